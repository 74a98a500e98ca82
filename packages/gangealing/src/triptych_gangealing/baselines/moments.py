"""Alignment by image moments: centroid, principal axis and radius of gyration of each image's ink.

A baseline that sees one image at a time and learns nothing. `ink` and `luma` reduce an image to ink, 0 to 1 at each pixel, for
`congealing` too.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from triptych_gangealing.digits32 import LUMA
from triptych_gangealing.warp import Affine, Warp, centres

INK_FLOOR = 0.1  # share of the strongest distance that rounding and a background that is no plane may reach
STRONGEST = 0.005  # share of pixels taken to be full ink: those of the thinnest digit's stroke
RADIUS = 0.4  # of gyration, in half sides: that of MNIST's digits on a canvas of 32
Images = Shaped[Tensor, "n channels height width"]


def luma(images: Images) -> Float[Tensor, "n 1 height width"]:
    """Brightness, 0 to 1, of uint8 images or of floats in [-1, 1]: ink, where digits are white on black."""
    images = _unit(images)
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def ink(images: Images) -> Float[Tensor, "n 1 height width"]:
    """What stands out from the background, 0 to 1: the distance in colour from a plane fitted to the border's pixels.

    Distances are relative to the strongest half percent; those below a tenth count as none. Takes uint8 or floats in [-1, 1],
    grey or colour, dark on light or light on dark.
    """
    images = _unit(images)
    n, channels, height, width = images.shape
    basis, colours = _plane(height, width).to(images), images.flatten(2).mT  # pixels x 3; n x pixels x channels
    edge = torch.ones(height, width, dtype=torch.bool, device=images.device)
    edge[1:-1, 1:-1] = False
    at_border, border = basis[edge.flatten()], colours[:, edge.flatten()]
    # Reweighted least squares: the plane minimises distances, not their squares, so that ink at the border bends it little.
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
    images: Images, *, read: Callable[[Images], Tensor] = ink, resolve: Literal["skewness", "upright"] = "skewness"
) -> Warp:
    """Bring the ink's centroid to the middle, its principal axis upright, its radius of gyration to 0.4 half sides.

    resolve: which of the axis's two directions is down: by "skewness", where the longer tail is (the third moment along the
    axis); or "upright", the smaller of the two rotations, right for anything turned by less than 90 degrees. Images without ink
    stay as they are. Raises ValueError for images that are not square.
    """
    weights = require_square(read(images)).double().flatten(1)
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
    parts = torch.cat([rotation[:, None], log_scale[:, None], centroid], dim=1).masked_fill(empty[:, None], 0).float()
    return Warp((Affine.similarity(parts[:, 0], parts[:, 1], parts[:, 2:]),))


def _unit(images: Images) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else (images.float() + 1) / 2


def require_square(stack: Tensor) -> Tensor:
    """The images themselves. Raises ValueError where height and width differ."""
    if stack.shape[-1] != stack.shape[-2]:
        raise ValueError(f"images of {stack.shape[-2]} x {stack.shape[-1]}: expected square ones; crop or pad them")
    return stack


def _plane(height: int, width: int) -> Float[Tensor, "pixels 3"]:
    """(1, x, y) of every pixel, row by row; normalised coordinates."""
    points = centres((height, width), torch.empty(())).view(-1, 2)
    return torch.cat([torch.ones(len(points), 1), points], dim=1)
