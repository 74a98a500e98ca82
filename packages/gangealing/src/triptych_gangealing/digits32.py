"""Coloured jittered digits: an unaligned data set whose every pose and colour is known.

Every MNIST digit is drawn many times, each time rotated, scaled, shifted and coloured anew on a background with a smooth
gradient. Item i shows digit `i mod len(source)`; its jitter is a function of (seed, i) alone.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from triptych_common.data import load
from triptych_common.data.source import ImageSource
from triptych_common.randomness import uniform

CANVAS, DIGIT = 32, 28  # pixels; shifts are in those of the canvas, where an unscaled digit covers 28 x 28 of them
MAX_ANGLE, MIN_SCALE, MAX_SHIFT_PX = math.pi / 3, 0.6, 4.0
MIN_CONTRAST, MARGIN, MAX_GRADIENT = 0.4, 0.15, 0.16  # lumas, of 0 (black) .. 1 (white)
LUMA = (0.299, 0.587, 0.114)
RECIPE = 1  # part of the fingerprint: to be raised with any change to the pixels
Digits = UInt8[Tensor, "n 1 28 28"]


class Jitters(NamedTuple):
    """How each of n items is drawn.

    Convention: x to the right, y down; `shift_px` (x, y) is the digit's middle relative to the canvas's, in pixels of a 32-pixel
    canvas at any size drawn; a positive angle turns the digit counter-clockwise as seen.
    Colours are RGB in 0..1. At the canvas's middle the colour is `background`; it grows by gradient . (x, y), with x and y from
    -1 to 1 across the canvas, and is clamped.
    """

    item: Int[Tensor, " n"]  # in this data set
    digit: Int[Tensor, " n"]  # in the data set's `digits`
    label: Int[Tensor, " n"]  # 0..9, also where one digit alone makes the data set
    angle: Float[Tensor, " n"]  # radians
    scale: Float[Tensor, " n"]
    shift_px: Float[Tensor, "n 2"]
    foreground: Float[Tensor, "n 3"]
    background: Float[Tensor, "n 3"]
    gradient: Float[Tensor, "n 2"]

    def to(self, device: torch.device | str) -> "Jitters":
        return Jitters(*(values.to(device) for values in self))


def affine(jitters: Jitters) -> Float[Tensor, "n 2 3"]:
    """Where each point of the canvas lies in the digit's own image: the ground truth of an alignment, at any size drawn.

    Convention: that of `Warp`, output (canvas) to input (digit): the theta of `F.affine_grid(align_corners=False)`.
    """
    cos, sin = jitters.angle.cos(), jitters.angle.sin()
    turn = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    # A canvas is CANVAS / DIGIT digits wide: the scale is that of the digit, so its inverse acts on coordinates.
    linear = turn * (CANVAS / (DIGIT * jitters.scale))[:, None, None]
    shift = jitters.shift_px / (CANVAS / 2)
    return torch.cat([linear, -linear @ shift[..., None]], dim=2)


def render(digits: Digits, jitters: Jitters, size: int = CANVAS) -> UInt8[Tensor, "n 3 {size} {size}"]:
    """Draw digits by their jitters; antialiased, each pixel the mean of at least 2 x 2 points of an enlarged digit.

    Ink that leaves the canvas is cut off: in 1 item of 200, and then at most a few hundredths of it. Raises ValueError for a size
    below 8.
    """
    if size < 8:
        raise ValueError(f"size {size}: expected at least 8, below which no digit can be read")
    n, points = len(digits), max(2, math.ceil(64 / size))
    jitters = jitters.to(digits.device)
    enlarged = F.interpolate(digits.float() / 255, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
    grid = F.affine_grid(affine(jitters), [n, 1, size * points, size * points], align_corners=False)
    ink = F.avg_pool2d(F.grid_sample(enlarged, grid, align_corners=False), points)
    middles = (torch.arange(size, device=digits.device) + 0.5) * 2 / size - 1
    slope_x, slope_y = jitters.gradient[:, :, None].unbind(1)
    brighter = (slope_y * middles)[:, :, None] + (slope_x * middles)[:, None, :]
    background = (jitters.background[:, :, None, None] + brighter[:, None]).clamp(0, 1)
    pixels = background + (jitters.foreground[:, :, None, None] - background) * ink
    return (pixels * 255).round().to(torch.uint8)


class Digits32(ImageSource):
    """Coloured jittered digits, drawn on demand: `copies` of every digit of one split of `source`.

    source: mnist5k, which needs no download (100,000 items of its 4,000 training digits), or mnist. digit: this digit
    alone, one class. size: pixels of the square canvas. Angles are uniform within 60 degrees, scales in 0.6 .. 1, shifts
    within 4 px in x and y; lumas of digit and background differ by at least 0.4, and either may be the lighter.
    Raises ValueError for another source, split or digit, or no copies.
    """

    lossy = False

    def __init__(
        self,
        split: str = "train",
        digit: int | None = None,
        source: str = "mnist5k",
        copies: int = 25,
        seed: int = 0,
        size: int = CANVAS,
    ) -> None:
        if source not in ("mnist5k", "mnist"):
            raise ValueError(f"digits32 of {source!r}: expected mnist5k or mnist")
        if digit is not None and not 0 <= digit <= 9:
            raise ValueError(f"digits32:{digit}: expected a digit, 0 to 9")
        if copies < 1:
            raise ValueError(f"digits32: copies {copies}, expected at least 1")
        data = load(source, split)
        chosen = data.labels == digit if digit is not None else torch.ones_like(data.labels, dtype=torch.bool)
        self.digits, self._digit_labels = data.images[chosen], data.labels[chosen]
        self.split, self.digit, self.source = split, digit, source
        self.copies, self.seed, self.size = copies, seed, size
        self.name = "digits32" if digit is None else f"digits32:{digit}"
        self.class_names = tuple(map(str, range(10))) if digit is None else (str(digit),)
        self.num_classes = len(self.class_names)
        self.labels = (self._digit_labels * (digit is None)).repeat(copies)  # one digit alone is class 0

    def jitters(self, indices: Sequence[int] | Tensor) -> Jitters:
        """How items are drawn."""
        item = torch.as_tensor(indices, dtype=torch.long).reshape(-1)
        if len(item) and not 0 <= int(item.min()) <= int(item.max()) < len(self):
            raise IndexError(f"{self.name}: items {int(item.min())}..{int(item.max())}, expected 0..{len(self) - 1}")
        counters = item.tolist()

        def draw(quantity: str, low: float = 0, high: float = 1) -> Tensor:
            stream = f"digits32/{self.source}/{self.split}/{quantity}"
            return low + (high - low) * uniform(self.seed, stream, counters)

        digit = item % len(self.digits)
        foreground_luma, background_luma = _lumas(draw("polarity"), draw("contrast"), draw("luma"))
        direction, strength = draw("gradient direction", 0, 2 * math.pi), draw("gradient strength", 0, MAX_GRADIENT)
        values = (
            draw("angle", -MAX_ANGLE, MAX_ANGLE),
            draw("scale", MIN_SCALE, 1),
            torch.stack([draw(f"shift {axis}", -MAX_SHIFT_PX, MAX_SHIFT_PX) for axis in "xy"], dim=1),
            _coloured(foreground_luma, draw("foreground hue"), draw("foreground saturation"), 0.0),
            _coloured(background_luma, draw("background hue"), draw("background saturation"), MARGIN),
            strength[:, None] * torch.stack([direction.cos(), direction.sin()], dim=1),
        )
        return Jitters(item, digit, self._digit_labels[digit], *(value.float() for value in values))

    def batch(self, indices: Sequence[int] | Tensor) -> UInt8[Tensor, "n 3 height width"]:
        """Items as pixels."""
        jitters = self.jitters(indices)
        return render(self.digits[jitters.digit], jitters, self.size)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.batch([index])[0].permute(1, 2, 0).contiguous().numpy())

    def locate(self, index: int) -> str:
        return f"{self.name}/{self.split}[{index}]"

    def fingerprint(self) -> str:
        """Over the digits, their labels, and every setting that decides pixels."""
        settings = (RECIPE, self.split, self.digit, self.source, self.copies, self.seed, self.size)
        digest = hashlib.sha256(repr(settings).encode())
        digest.update(self._digit_labels.numpy().tobytes())
        digest.update(self.digits.numpy().tobytes())
        return f"recipe:{digest.hexdigest()}"


def _lumas(polarity: Tensor, contrast: Tensor, place: Tensor) -> tuple[Tensor, ...]:
    """Lumas of digit and background, from three uniform numbers."""
    # The background stays MARGIN away from black and white, or its gradient would be clamped.
    contrast = MIN_CONTRAST + contrast * (1 - MARGIN - MIN_CONTRAST)
    background = MARGIN + place * (1 - MARGIN - contrast)
    foreground = background + contrast
    dark_on_light = polarity < 0.5
    return tuple(torch.where(dark_on_light, 1 - luma, luma) for luma in (foreground, background))


def _coloured(luma: Tensor, hue: Tensor, saturation: Tensor, margin: float) -> Tensor:
    """RGB of a given luma: gray, moved towards a hue by a share of the way to the walls of the cube (margin .. 1 - margin)."""
    # Moving along a hue less its own luma leaves the luma as it is.
    sixths = hue[:, None] * 6 + luma.new_tensor([0.0, 4.0, 2.0])
    pure = (((sixths % 6) - 3).abs() - 1).clamp(0, 1)
    towards = pure - (pure @ luma.new_tensor(LUMA))[:, None]
    room = torch.where(towards > 0, 1 - margin - luma[:, None], luma[:, None] - margin)
    reach = (room / towards.abs().clamp(min=1e-9)).amin(dim=1)
    return luma[:, None] + (saturation * reach)[:, None] * towards
