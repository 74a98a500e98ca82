"""A smoke study of one experiment: killed at several moments it ends as if it had run through."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from triptych_common.storage.run import flatten
from triptych_common.testing import run_cli
from triptych_dit.sample import read_npz
from triptych_thesis.chapter2 import unet
from triptych_thesis.chapter2.sizes import Model
from triptych_thesis.chapter2.study import Chapter2

STUDY = ["reproduce", "ch2", "--size", "smoke", "--only", "unet", "--workers", "2", "--claims", "none"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    done = run_cli("triptych_thesis.cli", *STUDY, "--out", str(out), timeout=900)
    assert done.returncode == 0, done.stderr
    return out


def found(out: Path) -> dict:
    """Everything measured: the experiment's result, and every replicate of every score."""
    files = [out / "smoke/experiments/unet.json", *sorted((out / "smoke/samples").rglob("scores.json"))]
    contents = {str(path.relative_to(out)): flatten(json.loads(path.read_text())) for path in files}
    return {name: {k: v for k, v in content.items() if not k.startswith("made.")} for name, content in contents.items()}


def kill_when(out: Path, there: Callable[[], bool]) -> None:
    """Start the study and kill it, its workers left to themselves, once `there`."""
    command = [sys.executable, "-m", "triptych_thesis.cli", *STUDY, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not there():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_one_experiment_reports_on_itself_alone(whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["experiments"].keys() == {"unet"}
    assert {path.name for path in (whole / "smoke/models").iterdir()} == {"B-2", "U-Net-like-B-2", "S-2", "S-2-seed-+1"}
    assert results["claims"] == {}  # the other half of Figure 2.2 has not run
    page = (whole / "report.html").read_text()
    assert "Against a U-Net" in page
    assert "Block designs" not in page


def test_killed_three_times_it_ends_with_the_same_numbers(whole, tmp_path):
    smoke = tmp_path / "smoke"
    kill_when(tmp_path, lambda: any((smoke / "autoencoder/checkpoints").glob("step-0000003*")))
    kill_when(tmp_path, lambda: any((smoke / "models/U-Net-like-B-2/checkpoints").glob("step-0000001*")))
    kill_when(tmp_path, lambda: any((smoke / "samples").rglob("samples.npz")))
    trained = smoke / "models/B-2/metrics.jsonl"
    before = trained.read_bytes()
    done = run_cli("triptych_thesis.cli", *STUDY, "--out", str(tmp_path), timeout=900)
    assert done.returncode == 0, done.stderr
    assert trained.read_bytes() == before  # it was finished, and not trained again
    ours, expected = found(tmp_path), found(whole)
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        assert ours[name] == values, name


def test_another_number_of_workers_changes_nothing(whole, tmp_path):
    alone = [word if word != "2" else "1" for word in STUDY]
    done = run_cli("triptych_thesis.cli", *alone, "--out", str(tmp_path), timeout=900)
    assert done.returncode == 0, done.stderr
    assert found(tmp_path) == found(whole)


def test_the_unets_samples_resume_by_batches(whole, tmp_path, monkeypatch):
    context = Chapter2(out=whole, size="smoke", device="cpu").context()
    unit = context.sampling(context.after(Model("B/2", unet=True)))
    assert unit.done
    ours = replace(unit, config=replace(unit.config, out=tmp_path, batch_size=20))
    drawn, real = [], unet.sample_unet

    def cut_short(*args, first_index, **options):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(first_index)
        return real(*args, first_index=first_index, **options)

    monkeypatch.setattr(unet, "sample_unet", cut_short)
    with pytest.raises(KeyboardInterrupt):
        ours()
    assert not ours.drawn
    drawn[:1] = []
    ours()
    assert drawn == [20, 40]  # the first two stood
    (images, labels), (expected, expected_labels) = (read_npz(u.config.out / "samples.npz") for u in (ours, unit))
    assert labels.tolist() == expected_labels.tolist()
    assert (images.int() - expected.int()).abs().max() <= 1  # batches of 20 instead of one of 50
    assert (tmp_path / "grid.png").exists()
    assert not (tmp_path / "parts").exists()
