"""Where commands write: what was there stays, whatever is typed."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from triptych_common.cli import Command, CommonOptions, main
from triptych_common.storage.output import LOCK, MARK, claimed


@dataclass(frozen=True)
class Config(CommonOptions):
    """Write a file."""

    fail: bool = False
    """before anything is written"""


def write(config):
    if config.fail:
        raise ValueError("no luck")
    path = config.out if config.out.suffix else config.out / "grid.png"
    path.write_text("ours")
    return {"grid": path}


COMMANDS = {"draw": Command("", Config, write), "other": Command("", Config, write)}
COMMANDS["export"] = Command("", Config, write, writes="file")


def run(*words):
    return main("prog", COMMANDS, [str(word) for word in words])


def test_a_folder_is_made_marked_and_written_again(tmp_path):
    out = tmp_path / "a" / "b"
    assert run("draw", "--out", out) == 0
    assert json.loads((out / MARK).read_text()) == {"command": "prog draw"}
    (out / "grid.png").unlink()
    assert run("draw", "--out", out) == 0
    assert (out / "grid.png").read_text() == "ours"


def test_files_of_others_stay_unless_overwritten(tmp_path, capsys):
    (tmp_path / "grid.png").write_text("theirs")
    (tmp_path / "notes.txt").write_text("theirs")
    assert run("draw", "--out", tmp_path) == 1
    message = (
        f"error: out {tmp_path}: holds 2 files that prog draw did not write, such as grid.png; choose another --out"
    )
    assert capsys.readouterr().err.startswith(message)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("grid.png", "notes.txt"), "theirs"
    )
    assert run("draw", "--out", tmp_path, "--overwrite") == 0
    assert (tmp_path / "grid.png").read_text() == "ours"
    assert (tmp_path / "notes.txt").read_text() == "theirs"


def test_a_folder_of_another_command_is_refused(tmp_path, capsys):
    assert run("draw", "--out", tmp_path / "a") == 0
    assert run("other", "--out", tmp_path / "a") == 1
    assert 'holds what "prog draw" wrote' in capsys.readouterr().err


def test_hidden_files_do_not_count(tmp_path):
    (tmp_path / ".DS_Store").write_text("")
    assert run("draw", "--out", tmp_path) == 0


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_nothing(tmp_path, there):
    out = tmp_path / "a" / "b"
    if there:
        out.mkdir(parents=True)
    assert run("draw", "--out", out, "--fail") == 1
    assert out.exists() == there
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if there else [])


def test_a_file_is_no_folder(tmp_path, capsys):
    (tmp_path / "a").write_text("theirs")
    assert run("draw", "--out", tmp_path / "a") == 1
    assert "a file, expected a folder" in capsys.readouterr().err


def test_an_exported_file_is_replaced_only_on_demand(tmp_path, capsys):
    path = tmp_path / "model.pt"
    path.write_text("theirs")
    assert run("export", "--out", path) == 1
    assert "exists already" in capsys.readouterr().err
    assert path.read_text() == "theirs"
    assert run("export", "--out", path, "--overwrite") == 0
    assert path.read_text() == "ours"
    assert run("export", "--out", tmp_path / "new") == 0


def test_one_process_at_a_time(tmp_path):
    with (
        claimed(tmp_path, "prog draw"),
        pytest.raises(ValueError, match="another process is writing"),
        claimed(tmp_path, "prog draw"),
    ):
        pass
    assert not (tmp_path / LOCK).exists()


def test_runs_of_versions_without_marks_go_on(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "command": "prog draw --out x"}))
    assert run("draw", "--out", tmp_path) == 0
    for content in (
        '{"model_type": "unet"}',
        "[" * 9999,
        '{"command": "rm -rf"}',
        '{"command": "python -m http.server"}',
    ):
        folder = tmp_path / str(len(content))
        folder.mkdir()
        (folder / "config.json").write_text(content)
        assert run("draw", "--out", folder) == 1


def test_a_disk_that_refuses_is_one_line(capsys):
    assert run("draw", "--out", "/proc/nowhere") == 1
    assert "/proc/nowhere: cannot be written" in capsys.readouterr().err


def test_other_ranks_claim_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "RANK", "1")
    Path(tmp_path / "grid.png").write_text("the main rank's")
    assert run("draw", "--out", tmp_path) == 0
