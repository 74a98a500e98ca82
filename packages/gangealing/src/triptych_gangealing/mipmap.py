"""Anti-aliased sampling of images at arbitrary points: trilinear, from a pyramid of ever smaller copies (a mip map).

The definition:
- Level 0 is the image. Level l + 1 has half the rows and columns of level l, rounded up, filtered by a tent two of its own
  pixels wide on either side; for even sides the taps are [1, 3, 3, 1] / 8. What of the tent hangs over the edge is left out
  and the rest scaled up, as in `F.interpolate(..., mode="bilinear", antialias=True, align_corners=False)`.
- Every level spans the whole image: a normalised coordinate means the same place in all of them, -1 and 1 are the outer
  edges of the outer pixels (align_corners=False). Each is sampled bilinearly at its own size, with the same padding.
- A pixel's level is log2 of the largest distance, in input pixels, between its source and those of its four neighbours,
  clamped to [0, 2.5]; between two whole levels is interpolated linearly.

The levels need never be brought back to full size, which takes most of the time where it is done: there a sample is bilinear
in an already bilinear enlargement, here in the level itself.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

MAX_LEVEL = 2.5

Images = Float[Tensor, "n channels height width"]


def sample(
    images: Images, grid: Float[Tensor, "n h w 2"], level: Float[Tensor, "n h w"], padding: str
) -> Float[Tensor, "n channels h w"]:
    """Images at the grid's points (x, y), normalised, each at its own level of 0..`MAX_LEVEL`.

    padding: "border", "reflection" or "zeros". Differentiable in all three; where a level is a whole number, its derivative
    is taken to be 0.
    """
    first, last = _range(level)
    for _ in range(first):
        images = halved(images)
    out = F.grid_sample(images, grid, padding_mode=padding, align_corners=False)
    for number in range(first, last):
        images = halved(images)
        values = F.grid_sample(images, grid, padding_mode=padding, align_corners=False)
        share = F.hardtanh(level - number, 0, 1)[:, None]  # 1 where the level is higher still: out is forgotten
        out = torch.lerp(out, values, share)
    return out


def _range(level: Tensor) -> tuple[int, int]:
    """First and last level of the pyramid that any pixel needs; on other devices than a CPU, which would have to wait for the
    answer, all of them."""
    everything = 0, math.ceil(MAX_LEVEL)
    if level.device.type != "cpu" or torch.compiler.is_compiling() or level.numel() == 0:
        return everything
    low, high = (float(value) for value in level.detach().aminmax())
    return (math.floor(low), math.ceil(high)) if math.isfinite(low + high) else everything


def levels(x: Float[Tensor, "n h w"], y: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
    """The level of each output pixel, 0..`MAX_LEVEL`, from its source point in input pixels, counted from anywhere."""
    across = (x[:, :, 1:] - x[:, :, :-1]).square() + (y[:, :, 1:] - y[:, :, :-1]).square()
    down = (x[:, 1:] - x[:, :-1]).square() + (y[:, 1:] - y[:, :-1]).square()
    left_right = torch.maximum(F.pad(across, (1, 0)), F.pad(across, (0, 1)))
    up_down = torch.maximum(F.pad(down, (0, 0, 1, 0)), F.pad(down, (0, 0, 0, 1)))
    # Of squares: no root whose slope is infinite at 0. Padded with 0, which is never the largest: below 1 counts as 1.
    return torch.maximum(left_right, up_down).clamp(1, 4**MAX_LEVEL).log2() / 2


def halved(images: Images) -> Float[Tensor, "n channels half_height half_width"]:
    """The next level of the pyramid."""
    return _halved(_halved(images, 2), 3)


def _halved(x: Tensor, dim: int) -> Tensor:
    """Along one axis; for an even side without a convolution, which on a CPU takes more than twice as long."""
    side = x.shape[dim]
    if side == 1:
        return x
    half = (side + 1) // 2
    if side % 2 and dim == 2:  # transposed: torch 2.15 shrinks a single column wrongly
        return _halved(x.mT.contiguous(), 3).mT.contiguous()
    if side % 2:
        return F.interpolate(x, (x.shape[2], half), mode="bilinear", antialias=True, align_corners=False)
    first, second = x.unflatten(dim, (half, 2)).unbind(dim + 1)
    out = (first + second).mul_(3 / 8)
    if half == 1:
        return out.mul_(8 / 6)
    out.narrow(dim, 1, half - 1).add_(second.narrow(dim, 0, half - 1), alpha=1 / 8)
    out.narrow(dim, 0, half - 1).add_(first.narrow(dim, 1, half - 1), alpha=1 / 8)
    for end in (0, half - 1):
        out.narrow(dim, end, 1).mul_(8 / 7)
    return out
