"""A slice of the fault matrix, and whether its judgement can fail; `make faults` runs all of it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fault_matrix.py")
_spec = importlib.util.spec_from_file_location("fault_matrix", SCRIPT)
matrix = importlib.util.module_from_spec(_spec)
sys.modules["fault_matrix"] = matrix  # for its dataclasses
_spec.loader.exec_module(matrix)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_slice(tmp_path):
    commands, faults = (
        ["dit encode", "train-gan"],
        ["SIGTERM", "SIGKILL", "flipped byte", "missing file", "two processes"],
    )
    words = ["--out", tmp_path, "--trials", "1", "--commands", *commands, "--faults", *faults]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["command", *commands]
    assert done.stdout.count("1 same") >= len(commands)


def test_differences_are_seen(tmp_path):
    for name, content in {"a.json": '{"loss": 1, "seconds": 2, "rows": [{"at": 1}, {"at": 2}]}', "b.bin": "x"}.items():
        (tmp_path / name).write_text(content)
    found = matrix.contents(tmp_path)
    reference = matrix.Reference(dict(found), varying={"a.json#.rows.at"}, seconds=1, growth=0, bytes=0)
    assert not reference.differences(found)
    assert not reference.differences(found | {"a.json#.seconds": 3, "a.json#.rows.0.at": 7})
    assert reference.differences(found | {"a.json#.loss": 2}) == ["a.json#.loss"]
    assert reference.differences({name: value for name, value in found.items() if name != "b.bin"}) == ["b.bin"]
    assert reference.differences(found | {"left.partial": b""}) == ["left.partial"]


@pytest.mark.parametrize(("errors", "status", "outcome"), [
    ("Traceback (most recent call last):\n", 1, "traceback"), ("terminate called without\n", -6, "traceback"),
    ("", 1, "no word"), ("error: a\n", 7, "wrong status"), ("error: a\n", 1, ""),
])  # fmt: skip
def test_indecent_ends_are_seen(errors, status, outcome, tmp_path):
    result = matrix.Trial("align", "SIGTERM", 0, "")
    bench = matrix.Bench("align", tmp_path, tmp_path, 0)
    assert bench.clean(matrix.Ended(status, "", errors, 1.0), result, (0, 1, -6)) == (not outcome)
    assert result.outcome == outcome
