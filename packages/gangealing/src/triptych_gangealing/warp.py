"""Warps: where each pixel of an output (aligned, congealed) image comes from in its input image.

The conventions of coordinates are those of `warping`: points are (x, y), normalised so that -1 and 1 are the image's outer
edges, or in pixels, the centre of the first at 0. A warp goes from OUTPUT to INPUT; its inverse from input to output.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from triptych_gangealing import mipmap
from triptych_gangealing.warping import Affine, Flow, InverseFlow, Points, Size, centres, to_normalised, to_pixels

__all__ = ["TOLERANCE", "Affine", "Flow", "InverseFlow", "Mapped", "Warp", "centres", "to_normalised", "to_pixels"]

Stage = Affine | Flow | InverseFlow

TOLERANCE = 1e-5  # of an inverse, normalised: 0.005 pixels of an image of 1000


class Mapped(NamedTuple):
    """Points that went through a warp."""

    points: Float[Tensor, "n k 2"]  # normalised
    residual: Float[Tensor, "n k"]  # of inverse flows, the largest: how far from the point asked for, normalised
    converged: Bool[Tensor, "n k"]
    """residual at most TOLERANCE: this is an answer. Where a flow folds there are several, and it is one of them"""
    inside: Bool[Tensor, "n k"]  # of the image they arrive in, edges included


@dataclass(frozen=True, eq=False)
class Warp:
    """Stages for each of n images, in the order in which a point of the output passes them on its way to the input."""

    stages: tuple[Stage, ...]

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
        """Those of some of the images."""
        return self._map_tensors(lambda x: x[indices])

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Warp":
        return Warp(tuple(stage.map_tensors(function) for stage in self.stages))

    def compose(self, other: "Warp") -> "Warp":
        """This warp of what `other` makes of an image: `a.compose(b).sample(x)` is `a.sample(b.sample(x))`, resampled once.

        A point of the output passes the stages of this warp, then those of `other`.
        """
        return Warp(self.stages + other.stages)

    def inverse(self) -> "Warp":
        """From input to output: `w.inverse().sample(w.sample(x))` is about x, but where a flow folds.

        Raises ValueError for a singular stage.
        """
        return Warp(tuple(stage.inverse() for stage in reversed(self.stages)))

    def mirror(self) -> "Warp":
        """For an image, where this warp is for the image flipped left to right."""
        flip = torch.eye(2, 3, dtype=self.stages[0].tensor.dtype, device=self.stages[0].tensor.device)
        flip[0, 0] = -1
        return Warp((*self.stages, Affine(flip.repeat(len(self), 1, 1))))

    def resize(self, size: Size) -> "Warp":
        """With flows on a grid of (height, width) cells. No image needs it: a warp fits every resolution as it is."""
        return Warp(tuple(stage if isinstance(stage, Affine) else stage.resize(size) for stage in self.stages))

    def grid(self, size: Size) -> Float[Tensor, "n h w 2"]:
        """Where each pixel of an output of (height, width) comes from."""
        start = centres(size, self.stages[0].tensor).view(1, -1, 2).expand(len(self), -1, -1)
        first, *rest = self.stages
        whole = isinstance(first, Flow) and first.size == tuple(size)  # asked at the centres of its cells
        points = start + first.delta.flatten(2).mT if whole else first(start)
        for stage in rest:
            points = stage(points)
        return points.unflatten(1, tuple(size))

    def sample(
        self,
        images: Float[Tensor, "n c H W"],
        size: Size | None = None,
        padding: str = "border",
        antialias: bool = True,
    ) -> Float[Tensor, "n c h w"]:
        """The output images, of (height, width) `size`, by default the input's.

        padding: what is outside the input is "border" (its nearest pixel), "reflection" or "zeros". antialias: what is made
        smaller is taken from smaller copies, as `mipmap` defines; otherwise bilinear. Differentiable in images and stages;
        the types of both are promoted for the computation, the result has the images'.
        """
        if len(images) != len(self):
            raise ValueError(f"{len(images)} images for {len(self)} warps: expected one each; select or repeat")
        grid = self.grid(tuple(images.shape[2:]) if size is None else size)
        dtype = torch.promote_types(images.dtype, grid.dtype)
        source, grid = images.to(dtype), grid.to(dtype)
        if antialias:
            height, width = images.shape[2:]
            level = mipmap.levels(grid[..., 0] * (width / 2), grid[..., 1] * (height / 2))
            out = mipmap.sample(source, grid, level, padding)
        else:
            out = F.grid_sample(source, grid, padding_mode=padding, align_corners=False)
        return out.to(images.dtype)

    def map_points(self, points: Points) -> Mapped:
        """Points of the output images, normalised, to where they come from in the input; the other way by `inverse()`."""
        if len(points) != len(self):
            raise ValueError(
                f"points of {len(points)} images for {len(self)} warps: expected as many; select or repeat"
            )
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


def _joined(stages: Sequence[Stage]) -> Stage:
    tensors = torch.cat([stage.tensor for stage in stages])
    return stages[0].map_tensors(lambda _: tensors)
