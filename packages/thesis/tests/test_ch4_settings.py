"""Settings of chapter 4: rows of Table 4.3, the thesis's own runs, and what is refused."""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from triptych_common.testing import fails_with, run_here
from triptych_gangealing.cli import run as run_gangealing
from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.weights import write_network
from triptych_gangealing.train_config import PRESETS
from triptych_thesis import cli
from triptych_thesis.chapter4.paper import DATASETS
from triptych_thesis.chapter4.sizes import FIRST_ROWS, LEARNED, LPIPS_ROWS, SIZES, TABLE_4_3, ablation
from triptych_thesis.chapter4.study import Chapter4
from triptych_thesis.study.claims import load_claims

ROOT = Path(__file__).parents[3]
command = partial(run_here, cli.run)

# --- Table 4.3

TABLE = {  # distance, cut-off, weight of total variation, N: as printed
    "c fixed at the mean": ("ssl-vgg", 5, 1000, 0),
    "c unconstrained": ("ssl-vgg", 5, 1000, 512),
    "cut-off one earlier": ("ssl-vgg", 4, 1000, 1),
    "cut-off one later": ("ssl-vgg", 6, 1000, 1),
    "no style mixing": ("ssl-vgg", 14, 1000, 1),
    "LPIPS, no style mixing": ("lpips", 14, 1000, 1),
    "no total variation": ("ssl-vgg", 5, 0, 1),
    "LPIPS, lower total variation": ("lpips", 5, 1000, 1),
    "complete": ("ssl-vgg", 5, 1000, 1),
    "LPIPS, complete": ("lpips", 5, 2500, 1),
}


def test_rows_on_cats_are_those_of_the_thesis():
    assert set(TABLE) == set(TABLE_4_3) - {LEARNED}
    learned = ablation(LEARNED, PRESETS["cat-ssl"], num_ws=14, w_dim=512)
    assert learned == ablation("complete", PRESETS["cat-ssl"], num_ws=14, w_dim=512)
    for row, expected in TABLE.items():
        found = ablation(row, PRESETS["cat-ssl"], num_ws=14, w_dim=512, vgg=Path("vgg.pth"))
        assert (found.distance, found.cutoff, found.tv_weight, found.components) == expected, row
        assert (found.distance_weights is not None) == (found.distance == "lpips")
    with pytest.raises(ValueError, match="ablation 'more': expected one of complete; c learned from the mean; c fixed"):
        ablation("more", PRESETS["cat-ssl"], num_ws=14, w_dim=512)


def test_the_thesis_numbers_are_those_of_the_ledger():
    published = load_claims(ROOT / "claims.toml")["gangealing.table-4.3"].published
    assert sorted(re.findall(r"\d+\.\d+", published), key=float) == sorted(filter(None, TABLE_4_3.values()), key=float)


def test_rows_on_digits_keep_every_proportion(tmp_path):
    torch.manual_seed(0)
    shape = GeneratorConfig(32, channel_base=64, channel_max=4, z_dim=6, w_dim=6, mapping_layers=1)
    write_network(tmp_path / "g.safetensors", Generator(shape), {})
    study = Chapter4(digit_generator=str(tmp_path / "g.safetensors"), lpips_weights=tmp_path / "vgg.pth")
    context = study.context()
    whole = SIZES["laptop"].one
    folders = set()
    for row in context.wanted_rows:
        short = context.ablation_config(row)
        share = short.total_images / whole.total_images
        assert 0.1 < share < 0.5
        for name in ("psi_images", "constant_images", "restart_images", "ema_half_life_images"):
            assert abs(getattr(short, name) - share * getattr(whole, name)) <= 0.5, name
        folders.add(short.out.name)
    assert len(folders) == len(context.wanted_rows) == len(FIRST_ROWS) + len(LPIPS_ROWS)
    assert context.ablation_config("LPIPS, complete").tv_weight == 2.5 * whole.tv_weight
    assert context.ablation_config("LPIPS, no style mixing").cutoff == 8
    assert set(Chapter4(all=True).context().wanted_rows) == set(TABLE_4_3) - set(LPIPS_ROWS)


# --- the thesis's size


def settings_of(line: str) -> dict:
    """What a documented torchrun line comes to."""
    words = shlex.split(line)
    assert words[:5] == ["torchrun", "--nproc-per-node", "8", "-m", "triptych_gangealing.cli"]
    done = run_here(run_gangealing, *words[5:], "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_documented_lines_are_those_that_are_printed_and_parse():
    lines = re.findall(r"^torchrun .*$", (ROOT / "docs/chapter-4.md").read_text(), re.MULTILINE)
    assert lines == [run.command for run in Chapter4(size="paper").paper().runs()]
    expected = {  # padding, modes, directions, cut-off, mirror images: the released scripts'
        "bicycle": ("reflection", 1, 1, 5, False), "cat": ("border", 1, 1, 5, False), "dog": ("border", 1, 1, 5, False),
        "tv": ("reflection", 1, 1, 5, False), "celeba": ("border", 1, 512, 6, False), "cub": ("border", 1, 1, 5, False),
        "car": ("reflection", 4, 5, 6, True), "horse": ("reflection", 4, 1, 5, True),
    }  # fmt: skip
    assert tuple(expected) == DATASETS
    for line, (name, values) in zip(lines, expected.items(), strict=True):
        found = settings_of(line)
        config = found["config"]
        assert tuple(config[key] for key in ("padding", "clusters", "components", "cutoff", "flips")) == values, name
        assert (config["distance"], config["tv_weight"], config["batch_size"], config["input_size"]) == (
            "lpips",
            2500,
            40,
            128,
        )
        assert (config["generator"], config["out"]) == (f"generators/{name}.pkl", f"runs/ch4/paper/{name}")
        assert found["parameters"] >= 43_000_000


def test_every_row_of_table_4_3_has_its_line_too(tmp_path):
    config = Chapter4(size="paper", all=True, datasets=("cat",), lpips_weights=Path("my vgg.pth"))
    runs = {run.name: run for run in config.paper().runs()}
    assert len(runs) == 1 + len(TABLE_4_3) - 2  # the data set cat is LPIPS's complete row; one is of digits alone
    for name, run in runs.items():
        found = settings_of(run.command)["config"]
        row = "LPIPS, complete" if name == "cat" else name.removeprefix("Table 4.3, ")
        assert (found["distance"], found["cutoff"], found["tv_weight"], found["components"]) == TABLE[row]
        vgg = "my vgg.pth" if TABLE[row][0] == "lpips" else "generators/simclr_vgg_phase150.pt"
        assert found["distance_weights"] == vgg
    assert len({run.config.out for run in runs.values()}) == len(runs)


def test_size_paper_writes_commands_and_says_how_far_each_is(tmp_path):
    generators, out = tmp_path / "generators", tmp_path / "ch4"
    generators.mkdir()
    (generators / "dog.pt").write_bytes(b"")
    run = out / "paper" / "tv"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "images": 40000, "loss": 1.0, "distance": 0.25}\n')
    words = ["--size", "paper", "--out", out, "--generators", generators]
    done = command("reproduce", "ch4", *words, "--datasets", "cat", "dog", "tv", "--json")
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])["runs"]
    states = {name: found["state"] for name, found in runs.items()}
    assert states == {
        "cat": f"needs {generators / 'cat.pkl'}", "dog": "ready to train", "tv": "40,000 of 52,500,000 images",
    }  # fmt: skip
    assert f"--generator {generators / 'dog.pt'}" in runs["dog"]["command"]
    script, page = (out / "paper" / "commands.sh").read_text(), (out / "paper" / "report.html").read_text()
    for found in runs.values():
        assert found["command"] in script
        assert found["command"] in page
    assert "0 of 3 runs trained" in page
    assert "0.2500" in page
    dry = command("reproduce", "ch4", *words, "--dry-run", "--json")
    assert len(json.loads(dry.stdout.splitlines()[-1])["runs"]) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "paper", "--datasets", "cow"], "dataset 'cow': expected some of bicycle, cat"),
        (["--datasets", "cat"], "datasets cat: of size paper; pass --size paper"),
    ],
)
def test_what_there_is_not_is_one_line(options, message):
    fails_with(command("reproduce", "ch4", *options, "--dry-run"), message, 2)
