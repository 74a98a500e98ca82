"""Parameters as features of what permutes: of nothing, of a group's units, or of the edges between two groups' units."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from triptych_gpt.symmetry.spec import PermutationSpec


@dataclass(frozen=True)
class Part:
    """A parameter seen from the units that its axes belong to.

    groups: theirs, none to two, in the spec's order. features: entries of the parameter for each unit (or pair of units).
    """

    span: slice
    split: tuple[int, ...]  # the parameter's shape, permuting axes as (units, block)
    order: tuple[int, ...]  # of these dimensions: units first
    groups: tuple[str, ...]
    features: int

    def take(self, theta: Float[Tensor, "n D"]) -> Float[Tensor, "n *units features"]:
        """The parameter's entries, by unit."""
        value = theta[:, self.span].view(len(theta), *self.split)
        units = [self.split[dim] for dim in self.order[: len(self.groups)]]
        return value.permute(0, *(1 + dim for dim in self.order)).reshape(len(theta), *units, self.features)

    def put(self, entries: Float[Tensor, "n *units features"]) -> Float[Tensor, "n size"]:
        """What `take` took, back in the order of theta."""
        value = entries.reshape(len(entries), *(self.split[dim] for dim in self.order))
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return value.permute(0, *(1 + dim for dim in back)).reshape(len(entries), self.span.stop - self.span.start)


def parts_of(spec: PermutationSpec) -> list[Part]:
    """A part for each parameter, in the layout's order.

    Raises ValueError for a parameter with three permuting axes or more.
    """
    rank = {group: place for place, group in enumerate(spec.groups)}
    parts = []
    for name, axes in spec.axes.items():
        split: list[int] = []
        units: list[tuple[int, int, str]] = []  # rank of the group, dimension, group
        for axis, length in zip(axes, spec.layout.shapes[name], strict=True):
            if axis is not None:
                units.append((rank[axis.group], len(split), axis.group))
                split.append(length // axis.block)
            if axis is None or axis.block > 1:
                split.append(length if axis is None else axis.block)
        if len(units) > 2:
            raise ValueError(
                f"{name}: {len(units)} of its axes permute, neuron tokens know at most 2; use layer or chunk tokens"
            )
        units.sort()
        first = [dim for _, dim, _ in units]
        rest = [dim for dim in range(len(split)) if dim not in first]
        features = math.prod(split[dim] for dim in rest)
        groups = tuple(group for *_, group in units)
        parts.append(Part(spec.layout.spans[name], tuple(split), (*first, *rest), groups, features))
    return parts


def by_groups(parts: Sequence[Part]) -> dict[tuple[str, ...], list[Part]]:
    """Parts that lie between the same groups, together."""
    together: dict[tuple[str, ...], list[Part]] = {}
    for part in parts:
        together.setdefault(part.groups, []).append(part)
    return together
