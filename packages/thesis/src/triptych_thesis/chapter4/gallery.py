"""Pictures of a reproduction: before and after, averages, matches, an edit on real digits."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from triptych_common.images import from_uint8, image_grid, png_bytes, to_uint8
from triptych_gangealing.aligner import load_aligner
from triptych_gangealing.baselines.moments import ink
from triptych_gangealing.correspondence import between, middle_points
from triptych_gangealing.edit import propagate
from triptych_gangealing.figures import matches_figure
from triptych_gangealing.keypoints.synthetic import posed_digits
from triptych_gangealing.warp import Warp, centres, to_pixels

from triptych_thesis.chapter4.sizes import DIGIT, Size

COLUMNS = 12
SCALE = 3  # screen pixels of a pixel


@dataclass(frozen=True)
class Gallery:
    """PNG files as bytes."""

    before_after: bytes
    averages: bytes
    edit: bytes
    clusters: bytes
    matches: bytes
    edited: int


def make_gallery(folder: Path, size: Size, *, seed: int) -> Gallery:
    """Of the two alignments in a folder, on held-out digits that neither has seen."""
    one, clustered = load_aligner(folder / "one"), load_aligner(folder / "clustered")
    posed = posed_digits(size.shown, seed + 2, DIGIT)
    images = from_uint8(posed.images)
    found = one.align(images, iterations=size.iterations)
    aligned = found.warp.sample(images, padding=one.facts["padding"])
    # Of ink: half of all digits are darker than their ground, so that an average in colour is grey however well they align.
    before, after = (strokes.mean(0).expand(3, -1, -1) * 2 - 1 for strokes in (ink(images), _inked(images, found.warp)))
    edit = disc(images.shape[-1])
    drawn = propagate(edit, found.warp, images)
    shown = slice(0, COLUMNS)
    several = posed_digits(size.shown, seed + 3, None)
    pictures = from_uint8(several.images)
    grouped = clustered.align(pictures)
    rows = []
    for cluster in range(clustered.config.heads):
        members = (grouped.cluster == cluster).nonzero().flatten()
        first = members[: COLUMNS - 1]
        warped = grouped.warp.select(first).sample(pictures[first]) if len(members) else pictures[:0]
        strokes = _inked(pictures[members], grouped.warp.select(members)) if len(members) else pictures[:1, :1] * 0
        middle = strokes.mean(0).expand(3, -1, -1) * 2 - 1
        blank = torch.zeros(COLUMNS - 1 - len(first), *pictures.shape[1:])
        rows.append(torch.cat([middle[None], warped, blank]))
    source, target = found.warp.select([0]), found.warp.select([1])
    side = tuple(images.shape[2:])
    points = to_pixels(source.map_points(middle_points(6)).points, side)
    transferred = between(source, target, points, side, side)
    reliable = transferred.reliable[0]
    matches = matches_figure(
        posed.images[0], posed.images[1], points[0, reliable], transferred.points[0, reliable], ("one digit", "another")
    )
    return Gallery(
        _png(image_grid(to_uint8(torch.cat([images[shown], aligned[shown]])), columns=COLUMNS)),
        _png(image_grid(to_uint8(torch.stack([before, after])), columns=2), scale=6),
        _png(image_grid(to_uint8(torch.cat([images[shown], drawn[shown]])), columns=COLUMNS)),
        _png(image_grid(to_uint8(torch.cat(rows)), columns=COLUMNS)),
        matches,
        COLUMNS,
    )


def disc(size: int) -> Float[Tensor, "4 {size} {size}"]:
    """A small yellow disc with a red rim, to be drawn on the average: RGB in [-1, 1], alpha in 0..1."""
    points = centres((size, size), torch.zeros(()))
    distance = (points - torch.tensor([0.0, -0.35])).norm(dim=-1)
    colour = torch.where(
        (distance < 0.12)[None],
        torch.tensor([1.0, 0.9, -1.0])[:, None, None],
        torch.tensor([1.0, -1, -1])[:, None, None],
    )
    return torch.cat([colour, (distance < 0.2).float()[None]])


def _inked(images: Float[Tensor, "n 3 height width"], warp: Warp) -> Float[Tensor, "n 1 height width"]:
    return warp.sample(ink(images), padding="zeros")


def _png(image: UInt8[Tensor, "3 height width"], scale: int = SCALE) -> bytes:
    return png_bytes(image, scale=scale)
