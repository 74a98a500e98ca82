"""The conventions of coordinates, and the stages that warps are made of: affine maps, flows and inverse flows.

Convention, here and nowhere else: points are (x, y), x to the right, y down. Normalised, -1 and 1 are the image's outer edges
(align_corners=False), so that they mean the same place at any resolution; in pixels, the centre of the first pixel is 0.
Sizes are (height, width), as shapes are. A stage goes from OUTPUT (aligned, congealed) to INPUT; its inverse from input to
output.

Stages work in normalised coordinates: in an image that is not square, a similarity turns what has been squeezed to a square.
[thesis 4.3.1]
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Points = Float[Tensor, "n k 2"]
Size = tuple[int, int]

_GOOD_ENOUGH = 1e-6  # normalised: where the iteration of an inverse ends; a last step then makes it still better
_MAX_ITERATIONS = 100


def to_normalised(pixels: Float[Tensor, "*dims 2"], size: Size) -> Float[Tensor, "*dims 2"]:
    """Points in pixels of an image of (height, width) as normalised ones."""
    sides = _sides(pixels, size)
    return (2 * pixels + 1) / sides - 1


def to_pixels(normalised: Float[Tensor, "*dims 2"], size: Size) -> Float[Tensor, "*dims 2"]:
    """Normalised points in pixels of an image of (height, width)."""
    sides = _sides(normalised, size)
    return ((normalised + 1) * sides - 1) / 2


def centres(size: Size, like: Tensor) -> Float[Tensor, "h w 2"]:
    """The centre of every pixel, normalised."""
    rows, columns = (torch.arange(side, dtype=like.dtype, device=like.device) for side in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return to_normalised(torch.stack((x, y), dim=-1), size)


def _sides(points: Tensor, size: Size) -> Float[Tensor, " 2"]:
    """(width, height), in the order of a point's coordinates."""
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"image size {height}x{width} (height x width): expected at least 1x1")
    sides = torch.full((2,), float(width), dtype=points.dtype, device=points.device)
    sides[1] = height  # filled in on the device: a copy from the host would make it wait
    return sides


def _distance(difference: Float[Tensor, "n k 2"]) -> Float[Tensor, "n k"]:
    return difference.square().sum(dim=-1).sqrt()


@dataclass(frozen=True, eq=False)
class Affine:
    """p -> A p + t, one for each image; `matrix` is [A t]."""

    matrix: Float[Tensor, "n 2 3"]

    @classmethod
    def similarity(
        cls, rotation: Float[Tensor, " n"], log_scale: Float[Tensor, " n"], shift: Float[Tensor, "n 2"]
    ) -> "Affine":
        """A turn by `rotation` (radians, from x towards y) and a magnification by exp(log_scale), then a shift.

        Of the coordinates: what is seen is turned and moved the other way, and made smaller.
        """
        scale = log_scale.exp()
        a, b = scale * rotation.cos(), scale * rotation.sin()
        rows = (torch.stack((a, -b, shift[:, 0]), dim=-1), torch.stack((b, a, shift[:, 1]), dim=-1))
        return cls(torch.stack(rows, dim=1))

    def __call__(self, points: Points) -> Points:
        x, y = points.unbind(-1)
        # One by one: a matrix product would be rounded to bfloat16 under autocast, to TF32 on some GPUs.
        (a, b, tx), (c, d, ty) = (row.unbind(1) for row in self.matrix.unsqueeze(-1).unbind(1))
        return torch.stack((a * x + b * y + tx, c * x + d * y + ty), dim=-1)

    def inverse(self) -> "Affine":
        """In closed form. Raises ValueError for a singular matrix."""
        (a, b, tx), (c, d, ty) = (row.unbind(1) for row in self.matrix.unbind(1))
        determinant = a * d - b * c
        size = a.abs() * d.abs() + b.abs() * c.abs()
        regular = determinant.abs() > 4 * torch.finfo(self.matrix.dtype).eps * size  # false for NaN
        if not regular.all():
            item = int((~regular).nonzero()[0])
            value = float(determinant[item].detach())
            raise ValueError(f"affine warp {item} has determinant {value:.3g}: expected one that can be inverted")
        rows = (
            torch.stack((d, -b, b * ty - d * tx), dim=-1),
            torch.stack((-c, a, c * tx - a * ty), dim=-1),
        )
        return Affine(torch.stack(rows, dim=1) / determinant[:, None, None])

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Affine":
        return Affine(function(self.matrix))

    @property
    def tensor(self) -> Tensor:
        return self.matrix


@dataclass(frozen=True, eq=False)
class Flow:
    """p -> p + delta(p), one for each image; `delta` (x, y), normalised, is bilinear between the centres of the cells of its
    grid, which spans the output image, and constant beyond the outer ones."""

    delta: Float[Tensor, "n 2 height width"]

    def __call__(self, points: Points) -> Points:
        delta = F.grid_sample(self.delta, points[:, None], padding_mode="border", align_corners=False)
        return points + delta[:, :, 0].mT

    def inverse(self) -> "InverseFlow":
        return InverseFlow(self)

    def resize(self, size: Size) -> "Flow":
        """On a grid of (height, width) cells: exact at their centres."""
        if min(size) < 1:
            raise ValueError(f"flow of {size[0]}x{size[1]} cells (height x width): expected at least 1x1")
        return Flow(F.interpolate(self.delta, size, mode="bilinear", align_corners=False))

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Flow":
        return Flow(function(self.delta))

    @property
    def tensor(self) -> Tensor:
        return self.delta

    @property
    def size(self) -> Size:
        return self.delta.shape[2], self.delta.shape[3]

    def jacobian(self, points: Points) -> Float[Tensor, "n k 2 2"]:
        """Of p + delta(p), output by input; across the border between two cells, that to the right or below."""
        column, row = to_pixels(points, self.size).unbind(-1)
        left, top = column.floor(), row.floor()
        corners = ((left, row), (left + 1, row), (column, top), (column, top + 1))
        stacked = torch.cat([torch.stack(corner, dim=-1) for corner in corners], dim=1)
        at = to_normalised(stacked, self.size)
        delta = F.grid_sample(self.delta, at[:, None], padding_mode="border", align_corners=False)[:, :, 0].mT
        west, east, north, south = delta.chunk(4, dim=1)
        by_x, by_y = (east - west) * (self.size[1] / 2), (south - north) * (self.size[0] / 2)
        return torch.stack((by_x, by_y), dim=-1) + torch.eye(2, dtype=delta.dtype, device=delta.device)


@dataclass(frozen=True, eq=False)
class InverseFlow:
    """q -> that p with p + delta(p) = q, by fixed-point iteration."""

    flow: Flow

    def __call__(self, points: Points) -> Points:
        return self.solve(points)[0]

    def solve(self, points: Points) -> tuple[Points, Float[Tensor, "n k"]]:
        """p, and how far p + delta(p) is from q.

        The iteration is p <- p + s (q - p - delta(p)), with s = 1 where that brings it nearer, else half as much, and again:
        it finds its way wherever the flow does not fold, and where it does, one of several answers, or none. A step with the
        flow's slope at the end gives the last digits, and the derivatives of the implicit function.
        """
        with torch.no_grad():
            found, before = self._iterate(points)
            (a, b), (c, d) = (row.unbind(-1) for row in self.flow.jacobian(found).unbind(-2))
            determinant = a * d - b * c
            regular = determinant > 1e-3  # not a fold, whose other side is no answer
        x, y = (points - self.flow(found)).unbind(-1)
        step = torch.stack((d * x - b * y, a * y - c * x), dim=-1) / torch.where(regular, determinant, 1)[..., None]
        step = torch.where(regular[..., None], step, torch.stack((x, y), dim=-1))
        with torch.no_grad():
            after = _distance(points - self.flow(found + step))
            nearer = after < before
        step = torch.where(nearer[..., None], step, step - step.detach())  # or the derivatives alone
        return found + step, torch.where(nearer, after, before)

    def _iterate(self, points: Points) -> tuple[Points, Float[Tensor, "n k"]]:
        found = points
        error = points - self.flow(found)
        distance = _distance(error)
        share = torch.ones_like(distance)
        for _ in range(_MAX_ITERATIONS):
            if not ((distance > _GOOD_ENOUGH) & (share > 1e-3)).any():
                break
            trial = found + share[..., None] * error
            trial_error = points - self.flow(trial)
            trial_distance = _distance(trial_error)
            nearer = trial_distance < distance
            found = torch.where(nearer[..., None], trial, found)
            error = torch.where(nearer[..., None], trial_error, error)
            distance = torch.where(nearer, trial_distance, distance)
            share = torch.where(nearer, (2 * share).clamp(max=1), share / 2)
        return found, distance

    def inverse(self) -> Flow:
        return self.flow

    def resize(self, size: Size) -> "InverseFlow":
        return InverseFlow(self.flow.resize(size))

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "InverseFlow":
        return InverseFlow(self.flow.map_tensors(function))

    @property
    def tensor(self) -> Tensor:
        return self.flow.delta
