"""`make reproduce-ch2 SIZE=smoke`, without the network."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from triptych_common.storage.run import flatten
from triptych_common.testing import assert_self_contained, strict_json
from triptych_thesis.study.claims import load_claims
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, UNDECIDED

ROOT = Path(__file__).parents[3]
EXPERIMENTS = {
    "gallery", "block-designs", "scaling", "compute", "guidance", "visual-scaling", "unet", "samplers",
}  # fmt: skip
METRICS = ("frechet", "spatial_frechet", "digit_score", "precision", "recall", "accuracy")
CLAIMS = {*(f"dit.fig-2.{i}" for i in (1, 2, 5, 6, 7, 8, 9, 10, 11)), "dit.table-2.2"}


@pytest.fixture(scope="module")
def out(tmp_path_factory, reproduce) -> Path:
    folder = tmp_path_factory.mktemp("ch2")
    reproduce(2, folder)
    return folder


def test_report_is_self_contained_and_complete(out):
    page = (out / "report.html").read_text()
    # first screen, gallery, figures, the same noise through every model
    assert_self_contained(page, pictures=2 + 5 + 8 + 1)
    results = json.loads((out / "results.json").read_text())
    titles = [load_claims(ROOT / "claims.toml")[claim].title for claim in results["claims"]]
    for needed in ("Fréchet distance", *titles, "make reproduce-ch2 SIZE=smoke", "SHA-256", "thesis"):
        assert needed in page
    assert str(out) not in page.replace(results["command"], "")
    for folder in (out, out / "smoke"):
        links = re.findall(r'href="([^"#]*)"', (folder / "report.html").read_text())
        assert len(links) > 90
        assert all((folder / unquote(link)).is_file() for link in links)
        names = [link.rsplit("/", 1)[1] for link in links]
        assert names.count("grid.png") == names.count("samples.npz") == names.count("scores.json")
    rows = {name: e.get("rows", []) for name, e in results["experiments"].items()}
    for name in EXPERIMENTS - {"gallery", "visual-scaling"}:
        assert f"<summary>Samples: {len({row['samples'] for row in rows[name]})} sets" in page
    assert "<summary>Samples: 2 sets" in page


def test_the_page_fits_every_screen(out, check_page):
    check_page(out / "report.html")


def test_results_are_strict_json_with_intervals_instruments_and_ids(out):
    results = strict_json((out / "results.json").read_text())
    experiments = results["experiments"]
    assert set(experiments) == EXPERIMENTS
    assert results["claims"].keys() == CLAIMS
    assert {row["verdict"] for row in results["claims"].values()} <= {CONFIRMED, REFUTED, UNDECIDED}
    gallery = experiments["gallery"]
    assert set(gallery["instruments"]) == {"mnist_features", "mnist_classifier"}
    for row in gallery["rows"].values():
        for metric in ("frechet", "kernel", "precision", "recall", "accuracy", "near_duplicates"):
            assert row[metric]["low"] <= row[metric]["value"] <= row[metric]["high"]
    assert gallery["rows"]["training digits"]["near_duplicates"]["value"] == 1.0
    for name in EXPERIMENTS - {"gallery", "visual-scaling"}:
        for row in experiments[name]["rows"]:
            assert (out / "smoke" / row["samples"]).exists()
            for metric in METRICS:
                assert row[metric]["low"] <= row[metric]["value"] <= row[metric]["high"]
    assert {row["channels"] for row in experiments["guidance"]["rows"]} == {"all", 3}
    for name in EXPERIMENTS:
        made = {"command": "triptych reproduce ch2 --size smoke --seed 0", "commit": results["commit"]}
        assert results["made"][name] == made
    assert results["seed"] == 0
    assert results["commit"]


def test_training_learned_something_even_here(out):
    rows = [json.loads(line) for line in (out / "smoke/models/B-2/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["mse"] < 0.3 * rows[0]["mse"]


def test_a_model_that_goes_on_is_the_shorter_run_on_its_way(out):
    """The main model's snapshot where the others end, against what its own rows say it had seen."""
    kept = sorted(path.stem for path in (out / "smoke/models/B-2/snapshots").iterdir())
    assert kept == ["images-000000640", "images-000001280"]


def test_repeating_does_not_train_or_sample_again_and_ends_the_same(out, tmp_path, reproduce):
    shutil.copytree(out, tmp_path / "again")
    before = json.loads((out / "results.json").read_text())
    smoke = tmp_path / "again/smoke"
    made = [*smoke.rglob("metrics.jsonl"), *smoke.rglob("samples.npz"), *smoke.rglob("scores.json")]
    assert len(made) > 40
    stamps = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in made}
    assert "to do" not in reproduce(2, tmp_path / "again").stdout
    after = json.loads((tmp_path / "again/results.json").read_text())
    found, expected = flatten(after["experiments"]), flatten(before["experiments"])
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # to rounding: linear algebra on many threads may differ in the last digit
        exact = not isinstance(value, float)
        assert found[name] == (value if exact else pytest.approx(value, rel=1e-5, abs=1e-3)), name
    # Byte for byte: the measured seconds of every step are among them.
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in made} == stamps


def test_pictures_open_and_have_ten_columns(out):
    from PIL import Image

    sizes = {path.stem: Image.open(path).size for path in (out / "smoke/figures").glob("*.png")}
    assert {"overview", "guided", "unguided", "over-training", "strip", "curve", "visual-scaling"} <= sizes.keys()
    assert sizes["guided"] == (2 * (10 * 34 + 2), 2 * (10 * 34 + 2))
    assert Image.open(out / "smoke/figures/overview.png").text.keys() == {"command", "seed", "commit"}
    assert sizes["strip"] == (2 * (10 * 34 + 2), 2 * (2 * 34 + 2))
    assert sizes["visual-scaling"] == (2 * (10 * 34 + 2), 2 * (4 * 34 + 2))  # four models
