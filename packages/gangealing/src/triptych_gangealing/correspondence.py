"""Points of one image in another: into congealed space, and out of it again.  [thesis 4.4.2]

Of the four ways to mirror a pair, neither, either or both, the released code takes the one with the smoothest flows together: as
the sum has one term for each image, that is each image's own choice, `Aligner.align(flips=True)`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from triptych_gangealing.aligner import Alignment
from triptych_gangealing.warp import Warp, centres, to_normalised, to_pixels

Size = tuple[int, int]


class Transferred(NamedTuple):
    """Points in pixels of the image they were transferred to."""

    points: Float[Tensor, "n k 2"]
    reliable: Bool[Tensor, "n k"]
    """the way could be inverted, and lies within both images and congealed space; of a flow that folds it is one of several"""


def middle_points(side: int) -> Float[Tensor, "1 k 2"]:
    """side x side points spread over the middle of congealed space, where objects are; normalised, row by row."""
    return centres((side, side), torch.empty(())).view(1, -1, 2) * 0.6


def transfer(
    source: Alignment, target: Alignment, points: Float[Tensor, "n k 2"], source_size: Size, target_size: Size
) -> Transferred:
    """Points of n source images, (x, y) in their pixels, to the target images. Sizes are (height, width).

    Raises ValueError for pairs of different clusters: congealed spaces of two have nothing in common.
    """
    apart = source.cluster != target.cluster
    if bool(apart.any()):
        pair = int(apart.nonzero()[0])
        raise ValueError(
            f"pair {pair}: clusters {int(source.cluster[pair])} and {int(target.cluster[pair])}; points can be "
            "transferred within one cluster only"
        )
    return between(source.warp, target.warp, points, source_size, target_size)


def between(
    source: Warp, target: Warp, points: Float[Tensor, "n k 2"], source_size: Size, target_size: Size
) -> Transferred:
    """The same by warps, whatever they come from. One of a mirrored image leads to the original, so nothing asks which are."""
    start = to_normalised(points, source_size)
    congealed = source.inverse().map_points(start)
    found = target.map_points(congealed.points)
    pixels = to_pixels(found.points, target_size).to(points)
    within = (start.abs() <= 1).all(-1) & congealed.inside & found.inside
    return Transferred(pixels, congealed.converged & found.converged & within)
