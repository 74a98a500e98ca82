"""Readers on damaged files: the content, or one line of ValueError or OSError, whatever byte or value is wrong.

`make fuzz` runs a campaign of many more, and of those that are too slow for here.
"""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
fuzz = importlib.util.module_from_spec(_spec)
sys.modules["fuzz"] = fuzz  # where dataclasses look up their module
_spec.loader.exec_module(fuzz)
doors = fuzz.beside("doors")
CASES = 40
SLOW = ("hub parquet", "reference", "lmdb")  # seconds to import, or to read


@pytest.mark.parametrize("name", [name for name in doors.DOORS if name not in SLOW])
def test_damaged_files_are_read_or_refused_in_one_line(name, tmp_path):
    door = doors.DOORS[name]
    path = door.make(tmp_path)
    assert doors.complaint(door, tmp_path, path) is None
    others = doors.files_in(tmp_path)
    found = [fuzz.one(door, tmp_path, path, f"{name}/{i}", others) for i in range(round(CASES * door.share) + 4)]
    assert set(found) <= {"refused", "accepted"}
    assert "refused" in found
    assert doors.complaint(door, tmp_path, path) is None, "the file was not restored"


def test_a_fault_is_found_and_the_case_repeats(tmp_path):
    def read(path: Path) -> None:
        if path.read_bytes() != b"0123456789" * 10:
            raise TypeError("a reader that is wrong")

    def make(folder: Path) -> Path:
        (folder / "a.txt").write_bytes(b"0123456789" * 10)
        return folder / "a.txt"

    door = doors.Door(make, read)
    path = make(tmp_path)
    outcomes = [[fuzz.one(door, tmp_path, path, str(i), []) for i in range(20)] for _ in range(2)]
    assert outcomes[0] == outcomes[1]
    assert "TypeError: a reader that is wrong" in outcomes[0]
    assert path.read_bytes() == b"0123456789" * 10


def test_values_change_anywhere_in_a_tree():
    tree = {"a": [1, {"b": 2}], "c": "x"}
    changed = [doors.altered(tree, random.Random(i)) for i in range(200)]
    assert tree == {"a": [1, {"b": 2}], "c": "x"}
    assert any(isinstance(each, dict) and each.get("c") != "x" for each in changed)
    assert any(
        isinstance(each, dict) and each.get("a") in ([1], [1, 0], [1, {"b": None}], [1, {"b": ""}]) for each in changed
    )


def test_a_campaign_resumes_and_adds_up(tmp_path, monkeypatch):
    ran = []

    def part(name, row, stop, *rest):
        ran.append((name, row.cases, stop))
        row.refused += stop - row.cases
        row.cases = stop

    monkeypatch.setattr(fuzz, "_part", part)
    first = fuzz.campaign(1000, 0, tmp_path / "state.json")
    assert sum(row.cases for row in first.values()) == 1000
    started = len(ran)
    assert fuzz.campaign(1000, 0, tmp_path / "state.json") == first
    assert len(ran) == started
    assert "| all | 1,000 | 1,000 | 0 | 0 |" in fuzz.table(first)
