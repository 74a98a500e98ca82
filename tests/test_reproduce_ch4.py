"""`make reproduce-ch4 SIZE=smoke`, without the network."""

import json
import re
from pathlib import Path

import pytest
import torch
from triptych_common.testing import run_cli
from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.weights import write_network

ROOT = Path(__file__).parent.parent
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}


def reproduce(out: Path, generator: Path) -> str:
    options = ["--size", "smoke", "--out", out, "--claims", ROOT / "claims.toml"]
    options += ["--generator", generator, "--digit-generator", generator]
    done = run_cli("triptych_gangealing.cli", "reproduce", *map(str, options), env=OFFLINE, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Path:
    """One of random weights: what is tested is the way, not the result."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("generator") / "generator.safetensors"
    config = GeneratorConfig(32, channel_base=256, channel_max=16, z_dim=24, w_dim=24, mapping_layers=2)
    write_network(path, Generator(config), {})
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory, generator) -> Path:
    folder = tmp_path_factory.mktemp("ch4")
    assert f"wrote {folder / 'report.html'} (size smoke)" in reproduce(folder, generator)
    return folder


def test_report_is_self_contained_and_complete(out):
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page.replace("\n", " ")) == []
    for needed in (
        "PCK-Transfer on grey digits",
        "Congealing",
        "k-means",
        "Table 4.3",
        "67.2",
        "make reproduce-ch4 SIZE=smoke",
    ):
        assert needed in page


def test_results_are_strict_json_with_intervals(out):
    def refuse(constant):
        raise AssertionError(constant)

    results = json.loads((out / "results.json").read_text(), parse_constant=refuse)
    methods = {"none", "moments", "moments, upright", "Congealing", "GANgealing"}
    assert {kind: set(scores) for kind, scores in results["scores"].items()} == {"coloured": methods, "grey": methods}
    for score in results["scores"]["coloured"].values():
        found = score["pck"]["target box, per point, 0.1"]
        assert found["low"] <= found["value"] <= found["high"]
    assert results["clusters"]["clusters"] == 3
    assert set(results["ablations"]) == {"complete", "c fixed at the mean", "no style mixing", "no total variation"}
    assert results["commit"]


def test_repeating_trains_nothing_again_and_ends_the_same(out, generator):
    before = json.loads((out / "results.json").read_text())
    stamps = {path: path.stat().st_mtime_ns for path in (out / "smoke").rglob("*.safetensors")}
    assert len(stamps) > 6
    reproduce(out, generator)
    after = json.loads((out / "results.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    for name in ("scores", "clusters", "ablations", "training"):
        assert after[name] == before[name], name
