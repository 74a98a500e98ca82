"""The protocols by which papers score the same predictions, by name: numbers of one do not compare with those of another.

    table = score(benchmark, predictions)

A protocol says whose box the threshold is a share of, along which side, in which frame, how points are averaged, whether the
bound counts, and which labels a mirrored picture has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate

from triptych_gangealing.keypoints.benchmarks import Benchmark
from triptych_gangealing.keypoints.pck import averaged

ALPHAS = (0.1, 0.05, 0.01)
REPEATS = 200


@dataclass(frozen=True)
class Protocol:
    """box: whose size alpha is a share of. side: its longer one, or each axis by its own. average: points pooled, or the mean of
    each pair's share. bound: whether a distance of exactly alpha x size is right. frame: pixels of the picture ("picture"), or of
    one that was resized to a square without keeping its shape, where the box's longer side is scaled by the factor of x, of y or
    by the smaller one. labels: "strict" exchanges left and right where one of both pictures is mirrored, and counts a point if
    both pictures have it then; "released" decides before the exchange what counts, as the released GANgealing code.
    """

    box: Literal["target", "source", "image"] = "target"
    side: Literal["longer", "axes"] = "longer"
    average: Literal["per point", "per image"] = "per point"
    bound: Literal["<=", "<"] = "<="
    frame: Literal["picture", "x", "y", "min"] = "picture"
    labels: Literal["strict", "released"] = "strict"


PROTOCOLS = {
    "strict": Protocol(),
    "as released": Protocol(labels="released"),
    "per image": Protocol(average="per image"),  # HPF, CHM, CATs
    "source box": Protocol(box="source"),
    "image size": Protocol(box="image"),  # CUB
    "each axis": Protocol(side="axes"),
    "bound excluded": Protocol(bound="<"),
    "square, scale of x": Protocol(frame="x"),
    "square, scale of y": Protocol(frame="y"),
    "square, smaller scale": Protocol(frame="min"),
}


@dataclass(frozen=True)
class Predictions:
    """Where a method finds each pair's source points in the target.

    points: (x, y) in pixels of the target, of every keypoint that the source has; NaN where the method gives none. corner: of the
    source's square, the point that the released code transfers for a keypoint which the source lacks; NaN by default.
    mirrored: pairs of which the method has mirrored one picture, so that left becomes right.
    """

    points: Float[Tensor, "n k 2"]
    mirrored: Bool[Tensor, " n"]
    corner: Float[Tensor, "n 2"] | None = None

    @classmethod
    def of(cls, points: Float[Tensor, "n k 2"]) -> "Predictions":
        """Of a method that mirrors nothing."""
        return cls(points, torch.zeros(len(points), dtype=torch.bool))


class Scored(NamedTuple):
    """PCK of one protocol at one alpha, 0 to 1. pairs, images: with 95% intervals over pairs, and over target pictures."""

    alpha: float
    points: int
    pairs: Estimate
    images: Estimate


def score(
    benchmark: Benchmark,
    predictions: Predictions,
    protocols: Mapping[str, Protocol] = PROTOCOLS,
    alphas: Sequence[float] = ALPHAS,
    *,
    repeats: int = REPEATS,
    seed: int = 0,
) -> dict[str, list[Scored]]:
    """PCK by every protocol. Raises ValueError for predictions of another shape, or where no point counts."""
    expected = (*benchmark.listed.shape, 2)
    if predictions.points.shape != expected:
        raise ValueError(
            f"predictions {tuple(predictions.points.shape)}: expected {expected}, a point for each keypoint"
        )
    found = {}
    for name, protocol in protocols.items():
        distance, size, valid = measured(benchmark, predictions, protocol)
        if not bool(valid.any()):
            raise ValueError(f"{benchmark.name}: no keypoint that both pictures of a pair have; nothing to score")
        found[name] = [_scored(benchmark, distance, size, valid, protocol, alpha, repeats, seed) for alpha in alphas]
    return found


def measured(
    benchmark: Benchmark, predictions: Predictions, protocol: Protocol
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"], Bool[Tensor, "n k"]]:
    """Distances of predicted from true points, the sizes that alpha is a share of, and which points count.

    A point without a prediction has a distance that is not finite.
    """
    source, target = benchmark.pairs.unbind(1)
    exchange = torch.where(predictions.mirrored[:, None], benchmark.mirrored, torch.arange(len(benchmark.mirrored)))
    predicted = predictions.points.double().gather(1, exchange[:, :, None].expand(-1, -1, 2))
    truth = benchmark.points[target].double()
    has = (~benchmark.points.isnan().any(-1))[source], (~benchmark.points.isnan().any(-1))[target]
    lists = benchmark.listed
    if protocol.labels == "strict":
        # A pair's list names points that both pictures have; after the exchange, other ones are common to both.
        common = has[0].gather(1, exchange) & has[1]
        valid = torch.where(predictions.mirrored[:, None], common, common & lists)
    else:
        valid = lists & has[0] & has[1]
        if predictions.corner is not None:
            lacking = ~has[0].gather(1, exchange)
            predicted = torch.where(lacking[:, :, None], predictions.corner.double()[:, None], predicted)
    delta = predicted - truth
    whole = benchmark.size.double()
    boxes = {"target": benchmark.box[target], "source": benchmark.box[source]}
    sides = (
        (boxes[protocol.box][:, 2:] - boxes[protocol.box][:, :2]).double() if protocol.box != "image" else whole[target]
    )
    if protocol.side == "axes":
        return (delta.abs() / sides[:, None]).amax(-1), torch.ones(len(delta), dtype=torch.float64), valid
    longer = sides.amax(1)
    if protocol.frame != "picture":
        scale = 1 / whole[target]  # to a square of side 1
        delta = delta * scale[:, None]
        chosen = {"x": scale[:, 0], "y": scale[:, 1], "min": scale.amin(1)}[protocol.frame]
        longer = longer * chosen
    return torch.linalg.vector_norm(delta, dim=-1), longer, valid


def _scored(
    benchmark: Benchmark,
    distance: Tensor,
    size: Tensor,
    valid: Tensor,
    protocol: Protocol,
    alpha: float,
    repeats: int,
    seed: int,
) -> Scored:
    radius = alpha * size[:, None]
    hits = (distance <= radius if protocol.bound == "<=" else distance < radius) & valid  # never true of NaN
    estimates = [
        averaged(hits, valid, protocol.average, repeats=repeats, seed=seed, groups=groups)
        for groups in (None, benchmark.pairs[:, 1])
    ]
    return Scored(alpha, int(valid.sum()), *estimates)


def by_attribute(
    benchmark: Benchmark, predictions: Predictions, alpha: float = ALPHAS[0], *, repeats: int = REPEATS, seed: int = 0
) -> dict[str, dict[int, Scored]]:
    """Strict PCK of the pairs with each value of each attribute.  [thesis Fig. 4.7]"""
    found: dict[str, dict[int, Scored]] = {}
    for name, values in benchmark.attributes.items():
        for value in values.unique().tolist():
            here = (values == value).nonzero()[:, 0]
            part = benchmark.select(here)
            corner = None if predictions.corner is None else predictions.corner[here]
            own = Predictions(predictions.points[here], predictions.mirrored[here], corner)
            distance, size, valid = measured(part, own, PROTOCOLS["strict"])
            if bool(valid.any()):
                scored = _scored(part, distance, size, valid, PROTOCOLS["strict"], alpha, repeats, seed)
                found.setdefault(name, {})[value] = scored
    return found


def as_rows(methods: Mapping[str, Mapping[str, Sequence[Scored]]], alpha: float) -> tuple[list[str], list[list[str]]]:
    """A table: a row for each method, a column for each protocol, in percent, and how far the protocols are apart."""
    names = list(next(iter(methods.values())))
    rows = []
    for method, scores in methods.items():
        values = [next(one for one in scores[name] if one.alpha == alpha).pairs.value for name in names]
        rows.append([method, *(f"{100 * value:.1f}" for value in values), f"{100 * (max(values) - min(values)):.1f}"])
    return ["method", *names, "spread"], rows


def plain(scores: Mapping[str, Sequence[Scored]]) -> dict[str, Any]:
    """Scores as JSON can hold them."""
    return {
        name: [
            {
                "alpha": one.alpha,
                "points": one.points,
                "over pairs": one.pairs._asdict(),
                "over images": one.images._asdict(),
            }
            for one in several
        ]
        for name, several in scores.items()
    }
