"""What a reproduction of chapter 4 makes of its numbers: aims, verdicts, the ledger, Table 4.3's rows, the thesis's commands."""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from triptych_common.testing import fails_with, run_here
from triptych_gangealing import cli
from triptych_gangealing.digits32 import render
from triptych_gangealing.keypoints.synthetic import posed_digits
from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.weights import write_network
from triptych_gangealing.train_config import PRESETS
from triptych_thesis.chapter4 import ablations, ledger
from triptych_thesis.chapter4.command import ReproduceConfig
from triptych_thesis.chapter4.paper import DATASETS, paper_runs
from triptych_thesis.chapter4.sizes import SIZES
from triptych_thesis.chapter4.targets import AT, CLUSTERS, OURS, Target, on_grey, targets
from triptych_thesis.study.claims import load_claims, record, record_results

ROOT = Path(__file__).parents[3]
command = partial(run_here, cli.run)


def near(value: float | int, margin: float = 0.01) -> dict[str, float]:
    return {"value": float(value), "low": value - margin, "high": value + margin}


def scored(pck: float, rotation: float | int, scale: float, shift: float | int, ratio: float) -> dict:
    pose = {"rotation_deg": near(rotation), "log_scale": near(scale), "shift_px": near(shift)}
    return {"pck": {AT: near(pck)}, "pose": pose, "own_pose": pose, "sharpness": {"ratio": near(ratio)}}


def results_of(ours: dict, purity: float = 0.6, **further: object) -> dict:
    scores = {
        "none": scored(0.2, 30, 0.2, 2, 0.4),
        "moments": scored(0.5, 20, 0.1, 1, 0.6),
        "moments, upright": scored(0.55, 18, 0.1, 1, 0.6),
        "Congealing": scored(0.6, 15, 0.12, 0.9, 0.65),
        OURS: ours,
    }
    clusters = {
        "clusters": 10,
        CLUSTERS: {"purity": near(purity)},
        "k-means, moments-aligned pixels": {"purity": near(0.49)},
    }
    return {"scores": {"coloured": scores, "grey": scores}, "clusters": clusters, **further}


# --- aims


def test_every_aim_is_met_by_what_is_better_everywhere():
    found = targets(results_of(scored(0.8, 10, 0.05, 0.5, 0.9)))
    assert [target.name for target in found] == ["pck", "rotation_deg", "log_scale", "shift_px", "sharpness", "purity"]
    assert all(target.met and target.line.startswith("Met: ") for target in found)
    for target, unit in zip(
        found, ("PCK@0.1", "degrees", "natural logarithm", "pixels of a 32", "gradient", "k-means"), strict=True
    ):
        assert unit in target.line
    for target in found[:4]:
        for baseline in ("no alignment", "moments", "moments kept upright", "classical Congealing"):
            assert baseline in target.line


@pytest.mark.parametrize(
    ("name", "ours", "purity", "said"),
    [
        ("pck", scored(0.615, 10, 0.05, 0.5, 0.9), 0.6, "not apart from classical Congealing"),
        ("pck", scored(0.5, 10, 0.05, 0.5, 0.9), 0.6,
         "worse than moments kept upright, classical Congealing; not apart from moments."),
        ("rotation_deg", scored(0.8, 16, 0.05, 0.5, 0.9), 0.6, "worse than classical Congealing."),
        ("log_scale", scored(0.8, 10, 0.1, 0.5, 0.9), 0.6, "not apart from moments, moments kept upright, classical Congealing."),
        ("shift_px", scored(0.8, 10, 0.05, 1.5, 0.9), 0.6, "worse than moments, moments kept upright, classical Congealing."),
        ("sharpness", scored(0.8, 10, 0.05, 0.5, 0.69), 0.6, "0.690"),
        ("purity", scored(0.8, 10, 0.05, 0.5, 0.9), 0.48, "The intervals overlap."),
    ],
)  # fmt: skip
def test_one_aim_is_missed_and_says_by_whom(name, ours, purity, said):
    found = targets(results_of(ours, purity))
    (missed,) = [target for target in found if not target.met]
    assert missed.name == name
    assert missed.line.startswith("Missed: ")
    assert said in missed.line


def test_clusters_are_named_by_what_made_them():
    (purity,) = [aim for aim in targets(results_of(scored(0.8, 10, 0.05, 0.5, 0.9))) if aim.name == "purity"]
    assert "k-means on a contrastive descriptor: 0.600" in purity.line
    assert "k-means on moments-aligned pixels: 0.490" in purity.line


def test_grey_digits_are_told_beside():
    line = on_grey(results_of(scored(0.8, 10, 0.05, 0.5, 0.9)))
    assert "0.800 [0.790, 0.810]" in line
    assert "classical Congealing 15.0" in line


def test_a_part_of_all_digits_has_each_of_them():
    """The data set is sorted by class: k-means fitted to its first quarter would know three digits."""
    few, more = posed_digits(30, 5, None, split="train"), posed_digits(70, 5, None, split="train")
    assert torch.equal(few.jitters.label, torch.arange(30) % 10)
    assert torch.equal(few.images, more.images[:30])
    assert torch.equal(more.images, render(more.digits, more.jitters))
    several = posed_digits(1_010, 5, None)  # of 1,000 held out
    assert torch.equal(several.digits[1_000:], several.digits[:10])
    assert not torch.equal(several.images[1_000:], several.images[:10])


# --- verdicts


def rows_of(**changed: float) -> dict:
    """Table 4.3 with the self-supervised distance, as the thesis has it, but for some rows."""
    found = {row: float(ablations.THESIS[row] or 67.2) / 100 for row in (*ablations.FIRST, *ablations.REST)}
    return {row: {"pck": {AT: near(value)}} for row, value in (found | changed).items()}


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        (rows_of(), "confirmed"),
        (rows_of(**{"c fixed at the mean": 0.6}), "refuted"),  # it does not collapse
        (rows_of(**{"no total variation": 0.1}), "refuted"),  # it should not
        (rows_of(**{"no style mixing": 0.335}), "undecided"),  # half, give or take
        ({row: found for row, found in rows_of().items() if row in ablations.FIRST}, "undecided"),  # not all were run
        ({row: found for row, found in rows_of(**{"c fixed at the mean": 0.6}).items() if row in ablations.FIRST}, "undecided"),
    ],
)  # fmt: skip
def test_table_4_3_is_what_its_rows_say(rows, verdict):
    found, interval = ledger.table(rows, 15_000, 15_000)
    assert found == verdict
    assert "15,000 images" in interval
    assert all(row in interval for row in rows)
    assert ("against the thesis" in interval) == bool(
        {0.6, 0.1} & {found["pck"][AT]["value"] for found in rows.values()}
    )
    assert ("; undecided for not run: " in interval) == (len(rows) < len(rows_of()))


@pytest.mark.parametrize("rows", [rows_of(), rows_of(**{"no total variation": 0.1})])
def test_rows_shorter_than_the_complete_method_decide_nothing(rows):
    verdict, interval = ledger.table(rows, 8_000, 48_000)
    assert verdict == "undecided"
    assert interval.endswith("; undecided for rows of 8,000 images, one seed, where the complete method takes 48,000")


@pytest.mark.parametrize(("met", "verdict"), [(4, "confirmed"), (1, "undecided"), (0, "refuted")])
def test_a_gallery_is_what_its_aims_say(met, verdict):
    names = ledger.AIMS["gangealing.fig-4.1"]
    aims = [Target(name, i < met, "numbers") for i, name in enumerate(names)]
    aims += [Target("pck", True, "numbers"), Target("purity", True, "numbers")]
    found = ledger.claims(
        {"size": "laptop", "seed": 3, "all": True, "ablations": rows_of(), "ablation_images": 1, "complete_images": 1},
        aims,
    )
    assert found["gangealing.fig-4.1"]["verdict"] == verdict
    assert found["gangealing.fig-4.3"]["verdict"] == "confirmed"
    assert found["gangealing.table-4.3"]["command"] == "triptych-gangealing reproduce --size laptop --all --seed 3"


# --- the ledger


@pytest.fixture
def copied(tmp_path) -> Path:
    path = tmp_path / "claims.toml"
    path.write_text((ROOT / "claims.toml").read_text())
    record(
        path, {"gangealing.table-4.3": {"verdict": "refuted", "size": "laptop", "interval": "x", "command": "make y"}}
    )
    return path


def written(folder: Path, size: str = "laptop") -> Path:
    row = {"verdict": "undecided", "size": size, "interval": 'a "quoted" 0.5 [0.4, 0.6] \\ more', "command": "make x"}
    path = folder / "results.json"
    path.write_text(json.dumps({"chapter": 4, "size": size, "claims": {"gangealing.table-4.3": row}}))
    return path


def test_a_verdict_enters_its_row_and_no_other(copied, tmp_path):
    before, text = load_claims(copied), copied.read_text().splitlines()
    record_results(written(tmp_path), copied, 4)
    after, new_text = load_claims(copied), copied.read_text().splitlines()
    assert [claim for claim in after if after[claim] != before[claim]] == ["gangealing.table-4.3"]
    assert after["gangealing.table-4.3"].interval == 'a "quoted" 0.5 [0.4, 0.6] \\ more'
    assert after["gangealing.table-4.3"].claim == before["gangealing.table-4.3"].claim
    assert len(new_text) == len(text)
    changed = {old.split(" = ")[0] for old, new in zip(text, new_text, strict=True) if old != new}
    assert changed == {"verdict", "interval", "command"}
    record_results(written(tmp_path), copied, 4)
    assert copied.read_text().splitlines() == new_text


def test_what_decides_nothing_stays_out(copied, tmp_path):
    before = copied.read_text()
    with pytest.raises(ValueError, match="decides no claim of chapter 4"):
        record_results(written(tmp_path, "smoke"), copied, 4)
    with pytest.raises(ValueError, match=r"has no claim 'gangealing\.fig-9'"):
        record(copied, {"gangealing.fig-9": {}})
    with pytest.raises(ValueError, match="expected one of not run"):
        record(copied, {"gangealing.fig-4.1": {"verdict": "yes", "size": "", "interval": "", "command": ""}})
    assert copied.read_text() == before


def test_the_ledger_has_every_claim_that_is_decided():
    assert {*ledger.AIMS, ledger.TABLE} <= load_claims(ROOT / "claims.toml").keys()


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
    assert set(TABLE) == set(ablations.THESIS) - {ablations.LEARNED}
    learned = ablations.ablation(ablations.LEARNED, PRESETS["cat-ssl"], num_ws=14, w_dim=512)
    assert learned == ablations.ablation("complete", PRESETS["cat-ssl"], num_ws=14, w_dim=512)
    for row, expected in TABLE.items():
        found = ablations.ablation(row, PRESETS["cat-ssl"], num_ws=14, w_dim=512, vgg=Path("vgg.pth"))
        assert (found.distance, found.cutoff, found.tv_weight, found.components) == expected, row
        assert (found.distance_weights is not None) == (found.distance == "lpips")
    with pytest.raises(ValueError, match="ablation 'more': expected one of complete; c learned from the mean; c fixed"):
        ablations.ablation("more", PRESETS["cat-ssl"], num_ws=14, w_dim=512)


def test_the_thesis_numbers_are_those_of_the_ledger():
    published = load_claims(ROOT / "claims.toml")["gangealing.table-4.3"].published
    assert sorted(re.findall(r"\d+\.\d+", published), key=float) == sorted(
        filter(None, ablations.THESIS.values()), key=float
    )


def test_rows_on_digits_keep_every_proportion(tmp_path):
    torch.manual_seed(0)
    shape = GeneratorConfig(32, channel_base=64, channel_max=4, z_dim=6, w_dim=6, mapping_layers=1)
    write_network(tmp_path / "g.safetensors", Generator(shape), {})
    config = ReproduceConfig(digit_generator=str(tmp_path / "g.safetensors"), lpips_weights=tmp_path / "vgg.pth")
    whole = SIZES["laptop"].one
    folders = set()
    for row in config.rows():
        short = config.ablation_config(row)
        share = short.total_images / whole.total_images
        assert 0.1 < share < 0.5
        for name in ("psi_images", "constant_images", "restart_images", "ema_half_life_images"):
            assert abs(getattr(short, name) - share * getattr(whole, name)) <= 0.5, name
        folders.add(short.out.name)
    assert len(folders) == len(config.rows()) == len(ablations.FIRST) + len(ablations.LPIPS)
    assert config.ablation_config("LPIPS, complete").tv_weight == 2.5 * whole.tv_weight
    assert config.ablation_config("LPIPS, no style mixing").cutoff == 8
    assert set(ReproduceConfig(all=True).rows()) == set(ablations.THESIS) - set(ablations.LPIPS)


# --- the thesis's size


def settings_of(line: str) -> dict:
    """What a documented torchrun line comes to."""
    words = shlex.split(line)
    assert words[:5] == ["torchrun", "--nproc-per-node", "8", "-m", "triptych_gangealing.cli"]
    done = command(*words[5:], "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_documented_lines_are_those_that_are_printed_and_parse():
    lines = re.findall(r"^torchrun .*$", (ROOT / "docs/chapter-4.md").read_text(), re.MULTILINE)
    assert lines == [run.command for run in paper_runs(ReproduceConfig(size="paper"))]
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
    config = ReproduceConfig(size="paper", all=True, datasets=("cat",), lpips_weights=Path("my vgg.pth"))
    runs = {run.name: run for run in paper_runs(config)}
    assert (
        len(runs) == 1 + len(ablations.THESIS) - 2
    )  # the data set cat is LPIPS's complete row; one is of digits alone
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
    done = command("reproduce", *words, "--datasets", "cat", "dog", "tv", "--json")
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
    dry = command("reproduce", *words, "--dry-run", "--json")
    assert len(json.loads(dry.stdout.splitlines()[-1])["runs"]) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "huge"], "size 'huge': expected one of smoke, laptop, gpu, paper"),
        (["--size", "paper", "--datasets", "cow"], "dataset 'cow': expected some of bicycle, cat"),
        (["--datasets", "cat"], "datasets cat: of size paper; pass --size paper"),
    ],
)
def test_what_there_is_not_is_one_line(options, message):
    fails_with(command("reproduce", *options, "--dry-run"), message, 2)
