"""Encode images to a cache of posterior moments, once, so that training never runs the autoencoder.  [thesis 2.4]

Shard i holds images i * shard_size .. (i + 1) * shard_size - 1. It is encoded by rank i modulo the number of ranks, in
batches that begin with the shard, so a cache does not depend on how many ranks made it. (On CPUs the number of threads
changes the last bits of a convolution: for equal bytes OMP_NUM_THREADS must be equal too; torchrun sets it to 1.)
"""

import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from triptych_common.cli import echo
from triptych_common.data import ImageSource, UnreadableImage, open_source
from triptych_common.images import from_uint8
from triptych_common.parallel import Ranks, process_group
from triptych_common.progress import Progress
from triptych_common.storage import checkpoint
from triptych_common.storage.run import RunDirectory

from triptych_dit.autoencoder.cache import (
    MANIFEST,
    SKIPPED,
    LatentCache,
    finished_shards,
    identity,
    pixel_sums,
    refuse_other_settings,
    shard_path,
    write_manifest,
    write_shard,
)
from triptych_dit.autoencoder.config import EncodeConfig
from triptych_dit.autoencoder.model import Autoencoder, load_autoencoder
from triptych_dit.cost import encoding_bytes, refuse_beyond

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIGITS = ("mnist5k", "mnist")


def open_images(config: EncodeConfig) -> ImageSource:
    """The source of images. Raises ValueError or OSError if it cannot be opened, or has none to encode."""
    if config.flips and config.source in DIGITS:
        raise ValueError(f"source {config.source}: a mirrored digit is no digit; pass --no-flips")
    columns = {"image_column": config.image_column, "label_column": config.label_column}
    source = open_source(config.source, config.split, unconditional=config.unconditional, **columns)
    _check_usable(source, config)
    return source


def preview(config: EncodeConfig) -> dict[str, Any]:
    """What --dry-run prints."""
    source, autoencoder = open_images(config), load_autoencoder(config.vae, download=False)
    shape = latent_shape(autoencoder, config.size)
    return {"config": asdict(config), **_extent(source, autoencoder, config), "latent_shape": shape}


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Make, resume or verify the cache in `config.out`; returns its path and contents.

    Raises ValueError for settings that do not fit the content of `out`, if no image can be used, or for moments that are not
    finite.
    """
    source = open_images(config)
    with process_group(config.device) as ranks:
        autoencoder = load_autoencoder(config.vae, device=ranks.device, dtype=PRECISIONS[config.precision])
        extent = _extent(source, autoencoder, config)
        refuse_large_batch(source, autoencoder, config)
        facts = cache_facts(source, autoencoder, config) if ranks.is_main else {}
        request, finished = checkpoint.index_digest(identity(facts)), set[int]()
        listing = source.listing()
        if ranks.is_main:  # before settings are written into a folder that has lost its own
            refuse_other_settings(config.out, extent["shards"], request)
        with RunDirectory(
            config.out, identity(facts), contents={"pictures": listing} if listing else None, is_main=ranks.is_main,
            device=ranks.device.type,
        ) as run:  # fmt: skip
            if ranks.is_main:
                echo("{images:,} images, {gigabytes:.2f} GB in {shards:,} shards".format(**extent))
                finished = finished_shards(run.path, extent["shards"], request)
                refuse_replaced(source, autoencoder, config, finished)
                if 0 < len(finished) < extent["shards"]:
                    run.compare_hardware()
            # The main rank's request and findings are the only ones.
            request, finished = ranks.gather((request, finished))[0]
            _encode_missing(source, autoencoder, config, request, finished, ranks)
            ranks.barrier()  # every rank has written its shards
            if ranks.is_main:
                write_manifest(run.path, extent["shards"], facts)
            ranks.barrier()
            manifest = LatentCache(run.path).facts
    listed = config.out / SKIPPED if manifest["skipped"] else None
    if listed:
        echo(f"left out {manifest['skipped']:,} images that cannot be used: {listed}")
    echo(f"latent cache of {manifest['items']:,} images: {config.out}")
    counts = {name: manifest[name] for name in ("items", "skipped", "latent_shape")}
    return {"cache": config.out, "manifest": config.out / MANIFEST, "skipped_list": listed, **counts}


def refuse_large_batch(source: ImageSource, autoencoder: Autoencoder, config: EncodeConfig) -> None:
    """Raise ValueError for more images at once than the encoder has memory for."""
    channels, value_bytes = autoencoder.module.config.block_out_channels[0], PRECISIONS[config.precision].itemsize
    refuse_beyond(
        min(config.batch_size, config.shard_size, len(source)),
        lambda n: encoding_bytes(channels, prod(config.size), n, value_bytes=value_bytes),
        autoencoder.device, "encoding", "choose a smaller --image-size",
    )  # fmt: skip


def latent_shape(autoencoder: Autoencoder, size: tuple[int, int]) -> tuple[int, int, int]:
    """Channels, height and width of the latents of images of a height and width. Raises ValueError for odd sizes."""
    factor = autoencoder.downsampling
    if any(side % factor for side in size):
        larger = "x".join(str(ceil(side / factor) * factor) for side in size)
        raise ValueError(
            f"image_size {size[0]}x{size[1]}: expected multiples of {factor}, the downsampling of {autoencoder.spec}, "
            f"such as {larger}"
        )
    return autoencoder.latent_channels, size[0] // factor, size[1] // factor


def cache_facts(source: ImageSource, autoencoder: Autoencoder, config: EncodeConfig) -> dict[str, Any]:
    """The manifest's record of how a cache was made."""
    return {
        "autoencoder": autoencoder.facts(),
        "source": {
            "spec": config.source, "split": config.split, "fingerprint": source.fingerprint(), "images": len(source),
            "class_names": list(source.class_names),
        },
        "lossy": source.lossy,
        "image": {
            "size": list(config.size), "channels": autoencoder.image_channels, "crop": "center",
            "resize": "box filter by halves, then bicubic", "allow_upscale": config.allow_upscale,
        },
        "latent_shape": list(latent_shape(autoencoder, config.size)),
        "flips": config.flips, "dtype": config.dtype, "precision": config.precision, "shard_size": config.shard_size,
    }  # fmt: skip


def _row_shape(autoencoder: Autoencoder, config: EncodeConfig) -> tuple[int, int, int, int]:
    channels, height, width = latent_shape(autoencoder, config.size)
    return (2 if config.flips else 1), 2 * channels, height, width


def _extent(source: ImageSource, autoencoder: Autoencoder, config: EncodeConfig) -> dict[str, Any]:
    row_bytes = prod(_row_shape(autoencoder, config)) * getattr(torch, config.dtype).itemsize
    shards = ceil(len(source) / config.shard_size)
    return {"images": len(source), "shards": shards, "gigabytes": len(source) * row_bytes / 1e9}


def _check_usable(source: ImageSource, config: EncodeConfig) -> None:
    """Fail early if a few images from all over the source are all unusable, for instance too small."""
    refused: Exception | str = "it is empty"
    for index in range(0, len(source), max(1, len(source) // 8)):
        try:
            source.read(index, config.size, allow_upscale=config.allow_upscale)
        except UnreadableImage as error:
            refused = error
        else:
            return
    raise ValueError(f"source {config.source}: none of the images looked at can be used ({refused})")


class _Batch(NamedTuple):
    """A worker's result for a range of images. An error that is no image's fault is raised by the parent.

    crc32: of each image's pixels.
    """

    pixels: UInt8[Tensor, "kept channels height width"] | None = None
    items: Sequence[int] = ()
    crc32: Sequence[int] = ()
    skipped: Sequence[dict[str, Any]] = ()
    error: OSError | None = None


class _Batches(Dataset):
    """Ranges of images, read and cropped."""

    def __init__(self, source: ImageSource, channels: int, config: EncodeConfig) -> None:
        self.source, self.channels, self.config = source, channels, config

    def __getitem__(self, items: range) -> _Batch:
        pixels, kept, skipped = [], [], []
        options: dict[str, Any] = {"channels": self.channels, "allow_upscale": self.config.allow_upscale}
        for item in items:
            try:
                pixels.append(self.source.read(item, self.config.size, **options))
                kept.append(item)
            except UnreadableImage as error:
                skipped.append({"item": item, "path": error.path, "reason": error.reason})
            except OSError as error:
                return _Batch(error=error)
        crc32 = [zlib.crc32(each.contiguous().numpy().data) for each in pixels]
        return _Batch(torch.stack(pixels) if pixels else None, kept, crc32, skipped)


def _encode_missing(
    source: ImageSource, autoencoder: Autoencoder, config: EncodeConfig, request: str, finished: set[int], ranks: Ranks
) -> None:
    """Encode this rank's shards, but for the `finished` ones."""
    shards = dict(enumerate(_split(range(len(source)), config.shard_size)))
    mine = [i for i in list(shards)[ranks.rank :: ranks.world_size] if i not in finished]
    loader = DataLoader(
        _Batches(source, autoencoder.image_channels, config),
        sampler=[batch for i in mine for batch in _split(shards[i], config.batch_size)],
        batch_size=None,
        num_workers=_workers(config) if mine else 0,
        pin_memory=ranks.device.type == "cuda",
        worker_init_fn=_quietly,
    )
    # Batches arrive in the sampler's order, whichever worker process finishes first.
    arriving = iter(loader)
    with Progress("encoding", sum(len(shards[i]) for i in mine), "img", enabled=ranks.is_main) as progress:
        for i in mine:
            dtype = getattr(torch, config.dtype)
            # An empty first part, as all images of a shard may be unusable.
            moments = [torch.empty(0, *_row_shape(autoencoder, config), dtype=dtype, device=ranks.device)]
            items, crc32, skipped = [], [], []
            for batch in islice(arriving, ceil(len(shards[i]) / config.batch_size)):
                if batch.error is not None:
                    raise batch.error
                if batch.pixels is not None:
                    moments.append(encode_images(autoencoder, batch.pixels, flips=config.flips).to(dtype))
                items += batch.items
                crc32 += batch.crc32
                skipped += batch.skipped
                progress.advance(len(batch.items) + len(batch.skipped))
            rows, numbers = torch.cat(moments), torch.tensor(items, dtype=torch.long)
            _check_finite(rows, items, source, config)
            sums = torch.tensor(crc32, dtype=torch.long)
            write_shard(config.out, i, rows, source.labels[numbers], numbers, sums, skipped=skipped, request=request)


def refuse_replaced(source: ImageSource, autoencoder: Autoencoder, config: EncodeConfig, finished: set[int]) -> None:
    """Raise ValueError if images of finished shards have other pixels than were encoded, in files of the same size.

    Only files that are newer than their shard are read.
    """
    suspects: dict[int, int | None] = {}
    for shard, items in enumerate(_split(range(len(source)), config.shard_size)):
        path = shard_path(config.out, shard)
        newer = source.changed_since(path.stat().st_mtime_ns, items) if shard in finished else []
        if newer and (known := pixel_sums(path)) is not None:
            suspects |= {item: known.get(item) for item in newer}
    images, replaced = _Batches(source, autoencoder.image_channels, config), []
    with Progress("comparing pictures", len(suspects), "img") as progress:
        for item, crc32 in suspects.items():
            batch = images[range(item, item + 1)]
            if batch.error is not None:
                raise batch.error
            if crc32 != (batch.crc32[0] if batch.crc32 else None):
                replaced.append(item)
            progress.advance()
    if replaced:
        such = f"{len(replaced):,} pictures changed since they were encoded, such as {source.locate(replaced[0])}"
        raise ValueError(f"{config.out}: {such}; put back what was there, or use another --out")


def encode_images(
    autoencoder: Autoencoder, pixels: UInt8[Tensor, "n channels height width"], *, flips: bool
) -> Float[Tensor, "n flips moments latent_height latent_width"]:
    """Posterior moments of images and, as a second entry, of their mirror images, on the autoencoder's device."""
    images = from_uint8(pixels.to(autoencoder.device, non_blocking=True))
    # Convolutions do not commute with mirroring: the mirrored latent is not the latent of the mirrored image.
    views = [images, images.flip(-1)] if flips else [images]
    return torch.stack([autoencoder.moments(view) for view in views], dim=1)


def _split(items: range, size: int) -> Iterator[range]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _quietly(_worker: int) -> None:
    """A worker's errors go to the parent, which reports them; once that is gone, nobody needs to know."""
    sys.excepthook = lambda *_: None


def _workers(config: EncodeConfig) -> int:
    if config.workers is not None:
        return config.workers
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _check_finite(rows: Tensor, items: Sequence[int], source: ImageSource, config: EncodeConfig) -> None:
    bad = (~rows.isfinite()).flatten(1).any(1).nonzero().flatten()
    if len(bad):
        remedy = "--precision float32" if config.precision != "float32" else "--dtype float32, or another autoencoder"
        raise ValueError(
            f"{source.locate(items[int(bad[0])])}: its moments are not finite with --precision {config.precision} "
            f"--dtype {config.dtype}; use {remedy}"
        )
