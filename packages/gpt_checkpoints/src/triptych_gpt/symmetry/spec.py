"""Permutation symmetry of a network: which axes of its parameters may be reordered together without changing its function.

`triptych_gpt.symmetry.derivation` derives a spec from a network of known layers. For other networks it is written by hand:

    spec = PermutationSpec(layout, {
        "hidden.weight": (Axis("hidden"), None), "hidden.bias": (Axis("hidden"),),
        "out.weight": (None, Axis("hidden")), "out.bias": (None,),
    })

G.pt's augmentation permutes theta and theta* alike, afresh for every sample:

    pairs = torch.stack([theta, theta_star], dim=1)                      # (n, 2, D)
    theta, theta_star = spec.apply(pairs, spec.draw(seed, indices)).unbind(1)
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from triptych_common import randomness

from triptych_gpt.layout import ParameterLayout


@dataclass(frozen=True)
class Axis:
    """A dimension whose entries move with a group's units: unit i is entries i*block .. (i+1)*block - 1."""

    group: str
    block: int = 1  # more after a feature map was flattened: a channel's height x width columns move as one


@dataclass(frozen=True)
class PermutationSpec:
    """The axes of a network's parameters that share permutations.  [thesis 3.2.1]

    axes: an entry for each dimension of every parameter, None if it is fixed.
    Raises ValueError if parameters or dimensions lack an entry, or if sizes do not agree within a group.
    """

    layout: ParameterLayout
    axes: Mapping[str, tuple[Axis | None, ...]]

    def __post_init__(self) -> None:
        for name in self.axes:
            if name not in self.layout.shapes:
                some = ", ".join(self.layout.names[:3])
                raise ValueError(f"{name}: axes for a parameter that the layout lacks; expected names such as {some}")
        for name, shape in self.layout.shapes.items():
            if name not in self.axes:
                raise ValueError(f"{name}: no axes given; declare {len(shape)}, None for those that stay fixed")
            if len(self.axes[name]) != len(shape):
                raise ValueError(f"{name}: {len(self.axes[name])} axes for shape {shape}; declare {len(shape)}")
        object.__setattr__(self, "axes", {name: tuple(self.axes[name]) for name in self.layout.shapes})
        _ = self.groups  # checks sizes

    @cached_property
    def groups(self) -> dict[str, int]:
        """Number of units of every group, in order of appearance."""
        groups: dict[str, int] = {}
        first: dict[str, str] = {}
        for name, axes in self.axes.items():
            for axis, length in zip(axes, self.layout.shapes[name], strict=True):
                if axis is None:
                    continue
                if axis.block < 1 or length % axis.block:
                    raise ValueError(f"{name}: a dimension of {length} in blocks of {axis.block}; they must divide it")
                units = length // axis.block
                if groups.setdefault(axis.group, units) != units:
                    known = f"{groups[axis.group]} in {first[axis.group]}; give them different groups or another block"
                    raise ValueError(f"{name}: {units} units in group {axis.group!r}, which has {known}")
                first.setdefault(axis.group, name)
        return groups

    def draw(
        self, seed: int, indices: Sequence[int] | Int[Tensor, " n"], stream: str = "permute"
    ) -> dict[str, Int[Tensor, "n _"]]:
        """Uniformly random permutations of every group on the CPU, a function of the seed, the stream and each index alone."""
        samples = np.asarray(indices, dtype=np.uint64)[:, None]
        drawn = {}
        for group, units in self.groups.items():
            counters = (samples * np.uint64(units) + np.arange(units, dtype=np.uint64)).reshape(-1)
            # A memoryview is a sequence of integers that numpy takes as it is; a list would cost more than the sampling.
            keys = randomness.uniform(seed, f"{stream}/{group}", counters.data)
            drawn[group] = torch.from_numpy(keys.numpy().reshape(-1, units).argsort(axis=-1, kind="stable"))
        return drawn

    def apply(
        self, theta: Float[Tensor, "*batch D"], permutations: Mapping[str, Int[Tensor, "*n _"]]
    ) -> Float[Tensor, "*batch D"]:
        """theta with its units reordered, in a new tensor: unit i of a group is unit permutations[group][..., i] of theta.

        theta: [*n, *more, D], of any floating type on any device. permutations: [*n, units] for every group, each for all of *more;
        so one permutation moves theta and theta* of [n, 2, D].
        Raises ValueError for groups, sizes or batches that do not fit, or for indices that are no permutation.
        """
        self.layout.check(theta)
        inverse = self.inverse(permutations)
        batch = next((tuple(p.shape[:-1]) for p in inverse.values()), ())
        if tuple(theta.shape[:-1])[: len(batch)] != batch:
            raise ValueError(f"theta of shape {tuple(theta.shape)}, permutations for {batch}; draw one for each")
        out = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
        if not theta.numel():
            return out
        n = math.prod(batch)
        source, target = (x.view(n, -1, self.layout.size).movedim(1, 0) for x in (theta.contiguous(), out))  # more n D
        tables = [
            {group: p.reshape(n, -1).to(theta.device, torch.long) for group, p in each.items()}
            for each in (permutations, inverse)
        ]
        for span, dims in self._moves:
            _move(source[..., span], target[..., span], dims, *tables)
        return out

    def inverse(self, permutations: Mapping[str, Int[Tensor, "*n _"]]) -> dict[str, Int[Tensor, "*n _"]]:
        """The permutations that undo these. Raises ValueError for groups or sizes that are not this spec's, and on the CPU also
        for indices that are no permutation."""
        if permutations.keys() != self.groups.keys():
            expected = f"expected those of {sorted(self.groups)}; draw them from this spec"
            raise ValueError(f"permutations of {sorted(permutations)}, {expected}")
        inverses, batch = {}, None
        for group, units in self.groups.items():
            forward = permutations[group].long()
            batch = forward.shape[:-1] if batch is None else batch
            if tuple(forward.shape) != (*batch, units):
                raise ValueError(f"{group}: permutations of shape {tuple(forward.shape)}, expected {(*batch, units)}")
            # Checked on the CPU alone: a device would have to be waited for.
            checkable = forward.device.type == "cpu"
            if checkable and ((forward < 0) | (forward >= units)).any():
                raise ValueError(f"{group}: an index outside 0..{units - 1}; give permutations of {units} units")
            places = torch.arange(units, device=forward.device).expand_as(forward)
            inverses[group] = torch.full_like(forward, -1).scatter_(-1, forward, places)
            if checkable and (inverses[group] < 0).any():
                raise ValueError(f"{group}: a unit that comes twice; give permutations of {units} units")
        return inverses

    @cached_property
    def _moves(self) -> list[tuple[slice, list[tuple[int, str | None]]]]:
        """Stretches of theta to move at once, each as dimensions (length, group or None); neighbours that stay are merged."""
        moves: list[tuple[slice, list[tuple[int, str | None]]]] = []
        for name, axes in self.axes.items():
            span, dims = self.layout.spans[name], list[tuple[int, str | None]]()
            for axis, length in zip(axes, self.layout.shapes[name], strict=True):
                block = length if axis is None else axis.block
                dims += [] if axis is None else [(length // block, axis.group)]
                if dims and dims[-1][1] is None:
                    dims[-1] = (dims[-1][0] * block, None)
                elif block > 1:
                    dims.append((block, None))
            fixed = all(group is None for _, group in dims)
            if fixed and moves and all(group is None for _, group in moves[-1][1]):
                span = slice(moves.pop()[0].start, span.stop)
            moves.append((span, [] if fixed else dims))
        return moves

    def to_json(self) -> dict[str, Any]:
        """{"layout": ..., "axes": {name: [null or [group, block], ...]}}."""
        axes = {name: [axis and [axis.group, axis.block] for axis in axes] for name, axes in self.axes.items()}
        return {"layout": self.layout.to_json(), "axes": axes}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "PermutationSpec":
        """The inverse of `to_json`. Raises ValueError for anything else."""
        try:
            axes, layout = {}, content["layout"]
            for name, entries in content["axes"].items():
                axes[name] = tuple(None if axis is None else Axis(str(axis[0]), int(axis[1])) for axis in entries)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError('not a permutation spec; expected {"layout": ..., "axes": {name: [...]}}') from error
        return cls(ParameterLayout.from_json(layout), axes)


def forward_of(network: nn.Module) -> Callable[[Tensor, Any], Tensor]:
    """The network in evaluation mode and float64 as a function of (theta [D], inputs)."""
    network = copy.deepcopy(network).eval().double()
    layout = ParameterLayout.of(network)

    def forward(theta: Float[Tensor, " D"], inputs: Any) -> Tensor:
        return functional_call(network, layout.unflatten(theta), (inputs,))

    return forward


def check_invariance(
    forward: Callable[[Tensor, Any], Tensor], spec: PermutationSpec, thetas: Float[Tensor, "n D"], inputs: Any
) -> float:
    """Largest absolute change of an output when each theta's units are permuted at random; NaN if an output is.

    forward: outputs of (theta [D] in float64, inputs), such as `forward_of` a network. A right spec stays below 1e-12 for outputs
    of about 1. Several thetas are needed: a small group's random permutation may be the identity.
    """
    thetas = thetas.double()
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        inputs = inputs.double()
    permuted = spec.apply(thetas, spec.draw(0, range(len(thetas)), "check-invariance"))
    with torch.no_grad():
        pairs = ((forward(a, inputs), forward(b, inputs)) for a, b in zip(thetas, permuted, strict=True))
        changes = [(before - after).abs().max() for before, after in pairs]
    return torch.stack(changes).max().item()  # torch's max, unlike Python's, returns NaN if there is one


def _move(
    source: Float[Tensor, "more n _"],
    target: Float[Tensor, "more n _"],
    dims: Sequence[tuple[int, str | None]],
    forward: Mapping[str, Int[Tensor, "n _"]],
    backward: Mapping[str, Int[Tensor, "n _"]],
) -> None:
    """Copy a stretch of theta into its reordered place."""
    # Contiguous runs are written whole where they belong, as fast as a plain copy; gather takes an index for each entry. Only a
    # last dimension that is permuted itself, so that runs have one entry, is gathered first.
    lengths, groups = [length for length, _ in dims], [group for _, group in dims]
    if dims:
        source, target = source.unflatten(-1, lengths), target.unflatten(-1, lengths)
    last = groups[-1] if groups else None
    if last is not None:
        groups.pop()
        order = forward[last]
        source = source.gather(-1, _beside(order, len(dims) - 1, len(dims)).expand(source.shape))
    while groups and groups[-1] is None:
        groups.pop()
    if not groups:
        target.copy_(source)
        return
    places = [
        _beside(torch.arange(length, device=source.device)[None] if group is None else backward[group], i, len(groups))
        for i, (length, group) in enumerate(zip(lengths, groups, strict=False))
    ]
    rows = torch.arange(source.shape[1], device=source.device)
    where: tuple[Any, ...] = (slice(None), rows.view(-1, *[1] * len(groups)), *places)
    target[where] = source


def _beside(order: Int[Tensor, "n units"], position: int, dims: int) -> Tensor:
    """[n, units] as [n, 1, ..., units, ..., 1], units at `position` of `dims` dimensions."""
    return order.view(len(order), *[1] * position, -1, *[1] * (dims - position - 1))
