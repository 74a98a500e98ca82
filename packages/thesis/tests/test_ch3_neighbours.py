"""Nearest-neighbour search against brute force over all permutations; the score at its two ends; baselines by hand."""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn
from triptych_gpt import nearest as nearest_module
from triptych_gpt.evaluation.baselines import identity, mean_of_finals, nearest_in_metric, retrieval
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.nearest import Pool, UnitVectors, augmented, lower_bound, nearest, weighted
from triptych_gpt.symmetry.derivation import derive
from triptych_gpt.symmetry.matching import match
from triptych_gpt.zoo.store import CohortData, Manifest, shard_name, write_shard
from triptych_gpt.zoo.zoo import Zoo
from triptych_thesis.chapter3.experiments.neighbours import nearest_neighbour_scores

CHECKPOINTS = 5


def shallow():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def deep():
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def conv():
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 2))


@dataclass(frozen=True)
class Made:
    zoo: Zoo
    spec: object
    train: torch.Tensor  # [runs, checkpoints, D]


def make_zoo(folder, network, train_runs=30, test_runs=4):
    """Runs of networks that drift away from where they began, metrics that fall as they do."""
    spec = derive(network())
    layout = ParameterLayout.of(network())
    metrics = {"loss": "lower"}
    manifest = Manifest.create(
        folder, {"task": "tiny", "layout": layout.to_json(), "dtype": "float32", "metrics": metrics, "checkpoints": 5}
    )
    rng = torch.Generator().manual_seed(layout.size)
    thetas = []
    for first, count, split in ((0, train_runs, "train"), (train_runs, test_runs, "test")):
        runs = list(range(first, first + count))
        steps = torch.arange(CHECKPOINTS).expand(count, -1)
        theta = torch.randn(count, 1, layout.size, generator=rng) + 0.3 * torch.randn(
            count, CHECKPOINTS, layout.size, generator=rng
        ).cumsum(1)
        loss = 2.0 - 0.25 * steps + 0.001 * torch.tensor(runs).view(-1, 1)
        data = CohortData(runs, theta, steps, {"loss": loss}, {"split": split}, {})
        manifest.commit(write_shard(folder, shard_name(runs), data, "float32"))
        thetas.append(theta)
    return Made(Zoo(folder), spec, thetas[0])


@pytest.fixture(scope="module", params=[shallow, conv], ids=["shallow", "conv"])
def separable(request, tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("zoo"), request.param)


@pytest.fixture(scope="module", params=[shallow, conv, deep], ids=["shallow", "conv", "deep"])
def any_made(request, tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("zoo"), request.param)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("zoo"), shallow)


@pytest.fixture(scope="module")
def made_deep(tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("zoo"), deep)


def samples_like(made, n=7):
    return torch.randn(n, made.zoo.layout.size, generator=torch.Generator().manual_seed(5))


def all_orders(spec):
    """Every combination of permutations of the spec's groups, each as arguments for apply."""
    combined = [{}]
    for group, units in spec.groups.items():
        combined = [{**rest, group: torch.tensor(p)} for rest in combined for p in permutations(range(units))]
    return combined


def brute_force(made, samples, spec):
    """Distance to the nearest of all training checkpoints in any order of units, and its place, in float64."""
    pool = made.train.flatten(0, 1).double()
    orders = [None] if spec is None else all_orders(spec)
    every = torch.stack(
        [torch.cdist(samples.double(), pool if order is None else spec.apply(pool, order)) for order in orders]
    )
    distance, place = every.amin(0).min(1)
    return distance, place // CHECKPOINTS, place % CHECKPOINTS


@pytest.mark.parametrize("matched", [False, True])
def test_the_search_finds_what_brute_force_over_all_permutations_finds(separable, matched):
    samples, spec = samples_like(separable), separable.spec if matched else None
    found = nearest(samples, Pool.of(separable.zoo, separable.zoo.runs_in("train")), spec)
    distance, run, checkpoint = brute_force(separable, samples, spec)
    assert found.exact
    torch.testing.assert_close(found.distance, distance, rtol=1e-12, atol=0)
    assert torch.equal(found.run, run)
    assert torch.equal(found.checkpoint, checkpoint)


def test_pruning_changes_nothing(separable, monkeypatch):
    samples, pool = samples_like(separable), Pool.of(separable.zoo, separable.zoo.runs_in("train"))
    compared, compare = [], nearest_module._Search._compare

    def counted(self, rows, columns, block):
        compared.append(len(rows))
        compare(self, rows, columns, block)

    monkeypatch.setattr(nearest_module._Search, "_compare", counted)
    pruned = nearest(samples, pool, separable.spec)
    some = sum(compared)
    # no bound: every pair is compared
    monkeypatch.setattr(nearest_module, "lower_bound", lambda own, fixed, *_: torch.full((len(own), len(fixed)), -1e9))
    compared.clear()
    whole = nearest(samples, pool, separable.spec)
    assert sum(compared) == len(samples) * len(pool)
    assert some < sum(compared) / 2
    for mine, unpruned in zip(pruned, whole, strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(unpruned))


def test_bounds_are_below_the_distance_under_every_permutation(any_made):
    a, b = samples_like(any_made).double(), any_made.train[:6, -1].double()
    parts = UnitVectors(any_made.spec)
    (fixed_a, units_a), (fixed_b, units_b) = parts.of(a), parts.of(b)
    own = [weighted(u.transpose(0, 1)).flatten(0, 1) for u in units_a]
    bound = lower_bound(weighted(fixed_a), augmented(fixed_b), own, [augmented(u) for u in units_b])
    least = torch.stack([torch.cdist(a, any_made.spec.apply(b, order)) for order in all_orders(any_made.spec)]).amin(0)
    assert (bound <= least.square() + 1e-9).all()
    assert (bound > 0.3 * least.square()).double().mean() > 0.5  # nor is it idle


def test_permuted_copies_with_a_little_noise_are_found_by_matching_alone(any_made):
    planted = any_made.train[[2, 11, 19], [4, 1, 3]]
    noise = 1e-3 * torch.randn(planted.shape, generator=torch.Generator().manual_seed(1))
    order = {group: torch.arange(units).roll(1) for group, units in any_made.spec.groups.items()}
    copies = any_made.spec.apply(planted, order) + noise
    pool = Pool.of(any_made.zoo, any_made.zoo.runs_in("train"))
    raw, matched = nearest(copies, pool), nearest(copies, pool, any_made.spec)
    assert matched.run.tolist() == [2, 11, 19]
    assert matched.checkpoint.tolist() == [4, 1, 3]
    torch.testing.assert_close(matched.distance, noise.double().norm(dim=1), rtol=1e-3, atol=0)
    assert (raw.distance > 100 * matched.distance).all()


def test_with_hidden_to_hidden_weights_distances_are_upper_bounds_and_say_so(made_deep):
    samples = samples_like(made_deep)
    pool = Pool.of(made_deep.zoo, made_deep.zoo.runs_in("train"))
    least, _, _ = brute_force(made_deep, samples, made_deep.spec)
    short, whole = (nearest(samples, pool, made_deep.spec, shortlist=size) for size in (8, len(pool)))
    assert not short.exact
    assert (short.distance >= whole.distance - 1e-9).all()
    assert (whole.distance >= least - 1e-6).all()
    assert (whole.distance < 1.1 * least).all()
    theta = made_deep.train[short.run[0], short.checkpoint[0]]
    aligned = made_deep.spec.apply(theta, match(made_deep.spec, theta, samples[0]))
    assert float((aligned - samples[0]).norm()) == pytest.approx(float(short.distance[0]), rel=1e-5)


@pytest.mark.parametrize("matched", [False, True])
def test_only_checkpoints_near_the_target_are_admitted(made, matched):
    samples, spec = samples_like(made), made.spec if matched else None
    target = torch.tensor([1.0, 2.0, 1.5, 1.0, 7.0, 1.27, 2.01])
    pool = Pool.of(made.zoo, made.zoo.runs_in("train"), metric="loss")
    found = nearest(samples, pool, spec, target=target, tolerance=0.02)
    loss = made.zoo.metrics("loss")[:30]
    for i, sample in enumerate(samples):
        near = ((loss - target[i]).abs() <= 0.02).flatten()
        if not near.any():
            assert (found.distance[i].item(), found.run[i].item()) == (float("inf"), -1)
            continue
        few = Made(made.zoo, made.spec, made.train.flatten(0, 1)[near].unsqueeze(0))
        distance, _, _ = brute_force(few, sample[None], spec)
        torch.testing.assert_close(found.distance[i], distance[0], rtol=1e-12, atol=0)
        assert abs(loss[found.run[i], found.checkpoint[i]] - target[i]) <= 0.02
    assert not found.distance[4].isfinite()


def test_results_do_not_depend_on_what_else_is_searched_for(made):
    samples, pool = samples_like(made, 40), Pool.of(made.zoo, made.zoo.runs_in("train"))
    whole = nearest(samples, pool, made.spec)
    one = nearest(samples[17:18], pool, made.spec)
    assert (one.distance[0], one.run[0], one.checkpoint[0]) == (whole.distance[17], whole.run[17], whole.checkpoint[17])


def test_samples_that_cannot_be_compared_are_one_line(made):
    pool = Pool.of(made.zoo, made.zoo.runs_in("train"))
    bad = samples_like(made)
    bad[3, 2] = torch.nan
    with pytest.raises(ValueError, match="sample 3 has entries that are not finite"):
        nearest(bad, pool)
    with pytest.raises(ValueError, match="theta has 3 entries"):
        nearest(bad[:, :3], pool)
    with pytest.raises(ValueError, match="make the pool with metric="):
        nearest(samples_like(made), pool, target=torch.ones(7), tolerance=1)


def by_kind(scores):
    return {(s["target"], s["matched"], s["near_prompt"]): s for s in scores}


def test_the_score_of_the_identity_is_full_and_that_of_retrieval_none(made):
    kept = by_kind(nearest_neighbour_scores(identity(), made.zoo, made.spec, "loss", [1.0, 1.5], tolerance=0.02))
    taken = by_kind(
        nearest_neighbour_scores(retrieval(made.zoo, "loss"), made.zoo, made.spec, "loss", [1.0, 1.5], tolerance=0.1)
    )
    assert len(kept) == 8
    for target in (1.0, 1.5):
        for matched in (False, True):
            score = kept[target, matched, False]
            assert (score["score"]["value"], score["counted"]) == (1.0, 4)
            assert score["own"].abs().max() == 0
            assert taken[target, matched, False]["score"]["value"] == 0.0
            assert taken[target, matched, False]["training"].abs().max() == 0
            assert taken[target, matched, True]["score"]["value"] == 0.0
    # losses of test runs are 0.03 off the prompt: none of their own checkpoints is near it
    away = kept[1.0, False, True]
    assert (away["score"], away["counted"]) == (None, 0)


def test_a_sample_is_compared_with_its_own_run_and_numbered_run_after_run(made):
    seen = []

    def finals_of_test_runs(theta, metric, target, indices):
        seen.append((list(indices), metric.tolist(), target.tolist()))
        return made.zoo.theta(made.zoo.runs_in("test"), [CHECKPOINTS - 1] * 4)

    prompts = [1.0, 1.5, 2.0]
    scores = nearest_neighbour_scores(finals_of_test_runs, made.zoo, made.spec, "loss", prompts, tolerance=0.1)
    assert [indices for indices, _, _ in seen] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [target for _, _, target in seen] == [[p] * 4 for p in prompts]
    assert seen[0][1] == pytest.approx([2.03, 2.031, 2.032, 2.033])
    assert [s["target"] for s in scores] == [p for p in prompts for _ in range(4)]
    assert all(s["score"]["value"] == 1.0 and s["own"].abs().max() == 0 for s in scores if not s["near_prompt"])
    wrong = nearest_neighbour_scores(
        lambda *args: finals_of_test_runs(*args).roll(1, 0), made.zoo, made.spec, "loss", [1.0], tolerance=0.1
    )
    assert (wrong[0]["own"] > 1).all()


def test_samples_that_are_not_finite_are_left_out_and_counted(made):
    def sometimes(theta, metric, target, indices):
        out = theta.clone()
        out[torch.as_tensor(indices) == 5] = torch.nan  # run 1 at the second of three prompts
        out[torch.as_tensor(indices) >= 8, 3] = torch.inf
        return out

    prompts = [1.0, 1.28, 1.5]
    found = by_kind(nearest_neighbour_scores(sometimes, made.zoo, made.spec, "loss", prompts, tolerance=0.01))
    whole = by_kind(nearest_neighbour_scores(identity(), made.zoo, made.spec, "loss", prompts, tolerance=0.01))
    for (target, matched, near), score in found.items():
        same, bad = whole[target, matched, near], {1.0: 0, 1.28: 1, 1.5: 4}[target]
        assert (score["non_finite"], same["non_finite"]) == (bad, 0)
        if bad == 4:
            assert (score["score"], score["counted"], score["median_distance_own"]) == (None, 0, None)
            continue
        kept = [0, 2, 3] if bad else [0, 1, 2, 3]
        assert score["counted"] == (len(kept) if same["counted"] else 0)
        assert torch.equal(score["own"][kept], same["own"][kept])
        assert torch.equal(score["training"][kept], same["training"][kept])
    assert found[1.28, True, True]["counted"] == 3
    scores = nearest_neighbour_scores(
        lambda theta, *_: theta * torch.nan, made.zoo, made.spec, "loss", [1.0], tolerance=0.01
    )
    assert [(score["score"], score["non_finite"]) for score in scores] == [(None, 4)] * 4


def test_only_runs_that_a_model_was_trained_on_are_its_training_runs(made):
    few = np.arange(3, 7)
    update = retrieval(made.zoo, "loss", rows=few)
    scores = nearest_neighbour_scores(update, made.zoo, made.spec, "loss", [1.0], tolerance=0.1, training=few)
    assert all(score["training"].abs().max() == 0 for score in scores)
    taken = update(torch.zeros(1, made.zoo.layout.size), torch.zeros(1), torch.tensor([1.0]), [0])
    torch.testing.assert_close(taken[0], made.train[3, 4])  # losses rise with the run
    others = nearest_neighbour_scores(
        update, made.zoo, made.spec, "loss", [1.0], tolerance=0.1, training=np.arange(10, 30)
    )
    assert all(score["training"].min() > 0.1 for score in others)
    mean = mean_of_finals(made.zoo, rows=few)(taken, taken[:, 0], taken[:, 0], [0])
    torch.testing.assert_close(mean[0], made.train[3:7, -1].mean(0))


def test_retrieval_takes_the_nearest_in_metric_and_of_equals_the_first(tmp_path):
    layout = ParameterLayout({"weight": (1, 1)})
    manifest = Manifest.create(
        tmp_path,
        {"task": "t", "layout": layout.to_json(), "dtype": "float32", "metrics": {"loss": "lower"}, "checkpoints": 2},
    )
    loss = torch.tensor([[float("nan"), 3.0], [1.0, 0.5], [0.5, 1.0]])
    theta = torch.arange(6.0).view(3, 2, 1)
    data = CohortData(range(3), theta, torch.tensor([[0, 1]] * 3), {"loss": loss}, {"split": "train"}, {})
    manifest.commit(write_shard(tmp_path, shard_name(range(3)), data, "float32"))
    zoo, targets = Zoo(tmp_path), torch.tensor([0.4, 1.1, 2.9, 100.0, 0.75])
    found = nearest_in_metric(zoo, "loss", targets)
    assert list(zip(found.rows.tolist(), found.checkpoints.tolist(), strict=True)) == [
        (1, 1), (1, 0), (0, 1), (0, 1), (1, 0)
    ]  # fmt: skip
    update = retrieval(zoo, "loss")
    theta = torch.zeros(5, 1, dtype=torch.float64)
    assert update(theta, targets, targets, range(5)).tolist() == [[3.0], [2.0], [1.0], [1.0], [2.0]]


def test_the_mean_of_finals_is_that_of_training_runs_and_undoes_permutations_where_asked(made, tmp_path):
    theta = torch.zeros(2, made.zoo.layout.size)
    plain = mean_of_finals(made.zoo)(theta, theta[:, 0], theta[:, 0], range(2))
    torch.testing.assert_close(plain, made.train[:, -1].mean(0).expand(2, -1))
    # runs that are one network in different orders: matched, their mean is that network
    one = torch.randn(made.zoo.layout.size, generator=torch.Generator().manual_seed(3))
    shuffled = made.spec.apply(one.expand(6, -1), made.spec.draw(0, range(6)))
    data = CohortData(
        range(6), torch.stack([shuffled * 0, shuffled], 1), torch.tensor([[0, 1]] * 6), {}, {"split": "train"}, {}
    )
    facts = {
        "task": "t",
        "layout": made.zoo.layout.to_json(),
        "dtype": "float32",
        "metrics": {"loss": "lower"},
        "checkpoints": 2,
    }
    Manifest.create(tmp_path, facts).commit(write_shard(tmp_path, shard_name(range(6)), data, "float32"))
    zoo = Zoo(tmp_path)
    mean = mean_of_finals(zoo, made.spec)(theta, theta[:, 0], theta[:, 0], range(2))[0]
    torch.testing.assert_close(mean, shuffled[0])
    assert not torch.allclose(mean_of_finals(zoo)(theta, theta[:, 0], theta[:, 0], range(2))[0], shuffled[0], atol=0.1)
    assert np.isfinite(mean.numpy()).all()
