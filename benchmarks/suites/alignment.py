"""Alignment on this machine's CPU: the spatial transformer from images to aligned images, and whole training steps.

- "grid_sample alone": one bilinear sampling at a ready-made grid, of the same size; no warp gets under it.
- "written out": the same networks, whose every sampling is the mip map's definition written out, each level sampled whole.
- "ours": as the package has it.

A transformer of random weights turns, scales, shifts and bends, so that samples need several levels. Training steps are of the
preset digits32 with a generator and an encoder of random weights; there "plain" samples bilinearly, with aliasing, and is a floor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from triptych_common.parallel import Ranks
from triptych_common.throughput import keep_freed_memory
from triptych_common.training import Batch
from triptych_gangealing import warp as warp_module
from triptych_gangealing.config import PRESETS, SpatialTransformerConfig
from triptych_gangealing.encoders.perceptual import SSL_DIVISOR, Encoder, EncoderConfig, PerceptualDistance
from triptych_gangealing.objective import Objective
from triptych_gangealing.spatial_transformer import SpatialTransformer
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.train_config import PRESETS as GENERATORS
from triptych_gangealing.train import make_state, step
from triptych_gangealing.train_config import PRESETS as TRAINING
from triptych_gangealing.train_config import AlignTrainConfig

from benchmarks.runner import Job
from benchmarks.suites.warp import Sampler, definition, plain

STEPS = 4  # of training, in one timed call


class Size(NamedTuple):
    """A transformer, and images of what side and how many at once."""

    name: str
    config: SpatialTransformerConfig
    side: int
    batch: int
    repeats: int


SIZES = [
    Size("digits32", PRESETS["digits32"], 32, 1, 20),
    Size("digits32", PRESETS["digits32"], 32, 16, 20),
    Size("paper", PRESETS["paper"], 256, 1, 10),
    Size("paper", PRESETS["paper"], 256, 16, 4),
]


def sampling_by(sampler: Sampler) -> AbstractContextManager[object]:
    """Within, every anti-aliased sampling of a warp is this one's, which finds its levels itself; border padding."""
    return patch.multiple(
        warp_module,
        pyramid_levels=lambda x, y: x,
        sample_pyramid=lambda images, grid, level, padding: sampler(images, grid),
    )


def replaced(once: Callable[[], Tensor], sampler: Sampler | None) -> Callable[[], Tensor]:
    """The same with another sampling; with the package's own where there is none."""
    if sampler is None:
        return once

    def otherwise() -> Tensor:
        with sampling_by(sampler):
            return once()

    return otherwise


def transformer_of(config: SpatialTransformerConfig, seed: int) -> SpatialTransformer:
    """Of random weights, in the last layers too, which at the start of training are zero."""
    torch.manual_seed(seed)
    transformer = SpatialTransformer(config).requires_grad_(False).eval()
    for layer, size in ((transformer.similarity.head, 1.0), (transformer.flow.delta[-1], 0.1)):
        nn.init.normal_(layer.weight, std=size)
    return transformer


def pictures(size: Size, seed: int) -> Tensor:
    """Smooth noise, in [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    coarse = 2 * torch.rand(size.batch, 3, size.side // 4, size.side // 4, generator=rng) - 1
    return F.interpolate(coarse, (size.side, size.side), mode="bilinear", align_corners=False)


def aligning(size: Size, sampler: Sampler | None = None) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare the whole way from images to aligned images of the size that the networks see."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        keep_freed_memory()
        transformer, images = transformer_of(size.config, seed), pictures(size, seed)
        out = (size.config.input_size, size.config.input_size)

        @torch.inference_mode()
        def once() -> Tensor:
            return transformer(images).warp.sample(images, out, padding="border")

        return replaced(once, sampler)

    return prepare


def floor(size: Size) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare one plain sampling at the grid that the transformer finds."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        keep_freed_memory()
        images, side = pictures(size, seed), size.config.input_size
        with torch.inference_mode():
            grid = transformer_of(size.config, seed)(images).warp.grid((side, side))
        return torch.inference_mode()(lambda: plain(images, grid))

    return prepare


def training(config: AlignTrainConfig, sampler: Sampler | None = None) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare steps of training, on one device: samples and targets, warps, distances, gradients, Adam, average."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        keep_freed_memory()
        torch.manual_seed(seed)
        generator = Generator(GENERATORS["digits32"].networks(0)[0]).requires_grad_(False).eval()
        distance = PerceptualDistance(Encoder(EncoderConfig()), divisor=SSL_DIVISOR)
        settled = replace(config, seed=seed, init_images=config.clusters, pca_samples=2_000)
        objective = Objective(settled, generator, distance)
        with TemporaryDirectory() as folder:
            state = make_state(objective, Ranks(0, 1, torch.device("cpu")), Path(folder))

        def once() -> Tensor:
            for _ in range(STEPS):
                counters = range(state.samples_seen, state.samples_seen + config.batch_size)
                step(objective, state, Batch(state.step, config.batch_size, counters))
            return state.model["transformer"].similarity.head.weight.detach().clone()

        return replaced(once, sampler)

    return prepare


def jobs_of(size: Size) -> Iterator[Job]:
    """Images to aligned images."""
    label = f"{size.name}, batch {size.batch}"
    alone, written = f"{label}: grid_sample alone", f"{label}: written out"
    yield Job(alone, floor(size), size.batch, "images", repeats=size.repeats)
    yield Job(written, aligning(size, definition), size.batch, "images", repeats=size.repeats)
    yield Job(
        f"{label}: ours", aligning(size), size.batch, "images", (alone, written), same_as=written, repeats=size.repeats
    )


def training_jobs(config: AlignTrainConfig) -> Iterator[Job]:
    """Steps of training."""
    floors = {"training step: plain": plain, "training step: written out": definition}
    for name, sampler in floors.items():
        yield Job(name, training(config, sampler), STEPS, "steps", repeats=5)
    yield Job("training step: ours", training(config), STEPS, "steps", tuple(floors), repeats=5)


def jobs() -> Sequence[Job]:
    return [*(job for size in SIZES for job in jobs_of(size)), *training_jobs(TRAINING["digits32"])]
