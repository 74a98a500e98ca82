"""Pairs of coloured digits with exact correspondences: one digit, seen twice.

Two different digits have no true correspondences. So a pair is ONE held-out digit, deformed twice by known elastic maps, then
jittered and coloured as in `Digits32`; keypoints are points of its ink, mapped through both.

Convention: points are (x, y) in pixels, the centre of an image's first pixel at (0, 0); elastic maps act on the digit's own
28 x 28 image, in the normalised coordinates of `Warp`.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F
from triptych_common.randomness import shuffled, uniform

from triptych_gangealing.digits32 import CANVAS, DIGIT, Digits, Digits32, Jitters, affine, render
from triptych_gangealing.warp import centres, to_pixels

WAVES = 3
SHORTEST_WAVE_PX, LONGEST_WAVE_PX = DIGIT, 2 * DIGIT
MAX_ELASTIC_PX = 4.4  # from SHORTEST_WAVE_PX / (2 pi) = 4.46 on, a map could fold
INK, CANDIDATES_PER_PX, MIN_SPACING_PX = 0.7, 2, 2.0  # of keypoints, in the digit's pixels
BOX_INK = 0.5
INVERSION_STEPS = 200


class Elastic(NamedTuple):
    """Smooth maps of the plane: q -> q + sum over waves of amplitude sin(wave . q + phase); normalised coordinates.

    The sum of |amplitude| |wave|, a bound on the slope, is below 1, so that each map has an inverse.
    """

    amplitude: Float[Tensor, "n waves 2"]
    wave: Float[Tensor, "n waves 2"]
    phase: Float[Tensor, "n waves"]

    def displacement(self, points: Float[Tensor, "n k 2"]) -> Float[Tensor, "n k 2"]:
        return (points @ self.wave.mT + self.phase[:, None]).sin() @ self.amplitude

    def backward(self, points: Float[Tensor, "n k 2"]) -> Float[Tensor, "n k 2"]:
        """Points of the deformed digit to the original, as resampling needs; in closed form."""
        return points + self.displacement(points)

    def forward(self, points: Float[Tensor, "n k 2"]) -> Float[Tensor, "n k 2"]:
        """Points of the original to the deformed digit, up to rounding: the contraction q <- p - displacement(q)."""
        deformed = points
        for _ in range(INVERSION_STEPS):
            before, deformed = deformed, points - self.displacement(deformed)
            if torch.equal(before, deformed):
                break
        return deformed


def draw_elastic(n: int, seed: int, stream: str, elastic_px: float) -> Elastic:
    """Random maps number 0 .. n-1 that move points by at most `elastic_px` pixels of a 28-pixel digit, 0.4 of that on average.

    Raises ValueError for a value outside 0 .. 4.4, where a map might fold.
    """
    if not 0 <= elastic_px <= MAX_ELASTIC_PX:
        raise ValueError(f"elastic_px {elastic_px}: expected 0 to {MAX_ELASTIC_PX}, beyond which the map may fold")

    def draw(quantity: str, low: float, high: float) -> Float[Tensor, "n waves"]:
        numbers = [uniform(seed, f"{stream}/{wave}/{quantity}", range(n)) for wave in range(WAVES)]
        return low + (high - low) * torch.stack(numbers, dim=1)

    def vectors(quantity: str, length: Float[Tensor, "n waves"]) -> Float[Tensor, "n waves 2"]:
        angle = draw(f"{quantity} direction", 0, 2 * math.pi)
        return length[..., None] * torch.stack([angle.cos(), angle.sin()], dim=-1)

    lowest, highest = (math.pi * DIGIT / wavelength for wavelength in (LONGEST_WAVE_PX, SHORTEST_WAVE_PX))
    # WAVES equal amplitudes add up to elastic_px at most; half a digit is one normalised unit.
    amplitude = torch.full((n, WAVES), elastic_px / (DIGIT / 2) / WAVES, dtype=torch.float64)
    wave = vectors("wave", draw("wave length", lowest, highest))
    return Elastic(vectors("amplitude", amplitude), wave, draw("phase", 0, 2 * math.pi))


def deform(digits: Digits, elastic: Elastic) -> Digits:
    """Digits under elastic maps, resampled bicubically: their displacement is so smooth that nothing aliases."""
    points = centres((DIGIT, DIGIT), elastic.phase).view(1, -1, 2).expand(len(digits), -1, -1)
    grid = elastic.backward(points).view(-1, DIGIT, DIGIT, 2)
    moved = F.grid_sample(digits.double(), grid, mode="bicubic", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Pairs:
    """n pairs of images, k points each; row i of every field belongs to pair i.

    valid: both images show the point, and it is 2 pixels or more from the others; coordinates of other points mean nothing.
    boxes: x0, y0, x1, y1, outer edges of the pixels with at least half ink, so that x1 - x0 is a number of pixels.
    jitters: those of `Digits32`; their `digit` is its index in the split.
    """

    source: UInt8[Tensor, "n 3 size size"]
    target: UInt8[Tensor, "n 3 size size"]
    source_points: Float[Tensor, "n k 2"]
    target_points: Float[Tensor, "n k 2"]
    valid: Bool[Tensor, "n k"]
    source_boxes: Float[Tensor, "n 4"]
    target_boxes: Float[Tensor, "n 4"]
    labels: Int[Tensor, " n"]
    source_jitters: Jitters
    target_jitters: Jitters

    def __len__(self) -> int:
        return len(self.labels)

    def swapped(self) -> "Pairs":
        """The same pairs the other way round."""
        partner = {"source": "target", "target": "source"}
        names = [field.name for field in fields(self)]
        renamed = ["_".join(partner.get(word, word) for word in name.split("_")) for name in names]
        return Pairs(**{name: getattr(self, other) for name, other in zip(names, renamed, strict=True)})


def pairs(
    n: int,
    seed: int = 0,
    digit: int | None = None,
    split: str = "held_out",
    *,
    k: int = 10,
    elastic_px: float = 2.5,
    grey: bool = False,
    size: int = CANVAS,
    source: str = "mnist5k",
) -> Pairs:
    """Pairs number 0 .. n-1, the same for any larger n; every digit is used once before any is used again.

    digit: only this one, 0 to 9. elastic_px: the largest displacement, in pixels of the 28-pixel digit. grey: white on
    black, jittered the same. size: of the canvas; points and boxes are in its pixels.
    Jitters are those of items of `Digits32(split, digit, source, seed=seed)`, two copies of a digit to a pair.
    Raises ValueError for fewer than one pair or point, and as Digits32, render and draw_elastic do.
    """
    if n < 1 or k < 1:
        raise ValueError(f"{n} pairs of {k} points: expected at least 1 of each")
    one_copy = len(Digits32(split, digit, source, copies=1))
    items = Digits32(split, digit, source, copies=2 * math.ceil(n / one_copy), seed=seed, size=size)
    numbers = torch.arange(n)
    of_digit = shuffled(seed, f"pairs/{source}/{split}/{digit}", numbers.tolist(), one_copy)
    originals = items.digits[of_digit]
    points, room = ink_points(originals, k)
    copies = 2 * (numbers // one_copy)
    sides: dict[str, Any] = {}
    for side, copy in (("source", copies), ("target", copies + 1)):
        jitters = items.jitters(of_digit + one_copy * copy)
        elastic = draw_elastic(n, seed, f"pairs/{source}/{split}/{side}", elastic_px)
        deformed = deform(originals, elastic)
        sides[side] = render(deformed, white_on_black(jitters) if grey else jitters, size)
        sides[f"{side}_points"] = on_canvas(elastic.forward(points), jitters, size)
        sides[f"{side}_boxes"] = ink_boxes(render(deformed, white_on_black(jitters), size)[:, :1])
        sides[f"{side}_jitters"] = jitters
    # Boxes come from plain white digits: they do not depend on colours.
    valid = room & shown(sides["source_points"], size) & shown(sides["target_points"], size)
    return Pairs(**sides, valid=valid, labels=sides["source_jitters"].label)


def white_on_black(jitters: Jitters) -> Jitters:
    """The same poses, without colour."""
    black = torch.zeros_like(jitters.background)
    return jitters._replace(foreground=black + 1, background=black, gradient=torch.zeros_like(jitters.gradient))


class Posed(NamedTuple):
    """Images of digits, their jitters, and the digits themselves."""

    images: UInt8[Tensor, "n 3 size size"]
    jitters: Jitters
    digits: Digits


def posed_digits(
    n: int, seed: int, digit: int | None, *, grey: bool = False, split: str = "held_out", source: str = "mnist5k"
) -> Posed:
    """n digits of a split, each in a pose of its own; with `digit` None the ten classes alternate.

    A longer list begins with the shorter one of the same settings. Raises ValueError for an unknown digit, split or source.
    """
    order = _alternating(Digits32(split, digit, source, copies=1).labels)
    items = Digits32(split, digit, source, copies=-(-n // len(order)), seed=seed)
    row = torch.arange(n)
    jitters = items.jitters(row - row % len(order) + order[row % len(order)])
    digits = items.digits[jitters.digit]
    images = render(digits, white_on_black(jitters) if grey else jitters)
    return Posed(images, jitters, digits)


def _alternating(labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Rows in an order in which classes alternate: the data set is sorted by class, so that its first rows would be zeros."""
    # How many of the same class come before each row.
    rank = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0] - 1
    return (rank * (labels.max() + 1) + labels).argsort()


def on_canvas(points: Float[Tensor, "n k 2"], jitters: Jitters, size: int = CANVAS) -> Float[Tensor, "n k 2"]:
    """Points of digits (normalised) in pixels of the canvas on which jitters draw them."""
    theta = affine(jitters).to(points.dtype)
    canvas = torch.linalg.solve(theta[:, :, :2], (points - theta[:, None, :, 2]).mT).mT
    return to_pixels(canvas, (size, size))


def shown(points: Float[Tensor, "n k 2"], size: int) -> Bool[Tensor, "n k"]:
    """Which points are inside a square image, its outermost half pixels included."""
    return ((points >= -0.5) & (points <= size - 0.5)).all(dim=-1)


def ink_points(digits: Digits, k: int) -> tuple[Float[Tensor, "n k 2"], Bool[Tensor, "n k"]]:
    """k points of each digit's ink, normalised float64, and which are 2 pixels or more from all before.

    Each is the point farthest from those before; the first is the one farthest from the ink's middle.
    """
    side = DIGIT * CANDIDATES_PER_PX
    enlarged = F.interpolate(digits.float() / 255, scale_factor=CANDIDATES_PER_PX, mode="bicubic", align_corners=False)
    places = centres((side, side), torch.empty((), dtype=torch.float64)).view(-1, 2)
    inked = (enlarged >= INK).flatten(1)
    middle = (inked.double() @ places) / inked.sum(1, keepdim=True).clamp(min=1)

    def distance_to(point: Float[Tensor, "n 2"]) -> Float[Tensor, "n places"]:
        return torch.hypot(places[:, 0] - point[:, :1], places[:, 1] - point[:, 1:])

    distance, chosen, room = distance_to(middle), [], []
    for number in range(k):
        best = distance.masked_fill(~inked, -1).argmax(1)
        chosen.append(places[best])
        spacing = distance.gather(1, best[:, None]).squeeze(1) * (DIGIT / 2)
        room.append(inked.any(1) & ((spacing >= MIN_SPACING_PX) | (number == 0)))
        distance = distance_to(places[best]) if number == 0 else distance.minimum(distance_to(places[best]))
    return torch.stack(chosen, dim=1), torch.stack(room, dim=1)


def ink_boxes(ink: UInt8[Tensor, "n 1 size size"]) -> Float[Tensor, "n 4"]:
    """The box (x0, y0, x1, y1) around at least half ink, white on black, in pixels; the whole image where there is none."""
    size = ink.shape[-1]
    inked = ink[:, 0] >= BOX_INK * 255
    inked = inked | ~inked.flatten(1).any(1)[:, None, None]

    def extent(line: Bool[Tensor, "n size"]) -> tuple[Tensor, Tensor]:
        line = line.int()  # argmax finds the first of equal values
        return line.argmax(1) - 0.5, size - 0.5 - line.flip(1).argmax(1)

    (x0, x1), (y0, y1) = extent(inked.any(1)), extent(inked.any(2))
    return torch.stack([x0, y0, x1, y1], dim=1).double()
