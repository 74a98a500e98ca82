"""Warps: where each pixel of an output (aligned, congealed) image comes from in its input image.

`Warp` is a chain of stages, each an affine map, a flow or an inverse flow. It samples images, composes, inverts and maps
points, and owns every convention of coordinates; the others are its parts.  [thesis 4.3.1]
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

Points = Float[Tensor, "n k 2"]
Images = Float[Tensor, "n channels height width"]
Size = tuple[int, int]

TOLERANCE = 1e-5  # of an inverse, normalised: 0.005 pixels of an image of 1000
MAX_LEVEL = 2.5  # of the pyramid that images are sampled from
_GOOD_ENOUGH = 1e-6  # normalised residual at which the iteration of an inverse ends; a Newton step follows
_MAX_ITERATIONS = 100


class Mapped(NamedTuple):
    """Points after a warp."""

    points: Float[Tensor, "n k 2"]  # normalised
    residual: Float[Tensor, "n k"]  # the largest error of an inverse flow on the way, normalised; 0 without one
    converged: Bool[Tensor, "n k"]
    """residual at most TOLERANCE. Where a flow folds there are several solutions, and this is one of them"""
    inside: Bool[Tensor, "n k"]  # of the image they arrive in, edges included


@dataclass(frozen=True, eq=False)
class Warp:
    """Stages for each of n images, in the order in which a point of the output passes them on its way to the input.

    Convention:
        direction: from OUTPUT (aligned, congealed) to INPUT; `inverse()` goes from input to output.
        points: (x, y), x to the right, y down.
        normalised coordinates: -1 and 1 are the image's outer edges (align_corners=False), so that they mean the same place
        at any resolution. An oblong image counts as squeezed to a square, and a similarity turns that square.
        pixels: the centre of the first pixel is (0, 0); `to_pixels` and `to_normalised` convert.
        sizes: (height, width), as shapes are.

    Example:
        >>> quarter_turn = Affine.similarity(torch.tensor([torch.pi / 2]), torch.zeros(1), torch.zeros(1, 2))
        >>> warp = Warp((quarter_turn,))
        >>> turned = warp.sample(images)  # (1, channels, height, width)
        >>> warp.map_points(torch.tensor([[[1.0, 0.0]]])).points.round()  # the output's right edge shows the input's bottom
        tensor([[[-0., 1.]]])
    """

    stages: "tuple[Stage, ...]"

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a warp without stages: expected at least one; use Warp.identity(n)")
        kinds = {(len(stage.tensor), stage.tensor.dtype, str(stage.tensor.device)) for stage in self.stages}
        if len(kinds) > 1:
            listed = "; ".join(f"{n} of {dtype} on {device}" for n, dtype, device in sorted(kinds, key=str))
            raise ValueError(f"warps of {listed}: expected as many in every stage, of one type, on one device")

    @classmethod
    def identity(
        cls, n: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> "Warp":
        return cls((Affine(torch.eye(2, 3, device=device, dtype=dtype).repeat(n, 1, 1)),))

    def __len__(self) -> int:
        return len(self.stages[0].tensor)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Warp":
        return self._map_tensors(lambda x: x.to(device=device, dtype=dtype))

    @classmethod
    def cat(cls, warps: Sequence["Warp"]) -> "Warp":
        """Warps of several batches of images as one. Raises ValueError where their stages are not alike."""
        kinds = {tuple(type(stage).__name__ for stage in warp.stages) for warp in warps}
        if len(kinds) != 1:
            listed = "; ".join(", ".join(names) for names in sorted(kinds)) or "none"
            raise ValueError(f"warps of stages {listed}: expected the same in each")
        columns = zip(*(warp.stages for warp in warps), strict=True)
        return cls(tuple(_joined(stages) for stages in columns))

    def select(self, indices: Int[Tensor, " m"] | Bool[Tensor, " n"] | Sequence[int] | slice) -> "Warp":
        """Warps of some of the images."""
        return self._map_tensors(lambda x: x[indices])

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Warp":
        return Warp(tuple(stage.map_tensors(function) for stage in self.stages))

    def compose(self, other: "Warp") -> "Warp":
        """`other` first, then this: `a.compose(b).sample(x)` is `a.sample(b.sample(x))`, but resampled once."""
        # Points travel the other way than pixels, from output to input, so this warp's stages come first.
        return Warp(self.stages + other.stages)

    def inverse(self) -> "Warp":
        """From input to output: `w.inverse().sample(w.sample(x))` is about x, except where a flow folds.

        Raises ValueError for a singular stage.
        """
        return Warp(tuple(stage.inverse() for stage in reversed(self.stages)))

    def mirror(self) -> "Warp":
        """The warp for an image, where this one is for the image flipped left to right."""
        flip = torch.eye(2, 3, dtype=self.stages[0].tensor.dtype, device=self.stages[0].tensor.device)
        flip[0, 0] = -1
        # Last, as it acts on the input's coordinates.
        return Warp((*self.stages, Affine(flip.repeat(len(self), 1, 1))))

    def resize(self, size: Size) -> "Warp":
        """The warp with flows on a grid of (height, width) cells. Sampling does not need this: a warp fits every resolution."""
        return Warp(tuple(stage if isinstance(stage, Affine) else stage.resize(size) for stage in self.stages))

    def grid(self, size: Size) -> Float[Tensor, "n h w 2"]:
        """Where each pixel of an output of (height, width) comes from."""
        start = centres(size, self.stages[0].tensor).view(1, -1, 2).expand(len(self), -1, -1)
        first, *rest = self.stages
        # At the centres of a flow's own cells nothing is interpolated.
        exact = isinstance(first, Flow) and first.size == tuple(size)
        points = start + first.tensor.flatten(2).mT if exact else first(start)
        for stage in rest:
            points = stage(points)
        return points.unflatten(1, tuple(size))

    def sample(
        self, images: Images, size: Size | None = None, padding: str = "border", antialias: bool = True
    ) -> Float[Tensor, "n channels h w"]:
        """The output images, of (height, width) `size`, by default the input's.

        padding: outside the input there is "border" (the nearest pixel), "reflection" or "zeros". antialias: where the warp
        shrinks, sample from smaller copies (`sample_pyramid`); otherwise bilinearly. Differentiable in images and stages;
        computed in the wider of their two types, returned in the images'.
        """
        if len(images) != len(self):
            raise ValueError(f"{len(images)} images for {len(self)} warps: expected one each; select or repeat")
        height, width = images.shape[2:]
        grid = self.grid((height, width) if size is None else size)
        dtype = torch.promote_types(images.dtype, grid.dtype)
        source, grid = images.to(dtype), grid.to(dtype)
        if antialias:
            # Half a side per normalised unit: distances in pixels of the input.
            level = pyramid_levels(grid[..., 0] * (width / 2), grid[..., 1] * (height / 2))
            out = sample_pyramid(source, grid, level, padding)
        else:
            out = F.grid_sample(source, grid, padding_mode=padding, align_corners=False)
        return out.to(images.dtype)

    def map_points(self, points: Points) -> Mapped:
        """Points of the output images, normalised, to where they come from in the input; the other way by `inverse()`."""
        images, warps = len(points), len(self)
        if images != warps:
            raise ValueError(f"points of {images} images for {warps} warps: expected one each; select or repeat")
        at = points.to(self.stages[0].tensor.dtype)
        residual = torch.zeros_like(at[..., 0])
        for stage in self.stages:
            if isinstance(stage, InverseFlow):
                at, distance = stage.solve(at)
                residual = torch.maximum(residual, distance)
            else:
                at = stage(at)
        residual = residual.detach()
        return Mapped(at, residual, residual <= TOLERANCE, _inside(at))

    def inside(self, size: Size) -> Float[Tensor, "n 1 h w"]:
        """1 for each pixel of an output of (height, width) that comes from within the input, else 0."""
        grid = self.grid(size)
        return _inside(grid)[:, None].to(grid.dtype)


def _inside(points: Float[Tensor, "*dims 2"]) -> Bool[Tensor, "*dims"]:
    return (points.detach().abs() <= 1).all(dim=-1)


def _joined(stages: "Sequence[Stage]") -> "Stage":
    tensors = torch.cat([stage.tensor for stage in stages])
    return stages[0].map_tensors(lambda _: tensors)


# --- Coordinates


def to_normalised(pixels: Float[Tensor, "*dims 2"], size: Size) -> Float[Tensor, "*dims 2"]:
    """Points in pixels of an image of (height, width) as normalised ones."""
    return (2 * pixels + 1) / _sides(pixels, size) - 1  # pixel 0 spans -0.5 to 0.5


def to_pixels(normalised: Float[Tensor, "*dims 2"], size: Size) -> Float[Tensor, "*dims 2"]:
    """Normalised points in pixels of an image of (height, width)."""
    return ((normalised + 1) * _sides(normalised, size) - 1) / 2


def centres(size: Size, like: Tensor, *, first: int = 0, rows: int | None = None) -> Float[Tensor, "h w 2"]:
    """The centre of every pixel, normalised; or of those from row `first` on of an image that has `rows`."""
    down, across = (torch.arange(side, dtype=like.dtype, device=like.device) for side in size)
    y, x = torch.meshgrid(down + first, across, indexing="ij")
    return to_normalised(torch.stack((x, y), dim=-1), (rows or size[0], size[1]))


def _sides(points: Tensor, size: Size) -> Float[Tensor, " 2"]:
    """(width, height), in the order of a point's coordinates."""
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"image size {height}x{width} (height x width): expected at least 1x1")
    # Filled in on the device: a copy from the host would make it wait.
    sides = torch.full((2,), float(width), dtype=points.dtype, device=points.device)
    sides[1] = height
    return sides


# --- Stages


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
        """A turn by `rotation` (radians, from x towards y) and a magnification by exp(log_scale), then a shift."""
        # It acts on coordinates: the image's content turns and moves the other way, and shrinks.
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
        rows = (torch.stack((d, -b, b * ty - d * tx), dim=-1), torch.stack((-c, a, c * tx - a * ty), dim=-1))
        return Affine(torch.stack(rows, dim=1) / determinant[:, None, None])

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Affine":
        return Affine(function(self.matrix))

    @property
    def tensor(self) -> Tensor:
        return self.matrix


@dataclass(frozen=True, eq=False)
class Flow:
    """p -> p + delta(p), one for each image. `delta` (x, y), normalised, is given at the centres of a grid of cells over the
    output image, bilinear between them and constant beyond the outer ones."""

    delta: Float[Tensor, "n 2 height width"]

    def __call__(self, points: Points) -> Points:
        return points + self._at(points)

    def _at(self, points: Points) -> Points:
        # grid_sample takes a grid of rows: n 1 k 2 gives n 2 1 k
        return F.grid_sample(self.delta, points[:, None], padding_mode="border", align_corners=False)[:, :, 0].mT

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
        """Of p + delta(p), output by input; on the border between two cells, that of the right or lower one."""
        # delta is bilinear: its slope in x is the difference of the columns left and right, at the point's own row.
        column, row = to_pixels(points, self.size).unbind(-1)
        left, top = column.floor(), row.floor()
        corners = ((left, row), (left + 1, row), (column, top), (column, top + 1))
        stacked = torch.cat([torch.stack(corner, dim=-1) for corner in corners], dim=1)
        delta = self._at(to_normalised(stacked, self.size))
        west, east, north, south = delta.chunk(4, dim=1)
        by_x, by_y = (east - west) * (self.size[1] / 2), (south - north) * (self.size[0] / 2)
        return torch.stack((by_x, by_y), dim=-1) + torch.eye(2, dtype=delta.dtype, device=delta.device)


@dataclass(frozen=True, eq=False)
class InverseFlow:
    """q -> the p with p + delta(p) = q, by fixed-point iteration."""

    flow: Flow

    def __call__(self, points: Points) -> Points:
        return self.solve(points)[0]

    def solve(self, points: Points) -> tuple[Points, Float[Tensor, "n k"]]:
        """The point p with p + delta(p) = q, and how far p + delta(p) is from q.

        The iteration p <- p + s (q - p - delta(p)), with s halved until it comes nearer, converges wherever the flow does not
        fold; where it folds, to one of several solutions or to none.
        """
        with torch.no_grad():
            p, before = self._iterate(points)
            (a, b), (c, d) = (row.unbind(-1) for row in self.flow.jacobian(p).unbind(-2))
            determinant = a * d - b * c
            regular = determinant > 1e-3  # otherwise the flow folds here
        # One Newton step outside no_grad: it adds the last digits, and its derivatives are those of the implicit function.
        x, y = (points - self.flow(p)).unbind(-1)
        step = torch.stack((d * x - b * y, a * y - c * x), dim=-1) / torch.where(regular, determinant, 1)[..., None]
        step = torch.where(regular[..., None], step, torch.stack((x, y), dim=-1))
        with torch.no_grad():
            after = _distance(points - self.flow(p + step))
            nearer = after < before
        step = torch.where(nearer[..., None], step, step - step.detach())  # of value 0, but with the derivatives
        return p + step, torch.where(nearer, after, before)

    def _iterate(self, points: Points) -> tuple[Points, Float[Tensor, "n k"]]:
        p = points
        error = points - self.flow(p)
        distance = _distance(error)
        share = torch.ones_like(distance)
        for _ in range(_MAX_ITERATIONS):
            if not ((distance > _GOOD_ENOUGH) & (share > 1e-3)).any():
                break
            trial = p + share[..., None] * error
            trial_error = points - self.flow(trial)
            trial_distance = _distance(trial_error)
            nearer = trial_distance < distance
            p = torch.where(nearer[..., None], trial, p)
            error = torch.where(nearer[..., None], trial_error, error)
            distance = torch.where(nearer, trial_distance, distance)
            # Each point has its own step: doubled where it helped, at most to 1, and halved where it did not.
            share = torch.where(nearer, (2 * share).clamp(max=1), share / 2)
        return p, distance

    def inverse(self) -> Flow:
        return self.flow

    def resize(self, size: Size) -> "InverseFlow":
        return InverseFlow(self.flow.resize(size))

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "InverseFlow":
        return InverseFlow(self.flow.map_tensors(function))

    @property
    def tensor(self) -> Tensor:
        return self.flow.delta


Stage = Affine | Flow | InverseFlow


# --- Anti-aliased sampling


def sample_pyramid(
    images: Images, grid: Float[Tensor, "n h w 2"], level: Float[Tensor, "n h w"], padding: str
) -> Float[Tensor, "n channels h w"]:
    """Images at the grid's points (x, y), normalised, each at its own level of 0..`MAX_LEVEL`: trilinear, from a mip map.

    - Level 0 is the image. Level l + 1 has half the rows and columns of level l, rounded up, filtered by a tent two of its own
      pixels wide on either side; for even sides the taps are [1, 3, 3, 1] / 8. Taps beyond the edge are dropped and the others
      scaled up, as in `F.interpolate(..., mode="bilinear", antialias=True, align_corners=False)`.
    - A normalised coordinate means the same place at every level. Each level is sampled bilinearly at its own size, with the same
      padding; levels in between are interpolated linearly.

    padding: "border", "reflection" or "zeros". Differentiable in all three; at whole levels the derivative is taken to be 0.
    """
    # Levels are not enlarged to full size first, which would take most of the time: each sample is bilinear in the level itself.
    first, last = _levels_needed(level)
    for _ in range(first):
        images = halved(images)
    out = F.grid_sample(images, grid, padding_mode=padding, align_corners=False)
    for number in range(first, last):
        images = halved(images)
        values = F.grid_sample(images, grid, padding_mode=padding, align_corners=False)
        # 1 at still higher levels, where the coarser copy replaces `out`.
        share = F.hardtanh(level - number, 0, 1)[:, None]
        out = torch.lerp(out, values, share)
    return out


def _levels_needed(level: Tensor) -> tuple[int, int]:
    """First and last level of the pyramid that any pixel needs."""
    everything = 0, math.ceil(MAX_LEVEL)
    # Other devices take all levels: reading the extremes would make them wait.
    if level.device.type != "cpu" or torch.compiler.is_compiling() or level.numel() == 0:
        return everything
    low, high = (float(value) for value in level.detach().aminmax())
    return (math.floor(low), math.ceil(high)) if math.isfinite(low + high) else everything


def pyramid_levels(x: Float[Tensor, "n h w"], y: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
    """The level of each output pixel, 0..`MAX_LEVEL`, from its source point in input pixels, whatever their origin.

    It is log2 of the largest distance, in input pixels, between the pixel's source and those of its four neighbours.
    """
    across = (x[:, :, 1:] - x[:, :, :-1]).square() + (y[:, :, 1:] - y[:, :, :-1]).square()
    down = (x[:, 1:] - x[:, :-1]).square() + (y[:, 1:] - y[:, :-1]).square()
    left_right = torch.maximum(F.pad(across, (1, 0)), F.pad(across, (0, 1)))
    up_down = torch.maximum(F.pad(down, (0, 0, 1, 0)), F.pad(down, (0, 0, 0, 1)))
    # log2 of a square over 2: a root would have infinite slope at 0. The padding's 0 never counts, as values below 1 become 1.
    return torch.maximum(left_right, up_down).clamp(1, 4**MAX_LEVEL).log2() / 2


def halved(images: Images) -> Float[Tensor, "n channels half_height half_width"]:
    """The next level of the pyramid."""
    return _halved(_halved(images, 2), 3)


def _halved(x: Tensor, dim: int) -> Tensor:
    """The same along one axis."""
    side = x.shape[dim]
    if side == 1:
        return x
    half = (side + 1) // 2
    if side % 2 and dim == 2:  # transposed: torch 2.15 shrinks a single column wrongly
        return _halved(x.mT.contiguous(), 3).mT.contiguous()
    if side % 2:
        return F.interpolate(x, (x.shape[2], half), mode="bilinear", antialias=True, align_corners=False)
    # Taps [1, 3, 3, 1] / 8 by sums of slices: on a CPU more than twice as fast as a convolution.
    first, second = x.unflatten(dim, (half, 2)).unbind(dim + 1)
    out = (first + second).mul_(3 / 8)
    if half == 1:
        return out.mul_(8 / 6)
    out.narrow(dim, 1, half - 1).add_(second.narrow(dim, 0, half - 1), alpha=1 / 8)
    out.narrow(dim, 0, half - 1).add_(first.narrow(dim, 1, half - 1), alpha=1 / 8)
    for end in (0, half - 1):  # where one tap of 1/8 is beyond the edge
        out.narrow(dim, end, 1).mul_(8 / 7)
    return out
