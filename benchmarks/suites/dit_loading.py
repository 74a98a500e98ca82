"""Feeding a DiT: latents sampled from the cache, beside decoding and cropping the images they were encoded from.

One process each, a random batch at a time, everything in the page cache. The pictures are smooth fields and some noise,
which a PNG decoder takes as long for as for photographs; a real run would also have the autoencoder to pay for.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from triptych_common import randomness
from triptych_common.data import ImageFolder
from triptych_common.images import from_uint8, to_uint8, write_png
from triptych_dit.autoencoder.cache import LatentCache, write_manifest, write_shard
from triptych_dit.autoencoder.model import scaled_sample

from benchmarks.runner import Job

BATCH, PICTURES, SIDE = 256, 256, 256
LATENTS, SHARD, SHAPE = 4096, 1024, (4, 32, 32)
SCALE = 0.18215


def pictures(folder: Path, seed: int) -> ImageFolder:
    """256 x 256 PNGs."""
    for i in range(PICTURES):
        coarse = randomness.normal(seed, "picture", [i], (3, 16, 16))
        smooth = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")[0] / 3
        grain = 0.03 * randomness.normal(seed, "grain", [i], (3, SIDE, SIDE))[0]
        write_png(folder / f"{i:04d}.png", to_uint8(smooth + grain))
    return ImageFolder(folder)


def latents(folder: Path, seed: int) -> LatentCache:
    """A cache of as many latents, of the shape of Stable Diffusion's."""
    for shard in range(LATENTS // SHARD):
        moments = randomness.normal(seed, "moments", [shard], (SHARD, 2, 2 * SHAPE[0], *SHAPE[1:]), dtype=torch.float16)
        items = torch.arange(SHARD) + shard * SHARD
        write_shard(folder, shard, moments[0], items % 10, items)
    facts = {
        "autoencoder": {"spec": "none", "scale_factor": SCALE}, "flips": True, "latent_shape": SHAPE,
        "source": {"spec": "noise", "class_names": [str(label) for label in range(10)]},
    }  # fmt: skip
    write_manifest(folder, LATENTS // SHARD, facts)
    return LatentCache(folder)


def batches(
    make: Callable[[Path, int], Any], load: Callable[..., Tensor], n: int
) -> Callable[[int], Callable[[], Any]]:
    """Prepare a job: what `make` writes into a temporary folder, loaded in shuffled order, half of it mirrored."""

    def prepare(seed: int) -> Callable[[], Any]:
        folder = TemporaryDirectory()
        source, counters = make(Path(folder.name), seed), iter(range(0, 1 << 40, BATCH))

        def once(_folder: TemporaryDirectory = folder) -> Tensor:  # which lives as long as this function
            batch = range(start := next(counters), start + BATCH)
            flipped = randomness.uniform(seed, "flip", batch) < 0.5
            return load(source, randomness.shuffled(seed, "order", batch, n), flipped, batch, seed)

        return once

    return prepare


def load_pictures(source: ImageFolder, indices: Tensor, flipped: Tensor, *_: Any) -> Tensor:
    images = torch.stack([source.read(index, SIDE) for index in indices.tolist()])
    return from_uint8(torch.where(flipped[:, None, None, None], images.flip(-1), images))


def load_moments(cache: LatentCache, indices: Tensor, flipped: Tensor, *_: Any) -> Tensor:
    return cache.moments(indices, flipped)


def load_samples(cache: LatentCache, indices: Tensor, flipped: Tensor, counters: range, seed: int) -> Tensor:
    noise = randomness.normal(seed, "posterior", counters, SHAPE)
    return scaled_sample(cache.moments(indices, flipped), noise, cache.space)


def jobs() -> Sequence[Job]:
    sampled = "latent cache, sampled"
    return [
        Job("latent cache, moments", batches(latents, load_moments, LATENTS), BATCH, "images"),
        Job(sampled, batches(latents, load_samples, LATENTS), BATCH, "images"),
        Job("folder of PNG", batches(pictures, load_pictures, PICTURES), BATCH, "images", against=(sampled,)),
    ]
