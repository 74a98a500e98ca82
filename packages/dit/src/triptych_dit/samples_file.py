"""Files of samples in the format of the ADM evaluation suite: an npz with `arr_0`, NHWC uint8, and labels in `arr_1`."""

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from triptych_common.storage.atomic import writing


def write_npz(
    path: Path,
    batches: Iterable[UInt8[Tensor, "batch channels height width"]],
    count: int,
    labels: Int[Tensor, " n"] | None = None,
) -> None:
    """Write `count` images, however batched, and their labels, atomically; one batch at a time is in memory.

    Raises ValueError unless the batches hold `count` images of one shape, OSError when the disk refuses.
    """
    with writing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            _write_images(member, batches, count, path)
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, labels.cpu().numpy(), allow_pickle=False)


def _write_images(file: io.BufferedIOBase, batches: Iterable[Tensor], count: int, path: Path) -> None:
    written, shape = 0, None
    for batch in batches:
        pixels = batch.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        if shape is None:
            shape = pixels.shape[1:]
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
        if pixels.shape[1:] != shape:
            raise ValueError(f"{path}: images of {pixels.shape[1:]} among images of {shape}")
        file.write(pixels.data)
        written += len(pixels)
    if written != count:
        raise ValueError(f"{path}: {written} images came for {count}")


def read_npz(path: Path) -> tuple[UInt8[Tensor, "n channels height width"], Int[Tensor, " n"] | None]:
    """Images and, where present, labels of a samples file: arr_0 NHWC uint8, arr_1 labels.

    Raises ValueError for a file that is not one.
    """
    path = Path(path)
    with _intact(path), np.load(path, allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays.get("arr_1")
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"{path}: arr_0 is {images.dtype} {images.shape}, expected uint8 (n, height, width, channels)")
    return (
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
    )


def read_batches(path: Path, size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
    """The images of a file that `write_npz` wrote, in order, `size` at a time and never more in memory.

    Raises ValueError for a damaged file.
    """
    with _intact(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        np.lib.format.read_magic(member)
        (count, *shape), _, _ = np.lib.format.read_array_header_1_0(member)
        for start in range(0, count, size):
            n = min(size, count - start)
            pixels = np.frombuffer(bytearray(member.read(n * int(np.prod(shape)))), dtype=np.uint8)
            yield torch.from_numpy(pixels.reshape(n, *shape)).permute(0, 3, 1, 2)


@contextmanager
def _intact(path: Path) -> Iterator[None]:
    """Whatever an absent or damaged archive raises, as one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such samples file; make one with triptych-dit sample") from error
    except (ValueError, OSError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not an npz file with arr_0, or a damaged one ({error}); make it again") from error
