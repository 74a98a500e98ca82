"""The gpt suites at tiny size: every job runs, and those that claim the same result give it."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.tasks import TASKS, Items

from benchmarks import learning
from benchmarks.runner import Job, Plan, run_suite
from benchmarks.suites import gpt_collect, gpt_gpu, gpt_pairs, gpt_policies
from benchmarks.suites.gpt_collect import CIFAR, MNIST, SIZES, jobs_of
from benchmarks.suites.gpt_storage import bytes_per_checkpoint, effect_of_bfloat16

CLASSES = torch.arange(96) % 10


def blobs(part):
    """Two blurred classes of digits in a few pixels: something that can be learned."""
    inputs = torch.randn(len(CLASSES), 784, generator=torch.Generator().manual_seed(len(part)))
    inputs[:, :10] += 4 * torch.nn.functional.one_hot(CLASSES, 10)
    return Items(inputs, CLASSES)


def few_digits(epochs):
    return replace(TASKS[MNIST], data=blobs, epochs=epochs, batch_size=32)


def little_noise(epochs):
    def data(part):
        rng = torch.Generator().manual_seed(0)
        return Items(torch.randn(24, 3, 32, 32, generator=rng), torch.randint(10, (24,), generator=rng))

    return replace(TASKS[CIFAR], data=data, epochs=epochs, batch_size=8)


TINY = {
    MNIST: replace(SIZES[MNIST], task=few_digits, networks=4, few=2, at_once=3, epochs=2, checkpoints=3),
    CIFAR: replace(SIZES[CIFAR], task=little_noise, networks=3, few=1, at_once=2),
}


@pytest.mark.parametrize("name", TINY)
def test_eager_vmap_and_ours_train_and_score_alike(name):
    result = run_suite(name, list(jobs_of(name, TINY[name])), Plan(1, 2))
    assert result["failed"] == {}
    rows = {row["name"]: row for row in result["jobs"]}
    assert len(rows) == 12
    assert sum("difference" in row for row in rows.values()) == 8
    assert all(row["difference"] < 1e-5 for row in rows.values() if "difference" in row)
    mine, theirs = rows[f"{name}, whole: ours"], rows[f"{name}, whole: eager"]
    per_item = mine["repeats"][0] / mine["items"] / (theirs["repeats"][0] / theirs["items"])
    ratio = mine["times_as_long"][theirs["name"]]
    assert ratio["min"] <= per_item * (1 + 1e-9)
    assert ratio["max"] >= per_item * (1 - 1e-9)


def test_other_weights_would_be_noticed():
    eager, vmapped, _ = list(jobs_of(MNIST, TINY[MNIST]))[:3]
    otherwise = replace(vmapped, prepare=lambda seed: vmapped.prepare(seed + 1))
    assert list(run_suite("toy", [eager, otherwise], Plan(1, 2))["failed"]) == [vmapped.name]


@pytest.mark.parametrize(("name", "test_items", "steps_per_epoch"), [(MNIST, 1000, 31), (CIFAR, 10_000, 390)])
def test_a_step_of_a_shortened_run_bears_its_share_of_scoring(name, test_items, steps_per_epoch):
    """Items scored for each step: a whole run has 200 checkpoints, scored on all test and 500 training items."""
    size, released = SIZES[name], TASKS[name]
    task = size.task(size.epochs)
    here = size.checkpoints * (len(task.items["test"].inputs) + task.scored_train_items) / task.steps
    there = 200 * (test_items + released.scored_train_items) / (released.epochs * steps_per_epoch)
    assert here == pytest.approx(there, rel=0.02)


@pytest.mark.skipif(not find_spec("lmdb"), reason="no lmdb")
def test_pairs_are_those_that_lmdb_gives(monkeypatch):
    monkeypatch.setattr(gpt_pairs, "RUNS", 4)
    monkeypatch.setattr(gpt_pairs, "COHORT_RUNS", 2)
    monkeypatch.setattr(gpt_pairs, "CHECKPOINTS", 5)
    monkeypatch.setattr(gpt_pairs, "BATCH", 16)
    monkeypatch.setattr(gpt_pairs, "LAYOUT", ParameterLayout({"weight": (3, 4), "bias": (3,)}))
    result = run_suite("gpt_pairs", gpt_pairs.jobs(), Plan(1, 2))
    assert result["failed"] == {}
    assert [row["difference"] for row in result["jobs"] if "difference" in row] == [0.0] * 5 * len(gpt_pairs.SAMPLINGS)
    held = gpt_pairs.stored(gpt_pairs.write_lmdb, gpt_pairs.Environments, 0)
    lmdb = gpt_pairs.LmdbPairs(held.opened, "thesis", 0)
    zoo = gpt_pairs.stored(gpt_pairs.write_zoo, gpt_pairs.Zoo, 0, "bfloat16")
    batch, (*theta, metrics) = gpt_pairs.Pairs(zoo.opened).draw(range(16)), lmdb.draw(range(16))
    assert torch.equal(torch.stack(theta), torch.stack(batch[:2]))
    assert torch.equal(metrics[:, 0, 1], batch.metrics["test_error"])
    assert torch.equal(metrics[:, 1, 0], batch.metrics_star["test_loss"])


def test_without_lmdb_its_jobs_are_skipped_with_a_reason(monkeypatch):
    monkeypatch.setattr(gpt_pairs, "find_spec", lambda name: None)
    skipped = {job.name for job in gpt_pairs.jobs() if job.skip}
    assert skipped == {job.name for job in gpt_pairs.jobs() if "LMDB" in job.name}
    assert len(skipped) == 2 * len(gpt_pairs.SAMPLINGS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_its_suite_is_skipped_and_not_absent():
    assert len(gpt_gpu.jobs()) == 9
    assert all(isinstance(job, Job) and "no GPU" in job.skip for job in gpt_gpu.jobs())


def test_suites_need_no_download():
    assert {type(size.task(1).items["train"]) for size in gpt_collect.SIZES.values()} == {Items}


@pytest.mark.skipif(not find_spec("lmdb"), reason="no lmdb")
def test_shards_take_the_bytes_of_their_numbers_and_lmdb_rounds_up_to_pages():
    found = bytes_per_checkpoint(ParameterLayout({"theta": (1250,)}), 2, 100)
    assert 5000 < found["float32"] < 1.03 * 5000
    assert 2500 < found["bfloat16"] < 1.06 * 2500
    assert found["LMDB"] > 8192


def test_bfloat16_hardly_changes_metrics():
    """Rounding moves each weight by 1/512 of itself at most: losses by about a hundredth, errors by an item or two."""
    found = effect_of_bfloat16(few_digits(8), 4, 6)
    print(found)
    for name, bound in (("test_loss", 0.02), ("train_loss", 0.02), ("test_error", 3 / 96)):
        assert found[name]["mean"] > 0
        assert found[name]["largest_absolute_change"] < bound
    assert found["test_loss"]["mean_absolute_change"] > 0


def test_policies_are_stepped_updated_and_scored():
    jobs = gpt_policies.jobs_of(gpt_policies.Size(policies=2, environments=8, small=4, steps=4))
    result = run_suite("toy", list(jobs), Plan(1, 2))
    assert result["failed"] == {}
    assert len(result["jobs"]) + len(result["skipped"]) == 16
    rows = {row["name"]: row for row in result["jobs"]}
    assert rows["stepping: policies"]["items"] == 2 * 8 * 4
    assert rows["updates, cartpole_small: 4 policies"]["times_as_long"]


def test_learning_curves_are_of_the_policies_as_they_are_scored():
    pytest.importorskip("stable_baselines3")
    small = replace(learning.AS_THEIRS, episodes=2, ppo=replace(learning.AS_THEIRS.ppo, environments=4, iterations=4))
    result = learning.measured(small, small, seeds=2, every=2)
    assert result["iterations"] == [0, 2, 4]
    assert {name: np.shape(curves) for name, curves in result["returns"].items()} == dict.fromkeys(
        ("ours", "ours, as theirs", "stable-baselines3"), (2, 3)
    )
    assert result["returns"]["ours"] == result["returns"]["ours, as theirs"]
    untrained = small.evaluate(small.initial(0, range(2)))["return"].tolist()
    assert [curve[0] for curve in result["returns"]["ours"]] == pytest.approx(untrained, rel=1e-5)
    assert learning.table({**result, "returns": {"a": [[1, 2, 3], [3, 4, 9]]}})[2] == "| 0 | 2 [2, 2] |"
    assert learning.figure(result).startswith(b"\x89PNG")
