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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise, product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from triptych_common import randomness

from triptych_gpt.layout import Functional, ParameterLayout


@dataclass(frozen=True)
class Axis:
    """A dimension whose entries move with a group's units: unit i is entries i*block .. (i+1)*block - 1."""

    group: str
    block: int = 1  # more after a feature map was flattened: a channel's height x width columns move as one


Factor = tuple[str | None, int]  # a group or None, and how many units or entries


@dataclass(frozen=True)
class Blocks:
    """A dimension that consists of segments one after another, each the product of its factors, the last one changing fastest.

    The rows of four heads of eight channels are Blocks(((("heads", 4), ("channels", 8)),)); those of an LSTM's four gates are
    Blocks((((None, 4), ("hidden", 16)),)), and a concatenation has a segment for each part.
    """

    segments: tuple[tuple[Factor, ...], ...]

    def __post_init__(self) -> None:
        if not self.segments or not all(segment and min(n for _, n in segment) > 0 for segment in self.segments):
            raise ValueError(f"blocks {self.segments}: expected segments of factors (group or None, 1 or more)")


Entry = Axis | Blocks | None


def segments_of(entry: Entry, length: int) -> tuple[tuple[Factor, ...], ...]:
    """A dimension's segments, whichever way they are declared. Raises ValueError if they are not `length` entries."""
    if isinstance(entry, Blocks):
        lengths = [math.prod(n for _, n in segment) for segment in entry.segments]
        if sum(lengths) != length:
            raise ValueError(f"a dimension of {length} in segments of {lengths}; they must add up to it")
        return entry.segments
    if entry is None:
        return (((None, length),),)
    if entry.block < 1 or length % entry.block:
        raise ValueError(f"a dimension of {length} in blocks of {entry.block}; they must divide it")
    units = (entry.group, length // entry.block)
    return ((units, (None, entry.block)),) if entry.block > 1 else ((units,),)


@dataclass(frozen=True)
class Piece:
    """The part of a parameter in one segment of each of its dimensions, indexed by the factors of these segments."""

    name: str
    span: slice  # of the parameter
    shape: tuple[int, ...]  # of the parameter
    where: tuple[slice, ...]  # in each of its dimensions
    factors: tuple[tuple[Factor, ...], ...]  # of each of its dimensions

    @property
    def dims(self) -> list[Factor]:
        return [factor for factors in self.factors for factor in factors]

    def view(self, theta: Float[Tensor, "*batch D"]) -> Tensor:
        """These entries of theta, [*batch, *dims]; a view."""
        value = theta[..., self.span].unflatten(-1, self.shape)[(..., *self.where)]
        for dim, factors in reversed(list(enumerate(self.factors, start=theta.ndim - 1))):
            value = value.unflatten(dim, [n for _, n in factors])
        return value


@dataclass(frozen=True)
class PermutationSpec:
    """The axes of a network's parameters that share permutations.  [thesis 3.2.1]

    axes: an entry for each dimension of every parameter, None if it is fixed; `Blocks` where one group is not enough.
    Raises ValueError if parameters or dimensions lack an entry, or if sizes do not agree within a group.
    """

    layout: ParameterLayout
    axes: Mapping[str, tuple[Entry, ...]]

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
    def pieces(self) -> list[Piece]:
        """The pieces of every parameter, in order of theta; most parameters are a single one."""
        pieces = []
        for name, entries in self.axes.items():
            shape = self.layout.shapes[name] or (1,)
            try:
                segments = [segments_of(*pair) for pair in zip(entries or (None,), shape, strict=True)]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            ends = [accumulate((math.prod(n for _, n in one) for one in each), initial=0) for each in segments]
            places = [[slice(*pair) for pair in pairwise(each)] for each in ends]
            for chosen in product(*map(zip, segments, places)):
                factors, where = zip(*chosen, strict=True)
                pieces.append(Piece(name, self.layout.spans[name], shape, where, factors))
        return pieces

    @cached_property
    def groups(self) -> dict[str, int]:
        """Number of units of every group, in order of appearance."""
        groups: dict[str, int] = {}
        first: dict[str, str] = {}
        for piece in self.pieces:
            for group, units in piece.dims:
                if group is not None and groups.setdefault(group, units) != units:
                    known = f"{groups[group]} in {first[group]}; give them different groups or another block"
                    raise ValueError(f"{piece.name}: {units} units in group {group!r}, which has {known}")
                first.setdefault(str(group), piece.name)
        return groups

    def without(self, groups: Collection[str]) -> "PermutationSpec":
        """The spec with these groups fixed."""
        axes: dict[str, tuple[Entry, ...]] = {}
        for name, entries in self.axes.items():
            named = [segments_of(*pair) for pair in zip(entries, self.layout.shapes[name], strict=True)]
            axes[name] = tuple(
                Blocks(tuple(tuple((None if g in groups else g, n) for g, n in segment) for segment in each))
                for each in named
            )
        return PermutationSpec(self.layout, axes)

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
        for view, dims in self._moves:
            _move(view(source), view(target), dims, *tables)
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
    def _moves(self) -> list[tuple[Callable[[Tensor], Tensor], list[Factor]]]:
        """What to move at once: views of theta by factors; neighbours that stay, within a tensor or not, are merged."""
        moves: list[tuple[Callable[[Tensor], Tensor], list[Factor]]] = []
        for piece in self.pieces:
            if piece.where != tuple(slice(0, length) for length in piece.shape):
                moves.append((piece.view, piece.dims))
                continue
            dims: list[Factor] = []
            for group, length in piece.dims:
                if dims and group is None and dims[-1][0] is None:
                    dims[-1] = (None, dims[-1][1] * length)
                elif length > 1 or not dims:
                    dims.append((group, length))
            span = piece.span
            if len(dims) == 1 and dims[0][0] is None and moves and isinstance(moves[-1][0], _Stretch):
                before = moves[-1][0]
                if before.lengths is None and before.span.stop == span.start:
                    moves.pop()
                    span = slice(before.span.start, span.stop)
            fixed = all(group is None for group, _ in dims)
            moves.append((_Stretch(span, None if fixed else [n for _, n in dims]), [] if fixed else dims))
        return moves

    def to_json(self) -> dict[str, Any]:
        """{"layout": ..., "axes": {name: [null, [group, block] or segments [[[group or null, units], ...], ...], ...]}}."""
        return {
            "layout": self.layout.to_json(),
            "axes": {name: list(map(_json, axes)) for name, axes in self.axes.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "PermutationSpec":
        """The inverse of `to_json`. Raises ValueError for anything else."""
        try:
            axes, layout = {}, content["layout"]
            for name, entries in content["axes"].items():
                axes[name] = tuple(map(_entry, entries))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError('not a permutation spec; expected {"layout": ..., "axes": {name: [...]}}') from error
        return cls(ParameterLayout.from_json(layout), axes)


@contextmanager
def mha_fastpath(*, enabled: bool) -> Iterator[None]:
    """Whether attention layers may take a fused path in evaluation, which neither vmap nor tracing can see through."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def forward_of(network: nn.Module) -> Callable[[Tensor, Any], Tensor]:
    """The network in evaluation mode and float64 as a function of (theta [D], inputs)."""
    network = copy.deepcopy(network).eval().double()
    layout, call = ParameterLayout.of(network), Functional(network)

    def forward(theta: Float[Tensor, " D"], inputs: Any) -> Tensor:
        with mha_fastpath(enabled=False):  # its sums have another order, and less precision
            return call(layout.unflatten(theta), inputs)

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


def _json(entry: Entry) -> list[Any] | None:
    if isinstance(entry, Blocks):
        return [[list(factor) for factor in segment] for segment in entry.segments]
    return None if entry is None else [entry.group, entry.block]


def _entry(content: Any) -> Entry:
    """The inverse of `_json`."""
    if content is None:
        return None
    if isinstance(content[0], str):
        return Axis(content[0], int(content[1]))
    named = [[(None if group is None else str(group), int(n)) for group, n in segment] for segment in content]
    return Blocks(tuple(map(tuple, named)))


@dataclass(frozen=True)
class _Stretch:
    """theta from one place to another, as dimensions of these lengths."""

    span: slice
    lengths: Sequence[int] | None

    def __call__(self, theta: Tensor) -> Tensor:
        stretch = theta[..., self.span]
        return stretch if self.lengths is None else stretch.unflatten(-1, self.lengths)


def _move(
    source: Float[Tensor, "more n *dims"],
    target: Float[Tensor, "more n *dims"],
    dims: Sequence[Factor],
    forward: Mapping[str, Int[Tensor, "n _"]],
    backward: Mapping[str, Int[Tensor, "n _"]],
) -> None:
    """Copy some entries of theta into their reordered places."""
    # Contiguous runs are written whole where they belong, as fast as a plain copy; gather takes an index for each entry. Only a
    # last dimension that is permuted itself, so that runs have one entry, is gathered first.
    groups, lengths = [group for group, _ in dims], [length for _, length in dims]
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
