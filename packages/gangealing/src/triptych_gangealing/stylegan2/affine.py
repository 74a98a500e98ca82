"""Images under affine maps, one a sample, in one resampling: anti-aliased, reflected at the edges, differentiable twice.

From Karras et al., "Training generative adversarial networks with limited data" (2020), appendix B.

Convention: x right, y down, in pixels, origin at the image's centre; what is outside the image is its reflection (edge
pixels not repeated).
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

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
# It delays by 5.098 samples, not by half its length, 5.5: samples are placed accordingly, or every rotation would be about
# a point a fifth of a pixel off the centre. The fine image is reflected about the nearest whole sample: the reflection is
# off by a tenth of a pixel, and by the little that sym6 lacks in symmetry, as is anything that is turned.
DELAY = float((SYM6 * torch.arange(TAPS)).sum() / SYM6.sum())
FIRST = round(DELAY)


def transform(images: Float[Tensor, "n c h w"], inverse: Float[Tensor, "n 3 3"]) -> Float[Tensor, "n c h w"]:
    """Each image under its own map; `inverse` (float64, CPU) takes homogeneous output positions to input positions.

    Samples whose pixels land on pixels are copied, exact to the bit; the others are resampled. Sides of at least 2.
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


def _copy_pixels(images: Float[Tensor, "n c h w"], inverse: Float[Tensor, "n 3 3"]) -> Float[Tensor, "n c h w"]:
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


def _resample(images: Float[Tensor, "n c h w"], inverse: Float[Tensor, "n 3 3"]) -> Float[Tensor, "n c h w"]:
    """Twice the resolution by sym6, bilinear samples of that, then sym6 again down to the original resolution.

    The two filters are matrices, which on CPU and small images is ten times as fast as convolution, reflection included.
    """
    height, width = images.shape[-2:]
    up, down = (partial(maker, device=images.device, dtype=images.dtype) for maker in (_up_matrix, _down_matrix))
    fine = up(height) @ (images @ up(width).mT)
    fine_height, fine_width = 2 * height + TAPS - 2, 2 * width + TAPS - 2  # what the second filter reads

    # Normalised coordinates of the wanted samples -> pixels -> where they come from -> normalised coordinates of `fine`.
    sizes = torch.tensor([width, height], dtype=inverse.dtype)
    to_pixels = _affine((2 * sizes + TAPS - 3) / 4, (TAPS - 1) / 4 - DELAY / 2)
    to_fine = _affine(2 / (sizes - 1), (DELAY - FIRST) / (sizes - 1))
    theta = (to_fine @ inverse @ to_pixels)[:, :2].to(images)
    grid = F.affine_grid(theta, [len(images), 1, fine_height, fine_width], align_corners=True)
    return down(height) @ (_Sample.apply(fine, grid) @ down(width).mT)


def _affine(scale: Float[Tensor, " 2"], offset: Float[Tensor, " 2"] | float) -> Float[Tensor, "3 3"]:
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
    """grid_sample, differentiable any number of times in the source: torch learnt the second derivative after 2.6."""

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
