"""Weight matching: known permutations, brute force, and an inner product that never falls."""

import itertools

import pytest
import torch
from torch import nn
from triptych_gpt.symmetry import matching
from triptych_gpt.symmetry.derivation import Residual, derive
from triptych_gpt.symmetry.matching import canonicalise, match
from triptych_gpt.symmetry.spec import Axis, PermutationSpec


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 4))


def conv_net() -> nn.Sequential:
    first = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(48, 5))


def residual_net() -> nn.Sequential:
    body = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8))
    square = nn.Sequential(nn.ReLU(), nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(6, 8), Residual(body), Residual(square), nn.Linear(8, 3))


def random_theta(spec: PermutationSpec, seed: int, *batch: int) -> torch.Tensor:
    return torch.randn(*batch, spec.layout.size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("network", [mlp(), conv_net(), residual_net()], ids=["mlp", "conv", "residual"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_known_permutation_is_found_exactly(network, noise):
    spec = derive(network)
    reference = random_theta(spec, 0)
    drawn = spec.draw(0, range(5))
    shuffled = spec.apply(reference.expand(5, -1), drawn) + noise * random_theta(spec, 1, 5)
    found = match(spec, shuffled, reference)
    for group, order in spec.inverse(drawn).items():
        assert torch.equal(found[group], order)
        assert not torch.equal(order, torch.arange(spec.groups[group]).expand_as(order))
    canonical = canonicalise(spec, shuffled, reference)
    assert (canonical - reference).abs().max() <= 6 * noise
    assert canonical.dtype == torch.float32


def test_one_hidden_layer_equals_brute_force():
    spec = derive(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    theta, reference = random_theta(spec, 0, 4).double(), random_theta(spec, 1).double()
    everything = torch.tensor(list(itertools.permutations(range(5))))
    for one in theta:
        (group,) = spec.groups
        products = spec.apply(one.expand(120, -1), {group: everything}) @ reference
        assert torch.equal(match(spec, one, reference)[group], everything[products.argmax()])


@pytest.mark.parametrize("network", [mlp(), residual_net()], ids=["mlp", "residual"])
def test_the_product_never_falls_and_the_end_is_an_optimum(network, monkeypatch):
    products = []
    improve = matching._improve

    def watched(spec, group, current, reference, *state):
        improved = improve(spec, group, current, reference, *state)
        products.append(current @ reference)
        return improved

    monkeypatch.setattr(matching, "_improve", watched)
    spec = derive(network)
    theta, reference = random_theta(spec, 2, 6).double(), random_theta(spec, 3).double()
    matched = spec.apply(theta, match(spec, theta, reference))
    path = torch.stack([theta @ reference, *products])
    assert (path.diff(dim=0) >= 0).all()
    assert (path[-1] > path[0] + 1).all()
    assert torch.allclose(path[-1], matched @ reference)
    for orders in match(spec, matched, reference, seed=1).values():
        assert torch.equal(orders, torch.arange(orders.shape[-1]).expand_as(orders))
    for group, units in spec.groups.items():
        if any(axes.count(Axis(group)) > 1 for axes in spec.axes.values()):
            continue  # only optimal to first order
        swaps = torch.stack([_swap(units, i, j) for i, j in itertools.combinations(range(units), 2)])
        stay = {other: torch.arange(n).expand(len(swaps), -1) for other, n in spec.groups.items()}
        for one in matched:
            assert (spec.apply(one.expand(len(swaps), -1), {**stay, group: swaps}) @ reference <= one @ reference).all()


def _swap(units: int, i: int, j: int) -> torch.Tensor:
    order = torch.arange(units)
    order[i], order[j] = j, i
    return order


def test_a_theta_is_matched_the_same_alone_and_in_a_batch():
    spec = derive(mlp())
    theta, reference = random_theta(spec, 4, 3, 2), random_theta(spec, 5)
    together = match(spec, theta, reference)
    assert together["0"].shape == (3, 2, 16)
    for i, j in itertools.product(range(3), range(2)):
        for group, order in match(spec, theta[i, j], reference).items():
            assert torch.equal(order, together[group][i, j])


def test_networks_matched_to_one_reference_are_closer_and_compute_the_same():
    network = mlp().double()
    spec = derive(network)
    theta, reference = random_theta(spec, 6, 300).double(), random_theta(spec, 7).double()
    canonical = canonicalise(spec, theta, reference)
    assert ((canonical - reference).norm(dim=1) < (theta - reference).norm(dim=1)).all()
    inputs = torch.randn(4, 12, dtype=torch.float64)
    for i in (0, 299):
        before, after = (
            torch.func.functional_call(network, spec.layout.unflatten(each[i]), (inputs,))
            for each in (theta, canonical)
        )
        assert (before - after).abs().max() < 1e-12


def test_vectors_that_cannot_be_matched_are_refused():
    spec = derive(mlp())
    good, bad = random_theta(spec, 0), random_theta(spec, 0)
    bad[3] = float("inf")
    with pytest.raises(ValueError, match="theta has entries that are not finite"):
        match(spec, bad, good)
    with pytest.raises(ValueError, match="the reference has entries that are not finite"):
        match(spec, good, bad)
    with pytest.raises(ValueError, match="theta has 3 entries"):
        match(spec, good[:3], good[:3])
