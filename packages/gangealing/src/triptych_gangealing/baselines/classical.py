"""Alignment without a generator: image moments, and classical Congealing; what a learned alignment must beat.

Both read an image as ink, 0 to 1 at each pixel, and return warps from aligned to input coordinates, as our networks do.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from triptych_gangealing.digits32 import LUMA
from triptych_gangealing.warp import Affine, Warp, centres

INK_FLOOR = 0.1  # of the strongest colour: what a background that is no plane, and rounding, may amount to
STRONGEST = 0.005  # share of pixels taken to be full ink: those of the thinnest digit's stroke
RADIUS = 0.4  # of gyration, in half sides: that of digits as MNIST has them, on a canvas of 32
PARAMETERS = ("shift x", "shift y", "rotation", "log scale x", "log scale y", "shear x", "shear y")
Images = Shaped[Tensor, "n channels height width"]


def luma(images: Images) -> Float[Tensor, "n 1 height width"]:
    """Brightness, 0 to 1, of uint8 images or of floats in [-1, 1]: ink, where digits are white on black."""
    images = _unit(images)
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def ink(images: Images) -> Float[Tensor, "n 1 height width"]:
    """What stands out from the background, 0 to 1: the distance in colour from a plane fitted to the border's pixels.

    The plane, one slope and level a channel, minimises the sum of distances, not of their squares (reweighted, 15 rounds), so
    that ink which touches the border bends it little. Distances are relative to the strongest half percent; those below a tenth
    are none. Takes uint8 or floats in [-1, 1], grey or colour, dark on light or light on dark.
    """
    images = _unit(images)
    n, channels, height, width = images.shape
    basis, colours = _plane(height, width).to(images), images.flatten(2).mT  # pixels x 3; n x pixels x channels
    edge = torch.ones(height, width, dtype=torch.bool, device=images.device)
    edge[1:-1, 1:-1] = False
    at_border, border = basis[edge.flatten()], colours[:, edge.flatten()]
    weights = images.new_ones(n, len(at_border), 1)
    for _ in range(15):
        weighted = weights * at_border
        plane = torch.linalg.solve(weighted.mT @ at_border, weighted.mT @ border)
        weights = 1 / (border - at_border @ plane).norm(dim=2, keepdim=True).clamp(min=1 / 255)
    distance = (colours - basis @ plane).norm(dim=2)
    strongest = distance.topk(max(1, round(STRONGEST * height * width)), dim=1).values.mean(1, keepdim=True)
    relative = distance / strongest.clamp(min=2 / 255 * math.sqrt(channels))
    return ((relative - INK_FLOOR) / (1 - INK_FLOOR)).clamp(0, 1).view(n, 1, height, width)


def moments(
    images: Images,
    *,
    read: Callable[[Images], Tensor] = ink,
    resolve: Literal["skewness", "upright"] = "skewness",
) -> Warp:
    """Bring the ink's centroid to the middle, its principal axis upright, its radius of gyration to 0.4 half sides.

    An axis has two directions. resolve: "skewness", by the image alone: down is where the longer tail lies (the third
    moment along the axis); "upright", by what one may know of the data: the smaller of the two rotations, right for anything
    turned by less than 90 degrees. Images without ink stay as they are. Raises ValueError for images that are not square.
    """
    weights = _square(read(images)).double().flatten(1)
    size = images.shape[-1]
    mass = weights.sum(1)
    empty = mass < 1e-6
    weights = torch.where(empty[:, None], 1.0, weights) / torch.where(empty, float(weights.shape[1]), mass)[:, None]
    points = _plane(size, size).to(weights)[:, 1:]
    centroid = weights @ points
    away = points - centroid[:, None]
    xx, yy, xy = ((weights * product).sum(1) for product in (away[..., 0] ** 2, away[..., 1] ** 2, away.prod(2)))
    angle = torch.atan2(2 * xy, xx - yy) / 2
    axis = torch.stack([angle.cos(), angle.sin()], dim=1)
    tail = (weights * (away * axis[:, None]).sum(2) ** 3).sum(1)
    direction = tail if resolve == "skewness" else axis[:, 1]
    axis = torch.where(direction < 0, -1.0, 1.0)[:, None] * axis
    rotation = torch.atan2(-axis[:, 0], axis[:, 1])  # turns (0, 1), down, to the axis
    log_scale = ((xx + yy).sqrt().clamp(min=1e-3) / RADIUS).log()
    found = torch.cat([rotation[:, None], log_scale[:, None], centroid], dim=1).masked_fill(empty[:, None], 0).float()
    return Warp((Affine.similarity(found[:, 0], found[:, 1], found[:, 2:]),))


class FunnelStep(NamedTuple):
    """One sweep as new images repeat it."""

    blur_px: float
    step: float
    log_odds: Float[Tensor, "height width"]  # of ink, in the stack as it was
    mean: Float[Tensor, " 7"]  # taken off the parameters after the sweep


@dataclass(frozen=True)
class Congealing:
    """Classical Congealing (Learned-Miller 2006): a stack of images aligned by making its pixels agree.

    Each pixel of the stack is a coin whose bias is its mean ink; the sum of the pixels' entropies is minimised over seven
    parameters an image (shifts, rotation, log scales, shears) by coordinate descent: a step up or down, whichever codes
    the image in fewer bits, or none. As the mean is the cheapest code for a stack, no sweep raises the entropy, though
    all images move at once. After it the mean parameters are taken off all images, without which everything would
    shrink to nothing. New images go down the funnel: the same sweeps, by the biases recorded.
    Two liberties, both in its favour: the stack is blurred in early stages, and steps get finer.
    """

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
        """Align a stack. padding: what is outside an image; "border" with `luma` of coloured ones, which would else agree best by
        leaving the canvas. stages: each of `sweeps` sweeps, with a blur in pixels and a size of steps.

        Steps of size 1 are one pixel of 32, 0.1 radians and 0.0625 in log scale and shear. Raises ValueError for fewer than
        two images, or not square.
        """
        if len(images) < 2:
            raise ValueError(f"{len(images)} images: expected at least 2 to align with each other")
        stack = _square(read(images)).float()
        parameters, funnel = stack.new_zeros(len(stack), len(PARAMETERS)), []
        entropy = [_entropy(stack)]
        for blur_px, step in stages:
            blurred = _blur(stack, blur_px)
            for _ in range(sweeps):
                mean_ink = (_warped(blurred, parameters, padding).sum(0)[0] + 0.5) / (len(stack) + 1)  # never 0 or 1
                log_odds = mean_ink.logit()
                parameters = _sweep(blurred, parameters, log_odds, step, padding)
                funnel.append(FunnelStep(blur_px, step, log_odds, parameters.mean(0)))
                parameters = parameters - funnel[-1].mean
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
    for number, unit in enumerate(_steps()):
        move = torch.zeros(len(PARAMETERS)).to(parameters)
        move[number] = step * unit
        tried = torch.cat([parameters + move, parameters - move])
        up, down = (_warped(torch.cat([stack, stack]), tried, padding) * log_odds).sum((1, 2, 3)).split(n)
        goes_up, goes_down = (up > best) & (up >= down), (down > best) & (down > up)
        parameters = parameters + (goes_up.float() - goes_down.float())[:, None] * move
        best = torch.where(goes_up, up, torch.where(goes_down, down, best))
    return parameters


def _steps() -> tuple[float, ...]:
    return (1 / 16, 1 / 16, 0.1, 1 / 16, 1 / 16, 1 / 16, 1 / 16)


def _matrices(parameters: Float[Tensor, "n 7"]) -> Float[Tensor, "n 2 3"]:
    """Output to input: shear y, then shear x, scales, rotation, shifts."""
    shift_x, shift_y, rotation, log_x, log_y, shear_x, shear_y = parameters.unbind(1)
    one = torch.ones_like(rotation)
    cos, sin = rotation.cos(), rotation.sin()
    sheared = (one + shear_x * shear_y, shear_x), (shear_y, one)
    (a, b), (c, d) = (
        [scale * value for value in row] for scale, row in zip((log_x.exp(), log_y.exp()), sheared, strict=True)
    )
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


def _unit(images: Images) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else (images.float() + 1) / 2


def _square(stack: Tensor) -> Tensor:
    if stack.shape[-1] != stack.shape[-2]:
        raise ValueError(f"images of {stack.shape[-2]} x {stack.shape[-1]}: expected square ones; crop or pad them")
    return stack


def _plane(height: int, width: int) -> Float[Tensor, "pixels 3"]:
    """(1, x, y) of every pixel, row by row; normalised coordinates."""
    points = centres((height, width), torch.empty(())).view(-1, 2)
    return torch.cat([torch.ones(len(points), 1), points], dim=1)
