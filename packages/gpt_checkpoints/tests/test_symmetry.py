"""The permutation spec: reordering against plain indexing, draws, batches, types, and declarations that are wrong."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.symmetry.spec import Axis, PermutationSpec, check_invariance, forward_of

H, G = Axis("hidden"), Axis("second")


def mlp_spec() -> PermutationSpec:
    layout = ParameterLayout({"0.weight": (5, 7), "0.bias": (5,), "2.weight": (4, 5), "2.bias": (4,)})
    return PermutationSpec(layout, {"0.weight": (H, None), "0.bias": (H,), "2.weight": (None, H), "2.bias": (None,)})


def varied_spec() -> PermutationSpec:
    """Every way of lying in theta: both axes, one group twice, blocks, fixed in between, single entries, no axes."""
    axes = {
        "rows": (H, None),
        "scalar": (),
        "both": (G, H),
        "conv": (G, H, None, None),
        "twice": (H, H),
        "pointwise": (H, G, None),
        "flattened": (None, Axis("second", 6)),
        "flattened and permuted": (H, Axis("second", 2), None),
        "between": (G, None, H),
        "fixed": (None, None),
        "bias": (G,),
    }
    shapes = [(3, 5), (), (4, 3), (4, 3, 2, 2), (3, 3), (3, 4, 1), (5, 24), (3, 8, 2), (4, 2, 3), (2, 2), (4,)]
    return PermutationSpec(ParameterLayout(dict(zip(axes, shapes, strict=True))), axes)


def entry_by_entry(spec: PermutationSpec, theta: np.ndarray, permutations: dict[str, np.ndarray]) -> np.ndarray:
    """One theta reordered by the definition alone: parameter after parameter, dimension after dimension."""
    parts = []
    for name, axes in spec.axes.items():
        tensor = theta[spec.layout.spans[name]].reshape(spec.layout.shapes[name])
        for dim, axis in enumerate(axes):
            if axis is not None:
                units = permutations[axis.group]
                order = (units[:, None] * axis.block + np.arange(axis.block)).reshape(-1)
                tensor = np.take(tensor, order, axis=dim)
        parts.append(tensor.reshape(-1))
    return np.concatenate(parts)


@pytest.mark.parametrize("spec", [mlp_spec(), varied_spec()], ids=["mlp", "varied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_apply_is_indexing_dimension_by_dimension(spec, dtype):
    theta = torch.arange(6 * spec.layout.size).view(6, -1).to(dtype)
    permutations = spec.draw(0, range(6))
    moved = spec.apply(theta, permutations)
    assert moved.dtype == dtype
    for i in range(6):
        one = {group: order[i].numpy() for group, order in permutations.items()}
        assert torch.equal(moved[i].double(), torch.from_numpy(entry_by_entry(spec, theta[i].double().numpy(), one)))


def test_more_dimensions_share_the_permutation_of_their_row():
    spec = varied_spec()
    pairs = torch.randn(3, 2, spec.layout.size)
    drawn = spec.draw(0, range(3))
    moved = spec.apply(pairs, drawn)
    for k in range(2):
        assert torch.equal(moved[:, k], spec.apply(pairs[:, k], drawn))
    alone = {group: order[1] for group, order in drawn.items()}
    assert torch.equal(spec.apply(pairs, alone)[1], moved[1])
    assert torch.equal(spec.apply(pairs[1, 0], alone), moved[1, 0])
    nested = {group: order.expand(2, -1, -1).movedim(1, 0) for group, order in drawn.items()}
    assert torch.equal(spec.apply(pairs, nested), moved)
    assert spec.apply(pairs[:0], spec.draw(0, [])).shape == (0, 2, spec.layout.size)


def test_theta_that_is_not_contiguous_and_theta_that_needs_gradients():
    spec = varied_spec()
    wide = torch.randn(3, 2 * spec.layout.size, dtype=torch.float64)
    drawn = spec.draw(1, range(3))
    assert torch.equal(spec.apply(wide[:, ::2], drawn), spec.apply(wide[:, ::2].clone(), drawn))
    theta = wide[:, ::2].clone().requires_grad_()
    weights = torch.randn_like(theta)
    (spec.apply(theta, drawn) * weights).sum().backward()
    assert torch.equal(theta.grad, spec.apply(weights, spec.inverse(drawn)))


def test_the_inverse_undoes():
    spec = varied_spec()
    theta, drawn = torch.randn(4, spec.layout.size), spec.draw(3, range(4))
    moved = spec.apply(theta, drawn)
    assert not torch.equal(moved, theta)
    assert torch.equal(spec.apply(moved, spec.inverse(drawn)), theta)


def test_a_draw_belongs_to_seed_stream_and_index_alone():
    spec = varied_spec()
    together = spec.draw(0, range(100))
    for indices in ([7], [99, 0, 50], torch.tensor([3, 98])):
        for group, order in spec.draw(0, indices).items():
            assert torch.equal(order, together[group][torch.as_tensor(indices)])
    for other in (spec.draw(1, range(100)), spec.draw(0, range(100), "another"), spec.draw(0, range(100, 200))):
        assert not torch.equal(other["second"], together["second"])


def test_draws_are_uniform_and_groups_independent():
    layout = ParameterLayout({"a": (3,), "b": (3,)})
    drawn = PermutationSpec(layout, {"a": (H,), "b": (G,)}).draw(0, range(36_000))
    number = {group: order @ torch.tensor([9, 3, 1]) for group, order in drawn.items()}
    counts = torch.unique(torch.stack([number["hidden"], number["second"]]), dim=1, return_counts=True)[1]
    assert len(counts) == 36
    assert ((counts - 1000).square() / 1000).sum() < 66.6  # chi-squared, 35 degrees of freedom: one in a thousand


def test_permutations_that_do_not_fit_are_refused():
    spec = mlp_spec()
    theta = torch.zeros(2, spec.layout.size)
    for bad, message in [
        ({}, r"permutations of \[\], expected those of \['hidden'\]"),
        ({"hidden": torch.zeros(2, 4).long()}, r"hidden: permutations of shape \(2, 4\), expected \(2, 5\)"),
        ({"hidden": torch.tensor([0, 1, 2, 3, 3]).expand(2, -1)}, "hidden: a unit that comes twice"),
        ({"hidden": torch.tensor([1, 2, 3, 4, 5]).expand(2, -1)}, r"hidden: an index outside 0\.\.4"),
        (spec.draw(0, range(3)), r"theta of shape \(2, 64\), permutations for \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            spec.apply(theta, bad)
    with pytest.raises(ValueError, match="theta has 63 entries"):
        spec.apply(theta[:, 1:], spec.draw(0, range(2)))


def test_declarations_that_do_not_fit_are_refused_in_one_line():
    layout, axes = mlp_spec().layout, dict(mlp_spec().axes)
    without = {name: axes[name] for name in ("0.weight", "0.bias", "2.weight")}
    for bad, message in [
        (without, r"2.bias: no axes given; declare 1"),
        ({**axes, "3.bias": (None,)}, r"3.bias: axes for a parameter that the layout lacks"),
        ({**axes, "2.weight": (H,)}, r"2.weight: 1 axes for shape \(4, 5\); declare 2"),
        ({**axes, "2.weight": (H, None)}, r"2.weight: 4 units in group 'hidden', which has 5 in 0.weight"),
        ({**axes, "2.weight": (None, Axis("hidden", 2))}, r"2.weight: a dimension of 5 in blocks of 2"),
        ({**axes, "2.weight": (None, Axis("hidden", 5))}, r"2.weight: 1 units in group 'hidden', which has 5"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            PermutationSpec(layout, bad)
        assert "\n" not in str(caught.value)


def test_json_and_back():
    spec = varied_spec()
    assert PermutationSpec.from_json(json.loads(json.dumps(spec.to_json(), sort_keys=True))) == spec
    for content in ({}, {"layout": [], "axes": {"a": 3}}, {"layout": spec.layout.to_json(), "axes": {"rows": [["x"]]}}):
        with pytest.raises(ValueError, match="not a permutation spec"):
            PermutationSpec.from_json(content)


def test_without_groups_nothing_moves():
    spec = PermutationSpec(ParameterLayout({"weight": (2, 3)}), {"weight": (None, None)})
    theta = torch.randn(4, 6)
    assert spec.draw(0, range(4)) == {}
    assert torch.equal(spec.apply(theta, {}), theta)


def test_check_invariance_distinguishes_right_wrong_and_nan():
    network = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4))
    right = mlp_spec()
    wrong = PermutationSpec(right.layout, {**right.axes, "0.bias": (None,)})
    thetas, inputs = torch.randn(4, right.layout.size), torch.randn(16, 7)
    assert check_invariance(forward_of(network), right, thetas, inputs) < 1e-12
    assert check_invariance(forward_of(network), wrong, thetas, inputs) > 1e-2
    thetas[1, 0] = float("nan")
    assert np.isnan(check_invariance(forward_of(network), right, thetas, inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_reorders_as_the_cpu_does(dtype):
    spec = varied_spec()
    theta, drawn = torch.randn(50, 2, spec.layout.size).to(dtype), spec.draw(0, range(50))
    there = {group: order.cuda() for group, order in drawn.items()}
    for permutations in (drawn, there):
        moved = spec.apply(theta.cuda(), permutations)
        assert moved.is_cuda
        assert torch.equal(moved.cpu(), spec.apply(theta, drawn))
