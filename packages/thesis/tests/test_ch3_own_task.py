"""A G.pt of a task of the user's own: two hidden layers, a metric where higher is better, and no prompts named."""

import json
import math

import pytest
from triptych_gpt import cli
from triptych_thesis import cli as thesis_cli
from triptych_thesis.chapter3.experiments.one_update import best_optimiser

TASK = """
import torch
from torch import nn

from triptych_gpt.tasks import Items, Metric, OptimizerSettings, cross_entropy, zero_one
from triptych_gpt.tasks.supervised import Score, SupervisedTask


def network():
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def spirals(part):
    rng = torch.Generator().manual_seed(0 if part == "train" else 1)
    labels = torch.arange(128) % 2
    radius = torch.rand(128, generator=rng)
    angle = 6 * radius + torch.pi * labels
    return Items(torch.stack([radius * angle.cos(), radius * angle.sin()], 1), labels)


def accuracy(outputs, targets):
    return 1 - zero_one(outputs, targets)


SPIRALS = SupervisedTask(
    name="spirals", network=network, data=spirals, epochs=4, batch_size=32,
    optimizer=OptimizerSettings("Adam", {"lr": 0.03}, schedule="constant"),
    scores=(Score(Metric("test_accuracy", "higher"), "test", accuracy), Score(Metric("test_loss", "lower"), "test", cross_entropy)),
)
"""

TRAIN = [
    "--width", "16", "--depth", "1", "--num-heads", "2", "--batch-size", "16", "--total-pairs", "160", "--warmup-pairs", "16",
    "--validation-every", "5", "--validation-networks", "2", "--validation-inference-steps", "2",
]  # fmt: skip
FEW = [
    "--num-inference-steps", "2", "--amounts.networks", "3", "--amounts.prompts", "3", "--amounts.baseline-networks", "2",
    "--amounts.optimizer-steps", "3", "--amounts.updates", "1", "--amounts.recursion-networks", "2", "--amounts.samples", "3",
    "--amounts.audit-samples", "3", "--amounts.neighbour-prompts", "2", "--amounts.sampler-steps", "1",
]  # fmt: skip


def own(folder):
    return ["--task", f"{folder / 'own.py'}:SPIRALS"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(TASK)
    collect = f"collect {folder / 'own.py'}:SPIRALS --runs 12 --cohort-runs 4 --split-every 3 --checkpoints 6"
    assert cli.run([*collect.split(), "--engine", "here", "--networks-at-once", "4", "--out", str(folder / "zoo")]) == 0
    assert cli.run(["train", "--zoo", str(folder / "zoo"), "--out", str(folder / "gpt"), *own(folder), *TRAIN]) == 0
    return folder


@pytest.fixture(scope="module")
def results(place):
    model = ["--model", str(place / "gpt"), "--zoo", str(place / "zoo"), "--out", str(place / "evaluation")]
    assert thesis_cli.run(["figures", *model, *own(place), *FEW]) == 0
    return {path.stem: json.loads(path.read_text())["result"] for path in (place / "evaluation").glob("[!.]*[!g].json")}


def test_it_is_validated_evaluated_and_audited(place, results):
    rows = [json.loads(line) for line in (place / "gpt" / "metrics.jsonl").read_text().splitlines()]
    assert any(math.isfinite(row.get("validation/alignment", math.nan)) for row in rows)
    assert results["audit"]["metric"] == "test_accuracy"
    assert results["fig-3.5"]["alignment"]["G.pt"]["better"] == "higher"


def test_prompts_fall_from_the_best_of_training(results):
    sweep = results["fig-3.5"]["sweeps"]["G.pt"]
    for prompts, start in zip(sweep["prompts"], sweep["start"]["test_accuracy"], strict=True):
        assert prompts[0] == pytest.approx(sweep["trained_best"]["test_accuracy"])
        assert prompts[-1] == pytest.approx(start)
        assert prompts == sorted(prompts, reverse=True)


def test_filters_are_said_to_be_none(place, results):
    assert "does not look at square images" in results["filters"]["none"]
    assert not list((place / "evaluation").glob("filters*.png"))


def test_the_best_optimiser_is_the_one_with_the_highest_where_higher_is_better(results):
    data = results["fig-3.3"]["figures"]["test_accuracy"]
    means = [method["mean"] for method in data["methods"] if method["kind"] == "optimiser"]
    assert best_optimiser(data)["mean"] == max(means)
    loss = results["fig-3.3"]["figures"]["test_loss"]
    assert best_optimiser(loss)["mean"] == min(m["mean"] for m in loss["methods"] if m["kind"] == "optimiser")
