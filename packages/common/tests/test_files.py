"""The reader of JSON against the standard library's, on what any file may hold: the right value, or one line."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triptych_common.fields import Checked, Ge, Gt, printable
from triptych_common.storage.files import PARTIAL, FileName, check, parse, read_json, rows, write_text
from typing_extensions import TypedDict


@dataclass(frozen=True)
class Inner(Checked):
    depth: Annotated[int, Gt(0)] = 2
    sizes: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Config(Checked):
    width: Annotated[int, Gt(0)] = 8
    inner: Inner = Inner()
    kind: Literal["a", "b"] = "a"
    path: Path | None = None
    rate: float = 0.5


class Row(TypedDict):
    step: Annotated[int, Ge(0)]
    loss: NotRequired[float]


def test_types_json_lacks_come_back():
    text = '{"width": 3, "inner": {"depth": 1, "sizes": [4, 5]}, "kind": "b", "path": "x/y", "rate": 2}'
    made = parse(text, Config, source="c", remedy="r")
    assert made == Config(3, Inner(1, (4, 5)), "b", Path("x/y"), 2.0)


@pytest.mark.parametrize(("text", "kind", "complaint"), [
    ('{"width": "3"}', Config, "c: width: '3': input should be a valid integer; r"),
    ('{"width": true}', Config, "c: width: True: input should be a valid integer; r"),
    ('{"width": 0}', Config, "c: width 0: expected a number above 0; r"),
    ('{"inner": {"depth": -1}}', Config, "c: inner.depth -1: expected a number above 0; r"),
    ('{"inner": {"sizes": [1, "x"]}}', Config, "c: inner.sizes.1: 'x': input should be a valid integer; r"),
    ('{"depth": 1}', Config, "c: depth: unknown; r"),
    ('{"kind": "c"}', Config, "c: kind: 'c': input should be 'a' or 'b'; r"),
    ("[]", Config, "c: content: []: input should be an object; r"),
    ('{"loss": 1}', Row, "c: step: missing; r"),
    ("{", Row, "c: not JSON (EOF while parsing an object at line 1 column 1); r"),
    ('"' + "x" * 999 + '"', Row, "c: content: '" + "x" * 59 + "...: input should be"),
    ('{"step": 1, "loss": NaN}', dict[str, int], "c: loss: nan: input should be"),
    ('{"step": 1, "loss": NaN}', Row, "c: NaN is no finite number; r"),
    ('{"step": 1, "loss": -Infinity}', Row, "c: -Infinity is no finite number; r"),
    ('{"step": 1, "loss": 1e999}', Row, "c: 1e999 is no finite number; r"),
    ('{"step": -1}', Row, "c: step -1: expected at least 0; r"),
    ('["../../x"]', list[FileName], "c: 0 '../../x': expected the name of a file in the same folder; r"),
    ('["a/b"]', list[FileName], "c: 0 'a/b': expected the name"),
    ('["..", "a"]', list[FileName], "c: 0 '..': expected the name"),
    (json.dumps(["x" * 250]), list[FileName], "c: 0 '" + "x" * 20),
    ('["a\\u0000b"]', list[FileName], "c: 0 "),
    ("[" * 100_000, list[Any], "c: not JSON (recursion limit exceeded"),
    (b'{"step": "\xff"}', Row, "c: not JSON"),
])  # fmt: skip
def test_damage_is_one_line_that_names_the_place(text, kind, complaint):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the whole message is compared)
        parse(text, kind, source="c", remedy="r")
    assert str(raised.value).startswith(complaint)
    assert "\n" not in str(raised.value)


def complaint_of(read):
    """The message of the error that a reader ends in; empty if it ends in none."""
    try:
        read()
    except ValueError as error:
        return str(error)
    return ""


@settings(deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8,
))  # fmt: skip
def test_any_json_is_read_as_the_standard_library_reads_it(value):
    text = json.dumps(value)
    assert parse(text, Any, source="c", remedy="r") == json.loads(text)
    for kind in (Config, Row):  # or refused in one line
        complaint = complaint_of(lambda kind=kind: check(value, kind, source="c", remedy="r"))
        assert complaint == printable(complaint)


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(content):
    complaint = complaint_of(lambda: parse(content, Config, source="c", remedy="r"))
    assert complaint == printable(complaint)


def test_files_are_bounded_and_regular(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json(path, remedy="r") == {"a": 1}
    with pytest.raises(ValueError, match="larger than the 4 bytes"):
        read_json(path, remedy="r", largest=4)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(ValueError, match="a pipe or device, expected a file"):
            read_json(tmp_path / name, remedy="r")
    with pytest.raises(ValueError, match="a folder, expected a file"):
        read_json(tmp_path, remedy="r")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none", remedy="r")


def test_rows_end_with_the_last_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n{"step": 3')
    assert list(rows(path, Row, remedy="r")) == [{"step": 1}, {"step": 2, "loss": 0.5}]
    path.write_text('{"step": 1}\n{"stop": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: step: missing; r"):
        list(rows(path, Row, remedy="r"))


def test_numbers_and_words_that_look_infinite_are_read():
    text = '{"step": 1, "digest": "1e999", "word": "NaN", "small": 1e-400, "large": 1e+300}'
    assert parse(text, dict[str, Any], source="c", remedy="r") == {
        "step": 1, "digest": "1e999", "word": "NaN", "small": 0.0, "large": 1e300,
    }  # fmt: skip


@pytest.mark.parametrize("lies", ["link", "pipe"])
def test_what_lies_at_the_temporary_name_is_not_written_to(tmp_path, lies):
    """Data that came with a link there would otherwise have a file of the user's written over."""
    path, precious = tmp_path / "a.json", tmp_path / "precious"
    precious.write_text("mine")
    partial = tmp_path / ("a.json" + PARTIAL)
    os.mkfifo(partial) if lies == "pipe" else partial.symlink_to(precious)
    write_text(path, "whole")
    assert (path.read_text(), path.is_symlink(), precious.read_text()) == ("whole", False, "mine")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json", "precious"]


def test_a_name_of_the_longest_length_can_be_written(tmp_path):
    path = tmp_path / ("x" * 251 + ".png")
    write_text(path, "whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]
