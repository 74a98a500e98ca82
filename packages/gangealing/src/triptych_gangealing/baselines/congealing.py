"""Classical Congealing: a stack of images aligned by making its pixels agree.  [Learned-Miller 2006]

A baseline without a generator. Images are read as ink, 0 to 1 at each pixel.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from triptych_gangealing.baselines.moments import Images, ink, require_square
from triptych_gangealing.warp import Affine, Warp

PARAMETERS = ("shift x", "shift y", "rotation", "log scale x", "log scale y", "shear x", "shear y")
UNITS = (1 / 16, 1 / 16, 0.1, 1 / 16, 1 / 16, 1 / 16, 1 / 16)  # a step of size 1, of each parameter


class FunnelStep(NamedTuple):
    """One sweep, recorded so that new images can repeat it."""

    blur_px: float
    step: float
    log_odds: Float[Tensor, "height width"]  # of ink, in the stack before the sweep
    mean: Float[Tensor, " 7"]  # subtracted from the parameters after the sweep


@dataclass(frozen=True)
class Congealing:
    """Classical Congealing (Learned-Miller 2006): a stack of images aligned by making its pixels agree.

    Each pixel of the stack is a coin whose bias is its mean ink. The sum of the pixels' entropies is minimised over seven
    parameters an image (shifts, rotation, log scales, shears) by coordinate descent: a step up, down or none, whichever codes
    the image in the fewest bits. New images go down the funnel: the same sweeps, with the recorded biases.
    """

    # Two liberties, both in its favour: the stack is blurred in early stages, and steps get finer.

    size: int
    read: Callable[[Images], Tensor]
    padding: str
    funnel: tuple[FunnelStep, ...]
    entropy: tuple[float, ...]  # of the unblurred stack in bits a pixel: at first, and after each stage
    training: Warp

    @classmethod
    def fit(
        cls,
        images: Images,
        *,
        read: Callable[[Images], Tensor] = ink,
        padding: Literal["zeros", "border"] = "zeros",
        stages: Sequence[tuple[float, float]] = ((2.0, 1.0), (1.0, 0.5), (0.5, 0.25), (0.0, 0.125)),
        sweeps: int = 12,
    ) -> "Congealing":
        """Align a stack.

        padding: what is outside an image; "border" with `luma` of coloured ones, which otherwise agree best by leaving the canvas.
        stages: blur in pixels and size of steps, each for `sweeps` sweeps; a step of 1 is one pixel of 32, 0.1 radians, and 0.0625
        in log scale and shear. Raises ValueError for fewer than two images, or not square.
        """
        if len(images) < 2:
            raise ValueError(f"{len(images)} images: expected at least 2 to align with each other")
        stack = require_square(read(images)).float()
        parameters, funnel = stack.new_zeros(len(stack), len(PARAMETERS)), []
        entropy = [_entropy(stack)]
        for blur_px, step in stages:
            blurred = _blur(stack, blur_px)
            for _ in range(sweeps):
                # The mean is the cheapest code for a stack, so no sweep raises the entropy, though all images move at once.
                mean_ink = (_warped(blurred, parameters, padding).sum(0)[0] + 0.5) / (len(stack) + 1)  # never 0 or 1
                log_odds = mean_ink.logit()
                parameters = _sweep(blurred, parameters, log_odds, step, padding)
                funnel.append(FunnelStep(blur_px, step, log_odds, parameters.mean(0)))
                parameters = parameters - funnel[-1].mean  # otherwise everything would shrink to nothing
            entropy.append(_entropy(_warped(stack, parameters, padding)))
        return cls(stack.shape[-1], read, padding, tuple(funnel), tuple(entropy), _as_warp(parameters))

    def align(self, images: Images) -> Warp:
        """Warps of images, each on its own. Raises ValueError for another size than the stack's."""
        if tuple(images.shape[2:]) != (self.size, self.size):
            raise ValueError(f"images of {tuple(images.shape[2:])}: expected {self.size} x {self.size}, as congealed")
        stack = self.read(images).float()
        parameters, blurred, blur_px = stack.new_zeros(len(stack), len(PARAMETERS)), stack, 0.0
        for at in self.funnel:
            if at.blur_px != blur_px:
                blurred, blur_px = _blur(stack, at.blur_px), at.blur_px
            parameters = _sweep(blurred, parameters, at.log_odds, at.step, self.padding) - at.mean
        return _as_warp(parameters)


def _sweep(stack: Tensor, parameters: Tensor, log_odds: Tensor, step: float, padding: str) -> Float[Tensor, "n 7"]:
    """Every image moves each parameter by a step up, down, or not at all: whichever the biases code in fewest bits."""
    n = len(stack)
    best = (_warped(stack, parameters, padding) * log_odds).sum((1, 2, 3))
    for number, unit in enumerate(UNITS):
        move = torch.zeros(len(PARAMETERS)).to(parameters)
        move[number] = step * unit
        tried = torch.cat([parameters + move, parameters - move])
        up, down = (_warped(torch.cat([stack, stack]), tried, padding) * log_odds).sum((1, 2, 3)).split(n)
        goes_up, goes_down = (up > best) & (up >= down), (down > best) & (down > up)
        parameters = parameters + (goes_up.float() - goes_down.float())[:, None] * move
        best = torch.where(goes_up, up, torch.where(goes_down, down, best))
    return parameters


def _matrices(parameters: Float[Tensor, "n 7"]) -> Float[Tensor, "n 2 3"]:
    """Output to input: shear y, then shear x, scales, rotation, shifts."""
    shift_x, shift_y, rotation, log_x, log_y, shear_x, shear_y = parameters.unbind(1)
    one = torch.ones_like(rotation)
    cos, sin = rotation.cos(), rotation.sin()
    sheared = (one + shear_x * shear_y, shear_x), (shear_y, one)
    scaled = zip((log_x.exp(), log_y.exp()), sheared, strict=True)
    (a, b), (c, d) = ([scale * value for value in row] for scale, row in scaled)
    rows = [cos * a - sin * c, cos * b - sin * d, shift_x], [sin * a + cos * c, sin * b + cos * d, shift_y]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def _as_warp(parameters: Float[Tensor, "n 7"]) -> Warp:
    return Warp((Affine(_matrices(parameters)),))


def _warped(stack: Tensor, parameters: Tensor, padding: str) -> Tensor:
    """Plain bilinear sampling: thousands of times a fit, and no step is far from natural size."""
    grid = F.affine_grid(_matrices(parameters), list(stack.shape), align_corners=False)
    return F.grid_sample(stack, grid, padding_mode=padding, align_corners=False)


def _blur(stack: Tensor, sigma_px: float) -> Tensor:
    """Gaussian, of pixels of this size."""
    if sigma_px == 0:
        return stack
    reach = math.ceil(3 * sigma_px)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).to(stack) / sigma_px) ** 2)
    kernel = kernel / kernel.sum()
    across = F.conv2d(stack, kernel.view(1, 1, 1, -1), padding=(0, reach))
    return F.conv2d(across, kernel.view(1, 1, -1, 1), padding=(reach, 0))


def _entropy(stack: Tensor) -> float:
    mean_ink = stack.double().mean(0)
    bits = -(torch.special.xlogy(mean_ink, mean_ink) + torch.special.xlogy(1 - mean_ink, 1 - mean_ink)) / math.log(2)
    return float(bits.mean())
