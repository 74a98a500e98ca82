"""Correspondence: points of one image in another, through congealed space; and a picture of it.  [thesis 4.4.2]"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from triptych_common.fields import printable
from triptych_common.plots import figure_png

from triptych_gangealing.aligner import Alignment
from triptych_gangealing.warp import Warp, centres, to_normalised, to_pixels

Size = tuple[int, int]


class Transferred(NamedTuple):
    """Points in pixels of the image they were transferred to."""

    points: Float[Tensor, "*n k 2"]
    reliable: Bool[Tensor, "*n k"]
    """the source's warp could be inverted there, and the point is inside both images and congealed space; where a flow folds, it
    is one of several answers"""


def middle_points(side: int) -> Float[Tensor, "1 k 2"]:
    """side x side points over the middle of congealed space, where objects are; normalised, row by row."""
    return centres((side, side), torch.empty(())).view(1, -1, 2) * 0.6


def transfer(
    source: Alignment, target: Alignment, points: Float[Tensor, "n k 2"], source_size: Size, target_size: Size
) -> Transferred:
    """Points of n source images, (x, y) in their pixels, to the target images. Sizes are (height, width).

    Raises ValueError for pairs of different clusters, whose congealed spaces have nothing in common.
    """
    apart = source.cluster != target.cluster
    if bool(apart.any()):
        pair = int(apart.nonzero()[0])
        clusters = f"clusters {int(source.cluster[pair])} and {int(target.cluster[pair])}"
        raise ValueError(f"pair {pair}: {clusters}; points can be transferred within one cluster only")
    return between(source.warp, target.warp, points, source_size, target_size)


def between(
    source: Warp, target: Warp, points: Float[Tensor, "n k 2"], source_size: Size, target_size: Size
) -> Transferred:
    """`transfer` by the warps of any method."""
    # The warp of a mirrored image leads to the original, so mirroring needs no special case here. The released code tries all four
    # combinations of a pair and takes the smallest sum of the flows' total variation; as that sum has one term for each image,
    # `Aligner.align(flips=True)` decides for each image by itself.
    # Warps map congealed to image coordinates: the source's is inverted, the target's is not.
    start = to_normalised(points, source_size)
    congealed = source.inverse().map_points(start)
    end = target.map_points(congealed.points)
    pixels = to_pixels(end.points, target_size).to(points)
    within = (start.abs() <= 1).all(-1) & congealed.inside & end.inside
    return Transferred(pixels, congealed.converged & end.converged & within)


def matches_figure(
    source: UInt8[Tensor, "3 height width"],
    target: UInt8[Tensor, "3 target_height target_width"],
    here: Float[Tensor, "k 2"],
    there: Float[Tensor, "k 2"],
    names: tuple[str, str],
) -> bytes:
    """A PNG of two images side by side, lines between points (x, y, in pixels of each) that correspond, coloured by place."""
    from matplotlib.figure import Figure
    from matplotlib.patches import ConnectionPatch

    figure = Figure(figsize=(8, 4))
    axes = figure.subplots(1, 2)
    for axis, image, name in zip(axes, (source, target), names, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(printable(name if len(name) < 50 else f"{name[:46]}..."), fontsize=9)
    span = here.amax(0) - here.amin(0) if len(here) else here.new_ones(2)
    style: dict[str, Any] = {"lw": 0.7, "alpha": 0.8}
    for a, b in zip(here, there, strict=True):
        place = (a - here.amin(0)) / span.clamp_min(1e-6)
        colour = (float(place[0]), 0.35, float(place[1]))
        ends = tuple(a.tolist()), tuple(b.tolist())
        figure.add_artist(ConnectionPatch(*ends, "data", "data", axesA=axes[0], axesB=axes[1], color=colour, **style))
        for axis, end in zip(axes, ends, strict=True):
            axis.plot(*end, "o", color=colour, ms=3)
    figure.tight_layout()
    return figure_png(figure)
