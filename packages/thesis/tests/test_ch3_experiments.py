"""Recursion, diversity and landscape, on networks whose metrics are known functions of their weights."""

import itertools
import json
import math

import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn
from triptych_common.randomness import normal
from triptych_gpt.evaluation.records import plain
from triptych_gpt.symmetry.derivation import derive
from triptych_gpt.tasks.task import Metric, Prompts, Task
from triptych_thesis.chapter3.experiments.filters import first_layer_filters
from triptych_thesis.chapter3.experiments.initialisers import recursive_prompting
from triptych_thesis.chapter3.experiments.landscape import Plane, diversity, landscape, spread

NETWORK = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
SIZE, MERIT = Metric("size", "lower", Prompts(0.0, 0.1, 0.9)), Metric("merit", "higher", Prompts(5.0, 4.9))


class Sizes(Task):
    """Scores networks by the mean square of their weights, and by 5 less that."""

    name, metrics, initialisers, steps = "sizes", (SIZE, MERIT), ("default", "wide"), 1
    symmetry = derive(NETWORK)
    layout = symmetry.layout

    def initial(self, seed, runs, initialiser="default"):
        drawn = normal(seed, f"start {initialiser}", list(runs), (self.layout.size,))
        return drawn * (3 if initialiser == "wide" else 1)

    def evaluate(self, theta):
        size = theta.square().mean(1)
        return {"size": size, "merit": 5 - size}


TASK = Sizes()
D = TASK.layout.size
RECURSIVE, BEST = 0.1, 0.0  # prompts for the size


def networks(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halfway(theta, metric, target, indices):
    """Half the way to the size asked for, with noise."""
    size = 0.5 * (metric + target)
    scaled = theta * (size / theta.square().mean(1)).sqrt()[:, None]
    return scaled + 0.05 * normal(2, "halfway", indices, theta.shape[1:]).to(theta)


def scattered(theta, metric, target, indices):
    """Samples that lie about a shrunken start, as noise has it."""
    return 0.2 * theta + 0.1 * normal(3, "scattered", indices, theta.shape[1:]).to(theta)


def untrained(n: int) -> dict[str, torch.Tensor]:
    return {name: TASK.initial(5, range(n), name) for name in TASK.initialisers}


# --- recursion


def test_recursion_equals_hand_iteration():
    starts = untrained(4)
    found = recursive_prompting(halfway, TASK, SIZE, starts, RECURSIVE, updates=3)
    assert list(found["curves"]) == ["default", "wide"]
    for name, theta in starts.items():
        history = [TASK.evaluate(theta)["size"]]
        for k in range(3):
            indices = [4 * k + i for i in range(4)]
            theta = halfway(theta, history[-1], torch.full((4,), RECURSIVE), indices)
            history.append(TASK.evaluate(theta)["size"])
        expected = torch.stack(history, dim=1).double()
        curve = found["curves"][name]
        assert torch.allclose(curve["metrics"]["size"], expected, rtol=1e-5)
        assert torch.allclose(curve["metrics"]["merit"], 5 - expected, rtol=1e-5)
        assert torch.allclose(curve["mean"], expected.mean(0), rtol=1e-5)
        assert torch.allclose(curve["standard_error"], expected.std(0) / 2, rtol=1e-4)
        assert curve["rejected"] == 0
    assert found["one_update"] == pytest.approx(float(found["curves"]["default"]["mean"][1]))


def test_updates_to_reach_counts_until_the_mean_is_within_the_margin():
    def exactly_half(theta, metric, target, indices):
        return theta * math.sqrt(0.5)

    starts = {"default": torch.ones(2, D), "wide": torch.ones(2, D) * math.sqrt(8)}  # sizes 1 and 8
    found = recursive_prompting(exactly_half, TASK, SIZE, starts, RECURSIVE, updates=5)
    assert found["curves"]["default"]["updates_to_reach"] == 1  # 0.5
    assert found["curves"]["wide"]["updates_to_reach"] == 4  # 4, 2, 1, 0.5
    short = recursive_prompting(exactly_half, TASK, SIZE, starts, RECURSIVE, updates=3)
    assert short["curves"]["wide"]["updates_to_reach"] is None
    loose = recursive_prompting(exactly_half, TASK, SIZE, starts, RECURSIVE, updates=5, within=1.01)
    assert loose["curves"]["wide"]["updates_to_reach"] == 3
    assert loose["curves"]["default"]["updates_to_reach"] == 0
    higher = recursive_prompting(exactly_half, TASK, MERIT, starts, 4.9, updates=5, within=0.01)
    assert higher["curves"]["wide"]["updates_to_reach"] == 4


def test_an_update_that_diverges_is_rejected_and_the_next_starts_from_before():
    def sometimes(theta, metric, target, indices):
        out = theta * 0.5
        out[torch.as_tensor(indices) == 2] = torch.inf  # network 0 at its second update
        return out

    found = recursive_prompting(sometimes, TASK, SIZE, {"default": torch.ones(2, D)}, RECURSIVE, updates=3)
    assert found["curves"]["default"]["rejected"] == 1
    sizes = found["curves"]["default"]["metrics"]["size"]
    assert torch.allclose(sizes, torch.tensor([[1, 1 / 4, 1 / 4, 1 / 16], [1, 1 / 4, 1 / 16, 1 / 64]]).double())
    json.dumps(plain(found), allow_nan=False)


def test_recursion_does_not_depend_on_batches_or_on_the_other_initialisers():
    starts = untrained(5)
    alone = {"default": starts["default"]}
    whole = recursive_prompting(halfway, TASK, SIZE, starts, RECURSIVE, updates=2)
    parts = recursive_prompting(halfway, TASK, SIZE, alone, RECURSIVE, updates=2, networks_at_once=2)
    expected = whole["curves"]["default"]["metrics"]["size"]
    assert torch.allclose(parts["curves"]["default"]["metrics"]["size"], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="initialiser 'default'"):
        recursive_prompting(halfway, TASK, SIZE, {"wide": starts["wide"]}, RECURSIVE)


# --- diversity


def test_spread_equals_brute_force_over_permutations():
    thetas, spec = networks(4), TASK.symmetry
    (group,) = spec.groups
    orders = torch.tensor(list(itertools.permutations(range(3))))
    raw, matched = [], []
    for a, b in itertools.combinations(thetas, 2):
        raw.append(float((a - b).norm()))
        matched.append(float((spec.apply(a.expand(6, -1), {group: orders}) - b).norm(dim=1).min()))
    found = spread(spec, thetas)
    assert found["raw"] == pytest.approx(sum(raw) / 6)
    assert found["matched"] == pytest.approx(sum(matched) / 6)
    assert found["matched"] < found["raw"]


def test_permuted_copies_have_no_matched_distance():
    spec = TASK.symmetry
    copies = spec.apply(networks(1).expand(6, -1), spec.draw(1, range(6)))
    found = spread(spec, copies)
    assert found["raw"] > 0.5
    assert found["matched"] == pytest.approx(0, abs=1e-12)


def test_diversity_tells_noise_from_starts():
    theta = networks(4)
    found = diversity(scattered, TASK, SIZE, theta, BEST, 5)
    samples = scattered(theta.repeat_interleave(5, 0), None, None, range(20)).view(4, 5, D)
    assert found["noise"]["raw"] == pytest.approx(sum(spread(TASK.symmetry, one)["raw"] for one in samples) / 4)
    assert found["starts"]["raw"] == pytest.approx(spread(TASK.symmetry, samples[:, 0])["raw"])
    assert found["before"] == spread(TASK.symmetry, theta)
    assert found["noise"]["raw"] < found["starts"]["raw"] < found["before"]["raw"]
    assert found["metric_mean"] == pytest.approx(float(samples.square().mean()))


def test_diversity_leaves_out_what_is_not_finite():
    def half_broken(theta, metric, target, indices):
        out = scattered(theta, metric, target, indices)
        out[torch.as_tensor(indices) % 2 == 0] = torch.nan
        return out

    found = diversity(half_broken, TASK, SIZE, networks(2), BEST, 4)
    assert found["non_finite"] == 4
    kept = scattered(networks(2).repeat_interleave(4, 0), None, None, range(8)).view(2, 4, D)[:, 1::2]
    assert found["noise"]["raw"] == pytest.approx(float((kept[:, 0] - kept[:, 1]).norm(dim=1).mean()))
    assert None not in plain(found)["noise"].values()


# --- landscape


def test_the_plane_equals_scikit_learns():
    thetas = networks(12) * torch.linspace(3, 0.1, D)
    plane, pca = Plane.through(thetas), PCA(2, svd_solver="full").fit(thetas)
    assert torch.allclose(plane.explained, torch.from_numpy(pca.explained_variance_ratio_))
    assert torch.allclose((plane.axes @ torch.from_numpy(pca.components_).T).abs(), torch.eye(2).double(), atol=1e-8)
    assert torch.allclose(plane.coordinates(thetas).abs(), torch.from_numpy(pca.transform(thetas)).abs())


def test_shares_are_one_in_the_plane_and_fractions_outside():
    plane = Plane.through(networks(6))
    inside = plane.at(torch.tensor([[0.0, 0.0], [1.0, -2.0], [30.0, 4.0]]))
    assert torch.allclose(plane.share(inside), torch.ones(3).double())
    others = plane.share(networks(20, seed=1))
    assert ((others > 0) & (others < 1)).all()
    across = plane.origin + networks(1, seed=2) @ (torch.eye(D).double() - plane.axes.T @ plane.axes)
    assert plane.share(across).item() == pytest.approx(0, abs=1e-12)
    assert torch.allclose(Plane.through(networks(3)).share(networks(3)), torch.ones(3).double())


@pytest.mark.parametrize(
    "thetas", [torch.ones(5, 23), torch.randn(2, 23), torch.linspace(0, 1, 5)[:, None] * torch.ones(23)]
)
def test_networks_on_a_line_span_no_plane(thetas):
    with pytest.raises(ValueError, match="span no plane"):
        Plane.through(thetas)


def test_the_landscape_of_a_bowl():
    start = networks(1)[0]
    found = landscape(scattered, TASK, SIZE, start, BEST, 7, side=9)
    samples = scattered(start.expand(7, -1), None, None, range(7))
    plane = Plane.through(samples)
    assert torch.allclose(found["samples"], plane.coordinates(samples))
    assert torch.allclose(found["sample_metric"], samples.square().mean(1))
    assert torch.allclose(found["projected_metric"], plane.at(found["samples"]).square().mean(1))
    for i, j in ((0, 0), (2, 7), (8, 3)):
        point = plane.at(torch.stack([found["x"][j], found["y"][i]])[None])
        assert float(found["values"][i, j]) == pytest.approx(float(point.square().mean()))
    assert torch.allclose(found["curvature"], torch.full((7, 2), 2 / D).double(), rtol=1e-6)  # of the mean square
    assert found["convex"] == 1.0
    assert found["x"][0] < found["samples"][:, 0].min() < found["samples"][:, 0].max() < found["x"][-1]
    improved = (float(start.square().mean()) - found["sample_metric"]).abs()
    assert torch.equal(found["accurate"], (found["projected_metric"] - found["sample_metric"]).abs() <= 0.1 * improved)
    json.dumps(plain(found), allow_nan=False)


def test_the_landscape_of_a_higher_metric_has_the_same_curvature():
    found = landscape(scattered, TASK, MERIT, networks(1)[0], 5.0, 5, side=5)
    assert torch.allclose(found["curvature"], torch.full((5, 2), 2 / D).double(), rtol=1e-6)


def test_the_landscape_leaves_out_what_is_not_finite():
    def broken(theta, metric, target, indices):
        out = scattered(theta, metric, target, indices)
        out[torch.as_tensor(indices) == 4] = torch.nan
        return out

    start = networks(1)[0]
    found = landscape(broken, TASK, SIZE, start, BEST, 5, side=5, first_index=3)
    assert found["non_finite"] == 1
    assert len(found["samples"]) == len(found["accurate"]) == 4
    finite = scattered(start.expand(4, -1), None, None, [3, 5, 6, 7])
    assert torch.allclose(found["explained"], Plane.through(finite).explained)


# --- filters


def test_filters_are_rows_of_the_first_weight():
    spec = derive(nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 2)))
    theta = torch.arange(float(spec.layout.size))
    images = first_layer_filters(spec.layout, theta)
    assert images.shape == (4, 3, 3)
    assert torch.equal(images[2], torch.arange(18.0, 27.0).view(3, 3))
    assert (
        first_layer_filters(derive(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))).layout, torch.zeros(46))
        is None
    )
