"""Adaptive discriminator augmentation: the differentiable "bgc" pipeline and the heuristic for its probability.

From Karras et al., "Training generative adversarial networks with limited data" (2020), appendix B. All geometric
transformations of a sample are composed into one matrix and executed once, all colour transformations into another.
Every random choice is a function of (seed, stream/quantity, counter): a sample's result does not depend on its batch.

Convention: x right, y down, in pixels, origin at the image's centre; positive angles turn counter-clockwise as seen.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from triptych_common.randomness import uniform

Images = Float[Tensor, "n c h w"]

# The orthonormal low-pass filter of the symlet with six vanishing moments, "sym6".
SYM6 = torch.tensor(
    [
        [0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633],
        [0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252],
        [-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148],
    ],
    dtype=torch.float64,
).flatten()
TAPS = len(SYM6)
# Its delay is 5.098 samples, not half its length, 5.5. Samples are placed accordingly; otherwise rotations would be about a
# point a fifth of a pixel off the centre. The fine image is reflected about the nearest whole sample, so reflections are a
# tenth of a pixel off.
DELAY = float((SYM6 * torch.arange(TAPS)).sum() / SYM6.sum())
FIRST = round(DELAY)

# Homogeneous colours: the projection on the grey axis, and the infinitesimal turn about it.
_EYE = torch.eye(4, dtype=torch.float64)
_LUMA = torch.tensor([[1, 1, 1, 0]] * 3 + [[0, 0, 0, 0]], dtype=torch.float64) / 3
_TURN = torch.tensor([[0, -1, 1, 0], [1, 0, -1, 0], [-1, 1, 0, 0], [0] * 4], dtype=torch.float64) / math.sqrt(3)


@dataclass(frozen=True)
class AugmentConfig:
    """Transformations: for each a multiplier of p in 0..1 (0 is off), then the published strengths."""

    x_flip: float = 0.0
    rotate90: float = 0.0
    integer_translation: float = 0.0
    scale: float = 0.0
    rotation: float = 0.0
    anisotropic_scale: float = 0.0
    fractional_translation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    luma_flip: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0

    integer_translation_max: float = 0.125  # of the image's width and height
    scale_std: float = 0.2  # in octaves: the factor is 2 ** N(0, std^2)
    rotation_max: float = 1.0  # of half a turn
    anisotropic_scale_std: float = 0.2  # octaves
    fractional_translation_std: float = 0.125  # of the image's width and height
    brightness_std: float = 0.2  # images span -1..1
    contrast_std: float = 0.5  # octaves
    hue_max: float = 1.0  # of half a turn
    saturation_std: float = 1.0  # octaves

    def __post_init__(self) -> None:
        for field in fields(self):
            value, strength = getattr(self, field.name), field.name.endswith(("_max", "_std"))
            if not 0 <= value <= (math.inf if strength else 1) or math.isinf(value):
                expected = "a number of at least 0" if strength else "a multiplier of p in 0..1"
                raise ValueError(f"augmentation {field.name}={value}: expected {expected}")


_BLIT = dict.fromkeys(("x_flip", "rotate90", "integer_translation"), 1.0)
_GEOM = dict.fromkeys(("scale", "rotation", "anisotropic_scale", "fractional_translation"), 1.0)
_COLOR = dict.fromkeys(("brightness", "contrast", "luma_flip", "hue", "saturation"), 1.0)
PRESETS = {
    "blit": AugmentConfig(**_BLIT),
    "geom": AugmentConfig(**_GEOM),
    "color": AugmentConfig(**_COLOR),
    "bg": AugmentConfig(**_BLIT, **_GEOM),
    "bgc": AugmentConfig(**_BLIT, **_GEOM, **_COLOR),
}
BGC = PRESETS["bgc"]


def adapted_p(p: float, mean_sign: float, target: float, share: float) -> float:
    """ADA's probability after an adjustment: up by `share` while E[sign D(real)] is above target, otherwise down.  [section 3.1]

    share: images since the last adjustment over those in which p may move by one.
    """
    # As published, p is clamped at 0 only: above 1 everything is applied, and p takes as long to come back.
    return max(0.0, p + share * ((mean_sign > target) - (mean_sign < target)))


def augment(
    images: Images,
    p: float | Float[Tensor, ""],
    seed: int,
    stream: str,
    counters: Sequence[int],
    config: AugmentConfig = BGC,
) -> Images:
    """Augment images of about -1..1, each transformation of each sample applied with probability p * multiplier.

    Image i gets the transformations of `counters[i]`. Differentiable twice with respect to images; p is a constant. Half
    precision is computed in float32. p = 0 returns `images` itself.
    Raises ValueError for a negative or infinite p (above 1 counts as 1), images smaller than 2x2, colour transformations of
    other than 1 or 3 channels, or counters that do not match the images.
    """
    if torch.compiler.is_compiling():  # random numbers by numpy's integers cannot be compiled: a break in the graph
        return torch.compiler.disable(augment)(images, p, seed, stream, counters, config)
    p = float(p)
    _check(images, p, counters, config)
    if p == 0 or len(images) == 0:
        return images
    draws = _Draws(p, seed, stream, counters, config)
    out = images if images.dtype in (torch.float32, torch.float64) else images.float()
    with torch.autocast(images.device.type, enabled=False):
        out = transform(out, _inverse_geometry(draws, *images.shape[-2:]))
        out = _recolour(out, _colour(draws))
    return out.to(images.dtype)


def _check(images: Tensor, p: float, counters: Sequence[int], config: AugmentConfig) -> None:
    channels, height, width = images.shape[1:]
    if not 0 <= p < math.inf:
        raise ValueError(f"augmentation probability {p}: expected a number of at least 0")
    if len(counters) != len(images):
        raise ValueError(f"{len(counters)} counters for {len(images)} images: expected one for each")
    if min(height, width) < 2:
        raise ValueError(f"images of {height}x{width} cannot be reflected at their edges: expected at least 2x2")
    if channels not in (1, 3) and any(getattr(config, name) for name in _COLOR):
        raise ValueError(f"colour augmentation of {channels} channels: expected 1 or 3; use preset 'bg' instead")


@dataclass(frozen=True)
class _Draws:
    """The random choices of a batch: float64 on the CPU, one for each counter."""

    p: float
    seed: int
    stream: str
    counters: Sequence[int]
    config: AugmentConfig

    def probability(self, name: str) -> float:
        return min(self.p * getattr(self.config, name), 1.0)

    def uniform(self, quantity: str) -> Float[Tensor, " n"]:
        return uniform(self.seed, f"{self.stream}/{quantity}", self.counters)

    def symmetric(self, quantity: str) -> Float[Tensor, " n"]:
        """Uniform in -1..1."""
        return 2 * self.uniform(quantity) - 1

    def normal(self, quantity: str) -> Float[Tensor, " n"]:
        return torch.special.ndtri(self.uniform(quantity).clamp(min=2.0**-54))

    def gated(self, name: str, value: Tensor, neutral: float, probability: float | None = None) -> Float[Tensor, " n"]:
        """`value` where the transformation is applied, else `neutral`; its gate is the quantity "name/gate"."""
        probability = self.probability(name) if probability is None else probability
        return torch.where(self.uniform(f"{name}/gate") < probability, value, neutral)


def _matrices(size: int, entries: Mapping[tuple[int, int], Float[Tensor, " n"]]) -> Float[Tensor, "n k k"]:
    """For each sample the identity with some entries replaced."""
    first = next(iter(entries.values()))
    out = torch.eye(size, dtype=first.dtype).repeat(len(first), 1, 1)
    for (row, column), entry in entries.items():
        out[:, row, column] = entry
    return out


def _shift(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, "n 3 3"]:
    return _matrices(3, {(0, 2): x, (1, 2): y})


def _turn(cos: Float[Tensor, " n"], sin: Float[Tensor, " n"]) -> Float[Tensor, "n 3 3"]:
    return _matrices(3, {(0, 0): cos, (0, 1): sin, (1, 0): -sin, (1, 1): cos})


def _inverse_geometry(draws: _Draws, height: int, width: int) -> Float[Tensor, "n 3 3"]:
    """Output to input: the inverses of the sampled transformations, in the order in which they are applied."""
    config, gated = draws.config, draws.gated
    inverse = torch.eye(3, dtype=torch.float64)
    if draws.probability("x_flip"):
        sign = gated("x_flip", 1 - 2 * (draws.uniform("x_flip") < 0.5).double(), 1)
        inverse = inverse @ _matrices(3, {(0, 0): sign})
    if draws.probability("rotate90"):
        angle = gated("rotate90", (4 * draws.uniform("rotate90")).floor(), 0) * (math.pi / 2)
        inverse = inverse @ _turn(angle.cos().round(), -angle.sin().round())
    if draws.probability("integer_translation"):
        x, y = (config.integer_translation_max * draws.symmetric(f"integer_translation/{axis}") for axis in "xy")
        x, y = (gated("integer_translation", shift.round(), 0) for shift in (x * width, y * height))
        inverse = inverse @ _shift(-x, -y)
    if draws.probability("scale"):
        shrink = gated("scale", torch.exp2(-config.scale_std * draws.normal("scale")), 1)
        inverse = inverse @ _matrices(3, {(0, 0): shrink, (1, 1): shrink})
    if draws.probability("rotation"):
        inverse = inverse @ _rotation_inverse(draws, "rotation_pre")
    if draws.probability("anisotropic_scale"):
        octaves = config.anisotropic_scale_std * draws.normal("anisotropic_scale")
        shrink = gated("anisotropic_scale", torch.exp2(-octaves), 1)
        inverse = inverse @ _matrices(3, {(0, 0): shrink, (1, 1): 1 / shrink})
    if draws.probability("rotation"):
        inverse = inverse @ _rotation_inverse(draws, "rotation_post")
    if draws.probability("fractional_translation"):
        x, y = (config.fractional_translation_std * draws.normal(f"fractional_translation/{axis}") for axis in "xy")
        x, y = (gated("fractional_translation", shift, 0) for shift in (x * width, y * height))
        inverse = inverse @ _shift(-x, -y)
    return inverse.expand(len(draws.counters), 3, 3)


def _rotation_inverse(draws: _Draws, name: str) -> Float[Tensor, "n 3 3"]:
    """One of the two rotations, before and after the anisotropic scaling."""
    # At least one of the two is applied with probability p.
    probability = 1 - math.sqrt(1 - draws.probability("rotation"))
    angle = draws.gated(name, math.pi * draws.config.rotation_max * draws.symmetric(name), 0, probability)
    return _turn(angle.cos(), -angle.sin())


def _colour(draws: _Draws) -> Float[Tensor, "n 4 4"]:
    """Homogeneous matrices on (red, green, blue, 1)."""
    config, gated = draws.config, draws.gated
    colour = torch.eye(4, dtype=torch.float64)
    if draws.probability("brightness"):
        add = gated("brightness", config.brightness_std * draws.normal("brightness"), 0)
        colour = _matrices(4, {(0, 3): add, (1, 3): add, (2, 3): add}) @ colour
    if draws.probability("contrast"):
        gain = gated("contrast", torch.exp2(config.contrast_std * draws.normal("contrast")), 1)
        colour = _matrices(4, {(0, 0): gain, (1, 1): gain, (2, 2): gain}) @ colour
    if draws.probability("luma_flip"):
        flip = gated("luma_flip", (draws.uniform("luma_flip") < 0.5).double(), 0)[:, None, None]
        colour = (_EYE - 2 * flip * _LUMA) @ colour
    if draws.probability("hue"):  # Rodrigues' rotation about the luma axis
        angle = gated("hue", math.pi * config.hue_max * draws.symmetric("hue"), 0)[:, None, None]
        colour = (_EYE + angle.sin() * _TURN + (1 - angle.cos()) * (_TURN @ _TURN)) @ colour
    if draws.probability("saturation"):
        gain = gated("saturation", torch.exp2(config.saturation_std * draws.normal("saturation")), 1)[:, None, None]
        chroma = torch.diag(torch.tensor([1, 1, 1, 0])) - _LUMA
        colour = (_EYE + (gain - 1) * chroma) @ colour
    return colour.expand(len(draws.counters), 4, 4)


def _recolour(images: Images, colour: Float[Tensor, "n 4 4"]) -> Images:
    if (colour == _EYE).all():
        return images
    if images.shape[1] == 1:  # grey in, the mean of the resulting colour out
        linear, offset = colour[:, :3, :3].sum((1, 2))[:, None, None] / 3, colour[:, :3, 3:].mean(1, keepdim=True)
    else:
        linear, offset = colour[:, :3, :3], colour[:, :3, 3:]
    return torch.baddbmm(offset.to(images), linear.to(images), images.flatten(2)).view_as(images)


# --- Images under affine maps


def transform(images: Images, inverse: Float[Tensor, "n 3 3"]) -> Images:
    """Each image under its own map, in one resampling: anti-aliased, reflected at the edges, differentiable twice.

    Convention: x right, y down, in pixels, origin at the image's centre; what is outside the image is its reflection (edge
    pixels not repeated). `inverse` (float64, CPU) takes homogeneous output positions to input positions.

    Samples whose pixels fall on pixels are copied, exact to the bit; the others are resampled. Sides of at least 2.
    """
    if (inverse == torch.eye(3, dtype=inverse.dtype)).all():
        return images
    height, width = images.shape[-2:]
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=inverse.dtype)
    linear, shift = inverse[:, :2, :2], inverse[:, :2, 2]
    first_pixel = shift - linear @ centre + centre
    whole = (linear % 1 == 0).all(-1).all(-1) & (first_pixel % 1 == 0).all(-1)
    if whole.all():
        return _copy_pixels(images, inverse)
    if not whole.any():
        return _resample(images, inverse)
    some, rest = whole.nonzero()[:, 0], (~whole).nonzero()[:, 0]
    order = torch.cat((some, rest)).argsort().to(images.device)
    parts = (_copy_pixels, some), (_resample, rest)
    return torch.cat([execute(images[index.to(images.device)], inverse[index]) for execute, index in parts])[order]


def _fold(index: Int[Tensor, "*dims"], size: int) -> Int[Tensor, "*dims"]:
    """Indices of an endlessly reflected axis, as indices of the axis."""
    last = size - 1
    return last - (index % (2 * last) - last).abs()


def _copy_pixels(images: Images, inverse: Float[Tensor, "n 3 3"]) -> Images:
    """Flips, quarter turns and whole-pixel shifts, exact to the bit."""
    height, width = images.shape[-2:]
    a = inverse.to(images.device, torch.float32)[..., None]  # exact: small multiples of a half
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2

    def source(axis: int, size: int) -> Int[Tensor, "n h w"]:  # depends on x or on y, never on both
        shift = a[:, axis, 2] + (size - 1) / 2
        of_x, of_y = (_fold((a[:, axis, i] * at + shift).long(), size) for i, at in enumerate((x, y)))
        return torch.where(a[:, axis, 0, None] == 0, of_y[:, :, None], of_x[:, None, :])

    index = source(1, height) * width + source(0, width)
    index = index.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, index).view_as(images)


def _resample(images: Images, inverse: Float[Tensor, "n 3 3"]) -> Images:
    """Twice the resolution by sym6, bilinear samples of that, then sym6 again down to the original resolution."""
    # Filters are matrices: on a CPU and small images ten times as fast as convolution, reflection included.
    height, width = images.shape[-2:]
    up, down = (partial(maker, device=images.device, dtype=images.dtype) for maker in (_up_matrix, _down_matrix))
    fine = up(height) @ (images @ up(width).mT)
    fine_height, fine_width = 2 * height + TAPS - 2, 2 * width + TAPS - 2  # what the second filter reads

    # Normalised coordinates of the wanted samples -> pixels -> where they come from -> normalised coordinates of `fine`.
    sizes = torch.tensor([width, height], dtype=inverse.dtype)
    to_pixels = _scale_and_shift((2 * sizes + TAPS - 3) / 4, (TAPS - 1) / 4 - DELAY / 2)
    to_fine = _scale_and_shift(2 / (sizes - 1), (DELAY - FIRST) / (sizes - 1))
    theta = (to_fine @ inverse @ to_pixels)[:, :2].to(images)
    grid = F.affine_grid(theta, [len(images), 1, fine_height, fine_width], align_corners=True)
    return down(height) @ (_Sample.apply(fine, grid) @ down(width).mT)


def _scale_and_shift(scale: Float[Tensor, " 2"], offset: Float[Tensor, " 2"] | float) -> Float[Tensor, "3 3"]:
    matrix = torch.diag(torch.cat((scale, torch.ones(1, dtype=scale.dtype))))
    matrix[:2, 2] = offset
    return matrix


def _cached(maker: Callable[..., Tensor]) -> Callable[..., Any]:
    return lru_cache(maxsize=16)(torch.inference_mode(False)(maker))  # cached inference tensors would break training


@_cached
def _up_matrix(size: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "fine size"]:
    """Pixels to samples at twice the resolution, those from the first to the last pixel, of the reflected axis."""
    matrix = torch.zeros(2 * size - 1, size, dtype=torch.float64)
    sample = torch.arange(2 * size - 1)[:, None] + FIRST
    pixel = torch.arange(-TAPS, size + TAPS)[None]
    tap = sample - 2 * pixel
    weight = torch.where((tap >= 0) & (tap < TAPS), SYM6[tap.clamp(0, TAPS - 1)] * math.sqrt(2), 0)
    return matrix.index_add_(1, _fold(pixel[0], size), weight).to(device, dtype)


@_cached
def _down_matrix(size: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "size fine"]:
    """Samples at twice the resolution to pixels: the transpose, so that both together are the identity."""
    tap = torch.arange(2 * size + TAPS - 2) - 2 * torch.arange(size)[:, None]
    weight = torch.where((tap >= 0) & (tap < TAPS), SYM6[tap.clamp(0, TAPS - 1)] / math.sqrt(2), 0)
    return weight.to(device, dtype)


_REFLECTION = 2  # grid_sampler_2d's own numbers: 0 bilinear, 2 reflection


class _Sample(torch.autograd.Function):
    """grid_sample, differentiable any number of times in the source: torch 2.6 has no second derivative."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.size = source.shape[-2:]
        return F.grid_sample(source, grid, "bilinear", "reflection", align_corners=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _SampleTransposed.apply(gradient, *ctx.saved_tensors, ctx.size), None


class _SampleTransposed(torch.autograd.Function):
    """The transpose of _Sample; both are linear in their first argument, so each is the other's derivative."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grid: Tensor, size: Sequence[int]) -> Tensor:
        ctx.save_for_backward(grid)
        source = gradient.new_zeros(()).expand(*gradient.shape[:2], *size)  # only its shape matters
        backward = torch.ops.aten.grid_sampler_2d_backward
        return backward(gradient, source, grid, 0, _REFLECTION, True, (True, False))[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Sample.apply(gradient, *ctx.saved_tensors), None, None
