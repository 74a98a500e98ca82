"""Methods that find a pair's source points in its target: by aligners, by matching features, and by nothing at all."""

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_common.progress import Progress

from triptych_gangealing.aligner import Aligner, Alignment
from triptych_gangealing.baselines.congealing import Congealing
from triptych_gangealing.baselines.features import Encoder, matched
from triptych_gangealing.baselines.moments import luma
from triptych_gangealing.keypoints.benchmarks import Benchmark
from triptych_gangealing.keypoints.protocols import Predictions
from triptych_gangealing.pictures import Picture, align_pictures, detail, from_square, square_of
from triptych_gangealing.warp import Affine, Warp

Transfer = Callable[[Benchmark], Predictions]
Align = Callable[[Iterable[Picture]], Alignment]
AT_ONCE = 256  # pairs
CONGEALED_PX = 32


def by_aligner(aligner: Aligner, **options: int | bool) -> Transfer:
    """Points through congealed space; options are those of `Aligner.align`."""

    def align(pictures: Iterable[Picture]) -> Alignment:
        return align_pictures(aligner, pictures, **options)  # type: ignore[arg-type]

    return lambda benchmark: through(benchmark, align, detail(aligner))


def identity() -> Transfer:
    """Each point at its own place in the square around the picture."""
    return lambda benchmark: through(
        benchmark, lambda pictures: _by_squares(pictures, lambda x: Warp.identity(len(x))), 1
    )


def congealed() -> Transfer:
    """Classical Congealing, fitted to the benchmark's own pictures: it sees no pairs and no points."""

    def fit(stack: Tensor) -> Warp:
        return Congealing.fit(stack, read=luma, padding="border").training

    return lambda benchmark: through(benchmark, lambda pictures: _by_squares(pictures, fit), CONGEALED_PX)


def mean_keypoint() -> Transfer:
    """Each keypoint at its mean place within boxes, of all other pictures: what knowing the target's box alone is worth."""

    def transfer(benchmark: Benchmark) -> Predictions:
        corner, side = benchmark.box[:, None, :2], (benchmark.box[:, 2:] - benchmark.box[:, :2])[:, None]
        place = (benchmark.points - corner) / side
        known = ~place.isnan()
        total, count = place.nan_to_num().sum(0), known.sum(0)
        others = (total - place.nan_to_num()) / (count - known.long())  # 0 / 0 where no other picture has it
        target = benchmark.pairs[:, 1]
        return Predictions.of((others * side + corner)[target])

    return transfer


def by_features(encoder: Encoder) -> Transfer:
    """The most similar feature of the target, for the feature at each source point."""

    def transfer(benchmark: Benchmark) -> Predictions:
        used = benchmark.used()
        maps = {
            i: encoder(square_of(picture, encoder.size))[0]
            for i, picture in zip(used, _pictures(benchmark, encoder.size), strict=True)
        }
        encoder.settle(maps)
        points = torch.full((*benchmark.listed.shape, 2), torch.nan)
        for n, (source, target) in enumerate(benchmark.pairs.tolist()):
            here = _on_square(benchmark, source, benchmark.points[source])
            found = matched(maps[source], maps[target], here)
            points[n] = _on_picture(benchmark, target, found)
        return Predictions.of(points)

    return transfer


def through(benchmark: Benchmark, align: Align, at_least: int) -> Predictions:
    """Points of pairs through the congealed space of a method that aligns pictures."""
    used = benchmark.used()
    alignment = align(_pictures(benchmark, at_least))
    place = torch.full((len(benchmark.files),), -1)
    place[used] = torch.arange(len(used))
    parts, corners = [], []
    for some in torch.arange(len(benchmark)).split(AT_ONCE):
        source, target = benchmark.pairs[some].unbind(1)
        here, there = alignment.select(place[source]), alignment.select(place[target])
        # The square's corner goes along as one more point, for `Predictions.corner`.
        given = torch.cat([benchmark.points[source], _corner(benchmark.size[source])[:, None]], 1)
        lacking = given.isnan().any(-1)
        start = (2 * given.nan_to_num() + 1) / benchmark.size[source][:, None] - 1
        end = there.warp.map_points(here.warp.inverse().map_points(start).points).points
        found = ((end + 1) * benchmark.size[target][:, None] - 1) / 2
        found = found.masked_fill((lacking | (here.cluster != there.cluster)[:, None])[..., None], torch.nan)
        parts.append(found[:, :-1])
        corners.append(found[:, -1])
    mirrored = alignment.flipped[place[benchmark.pairs]]
    return Predictions(torch.cat(parts), mirrored[:, 0] != mirrored[:, 1], torch.cat(corners))


def _pictures(benchmark: Benchmark, at_least: int) -> Iterator[Picture]:
    """The pictures that pairs have, in order, read one after another."""
    used = benchmark.used()
    with Progress("reading", len(used), "picture") as progress:
        for index in used:
            yield benchmark.picture(index, at_least)
            progress.advance()


def _by_squares(pictures: Iterable[Picture], warps: Callable[[Tensor], Warp]) -> Alignment:
    """An alignment by a method that sees small squares only, all at once."""
    squares, ways = [], []
    for picture in pictures:
        squares.append(square_of(picture, CONGEALED_PX))
        ways.append(from_square(*picture.size)[None])
    stack = ((torch.cat(squares) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Alignment.of_warp(warps(stack).compose(Warp((Affine(torch.cat(ways)),))))


def _corner(size: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
    """The first pixel of the square in whose middle a picture is, in pixels of the picture."""
    return -((size.amax(1, keepdim=True) - size) / 2).floor()


def _on_square(benchmark: Benchmark, index: int, points: Float[Tensor, "k 2"]) -> Float[Tensor, "k 2"]:
    """Pixels of a picture as normalised points of its square."""
    side = benchmark.size[index].amax()
    return (2 * (points - _corner(benchmark.size[index][None])) + 1) / side - 1


def _on_picture(benchmark: Benchmark, index: int, points: Float[Tensor, "k 2"]) -> Float[Tensor, "k 2"]:
    side = benchmark.size[index].amax()
    return ((points + 1) * side - 1) / 2 + _corner(benchmark.size[index][None])
