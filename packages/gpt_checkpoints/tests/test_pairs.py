"""Pairs: how often each is sampled, in closed form, and that rows are those of the zoo."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.zoo.pairs import SAMPLINGS, Draw, Pairs, ends, released, stratified, thesis
from triptych_gpt.zoo.store import CohortData
from triptych_gpt.zoo.zoo import Zoo

LAYOUT = ParameterLayout({"weight": (2, 5)})
CHECKPOINTS = 7
COUNTERS = range(200_000)
SPLITS = {"train": [0, 1, 2, 6, 7], "test": [3, 4]}  # run 5 is dropped


def cohort(runs: range, split: str, dropped: dict[int, str]) -> CohortData:
    kept = [run for run in runs if run not in dropped]
    number = torch.tensor(kept).view(-1, 1) * 100.0 + torch.arange(CHECKPOINTS)
    theta = number.unsqueeze(-1) + torch.arange(LAYOUT.size) / 16
    steps = torch.arange(CHECKPOINTS).expand(len(kept), -1)
    return CohortData(kept, theta, steps, {"loss": number, "error": -number}, {"split": split}, dropped)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, write_zoo):
    folder = tmp_path_factory.mktemp("zoo")
    cohorts = cohort(range(3), "train", {}), cohort(range(3, 6), "test", {5: "bad"}), cohort(range(6, 8), "train", {})
    write_zoo(folder, LAYOUT, {"loss": "lower", "error": "lower"}, *cohorts)
    return Zoo(folder)


def frequencies(draw, runs, checkpoints):
    """How often each (run, start, target) was sampled."""
    counts = torch.zeros(runs, checkpoints, checkpoints, dtype=torch.float64)
    counts.index_put_((draw.run, draw.start, draw.target), torch.ones(1, dtype=torch.float64), accumulate=True)
    return counts.numpy()


def test_thesis_pairs_are_uniform_over_all_ordered_pairs_of_every_run():
    counts = frequencies(thesis(3, COUNTERS, 4, CHECKPOINTS), 4, CHECKPOINTS)
    later = np.triu(np.ones((CHECKPOINTS, CHECKPOINTS), dtype=bool), 1)
    assert counts[:, ~later].sum() == 0
    assert chisquare(counts[:, later].ravel()).pvalue > 1e-3
    assert len(counts[:, later].ravel()) == 4 * len(list(combinations(range(CHECKPOINTS), 2)))


def test_released_pairs_have_uniform_spacings_and_then_uniform_starts():
    counts = frequencies(released(3, COUNTERS, 50_000, CHECKPOINTS), 50_000, CHECKPOINTS).sum(0)
    expected = np.zeros_like(counts)
    for spacing in range(1, CHECKPOINTS):
        for start in range(CHECKPOINTS - spacing):
            expected[start, start + spacing] = len(COUNTERS) / (CHECKPOINTS - 1) / (CHECKPOINTS - spacing)
    assert counts[expected == 0].sum() == 0
    assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_released_pairs_favour_the_initialisation_as_the_harmonic_number_says():
    start = released(0, range(400_000), 100_000, 200).start
    expected = sum(1 / n for n in range(1, 200)) / 199
    deviation = (expected * (1 - expected) / len(start)) ** 0.5
    assert abs((start == 0).double().mean() - expected) < 4 * deviation
    assert expected * 199 == pytest.approx(5.87, abs=0.01)


def test_released_pairs_take_every_run_once_an_epoch_in_new_order():
    run = released(1, range(300), 100, CHECKPOINTS).run.view(3, 100)
    assert torch.equal(run.sort(1).values, torch.arange(100).expand(3, -1))
    assert not torch.equal(run[0], run[1])


@pytest.mark.parametrize("sampling", [thesis, released])
@pytest.mark.parametrize("checkpoints", [2, 3])
def test_few_checkpoints_still_make_pairs(sampling, checkpoints):
    draw = sampling(0, range(1000), 1, checkpoints)
    found = set(zip(draw.start.tolist(), draw.target.tolist(), strict=True))
    assert found == set(combinations(range(checkpoints), 2))
    assert draw.run.unique().tolist() == [0]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_the_zoos_and_of_the_split_alone(zoo, sampling, split):
    batch = Pairs(zoo, split, sampling, seed=2).draw(range(2000))
    assert batch.runs.unique().tolist() == SPLITS[split]
    assert (batch.checkpoints < batch.checkpoints_star).all()
    entries = torch.arange(LAYOUT.size) / 16
    for theta, metrics, checkpoints in (
        (batch.theta, batch.metrics, batch.checkpoints),
        (batch.theta_star, batch.metrics_star, batch.checkpoints_star),
    ):
        number = batch.runs * 100.0 + checkpoints  # identifies the run of theta: both halves of a pair are of one
        assert torch.equal(theta, number.unsqueeze(1) + entries)
        assert torch.equal(metrics["loss"], number)
        assert torch.equal(metrics["error"], -number)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_pair_depends_on_seed_and_counter_alone(zoo, sampling):
    pairs = Pairs(zoo, sampling=sampling, seed=4)
    whole = pairs.draw(range(40))
    mixed = pairs.draw([31, 5, 5, 12])
    for name in ("theta", "theta_star", "runs", "checkpoints", "checkpoints_star"):
        assert torch.equal(getattr(mixed, name), getattr(whole, name)[[31, 5, 5, 12]])
    assert torch.equal(mixed.metrics_star["loss"], whole.metrics_star["loss"][[31, 5, 5, 12]])
    assert torch.equal(pairs.draw(range(10, 40, 3)).theta, whole.theta[10:40:3])
    other = Pairs(zoo, sampling=sampling, seed=5).draw(range(40))
    assert not torch.equal(other.theta, whole.theta)


def test_pairs_fill_the_memory_they_are_given(zoo):
    pairs, out = Pairs(zoo), (torch.empty(16, LAYOUT.size), torch.empty(16, LAYOUT.size))
    batch = pairs.draw(range(16), out)
    assert (batch.theta.data_ptr(), batch.theta_star.data_ptr()) == (out[0].data_ptr(), out[1].data_ptr())
    assert torch.equal(out[1], pairs.draw(range(16)).theta_star)


def test_ends_are_the_first_and_last_checkpoint_of_uniform_runs():
    draw = ends(3, COUNTERS, 4, CHECKPOINTS)
    assert draw.start.unique().tolist() == [0]
    assert draw.target.unique().tolist() == [CHECKPOINTS - 1]
    assert chisquare(draw.run.bincount().numpy()).pvalue > 1e-3


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_stratified_pairs_reach_evenly_over_the_metric_and_often_its_good_end(better):
    """A run that is through its bad values in one step: uniform pairs hardly ever have them as a target."""
    sign = 1.0 if better == "lower" else -1.0
    metric = sign * torch.cat([torch.tensor([2.0, 1.5, 1.0, 0.5]), torch.linspace(0.1, 0.0, 96)]).expand(3, -1)
    even, plain = (draw(3, COUNTERS, 3, 100) for draw in (stratified(metric, better), thesis))
    assert (even.start < even.target).all()
    # Of values drawn uniformly over 0 .. 2, those in 1.25 .. 2 have checkpoint 1 nearest, which can be reached from 0 alone.
    first = ((even.start == 0) & (even.target == 1)).double().mean()
    expected = 0.3 * 0.75 / 2 + 0.2 / (100 * 99 / 2)
    assert abs(first - expected) < 4 * (expected / len(COUNTERS)) ** 0.5
    assert (plain.target == 1).double().mean() < 0.001
    assert abs((even.start == 0).double().mean() - (0.8 + 0.2 * 2 / 100)) < 0.01
    good = ((even.start == 0) & (even.target > 50)).double().mean()  # the better 49 of the 99 later checkpoints
    evenly = 0.3 * (metric[0, 50] * sign / 2)
    assert abs(good - (0.5 + float(evenly) + 0.2 * 2 / 100 / 2)) < 0.01
    assert chisquare(even.run.bincount().numpy()).pvalue > 1e-3


def test_any_function_can_be_a_sampling(zoo):
    def first_run(seed, counters, runs, checkpoints):
        n = len(counters)
        return Draw(
            torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long), torch.full((n,), checkpoints - 1)
        )

    batch = Pairs(zoo, "test", first_run).draw(range(3))
    assert batch.theta_star[:, 0].tolist() == [306, 306, 306]


def test_wrong_requests_are_one_line(zoo):
    with pytest.raises(ValueError, match="sampling 'uniform': expected one of thesis, released"):
        Pairs(zoo, sampling="uniform")
    with pytest.raises(ValueError, match="split 'validation': no runs"):
        Pairs(zoo, "validation")
    with pytest.raises(ValueError, match="counter -1: expected 0 or more"):
        Pairs(zoo).draw([3, -1])
