"""Networks as sets of unit vectors, and distances between them under the best matching of units.

Where no parameter has more than one permuted axis, the best permutation is a linear assignment of a group's units: each is a
vector of all that moves with it, fan-in, bias and fan-out.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from triptych_gpt.symmetry.spec import Axis, PermutationSpec


class UnitVectors:
    """theta as vectors of units, one set a group, and the entries that no permutation moves.

    A parameter with several permuted axes goes to the first one's group as norms over the others: these no permutation
    changes, and their differences bound the parameter's from below. exact: there is no such parameter.
    """

    def __init__(self, spec: PermutationSpec | None) -> None:
        self.spec = spec if spec is not None and spec.groups else None
        axes = [] if self.spec is None else self.spec.axes.values()
        self.exact = all(sum(axis is not None for axis in each) <= 1 for each in axes)

    def of(self, theta: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "n fixed"], list[Float[Tensor, "units n _"]]]:
        """What stays in place, and each group's units; all of theta stays where there is no spec."""
        if self.spec is None:
            return theta, []
        fixed, units = [theta[:, :0]], {group: [] for group in self.spec.groups}
        for name, values in self.spec.layout.unflatten(theta).items():
            axes = self.spec.axes[name]
            owner = next((dim for dim, axis in enumerate(axes) if axis is not None), None)
            if owner is None:
                fixed.append(values.flatten(1))
                continue
            values = _owner_first(values, axes, owner)
            units[axes[owner].group].append(values.flatten(2))
        return torch.cat(fixed, 1), [torch.cat(parts, 2) for parts in units.values() if parts]


def _owner_first(values: Tensor, axes: tuple[Axis | None, ...], owner: int) -> Float[Tensor, "units n *rest"]:
    """[n, *shape] with the owner's units in front, other permuted axes reduced to norms over their units."""
    others = [dim for dim, axis in enumerate(axes) if axis is not None and dim != owner]
    for dim in reversed(others):  # from the last, so that earlier dimensions keep their places
        values = values.unflatten(dim + 1, (-1, axes[dim].block)).movedim(dim + 1, -1)
    values = values.unflatten(owner + 1, (-1, axes[owner].block)).movedim(owner + 1, 0)
    return values.flatten(-len(others)).norm(dim=-1, keepdim=True) if others else values


def weighted(u: Float[Tensor, "*a k"]) -> Float[Tensor, "*a k2"]:
    """[-2u, |u|^2, 1], whose product with `augmented` of v is |u - v|^2."""
    return torch.cat([-2 * u, u.square().sum(-1, keepdim=True), u.new_ones(*u.shape[:-1], 1)], -1)


def augmented(v: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k2"]:
    """[v, 1, |v|^2]."""
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1), v.square().sum(-1, keepdim=True)], -1)


def lower_bound(
    own_fixed: Tensor, fixed: Tensor, own_units: list[Tensor], units: list[Tensor]
) -> Float[Tensor, "n block"]:
    """Squared distances, each unit compared with whichever is nearest rather than with one of its own.

    own_fixed [n, f] and own_units [n * units, k] as `weighted` makes them, fixed and units as `augmented` does.
    """
    lower = own_fixed @ fixed.T
    for u, v in zip(own_units, units, strict=True):
        pairs = (u @ v.flatten(0, 1).T).view(len(lower), -1, *v.shape[:2])  # [n, units of u, units of v, block]
        lower += torch.maximum(pairs.amin(2).sum(1), pairs.amin(1).sum(1))
    return lower


def squared_distances(
    parts: UnitVectors, a: Float[Tensor, "pairs D"], b: Float[Tensor, "pairs D"]
) -> Float[Tensor, " pairs"]:
    """Squared distances, units of b reordered as suits each pair best; of differences, so that copies are at zero."""
    (fixed_a, units_a), (fixed_b, units_b) = parts.of(a), parts.of(b)
    squared = (fixed_a - fixed_b).square().sum(1)
    for u, v in zip(units_a, units_b, strict=True):
        u, v = u.transpose(0, 1), v.transpose(0, 1)
        v = v.gather(1, assigned(u @ v.mT * -2)[:, :, None].expand_as(v))
        squared += (u - v).square().sum((1, 2))
    return squared


def assigned(costs: Float[Tensor, "pairs units units"]) -> Int[Tensor, "pairs units"]:
    """The unit that each unit gets where the sum of costs is least."""
    return torch.from_numpy(np.stack([linear_sum_assignment(each)[1] for each in costs.numpy()]))
