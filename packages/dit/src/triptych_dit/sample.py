"""Sample from a trained DiT: an npz file, a grid and, with `images`, a PNG for each image."""

import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from triptych_common.cli import echo
from triptych_common.data import UnreadableImage
from triptych_common.data.decoding import read_image
from triptych_common.images import image_grid, to_uint8, write_png
from triptych_common.parallel import Execution, Ranks, prepare, process_group
from triptych_common.progress import Progress
from triptych_common.samplers import evaluations
from triptych_common.storage import checkpoint
from triptych_common.storage.arrays import Npz
from triptych_common.storage.files import fitting, write_json, writing
from triptych_common.storage.run import RunDirectory

from triptych_dit.cost import refuse_beyond, sampling_bytes
from triptych_dit.interop import load_any
from triptych_dit.labels import resolved
from triptych_dit.sampling import autoencoder_of, sample_images, trajectory
from triptych_dit.settings import SampleConfig, SamplerSettings
from triptych_dit.weights import FETCH, TrainedModel

__all__ = ["SampleConfig", "SamplerSettings", "read_npz", "sample", "sample_images", "trajectory"]
GRID = 100  # images in grid.png
Images = UInt8[Tensor, "batch channels height width"]


def sample(config: SampleConfig) -> dict[str, Any]:
    """Write samples.npz, grid.png and samples.json to `config.out`, in parts that any rank can resume.

    Raises ValueError for a request that does not fit the model, or what `out` already holds.
    """
    trained = load_any(config.checkpoint, **config.loading())
    classes = classes_of(config, trained)
    labels = torch.tensor([classes[i % len(classes)] for i in range(config.num_samples)]) if classes else None
    # With the weights' hash, so that samples of a model and of its retrained successor are never joined.
    request = identity(config, trained) | {
        "labels": list(classes), "num_samples": config.num_samples,
        "model_sha256": checkpoint.digest(trained.model.state_dict()),
    }  # fmt: skip
    steps = evaluations(config, trained.diffusion)
    with process_group(config.device) as ranks:
        if ranks.is_main:
            drop_damaged(config.out / "samples.npz", *(path for _, _, path in _parts(config.out)))
        ranks.barrier()
        finished = (config.out / "samples.npz").exists()
        if not finished or config.vae is not None:
            request |= place(trained, ranks, config, config.num_samples)
        with RunDirectory(config.out, request, is_main=ranks.is_main, device=ranks.device.type) as run:
            ranks.barrier()  # the main rank has checked the folder
            if not finished:
                if ranks.is_main and _parts(run.path):
                    run.compare_hardware()

                def draw(batch: range, step: Callable[[], None]) -> Images:
                    some = None if labels is None else labels[batch.start : batch.stop]
                    images = sample_images(
                        trained, some, config, count=len(batch), seed=config.seed, first_index=batch.start,
                        vae=config.vae, progress=step,
                    )  # fmt: skip
                    return to_uint8(images)

                draw_missing(config, draw, steps, ranks)
                ranks.barrier()
            result = {"samples": str(run.path / "samples.npz"), "grid": str(run.path / "grid.png")}
            if ranks.is_main:
                gather(config, labels)
            ranks.barrier()
            if config.images:
                _write_images(run.path, trained, labels, ranks)
                result["images"] = str(run.path / "images")
                ranks.barrier()
            if ranks.is_main:
                write_grid(run.path, len(classes) or 10)
                write_json(run.path / "samples.json", {**request, **result})
                for file in result.values():
                    echo(f"wrote {file}")
    return result


def classes_of(config: SampleConfig, trained: TrainedModel) -> tuple[int, ...]:
    """The classes that samples have in turn; empty for a model without classes.

    Raises ValueError for labels that the model does not have, and for guidance that it cannot do.
    """
    config.check(trained.model.config)
    num_classes, names = trained.model.config.num_classes, trained.class_names
    if not num_classes and config.labels:
        raise ValueError(f"labels {config.labels}: this model is unconditional (num_classes=0); leave --labels out")
    return resolved(config.labels or range(min(num_classes, len(names) or num_classes)), num_classes, names)


def identity(config: Any, trained: TrainedModel) -> dict[str, Any]:
    """The settings that decide the images: sampler, seed and precision, with defaults resolved for this model."""
    settings = {field.name: getattr(config, field.name) for field in fields(SamplerSettings)}
    settings["sampler"] = config.sampler_name()
    if config.clip_x_0 is None:
        settings["clip_x_0"] = trained.of_pixels
    return settings | {"seed": config.seed} | ({"precision": config.precision} if config.precision else {})


def place(trained: TrainedModel, ranks: Ranks, config: Any, count: int) -> dict[str, str]:
    """Put the model on its device, in the requested precision, and load the autoencoder of its latents.

    count: images to make. Returns what identifies the decoder, if it is another one than in training.
    Raises ValueError if it cannot be loaded, and for a batch that does not fit into memory.
    """
    model, value_bytes = trained.model.config, trained.model.pos_embed.itemsize
    refuse_beyond(
        min(config.batch_size, count),
        lambda n: sampling_bytes(model, n if config.guidance_scale == 1 else 2 * n, value_bytes=value_bytes),
        ranks.device, "sampling", "choose a smaller model",
    )  # fmt: skip
    stored = {torch.float64: "float64", torch.float32: "float32"}[trained.model.pos_embed.dtype]
    prepare(trained.model, ranks, Execution(precision=config.precision or stored, compile=config.compile_blocks))
    autoencoder, space = autoencoder_of(trained, ranks.device, config.vae), trained.space
    if autoencoder is None:
        return {}
    given = config.vae is not None and trained.facts.get(FETCH)  # no file of the model says which
    # Released models know only the name of their autoencoder.
    same = space and (space.sha256 == autoencoder.sha256 if space.sha256 else space.spec == autoencoder.spec)
    return {} if same and not given else {"decoder": autoencoder.sha256}


def draw_missing(
    config: SampleConfig, draw: Callable[[range, Callable[[], None]], Images], steps: int, ranks: Ranks
) -> None:
    """Make the samples that no part file holds yet; ranks take turns at batches of consecutive indices.

    draw: maps indices and a progress callback, to be called after each of `steps` steps, to uint8 images (batch, channels,
        height, width).
    """
    # A sample depends on its index alone, so an interrupted run may be resumed with other batches, on any number of ranks.
    done = {index for start, end, _ in _parts(config.out) for index in range(start, end)}
    missing = [index for index in range(config.num_samples) if index not in done]
    batches = list(_consecutive(missing, config.batch_size))
    ranks.barrier()  # every rank has listed the folder before any adds to it
    mine = batches[ranks.rank :: ranks.world_size]
    total = sum(map(len, mine)) * steps
    with Progress("sampling", total, "image steps", enabled=ranks.is_main) as progress:
        for batch in mine:
            images = draw(batch, partial(progress.advance, len(batch)))
            write_npz(config.out / "parts" / f"{batch.start:08d}-{batch.stop:08d}.npz", [images], len(images))


def _consecutive(indices: Sequence[int], size: int) -> Iterator[range]:
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        members = [index for _, index in run]
        for start in range(members[0], members[-1] + 1, size):
            yield range(start, min(start + size, members[-1] + 1))


def _parts(out: Path) -> list[tuple[int, int, Path]]:
    """First index, last index + 1 and path of every part file."""
    paths = sorted((out / "parts").glob("*-*.npz"))
    return [(int(path.stem.split("-")[0]), int(path.stem.split("-")[1]), path) for path in paths]


def gather(config: SampleConfig, labels: Int[Tensor, " n"] | None) -> None:
    """Join the part files into samples.npz, one at a time, and remove them once it is written."""
    # An interruption between the two steps leaves both, so an existing file is complete.
    path = config.out / "samples.npz"
    if not path.exists():
        batches = (read_npz(part)[0] for _, _, part in _parts(config.out))
        write_npz(path, batches, config.num_samples, labels)
    shutil.rmtree(config.out / "parts", ignore_errors=True)


def write_grid(out: Path, columns: int) -> None:
    """OUT/grid.png: the first of OUT/samples.npz, at most ten in a row."""
    images = next(read_batches(out / "samples.npz", GRID))
    write_png(out / "grid.png", image_grid(images, columns=min(10, columns, len(images))))


def _write_images(out: Path, trained: TrainedModel, labels: Tensor | None, ranks: Ranks) -> None:
    """OUT/images: a PNG for each sample that has none yet, or a damaged one; ranks take turns."""
    first = 0
    for batch in read_batches(out / "samples.npz", GRID):
        for index, image in enumerate(batch, start=first):
            path = out / "images" / image_name(index, trained, None if labels is None else int(labels[index]))
            if index % ranks.world_size == ranks.rank and not _is_picture(path):
                write_png(path, image)
        first += len(batch)


def _is_picture(path: Path) -> bool:
    with suppress(FileNotFoundError, UnreadableImage):
        read_image(path)
        return True
    return False


def image_name(index: int, trained: TrainedModel, label: int | None) -> str:
    """000123-CLASS.png, with the class's name if the model file has it; 000123.png without classes."""
    if label is None:
        return f"{index:06d}.png"
    names = trained.class_names
    name = re.sub(r"[^\w.-]+", "-", names[label].split(",")[0]).strip("-.") if label < len(names) else ""
    return fitting(f"{index:06d}-{name or label}", ".png")


def write_npz(path: Path, batches: Iterable[Images], count: int, labels: Int[Tensor, " n"] | None = None) -> None:
    """Write a samples file, atomically: an npz with images as `arr_0` (NHWC, uint8) and labels as `arr_1`, the format of the
    ADM evaluation suite.

    Raises ValueError unless the batches hold `count` images of one shape, OSError if the disk refuses.
    """
    # Written as a stream, so that one batch at a time is in memory; numpy.savez would need all images.
    with writing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            _write_pixels(member, batches, count, path)
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, labels.cpu().numpy(), allow_pickle=False)


def _write_pixels(file: Any, batches: Iterable[Tensor], count: int, path: Path) -> None:
    written, shape = 0, None
    for batch in batches:
        pixels = batch.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        if shape is None:
            shape = pixels.shape[1:]
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
        if pixels.shape[1:] != shape:
            raise ValueError(f"{path}: images of both {shape} and {pixels.shape[1:]}")
        file.write(pixels.data)
        written += len(pixels)
    if written != count:
        raise ValueError(f"{path}: {written} images came for {count}")


def read_npz(path: Path) -> tuple[Images, Int[Tensor, " n"] | None]:
    """Read the images of a samples file and, if it has them, the labels.

    Raises FileNotFoundError for an absent file, ValueError for another or a damaged one.
    """
    file = _samples(Path(path))
    images = file.array("arr_0")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    if "arr_1" not in file.headers:
        return pixels, None
    file.expect("arr_1", "integers", (len(images),))
    return pixels, torch.from_numpy(file.array("arr_1").astype(np.int64))


def read_batches(path: Path, size: int) -> Iterator[Images]:
    """The images of a file written by `write_npz`, in order, `size` at a time. Raises as `read_npz` does."""
    for rows in _samples(path).rows("arr_0", size):
        yield torch.from_numpy(rows).permute(0, 3, 1, 2)


def drop_damaged(*paths: Path) -> None:
    """Remove those samples files that are not whole, so that they are made again."""
    for path in paths:
        try:
            file = _samples(path)
            for name in file.headers:
                for _ in file.rows(name, 256):
                    pass
        except FileNotFoundError:
            continue
        except ValueError:
            echo(f"{path}: damaged; sampling it again")
            path.unlink()


def _samples(path: Path) -> Npz:
    """An open samples file, whose pictures are not read yet."""
    file = Npz(path, absent="no such samples file; make one with triptych-dit sample")
    if "arr_0" not in file.headers:
        raise ValueError(f"{path}: holds no arr_0, expected a samples file")
    file.expect("arr_0", "uint8", (None, None, None, None))
    return file
