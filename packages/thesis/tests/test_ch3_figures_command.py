"""`triptych figures` of a model of a few steps: what it writes, that it resumes, and what it refuses."""

import contextlib
import io
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from triptych_common import testing
from triptych_common.storage import checkpoint
from triptych_common.testing import run_cli, run_here, strict_json
from triptych_gpt import SamplerSettings, Zoo, load
from triptych_gpt.model import FILE_NAME, write_model
from triptych_gpt.train import train
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.zoo.collect import collect
from triptych_gpt.zoo.collect_config import CollectConfig
from triptych_thesis import cli
from triptych_thesis.chapter3.figures import offered
from triptych_thesis.study.verdicts import VERDICTS

pytestmark = pytest.mark.filterwarnings("ignore:tokens of up to")

FEW = [
    "--num-inference-steps", "2", "--amounts.networks", "3", "--amounts.prompts", "3", "--amounts.baseline-networks", "2",
    "--amounts.optimizer-steps", "4", "--amounts.updates", "2", "--amounts.recursion-networks", "2", "--amounts.samples", "3",
    "--amounts.audit-samples", "4", "--amounts.neighbour-prompts", "2", "--amounts.sampler-steps", "1", "2",
]  # fmt: skip


command = partial(run_here, cli.run)


fails_with = partial(testing.fails_with, quiet=("verifying", "warning: tokens of"))


def zoo_of(folder: Path, **options: object) -> Path:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        collect(CollectConfig(**{"task": "mnist_mlp_14", "runs": 12, "epochs": 1, "checkpoints": 5, "cohort_runs": 4,
                                 "split_every": 3, "engine": "here", "networks_at_once": 4, **options}, out=folder))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A zoo, and a model trained on it."""
    folder = tmp_path_factory.mktemp("place")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        train(GptTrainConfig(zoo=zoo_of(folder / "zoo"), out=folder / "gpt", width=16, depth=1, num_heads=2, batch_size=32,
                             total_pairs=640, warmup_pairs=64, lr=1e-2, validation_every=0))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def evaluated(place) -> Path:
    """Every experiment, by the command in a process of its own."""
    options = ["--model", "gpt", "--zoo", "zoo", "--out", "all", *FEW, "--json"]
    done = run_cli("triptych_thesis.cli", "figures", *options, cwd=place)
    assert done.returncode == 0, done.stderr
    claims = strict_json(done.stdout)["claims"]
    assert claims.keys() == {f"gpt.fig-3.{number}" for number in (3, 4, 5, 6, 8, 9)}
    assert set(claims.values()) <= set(VERDICTS)
    assert all(f"{claim}: {verdict} (" in done.stderr for claim, verdict in claims.items())
    assert "R² between prompted and achieved test loss" in done.stderr
    return place / "all"


def evaluate(place: Path, out: Path, *options: object) -> subprocess.CompletedProcess:
    return command("figures", "--model", place / "gpt", "--zoo", place / "zoo", "--out", out, *FEW, *options)


def test_every_experiment_leaves_strict_json_and_its_figures(evaluated):
    assert {path.stem for path in evaluated.glob("[!.]*.json")} == {*offered(), "config"}
    for name in offered():
        written = strict_json((evaluated / f"{name}.json").read_text())
        assert written["experiment"] == name
        assert written["result"]
        assert written["made"]["commit"]
        if name == "film":
            assert written["result"] == {"none": "networks of mnist_mlp_14 balance no pole"}
            continue
        pictures = list(evaluated.glob(f"{name}*.png"))
        assert pictures, name
        assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_results_are_those_of_the_model_and_the_zoo(evaluated, place):
    """Numbers that can be had another way."""
    zoo, gpt = Zoo(place / "zoo"), load(place / "gpt")
    losses, test = zoo.metrics("test_loss"), torch.from_numpy(zoo.runs_in("test"))
    step = strict_json((evaluated / "fig-3.3.json").read_text())["result"]
    shown = step["figures"]["test_loss"]
    assert shown["start"] == pytest.approx(float(losses[test[:2], 0].mean()), rel=1e-5)
    assert shown["trained_best"] == pytest.approx(float(losses[zoo.runs_in("train")].min()))
    methods = {method["name"]: method["mean"] for method in shown["methods"]}
    assert methods["identity"] == pytest.approx(shown["start"], rel=1e-5)
    theta = zoo.theta(test[:2], [0, 0])
    asked = torch.full((2,), step["prompt"])
    new = gpt.sample(theta, losses[test[:2], 0], asked, settings=SamplerSettings(num_inference_steps=2))
    assert methods["G.pt"] == pytest.approx(float(gpt.task.evaluate(new)["test_loss"].mean()), rel=1e-4)
    audit = strict_json((evaluated / "audit.json").read_text())["result"]
    groups = {group["name"]: group for group in audit["groups"]}
    assert groups["samples"]["networks"] == 4
    assert groups["retrieval"]["median_distance"]["value"] == pytest.approx(0, abs=1e-3)


def test_repeating_does_what_is_missing_only(evaluated, place):
    (evaluated / "filters.json").unlink()
    (evaluated / "filters.png").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in evaluated.glob("[!.]*.json")}
    done = evaluate(place, evaluated)
    assert done.returncode == 0, done.stderr
    after = {path.name: path.stat().st_mtime_ns for path in evaluated.glob("[!.]*.json")}
    assert after.pop("filters.json")
    assert after == before
    assert (evaluated / "filters.png").exists()
    fails_with(evaluate(place, evaluated, "--seed", "1"), "seed=0 (now 1)")


def test_another_models_results_are_not_taken_for_this_ones(place, tmp_path):
    assert evaluate(place, tmp_path / "out", "--experiments", "filters").returncode == 0
    other = tmp_path / "gpt"
    tensors, facts = checkpoint.read(place / "gpt" / FILE_NAME)
    spoiled = {name: value * 1.01 for name, value in tensors.items()}
    write_model(other / FILE_NAME, load(place / "gpt").model.config, spoiled, facts)
    done = command("figures", "--model", other, "--zoo", place / "zoo", "--out", tmp_path / "out", *FEW,
                   "--experiments", "filters")  # fmt: skip
    fails_with(done, "holds a run with weights=")


@pytest.mark.parametrize(("options", "status", "message"), [
    (["figures", "--experiments", "fig-3.3", "fig-9.9"], 2, "experiments fig-9.9: expected some of fig-3.5, film, fig-3.3"),
    (["figures", "--amounts.networks", "0"], 2, "networks 0: expected at least 1"),
    (["figures", "--amounts.sampler-steps", "0"], 2, "expected numbers of 1..1000"),
    (["figures", "--num-inference-steps", "0"], 2, "num_inference_steps 0: expected 1..1000"),
    (["figures", "--amounts.networks", "99", "--experiments", "fig-3.5"], 1, "99 networks of test runs: "),
    (["figures", "--model", "nowhere"], 1, "nowhere: no such"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(place, tmp_path, monkeypatch, options, status, message):
    monkeypatch.chdir(tmp_path)
    few = ["--num-inference-steps", "2"]
    given = ["--model", place / "gpt", "--zoo", place / "zoo"]
    fails_with(command(options[0], *given, *few, *options[1:]), message, status)


def test_a_model_whose_updates_are_not_finite_is_reported_in_words(place, tmp_path):
    tensors, facts = checkpoint.read(place / "gpt" / FILE_NAME)
    wild = {name: torch.full_like(value, 3e38) if "norm_out" in name else value for name, value in tensors.items()}
    write_model(tmp_path / "gpt" / FILE_NAME, load(place / "gpt").model.config, wild, facts)
    options = ["--model", tmp_path / "gpt", "--zoo", place / "zoo"]
    nothing_to_show = {"fig-3.8": "0 networks that span no plane", "audit": "none of 4 updates is finite"}
    some = [name for name in offered() if name not in nothing_to_show]
    done = command("figures", *options, *FEW, "--out", tmp_path / "out", "--experiments", *some)
    assert done.returncode == 0, done.stderr
    assert "G.pt" not in done.stderr
    for name in some:
        strict_json((tmp_path / "out" / f"{name}.json").read_text())
    for name, message in nothing_to_show.items():
        fails_with(command("figures", *options, *FEW, "--out", tmp_path / "out", "--experiments", name), message)


def test_without_training_runs_facts_a_model_is_still_evaluated(place, tmp_path):
    """A converted model's file does not say what it was trained on."""
    tensors, facts = checkpoint.read(place / "gpt" / FILE_NAME)
    del facts["zoo"]
    write_model(tmp_path / "gpt" / FILE_NAME, load(place / "gpt").model.config, tensors, facts)
    options = ["--model", tmp_path / "gpt", "--zoo", place / "zoo", "--out", tmp_path / "out"]
    assert command("figures", *options, *FEW, "--experiments", "filters").returncode == 0
