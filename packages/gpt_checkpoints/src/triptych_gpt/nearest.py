"""The nearest of very many checkpoints to a network, in plain distance or under the best matching of hidden units.

Checkpoints are streamed from the zoo in blocks. A product of matrices bounds the distance of every pair from below, and pairs
are compared exactly, in order of their bounds, only while the bound beats the best distance so far.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from triptych_gpt.symmetry.matching import match
from triptych_gpt.symmetry.spec import PermutationSpec
from triptych_gpt.zoo.zoo import Zoo

_BLOCK = 512  # checkpoints bounded at a time, fewer where theta is long
_PAIR_FLOATS = 1 << 20  # pairwise unit distances at a time: about what a core's cache holds
_THETA_FLOATS = 1 << 22  # entries of thetas in memory at a time


class UnitVectors:
    """theta as vectors of units, one set for each group, and the entries that no permutation moves.

    exact: whether every parameter has one permuting axis at most. One with several goes to the first one's group as norms over the
    others, which no permutation changes, and whose differences bound the parameter's from below.
    """

    def __init__(self, spec: PermutationSpec | None) -> None:
        self.spec = spec if spec is not None and spec.groups else None
        pieces = [] if self.spec is None else self.spec.pieces
        self.exact = all(sum(group is not None for group, _ in piece.dims) <= 1 for piece in pieces)

    def of(self, theta: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "n fixed"], list[Float[Tensor, "units n _"]]]:
        """What stays in place (all of theta without a spec), and each group's units."""
        if self.spec is None:
            return theta, []
        fixed = [theta[:, :0]]
        units: dict[str, list[Tensor]] = {group: [] for group in self.spec.groups}
        for piece in self.spec.pieces:
            values = piece.view(theta)
            permuting = [dim for dim, (group, _) in enumerate(piece.dims) if group is not None]
            if not permuting:
                fixed.append(values.flatten(1))
                continue
            group = piece.dims[permuting[0]][0]
            assert group is not None
            units[group].append(_owner_first(values, permuting).flatten(2))
        return torch.cat(fixed, 1), [torch.cat(parts, 2) for parts in units.values() if parts]


def _owner_first(values: Float[Tensor, "n *dims"], permuting: Sequence[int]) -> Float[Tensor, "units n *rest"]:
    """The units of the first permuting dimension in front, reduced to norms over the units of the others."""
    owner, *others = permuting
    values = values.movedim([owner + 1, *(dim + 1 for dim in others)], [0, *range(-len(others), 0)])
    values = values[..., None] if values.ndim - len(others) == 2 else values  # a feature, if there is none
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
    """Bounds of squared distances from below, each unit compared with the nearest one instead of the one assigned to it.

    own_fixed [n, f] and own_units [n * units, k] as from `weighted`, fixed and units as from `augmented`.
    """
    lower = own_fixed @ fixed.T
    for u, v in zip(own_units, units, strict=True):
        pairs = (u @ v.flatten(0, 1).T).view(len(lower), -1, *v.shape[:2])  # n, units of u, units of v, block
        # Every unit has one partner: neither side's sum of distances to its nearest can exceed that of the assignment.
        lower += torch.maximum(pairs.amin(2).sum(1), pairs.amin(1).sum(1))
    return lower


def squared_distances(
    parts: UnitVectors, a: Float[Tensor, "pairs D"], b: Float[Tensor, "pairs D"]
) -> Float[Tensor, " pairs"]:
    """Squared distances, the units of b reordered as suits each pair best."""
    # Of differences, not by |a|^2 - 2ab + |b|^2, so that copies are at exactly zero.
    (fixed_a, units_a), (fixed_b, units_b) = parts.of(a), parts.of(b)
    squared = (fixed_a - fixed_b).square().sum(1)
    for u, v in zip(units_a, units_b, strict=True):
        u, v = u.transpose(0, 1), v.transpose(0, 1)
        v = v.gather(1, assigned(u @ v.mT * -2)[:, :, None].expand_as(v))
        squared += (u - v).square().sum((1, 2))
    return squared


def assigned(costs: Float[Tensor, "pairs units units"]) -> Int[Tensor, "pairs units"]:
    """The unit assigned to each unit, at the least sum of costs."""
    return torch.from_numpy(np.stack([linear_sum_assignment(each)[1] for each in costs.numpy()]))


@dataclass(frozen=True)
class Pool:
    """Checkpoints of a zoo to search: `checkpoints[i]` of the run at row `rows[i]`.

    values: a metric of each, ascending, if the search is to be restricted to those near a prompt.
    """

    zoo: Zoo
    rows: Int[Tensor, " m"]
    checkpoints: Int[Tensor, " m"]
    values: Float[Tensor, " m"] | None = None

    @classmethod
    def of(cls, zoo: Zoo, rows: Int[np.ndarray, " r"], every: int = 1, metric: str | None = None) -> "Pool":
        """Every k-th checkpoint of the runs at these rows, counted back from the last: `zoo.checkpoints` takes finals alone.

        With a metric, those whose metric is finite, in its order.
        """
        if every < 1:
            raise ValueError(f"every {every}: expected 1 or more, {zoo.checkpoints} for the final checkpoints alone")
        places, chosen = torch.arange(zoo.checkpoints - 1, -1, -every).flip(0), torch.as_tensor(rows)
        pool = cls(zoo, chosen.repeat_interleave(len(places)), places.repeat(len(chosen)))
        if metric is None:
            return pool
        values = zoo.metrics(metric)[pool.rows, pool.checkpoints]
        order = values.argsort(stable=True)
        order = order[values[order].isfinite()]
        return cls(zoo, pool.rows[order], pool.checkpoints[order], values[order])

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, size: int) -> Iterator[tuple[slice, Float[Tensor, "block D"]]]:
        """All thetas in order, in one buffer that is overwritten."""
        buffer = torch.empty(min(size, len(self)), self.zoo.layout.size)
        for start in range(0, len(self), size):
            here = slice(start, min(start + size, len(self)))
            yield here, self.zoo.theta(self.rows[here], self.checkpoints[here], buffer[: here.stop - here.start])


class Nearest(NamedTuple):
    """The checkpoint nearest to each of n networks; distance infinite, run and checkpoint -1 if none was admitted."""

    distance: Float[Tensor, " n"]  # Euclidean, in theta's units
    run: Int[Tensor, " n"]  # its number
    checkpoint: Int[Tensor, " n"]
    exact: bool = True  # otherwise distances are upper bounds


def nearest(
    samples: Float[Tensor, "n D"],
    pool: Pool,
    spec: PermutationSpec | None = None,
    *,
    target: Float[Tensor, " n"] | None = None,
    tolerance: float = math.inf,
    shortlist: int = 32,
) -> Nearest:
    """The checkpoint of the pool nearest to each sample; with a spec, under the best permutation of its units.

    target, tolerance: admit only checkpoints whose value in the pool is within tolerance of the sample's target.
    shortlist: results are exact if each parameter has one permuting axis at most, as in networks of one hidden layer. In others,
    `match` finds a local optimum for this many checkpoints of lowest bound: an upper bound on the distance.

    Bounds are computed on the samples' device. Raises ValueError for samples that do not fit or are not finite.
    """
    pool.zoo.layout.check(samples)
    if not samples.isfinite().all():
        bad = int((~samples.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"sample {bad} has entries that are not finite; leave such networks out")
    if target is not None and pool.values is None:
        raise ValueError("target: the pool's checkpoints have no values; make the pool with metric=")
    search = _Search(samples, pool, UnitVectors(spec), target, tolerance)
    if len(samples) and search.parts.exact:
        search.compare_as_bounded()
    elif len(samples):
        search.compare_shortlist(shortlist)
    found = search.best_place >= 0
    place = search.best_place.clamp(min=0)
    distance, run, checkpoint = search.best.sqrt(), torch.full_like(place, -1), torch.full_like(place, -1)
    if len(pool):
        numbers = torch.from_numpy(pool.zoo.runs.run)
        run = torch.where(found, numbers[pool.rows[place]], -1)
        checkpoint = torch.where(found, pool.checkpoints[place], -1)
    return Nearest(distance, run, checkpoint, search.parts.exact)


class _Block(NamedTuple):
    """A stretch of the pool, and bounds of its squared distances to the samples."""

    start: int
    theta: Float[Tensor, "block D"]
    fixed: Tensor  # on the samples' device, as from `augmented`
    units: list[Tensor]
    lower: Float[Tensor, "n block"]  # less `error`; infinite if not admitted
    error: Float[Tensor, "n block"]  # that float32 may have made


class _Search:
    """The best squared distances so far, and their places in the pool."""

    def __init__(
        self, samples: Float[Tensor, "n D"], pool: Pool, parts: UnitVectors, target: Float[Tensor, " n"] | None,
        tolerance: float,
    ) -> None:  # fmt: skip
        self.pool, self.parts, self.tolerance = pool, parts, tolerance
        self.target = None if target is None else target.detach().cpu().double()
        self.device = samples.device
        self.samples = samples.detach().cpu().double()
        # Neighbours in target admit the same checkpoints, so that whole pieces of a sorted pool can be left out.
        order = torch.arange(len(samples)) if self.target is None else self.target.argsort()
        fixed, units = parts.of(samples.detach().float())
        self.fixed, self.units = weighted(fixed), [weighted(u.transpose(0, 1)) for u in units]
        per_sample = max([1, *(len(u) ** 2 for u in units)]) * _BLOCK
        chunks = order.split(max(1, _PAIR_FLOATS // per_sample))
        self.chunks = [(rows, self.fixed[rows], [u[rows].flatten(0, 1) for u in self.units]) for rows in chunks]
        self.squares = self.samples.square().sum(1)
        self.best = torch.full((len(samples),), math.inf, dtype=torch.float64)
        self.best_place = torch.full((len(samples),), -1)

    def bounds(self) -> Iterator["_Block"]:
        size = max(16, min(_BLOCK, _THETA_FLOATS // self.pool.zoo.layout.size))
        for here, theta in self.pool.blocks(size):
            admitted = self._admitted(here)
            if admitted is not None and not admitted.any():
                continue
            on_device = theta.to(self.device)
            fixed, units = self.parts.of(on_device)
            fixed, units = augmented(fixed), [augmented(u) for u in units]
            lower = torch.full((len(self.samples), len(theta)), math.inf)
            for rows, own_fixed, own_units in self.chunks:
                if admitted is None or admitted[rows].any():
                    lower[rows] = lower_bound(own_fixed, fixed, own_units, units).cpu()
            # Several times the largest error seen in float32 products of this length.
            rounding = 4 * math.sqrt(self.pool.zoo.layout.size) * torch.finfo(torch.float32).eps
            error = rounding * (self.squares[:, None].float() + theta.square().sum(1))
            lower = lower.sub_(error)
            if admitted is not None:
                lower.masked_fill_(~admitted, math.inf)
            yield _Block(here.start, theta, fixed, units, lower, error)

    def _admitted(self, here: slice) -> Tensor | None:
        if self.target is None:
            return None
        assert self.pool.values is not None  # refused by `nearest`
        return (self.pool.values[here].double() - self.target[:, None]).abs() <= self.tolerance

    def compare_as_bounded(self) -> None:
        for block in self.bounds():
            at_once = 1  # the most promising alone, which usually rules out the others
            while (promising := block.lower < self.best[:, None]).any():
                some = min(at_once, int(promising.sum(1).max()))
                bound, columns = block.lower.topk(some, dim=1, largest=False)
                rows, which = (bound < self.best[:, None]).nonzero(as_tuple=True)
                columns = columns[rows, which]
                for part in torch.arange(len(rows)).split(max(1, _THETA_FLOATS // self.pool.zoo.layout.size)):
                    self._compare(rows[part], columns[part], block)
                block.lower[rows, columns] = math.inf
                at_once *= 4

    def _compare(self, rows: Int[Tensor, " p"], columns: Int[Tensor, " p"], block: "_Block") -> None:
        """Pairs of sample and checkpoint: by an assignment in float32 first, and in float64 if that may be the best."""
        if self.units:
            on_device = rows.to(self.device), columns.to(self.device)
            squared = (self.fixed[on_device[0]] * block.fixed[on_device[1]]).sum(1).cpu()
            for u, v in zip(self.units, block.units, strict=True):
                costs = torch.bmm(u[on_device[0]], v[:, on_device[1]].permute(1, 2, 0)).cpu()
                squared += costs.gather(2, assigned(costs)[:, :, None]).sum((1, 2))
            better = squared - block.error[rows, columns] < self.best[rows]
            rows, columns = rows[better], columns[better]
        if len(rows):
            squared = squared_distances(self.parts, self.samples[rows], block.theta[columns].double())
            self._note(rows, block.start + columns, squared)

    def compare_shortlist(self, size: int) -> None:
        lowest = torch.full((len(self.samples), 0), math.inf)
        places = torch.zeros(lowest.shape, dtype=torch.long)
        for block in self.bounds():
            lowest = torch.cat([lowest, block.lower], 1)
            here = torch.arange(block.start, block.start + len(block.theta))
            places = torch.cat([places, here.expand(len(lowest), -1)], 1)
            lowest, columns = lowest.topk(min(size, lowest.shape[1]), dim=1, largest=False)
            places = places.gather(1, columns)
        for row, sample in enumerate(self.samples):
            mine = places[row][lowest[row] < math.inf]
            if len(mine):
                theta = self.pool.zoo.theta(self.pool.rows[mine], self.pool.checkpoints[mine]).double()
                assert self.parts.spec is not None  # without one, bounds are exact
                theta = self.parts.spec.apply(theta, match(self.parts.spec, theta, sample))
                self._note(torch.full_like(mine, row), mine, (theta - sample).square().sum(1))

    def _note(self, rows: Int[Tensor, " p"], places: Int[Tensor, " p"], squared: Float[Tensor, " p"]) -> None:
        order = squared.argsort(descending=True)  # so that the nearest of a row is written last
        order = order[squared[order] < self.best[rows[order]]]
        for at in order.tolist():
            self.best[rows[at]], self.best_place[rows[at]] = squared[at], places[at]
