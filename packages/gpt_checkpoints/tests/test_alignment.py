"""Prompt alignment against scikit-learn, known values of known updates, and independence of batches."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import nn
from triptych_common.randomness import normal
from triptych_gpt.evaluation.alignment import (
    Sweep,
    alignment_of,
    prompt_alignment,
    prompt_sweep,
    quality_against_steps,
    r_squared,
    swept,
    trained_best,
)
from triptych_gpt.evaluation.prompted import with_prompts
from triptych_gpt.evaluation.records import plain
from triptych_gpt.symmetry.derivation import derive
from triptych_gpt.tasks.task import Metric, Prompts, Task
from triptych_gpt.zoo.zoo import Zoo

NETWORK = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
SIZE, MERIT = Metric("size", "lower", Prompts(0.0, 0.0, 0.9)), Metric("merit", "higher")


class Sizes(Task):
    """Scores networks by the mean square of their weights, and by 5 less that."""

    name, metrics, initialisers, steps = "sizes", (SIZE, MERIT), ("default", "other"), 1
    symmetry = derive(NETWORK)
    layout = symmetry.layout

    def evaluate(self, theta):
        size = theta.square().mean(1)
        return {"size": size, "merit": 5 - size}


TASK = Sizes()


def networks(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, TASK.layout.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def identity(theta, metric, target, indices):
    return theta


def obedient(theta, metric, target, indices):
    """Scales a network to the prompted size."""
    return theta * (target / theta.square().mean(1)).sqrt()[:, None]


def noisy(theta, metric, target, indices):
    return obedient(theta, metric, target, indices) + 0.3 * normal(1, "noisy", indices, theta.shape[1:]).to(theta)


def test_an_update_that_achieves_every_prompt_scores_one():
    found = prompt_alignment(obedient, TASK, SIZE, networks(5))
    assert found.r2.value == pytest.approx(1, abs=1e-12)
    assert found.r2.low == pytest.approx(1, abs=1e-12)
    assert found.spearman == pytest.approx(1)
    assert found.mean_gap < 1e-12
    assert (found.networks, found.prompts, found.non_finite) == (5, 20, 0)
    start = TASK.evaluate(networks(5))["size"]
    assert found.prompt_range == pytest.approx((0, 0.9 * float(start.max())))


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, -2.714), (0.9, -4.055)])
def test_the_identity_scores_as_the_thesis_has_it(fraction, expected):
    found = prompt_alignment(identity, TASK, replace(SIZE, prompts=Prompts(0.0, 0.0, fraction)), networks(4))
    assert found.r2.value == pytest.approx(expected, abs=1e-3)
    assert found.r2_each == pytest.approx([expected] * 4, abs=1e-3)
    assert found.spearman == 0


def test_r_squared_equals_scikit_learns():
    sweep = prompt_sweep(noisy, TASK, SIZE, networks(6))
    achieved = sweep.achieved["size"]
    expected = [r2_score(asked, got) for asked, got in zip(sweep.prompts, achieved, strict=True)]
    found = alignment_of(sweep)
    assert found.r2_each == pytest.approx(expected, rel=1e-9)
    assert found.r2.value == pytest.approx(sum(expected) / 6)
    assert found.r2.low < found.r2.value < found.r2.high
    assert found.mean_gap == pytest.approx(float((achieved - sweep.prompts).abs().mean()))
    assert found.achieved_at_best.value == pytest.approx(float(achieved[:, 0].mean()))


def test_spearman_equals_scipys():
    from scipy.stats import spearmanr

    sweep = prompt_sweep(noisy, TASK, SIZE, networks(6))
    pairs = zip(sweep.prompts, sweep.achieved["size"], strict=True)
    assert alignment_of(sweep).spearman == pytest.approx(sum(spearmanr(*pair).statistic for pair in pairs) / 6)


def test_reachable_prompts_are_no_better_than_the_training_sets_best():
    sweep = prompt_sweep(noisy, TASK, SIZE, networks(3), trained_best={"size": 0.4, "merit": 4.6})
    expected = []
    for asked, got in zip(sweep.prompts, sweep.achieved["size"], strict=True):
        within = asked >= 0.4
        assert 2 < within.sum() < 20
        expected.append(r2_score(asked[within], got[within]))
    assert alignment_of(sweep).r2_reachable.value == pytest.approx(sum(expected) / 3)
    assert alignment_of(prompt_sweep(noisy, TASK, SIZE, networks(3))).r2_reachable is None
    nothing = prompt_sweep(noisy, TASK, SIZE, networks(3), trained_best={"size": 100.0})
    assert alignment_of(nothing).r2_reachable is None


def test_where_higher_is_better_prompts_fall_from_the_best():
    theta = networks(4)
    start = TASK.evaluate(theta)["merit"]

    def to_merit(theta, metric, target, indices):
        return obedient(theta, metric, 5 - target, indices)

    merit = replace(MERIT, prompts=Prompts(5.0, 5.0))
    sweep = prompt_sweep(to_merit, TASK, merit, theta, trained_best={"merit": 4.8})
    assert torch.allclose(sweep.prompts[:, 0], torch.full((4,), 5.0).double())
    assert torch.allclose(sweep.prompts[:, -1], start)
    found = alignment_of(sweep)
    assert found.r2.value == pytest.approx(1)
    assert found.r2_reachable.value == pytest.approx(1)
    assert found.spearman == pytest.approx(1)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_batches_change_nothing(at_once):
    whole = prompt_sweep(noisy, TASK, SIZE, networks(5), prompts=6)
    parts = prompt_sweep(noisy, TASK, SIZE, networks(5), prompts=6, networks_at_once=at_once)
    for name in ("size", "merit"):
        assert torch.allclose(parts.achieved[name], whole.achieved[name], rtol=1e-12, atol=0)


def test_a_part_of_the_networks_gives_the_same_rows():
    whole = prompt_sweep(noisy, TASK, SIZE, networks(5), prompts=6)
    share = prompt_sweep(noisy, TASK, SIZE, networks(5)[3:], prompts=6, first_index=18)
    assert torch.allclose(share.achieved["size"], whole.achieved["size"][3:], rtol=1e-12, atol=0)
    other = prompt_sweep(noisy, TASK, SIZE, networks(5)[3:], prompts=6, first_index=100)
    assert not torch.allclose(other.achieved["size"], share.achieved["size"])


def test_updates_get_the_metric_they_start_from_and_each_prompt_once():
    seen = []

    def watch(theta, metric, target, indices):
        seen.extend(zip(theta[:, 0].tolist(), metric.tolist(), target.tolist(), indices, strict=True))
        return theta

    theta = networks(2)
    sweep = prompt_sweep(watch, TASK, SIZE, theta, prompts=3, networks_at_once=4)
    start = TASK.evaluate(theta)["size"]
    expected = [
        (float(theta[i, 0]), float(start[i]), float(sweep.prompts[i, j]), 3 * i + j) for i in range(2) for j in range(3)
    ]
    assert seen == expected


def test_what_is_not_finite_counts_as_the_worst_of_its_network():
    def diverging(theta, metric, target, indices):
        out = obedient(theta, metric, target, indices)
        out[torch.as_tensor(indices) % 20 == 0] = torch.nan  # the best prompt of every network
        return out

    theta = networks(3)
    sweep = prompt_sweep(diverging, TASK, SIZE, theta)
    assert sweep.achieved["size"][:, 0].isnan().all()
    assert sweep.achieved["merit"][:, 0].isnan().all()
    found = alignment_of(sweep)
    assert found.non_finite == 3
    filled = sweep.achieved["size"].clone()
    filled[:, 0] = TASK.evaluate(theta)["size"]  # worse than any it achieved
    assert found.r2_each == pytest.approx(r_squared(sweep.prompts, filled).tolist())
    assert found.r2.value < 0.5
    content = json.dumps(plain(sweep), allow_nan=False)
    assert json.loads(content)["achieved"]["size"][0][0] is None


def test_a_classifier_of_nans_has_no_error_rather_than_that_of_chance():
    class Deaf(Sizes):
        def evaluate(self, theta):
            return {"size": torch.full((len(theta),), 0.9), "merit": torch.zeros(len(theta))}

    def broken(theta, metric, target, indices):
        return theta * torch.nan

    assert prompt_sweep(broken, Deaf(), SIZE, networks(2)).achieved["size"].isnan().all()


def test_one_network_has_no_interval():
    found = prompt_alignment(noisy, TASK, SIZE, networks(1))
    assert (found.r2.low, found.r2.high) == (None, None)
    assert json.loads(json.dumps(plain(found), allow_nan=False))["r2"]["low"] is None


def test_results_survive_json():
    found = prompt_alignment(noisy, TASK, SIZE, networks(4), trained_best={"size": 0.2})
    read = json.loads(json.dumps(plain(found), allow_nan=False))
    assert read["r2"] == pytest.approx(found.r2._asdict())
    assert read["r2_each"] == pytest.approx(list(found.r2_each))
    sweep = prompt_sweep(noisy, TASK, SIZE, networks(2))
    read = json.loads(json.dumps(plain(sweep), allow_nan=False))
    assert torch.equal(torch.tensor(read["prompts"], dtype=torch.float64), sweep.prompts)


class ThreeRuns(Zoo):
    better = {"size": "lower", "merit": "higher"}  # noqa: RUF012

    def __init__(self):
        pass

    def metrics(self, name):
        values = torch.tensor([[3.0, 2.0], [9.0, 1.0], [torch.nan, 2.5]])
        return values if name == "size" else 5 - values


def test_the_training_sets_best_is_of_its_own_runs():
    for rows, size in (([0, 2], 2.0), ([1], 1.0), ([2], 2.5)):
        assert trained_best(ThreeRuns(), np.array(rows)) == {"size": size, "merit": 5 - size}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"metric": MERIT}, "no prompts of its own"),
        ({"metric": Metric("speed", "lower", Prompts(0.0, 0.0))}, "scores size, merit"),
        ({"metric": replace(SIZE, prompts=Prompts(50.0, 0.0))}, "no worse than the best prompt 50"),
        ({"prompts": 1}, "at least 2"),
        ({"theta": torch.full((1, 23), torch.nan)}, "not finite"),
    ],
)
def test_bad_requests_are_refused_in_one_line(arguments, match):
    arguments = {"metric": SIZE, "theta": networks(2), **arguments}
    with pytest.raises(ValueError, match=match) as error:
        prompt_sweep(identity, TASK, **arguments)
    assert "\n" not in str(error.value)


def test_a_metric_may_be_given_other_prompts_than_the_tasks():
    given = replace(MERIT, prompts=Prompts(5.0, 5.0, 1.0))
    sweep = prompt_sweep(identity, TASK, given, networks(2), prompts=3)
    assert sweep.prompts[:, 0].tolist() == [5.0, 5.0]
    assert torch.equal(sweep.start["merit"], TASK.evaluate(networks(2))["merit"])


def test_prompts_of_every_network_are_regular():
    asked = swept(SIZE, torch.tensor([2.0, 1.0]), 0.5, 1.0, 4)
    assert torch.allclose(asked, torch.tensor([[0.5, 1.0, 1.5, 2.0], [0.5, 2 / 3, 5 / 6, 1.0]]).double())


def test_alignment_reads_a_sweep_made_by_hand():
    prompts = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    achieved = torch.tensor([[0.5, 1.0, 1.5]], dtype=torch.float64)
    sweep = Sweep("size", "lower", prompts, {"size": achieved}, {"size": torch.tensor([2.0]).double()}, {})
    assert alignment_of(sweep).r2.value == pytest.approx(1 - 0.5 / 2)


def test_a_metrics_own_prompts_are_used():
    own, none = Metric("loss", "lower", Prompts(0.1, 0.2, 0.9)), Metric("error", "lower")
    assert with_prompts("loss", (own, none), 0.5) is own
    assert with_prompts("error", (own, none), 0.5).prompts == Prompts(0.5, 0.5, 1.0)
    with pytest.raises(ValueError, match="metric 'return': the task scores loss, error"):
        with_prompts("return", (own, none), 0.5)


def test_alignment_against_steps_has_a_row_for_each_update_in_order():
    def off_by(scale):
        def update(theta, metric, target, indices):
            size = target + scale * metric
            return theta * (size / theta.square().mean(1)).sqrt()[:, None]

        return update

    updates = {("slow", 100): off_by(0.0), ("slow", 5): off_by(0.3), ("fast", 1): off_by(0.1)}
    rows = quality_against_steps(updates, TASK, SIZE, networks(3), prompts=5)
    assert [(row.sampler, row.model_evaluations) for row in rows] == [("slow", 5), ("slow", 100), ("fast", 1)]
    start = TASK.evaluate(networks(3))["size"].mean()
    assert rows[0].alignment.mean_gap == pytest.approx(0.3 * float(start))
    assert rows[1].alignment.r2.value == pytest.approx(1)
    assert rows[0].alignment.r2.value < rows[2].alignment.r2.value < 1
    json.dumps(plain(rows), allow_nan=False)
