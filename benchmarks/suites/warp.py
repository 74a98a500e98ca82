"""Anti-aliased warping on this machine's CPU: half the size, under smooth flows and similarities that need every mip level.

- "plain": one bilinear grid_sample, which aliases; nothing anti-aliased gets under it.
- "released": as the released code of GANgealing goes about it. Every level of the pyramid is brought back to full size, all
  are sampled, then each pixel picks two. A sample there is bilinear in a bilinear enlargement: close to ours, not the same.
- "definition": ours written out. Every level is sampled at its own size, then each pixel picks two.

"both" is forward and the gradient of the grid, as in training, where images come from a frozen generator.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from triptych_common.throughput import keep_freed_memory
from triptych_gangealing import warp as warp_module
from triptych_gangealing.warp import Affine, Flow, Warp

from benchmarks.runner import Job

IMAGES, OUT = (4, 3, 256, 256), (128, 128)
POINTS = 20  # keypoints of an image
WAYS = {"output to input": False, "input to output": True}

Sampler = Callable[[Tensor, Tensor], Tensor]  # of images and a grid


def plain(images: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def ours(images: Tensor, grid: Tensor) -> Tensor:
    height, width = images.shape[2:]
    level = warp_module.pyramid_levels(grid[..., 0] * (width / 2), grid[..., 1] * (height / 2))
    return warp_module.sample_pyramid(images, grid, level, "border")


def levels_by_definition(images: Tensor, grid: Tensor) -> Tensor:
    """Of the farthest of four neighbours; a pixel without one has itself."""
    height, width = images.shape[2:]
    pixels = grid.movedim(-1, 1) * torch.tensor([width / 2, height / 2]).view(1, 2, 1, 1)
    around = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    near = (around[:, :, 1:-1, :-2], around[:, :, 1:-1, 2:], around[:, :, :-2, 1:-1], around[:, :, 2:, 1:-1])
    squared = torch.stack([(other - pixels).square().sum(1) for other in near]).amax(0)
    return squared.clamp(min=1).sqrt().log2().clamp(max=warp_module.MAX_LEVEL)


def picked(stack: Tensor, level: Tensor) -> Tensor:
    """From samples of every level (batch, channels, levels, rows, columns), interpolated between two."""
    index = level[:, None, None].expand(-1, stack.shape[1], -1, -1, -1)
    low, high = (stack.gather(2, at.long())[:, :, 0] for at in (index.floor(), index.ceil()))
    return low + (level % 1)[:, None] * (high - low)


def definition(images: Tensor, grid: Tensor) -> Tensor:
    level = levels_by_definition(images, grid)
    values = [plain(images, grid)]
    for _ in range(math.ceil(float(level.detach().max()))):
        half = [(side + 1) // 2 for side in images.shape[2:]]
        images = F.interpolate(images, half, mode="bilinear", antialias=True, align_corners=False)
        values.append(plain(images, grid))
    return picked(torch.stack(values, 2), level)


def released(images: Tensor, grid: Tensor) -> Tensor:
    level = levels_by_definition(images, grid)
    channels, size = images.shape[1], images.shape[2:]
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=images.dtype) / 8
    weight = taps.outer(taps).repeat(channels, 1, 1, 1)
    full = [images]
    for _ in range(math.ceil(float(level.detach().max()))):
        images = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), weight, stride=2, groups=channels)
        full.append(F.interpolate(images, size, mode="bilinear", align_corners=False))
    values = plain(torch.stack(full, 2).flatten(1, 2), grid)
    return picked(values.unflatten(1, (channels, len(full))), level)


SAMPLERS: dict[str, Sampler] = {"plain": plain, "released": released, "definition": definition, "ours": ours}


def drawn(seed: int) -> tuple[Tensor, Warp]:
    """Images, and smooth flows as fine as the output before turns, magnifications and shifts. (Of a coarser flow, a pixel's
    neighbours on two sides are often equally far, and rounding decides whose is the gradient.)"""
    rng = torch.Generator().manual_seed(seed)
    n = IMAGES[0]
    images = F.interpolate(torch.rand(n, IMAGES[1], *(side // 4 for side in IMAGES[2:]), generator=rng), IMAGES[2:])
    coarse = 0.12 * torch.randn(n, 2, 6, 6, generator=rng)
    flow = Flow(F.interpolate(coarse, OUT, mode="bicubic", align_corners=False))
    turn, scale, shift = (0.3 * torch.randn(n, *rest, generator=rng) for rest in ((), (), (2,)))
    return images, Warp((flow, Affine.similarity(turn, scale, shift)))


def sampling(sampler: Sampler, *, backward: bool) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare sampling at a given grid; what is timed returns the values, or the grid's gradient."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        keep_freed_memory()
        images, warp = drawn(seed)
        grid = warp.grid(OUT)
        if not backward:
            return torch.inference_mode()(lambda: sampler(images, grid))
        grid.requires_grad_()
        weights = torch.randn(IMAGES[0], IMAGES[1], *OUT, generator=torch.Generator().manual_seed(seed))
        return lambda: torch.autograd.grad(sampler(images, grid), grid, weights)[0]

    return prepare


def warping(*, backward: bool) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare a whole warp: its grid and the sampling; or with the gradient of its flow and of its matrix."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        keep_freed_memory()
        images, warp = drawn(seed)
        if not backward:
            return torch.inference_mode()(lambda: warp.sample(images, OUT))
        stages = [stage.tensor.requires_grad_() for stage in warp.stages]
        return lambda: torch.autograd.grad(warp.sample(images, OUT).square().sum(), stages)[0]

    return prepare


def mapping(*, back: bool) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare mapping a few points of each image, from output to input or back."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        _, warp = drawn(seed)
        points = 1.6 * torch.rand(IMAGES[0], POINTS, 2, generator=torch.Generator().manual_seed(seed)) - 0.8
        if back:
            points, warp = warp.map_points(points).points, warp.inverse()
        return torch.inference_mode()(lambda: warp.map_points(points).points)

    return prepare


def jobs() -> Sequence[Job]:
    n, listed = IMAGES[0], []
    for passes in ("forward", "both"):
        names = {name: f"sampling, {passes}: {name}" for name in SAMPLERS}
        for name, sampler in SAMPLERS.items():
            prepare = sampling(sampler, backward=passes == "both")
            others = tuple(names[other] for other in SAMPLERS if other != "ours")
            mine = {"against": others, "same_as": names["definition"]} if name == "ours" else {}
            listed.append(Job(names[name], prepare, n, "images", **mine))
        prepare = warping(backward=passes == "both")
        listed.append(Job(f"whole warp, {passes}", prepare, n, "images", (names["plain"],)))
    points = (Job(f"points, {way}", mapping(back=back), n * POINTS, "points") for way, back in WAYS.items())
    return [*listed, *points]
