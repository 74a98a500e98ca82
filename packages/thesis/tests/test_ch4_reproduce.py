"""`make reproduce-ch4 SIZE=smoke`, without the network."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from shutil import copy

import pytest
import torch
from triptych_common.testing import assert_self_contained, strict_json
from triptych_gangealing.encoders.perceptual import Vgg16
from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.weights import write_network
from triptych_thesis.chapter4.experiments import alignment, clusters
from triptych_thesis.chapter4.sizes import FIRST_ROWS


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Path:
    """One of random weights: what is tested is the way, not the result."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("generator") / "generator.safetensors"
    config = GeneratorConfig(32, channel_base=256, channel_max=16, z_dim=24, w_dim=24, mapping_layers=2)
    write_network(path, Generator(config), {})
    return path


@pytest.fixture(scope="module")
def with_generator(generator) -> list[object]:
    return ["--generator", generator, "--digit-generator", generator]


@pytest.fixture(scope="module")
def out(tmp_path_factory, with_generator, reproduce) -> Path:
    """A finished study; `first` holds what it wrote before a test went on with it."""
    folder = tmp_path_factory.mktemp("ch4")
    reproduce(4, folder, *with_generator)
    (folder / "first").mkdir()
    for name in ("report.html", "results.json"):
        copy(folder / name, folder / "first")
    return folder


def test_report_is_self_contained_and_complete(out):
    page = (out / "first/report.html").read_text()
    assert_self_contained(page, pictures=5)
    for needed in (
        "PCK-Transfer, in target boxes, per point, grey digits",
        "Congealing",
        "k-means on a contrastive descriptor",
        "k-means, moments-aligned pixels",
        "resample digits, each with all its pairs",
        "Table 4.3",
        "67.2",
        "LPIPS, no style mixing: no VGG weights were given (--lpips-weights)",
        "cut-off one later (--all)",
        'id="gangealing.fig-4.3"',
        "make reproduce-ch4 SIZE=smoke",
    ):
        assert needed in page


def test_the_page_fits_every_screen(out, check_page):
    check_page(out / "first/report.html")


def test_results_are_strict_json_with_intervals(out):
    results = strict_json((out / "first/results.json").read_text())
    methods = {"none", "moments", "moments, upright", "Congealing", "GANgealing"}
    assert {kind: set(scores) for kind, scores in results["experiments"]["alignment"].items()} == {
        "coloured": methods,
        "grey": methods,
    }
    for score in results["experiments"]["alignment"]["coloured"].values():
        found = score["pck"]["target box, per point, 0.1"]
        assert found["low"] <= found["value"] <= found["high"]
    assert results["experiments"]["clusters"]["clusters"] == 3
    assert results["claims"]["gangealing.table-4.3"]["verdict"] == "undecided"
    assert set(results["experiments"]["ablations"]["rows"]) == set(FIRST_ROWS)
    assert results["commit"]


def test_the_first_screen_is_a_sentence_a_picture_and_the_verdicts(out):
    page, results = (out / "first/report.html").read_text(), json.loads((out / "first/results.json").read_text())
    first = page[page.index("<h1>") : page.index("<h2")]
    (headline,) = re.findall(r'<p class="headline">(.*?)</p>', first, re.DOTALL)
    assert headline.count(".") == 1
    assert first.count("<img") == 1
    table = first[first.index('<table id="verdicts"') : first.index("</table>")]
    claims = re.findall(r'<td class="mark (\w+)"', table)
    assert claims == [found["verdict"] for found in results["claims"].values()]
    assert list(results["claims"]) == ["gangealing.fig-4.1", "gangealing.fig-4.3", "gangealing.table-4.3"]
    aims = [
        aim for each in (alignment, clusters) for aim in each.verdicts(results["experiments"][each.EXPERIMENT.name])
    ]
    aims.sort(key=lambda aim: aim.claim)
    assert re.findall(r'<span class="mark (\w+)"', table) == [aim.verdict for aim in aims]
    assert len(aims) == 6
    text = re.sub(r"<[^>]+>", "", table)
    for aim in aims:
        shown = aim.evidence[0]
        assert f"{shown.ours}{'against ' * bool(shown.beside)}{shown.beside}" in text.replace("\n", "")


@pytest.mark.skipif(find_spec("lpips") is None, reason="LPIPS needs its package")
def test_repeating_trains_only_what_is_asked_for_besides(out, with_generator, reproduce, tmp_path):
    before = json.loads((out / "results.json").read_text())
    stamps = {path: path.stat().st_mtime_ns for path in (out / "smoke").rglob("*.safetensors")}
    assert len(stamps) > 6
    torch.manual_seed(1)
    torch.save(Vgg16().state_dict(), tmp_path / "vgg.pth")
    reproduce(4, out, *with_generator, "--lpips-weights", tmp_path / "vgg.pth")
    after = json.loads((out / "results.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert after["training"] == before["training"]
    for name in ("alignment", "clusters", "correspondence"):
        assert after["experiments"][name] == before["experiments"][name], name
        assert after["made"][name] == before["made"][name], name
    rows, rows_before = (results["experiments"]["ablations"]["rows"] for results in (after, before))
    assert set(rows) - set(rows_before) == {
        "LPIPS, complete", "LPIPS, lower total variation", "LPIPS, no style mixing",
    }  # fmt: skip
    assert all(rows[row] == found for row, found in rows_before.items())
    assert "no VGG weights" not in (out / "report.html").read_text()
