"""`make reproduce-ch2 SIZE=smoke`, without the network."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from triptych_common.run import flatten
from triptych_common.testing import run_cli

ROOT = Path(__file__).parent.parent
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ch2")
    options = ["--size", "smoke", "--out", str(folder), "--claims", str(ROOT / "claims.toml")]
    done = run_cli("triptych_dit.cli", "reproduce", *options, env=OFFLINE, timeout=900)
    assert done.returncode == 0, done.stderr
    assert f"wrote {folder / 'report.html'} (size smoke)" in done.stdout
    return folder


def test_report_is_self_contained_and_complete(out):
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page.replace("\n", " ")) == []
    for needed in (
        "Fréchet distance",
        "dit.fig-2.1",
        "dit.table-2.2",
        "make reproduce-ch2 SIZE=smoke",
        "SHA-256",
        "thesis",
    ):
        assert needed in page


def test_results_are_strict_json_with_intervals_instruments_and_ids(out):
    def refuse(constant):
        raise AssertionError(constant)

    results = json.loads((out / "results.json").read_text(), parse_constant=refuse)
    assert set(results["experiments"]) == {"dit.fig-2.1", "dit.table-2.2"}
    assert set(results["scores"]["instruments"]) == {"mnist_features", "mnist_classifier"}
    for row in results["scores"]["rows"].values():
        for metric in ("frechet", "kernel", "precision", "recall", "accuracy", "near_duplicates"):
            assert row[metric]["low"] <= row[metric]["value"] <= row[metric]["high"]
    assert results["scores"]["rows"]["training digits"]["near_duplicates"]["value"] == 1.0
    assert results["training"]["seed"] == 0
    assert results["commit"]


def test_training_learned_something_even_here(out):
    rows = [json.loads(line) for line in (out / "smoke/train/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["mse"] < 0.3 * rows[0]["mse"]


def test_repeating_does_not_train_or_sample_again_and_ends_the_same(out, tmp_path):
    shutil.copytree(out, tmp_path / "again")
    before = json.loads((out / "results.json").read_text())
    made = [tmp_path / "again/smoke" / name for name in ("train/metrics.jsonl", "samples-cfg-1.5/samples.npz")]
    stamps = [(path.read_bytes(), path.stat().st_mtime_ns) for path in made]
    options = ["--size", "smoke", "--out", str(tmp_path / "again")]
    done = run_cli("triptych_dit.cli", "reproduce", *options, env=OFFLINE, timeout=900)
    assert done.returncode == 0, done.stderr
    after = json.loads((tmp_path / "again/results.json").read_text())
    scores, expected = flatten(after["scores"]), flatten(before["scores"])
    assert scores.keys() == expected.keys()
    for name, value in expected.items():  # to rounding: linear algebra on many threads may differ in the last digit
        assert scores[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-3)), name
    # Byte for byte: the measured seconds of every step are among them.
    assert [path.read_bytes() for path in made] == [content for content, _ in stamps]
    assert made[1].stat().st_mtime_ns == stamps[1][1]


def test_pictures_open_and_have_ten_columns(out):
    from PIL import Image

    sizes = {path.stem: Image.open(path).size for path in (out / "smoke/figures").glob("*.png")}
    assert sizes.keys() == {"overview", "guided", "unguided", "over-training", "strip", "curve"}
    assert sizes["guided"] == (2 * (10 * 30 + 2), 2 * (10 * 30 + 2))
    assert Image.open(out / "smoke/figures/overview.png").text.keys() == {"command", "seed", "commit"}
    assert sizes["strip"] == (2 * (10 * 30 + 2), 2 * (2 * 30 + 2))


def test_make_knows_the_target():
    shown = subprocess.run(["make", "-n", "reproduce-ch2", "SIZE=smoke"], capture_output=True, text=True, cwd=ROOT)
    assert "triptych-dit reproduce --size smoke" in shown.stdout
