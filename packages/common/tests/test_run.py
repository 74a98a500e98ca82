import json
import subprocess
import sys

import pytest
from triptych_common.storage.files import write_bytes, write_json
from triptych_common.storage.provenance import git_commit, provenance
from triptych_common.storage.run import RunDirectory, flatten


def test_a_second_process_is_refused_and_the_lock_dies_with_its_holder(tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom triptych_common.storage.run import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1]), {}):\n    print('in', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match="another process is using this run directory"), RunDirectory(tmp_path, {}):
            pass
    finally:
        holder.kill()
        holder.wait()
    with RunDirectory(tmp_path, {}):  # SIGKILL left no stale lock
        pass


def test_another_identity_is_refused_with_both_values(tmp_path):
    with RunDirectory(tmp_path, {"lr": 0.1, "model": {"depth": 2}}):
        pass
    with RunDirectory(tmp_path, {"lr": 0.1, "model": {"depth": 2}}):
        pass
    with (
        pytest.raises(ValueError, match=r"holds a run with model.depth=2 \(now 3\)"),
        RunDirectory(tmp_path, {"lr": 0.1, "model": {"depth": 3}}),
    ):
        pass


def test_config_records_what_made_the_run(tmp_path):
    with RunDirectory(tmp_path, {"seed": 3}):
        pass
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"] == {"seed": 3}
    assert {"command", "commit", "versions", "hardware"} <= config.keys()
    assert config["versions"]["torch"]


def test_metrics_survive_a_torn_row_and_refuse_nan(tmp_path):
    with RunDirectory(tmp_path, {}) as run:
        for step in (1, 2, 3):
            run.log({"step": step, "loss": 0.5})
        with run.metrics_path.open("a") as file:
            file.write('{"step": 4')
        assert [row["step"] for row in run.metrics()] == [1, 2, 3]
        run.truncate_metrics(2)
        assert [row["step"] for row in run.metrics()] == [1, 2]
        with pytest.raises(ValueError, match="JSON"):
            run.log({"step": 5, "loss": float("nan")})


def test_a_flipped_bit_in_metrics_is_told_once_wherever_it_is(tmp_path, capsys):
    with RunDirectory(tmp_path, {}) as run:
        for step in (1, 2, 3):
            run.log({"step": step, "loss": 0.5})
    whole = run.metrics_path.read_bytes()
    for place in (whole.index(b"0.5") + 2, whole.index(b"loss") + 1):  # a number, a name: still valid JSON
        run.metrics_path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with RunDirectory(tmp_path, {}) as again:
            assert len(again.metrics()) == 3
            assert "metrics.jsonl: changed since it was written" in capsys.readouterr().out
    run.metrics_path.write_bytes(whole)
    with RunDirectory(tmp_path, {}) as again:
        again.truncate_metrics(2)
        again.log({"step": 3, "loss": 0.25})
        again.log({"step": 4, "loss": 0.25})
    with again.metrics_path.open("a") as file:
        file.write('{"step": 5')  # torn behind the seal
    with RunDirectory(tmp_path, {}) as last:
        assert [row["step"] for row in last.metrics()] == [1, 2, 3, 4]
    assert "changed" not in capsys.readouterr().out
    last.metrics_path.unlink()
    with RunDirectory(tmp_path, {}) as without:
        without.truncate_metrics(3)
        assert "metrics.jsonl: lost" in capsys.readouterr().out
        without.log({"step": 4, "loss": 0.5})
        assert without.metrics() == [{"step": 4, "loss": 0.5}]


def test_tensorboard_events_are_written(tmp_path):
    pytest.importorskip("tensorboard")
    with RunDirectory(tmp_path, {}, tensorboard=True) as run:
        run.log({"step": 1, "loss": 0.5})
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_full_disk_while_logging_names_file_and_remedy(tmp_path):
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom triptych_common.storage.run import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1]), {}) as run:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "    try:\n        for step in range(100):\n            run.log({'step': step})\n"
        "    except OSError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert "metrics.jsonl: cannot be written" in done.stdout
    assert "then repeat" in done.stdout


def test_commands_are_quoted_as_typed(tmp_path):
    path = tmp_path / "show.py"
    path.write_text("from triptych_common.storage.provenance import command_line\nprint(command_line())\n")
    done = subprocess.run([sys.executable, path, "--out", "a b"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "show.py --out 'a b'"


def test_writes_leave_nothing_half_done_and_json_is_strict(tmp_path):
    write_json(tmp_path / "a" / "x.json", {"v": 1})
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {"v": 1}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a" / "x.json", {"v": float("inf")})
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.json"]


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written .* choose another --out"):
        write_bytes(tmp_path / "file" / "x", b"")
    with (
        pytest.raises(OSError, match=r"cannot be written .* choose another --out"),
        RunDirectory(tmp_path / "file", {}),
    ):
        pass


def test_flatten_joins_keys():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_provenance_names_commit_and_command():
    facts = provenance()
    assert facts["commit"] == git_commit()
    assert facts["command"]


def test_free_settings_may_differ_also_where_an_earlier_version_recorded_them(tmp_path):
    before = {"lr": 0.1, "log_every": 5, "early": 3, "model": {"depth": 2, "log_every": 5}}
    now, free = {"lr": 0.1, "early": 3, "model": {"depth": 2}}, {"log_every"}
    with RunDirectory(tmp_path, before):
        pass
    with RunDirectory(tmp_path, now, free=free):
        pass
    # Other options that are recorded only where they are set are compared still.
    for changed, message in (
        ({"early": None}, r"early=3 \(now None\)"),
        ({"model": {"depth": 3}}, r"depth=2 \(now 3\)"),
    ):
        with pytest.raises(ValueError, match=message), RunDirectory(tmp_path, {**now, **changed}, free=free):
            pass
    with pytest.raises(ValueError, match="log_every=5"), RunDirectory(tmp_path, now):
        pass


def test_a_setting_that_changed_is_recorded_beside_what_was(tmp_path):
    with RunDirectory(tmp_path, {"total_images": 10, "lr": 0.1}) as run:
        began = json.loads((tmp_path / "config.json").read_text())
        assert run.recorded("total_images") == 10
    with RunDirectory(tmp_path, {"total_images": 20, "lr": 0.1}, free={"total_images"}) as run:
        run.record("total_images", 20)
    began["config"]["total_images"] = 20
    now = json.loads((tmp_path / "config.json").read_text())
    assert now.pop("crc32") != began.pop("crc32")
    assert now == began


def test_a_setting_that_an_earlier_version_lacked_may_have_its_default(tmp_path):
    with RunDirectory(tmp_path, {"lr": 0.1}):
        pass
    with RunDirectory(tmp_path, {"lr": 0.1, "mirror": False}, defaults={"mirror": False, "lr": 0.5}):
        pass
    for now, message in (
        ({"lr": 0.1, "mirror": True}, r"mirror=None \(now True\)"),
        ({"lr": 0.5}, r"lr=0.1 \(now 0.5\)"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            RunDirectory(tmp_path, now, defaults={"mirror": False, "lr": 0.5}),
        ):
            pass


def test_a_flipped_bit_in_what_a_run_records_of_itself_is_told(tmp_path, capsys):
    with RunDirectory(tmp_path, {"seed": 3, "lr": 0.1}) as run:
        run.record("total", 1e-7)
    with RunDirectory(tmp_path, {"seed": 3, "lr": 0.1, "total": 1e-7}):
        assert capsys.readouterr().out == ""
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"commit"', '"com}it"'))
    with RunDirectory(tmp_path, {"seed": 3, "lr": 0.1, "total": 1e-7}):
        assert "config.json: changed since it was written" in capsys.readouterr().out
