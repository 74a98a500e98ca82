"""Reading image files in the ADM evaluation suite's npz format, in bounded memory."""

import math
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from triptych_common.metrics.distances import Gaussian
from triptych_common.metrics.inception import POOL_DIM, SPATIAL_DIM


class Images:
    """Images to score.

    path: in messages. count: number of images, 0 if there are statistics only. crc32: checksum of the images, or None.
    pool, spatial: Gaussians of the features for FID and for sFID, or None.
    """

    path: Path
    count: int
    crc32: str | None
    pool: Gaussian | None
    spatial: Gaussian | None

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "n channels height width"]]:
        """All images in order, `size` at a time, in RGB."""
        raise NotImplementedError


class NpzImages(Images):
    """An npz file with images (`arr_0`: NHWC uint8), their statistics (`mu`, `sigma`; `mu_s`, `sigma_s`), or both.

    Opening reads only the header; `batches` streams the images and holds at most one batch.

    size: height and width, None without images. Gray images are repeated over three channels.
    Raises FileNotFoundError for an absent file, ValueError for one without either, or with images of wrong shape or type.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such npz file")
        with self._intact(), zipfile.ZipFile(self.path) as archive:
            # The archive's directory and the array's header give size and type; the images are not read yet.
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            images = members.get("arr_0")
            if images is not None:
                with archive.open(images) as file:
                    shape, fortran, dtype = _header(file)
                    size = file.tell() + math.prod(shape) * dtype.itemsize
        self.count, self.crc32 = 0, None
        self.size: tuple[int, int] | None = None
        if images is not None:
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
                wanted = "uint8 (n, height, width, 3), or 1 for gray, in 0..255"
                raise ValueError(f"{path}: arr_0 is {dtype} {shape}, expected {wanted}")
            if fortran:
                raise ValueError(f"{path}: arr_0 is in Fortran order; save numpy.ascontiguousarray of it")
            if images.file_size != size:
                raise ValueError(f"{path}: damaged, arr_0 has {images.file_size:,} of {size:,} bytes; make it again")
            self.count, self._image_shape, self.crc32 = shape[0], shape[1:], f"{images.CRC:08x}"
            self.size = shape[1], shape[2]
        self.pool = self._gaussian(members.keys(), "mu", "sigma", POOL_DIM)
        self.spatial = self._gaussian(members.keys(), "mu_s", "sigma_s", SPATIAL_DIM)
        if not self.count and self.pool is None:
            held = ", ".join(sorted(members)) or "nothing"
            raise ValueError(f"{self.path}: holds {held}; expected images in arr_0 (NHWC uint8), or mu and sigma")

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "n channels height width"]]:
        """All images in order, `size` at a time.

        Raises ValueError if the file turns out to be damaged.
        """
        image_bytes = math.prod(self._image_shape)
        with self._intact(), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _header(file)
            for start in range(0, self.count, size):
                n = min(size, self.count - start)
                content = file.read(n * image_bytes)
                if len(content) != n * image_bytes:
                    raise EOFError("arr_0 ends early")
                images = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                yield images.view(n, *self._image_shape).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)

    def _gaussian(self, held: Collection[str], mean: str, covariance: str, dim: int) -> Gaussian | None:
        if mean not in held and covariance not in held:
            return None
        if mean not in held or covariance not in held:
            raise ValueError(f"{self.path}: holds only one of {mean} and {covariance}; expected both")
        with self._intact(), np.load(self.path, allow_pickle=False) as arrays:
            found = arrays[mean], arrays[covariance]
        if found[0].shape != (dim,) or found[1].shape != (dim, dim) or any(x.dtype.kind != "f" for x in found):
            kinds = " and ".join(f"{x.dtype} {x.shape}" for x in found)
            raise ValueError(
                f"{self.path}: {mean} and {covariance} are {kinds}, expected floats ({dim},) and ({dim}, {dim})"
            )
        if not all(np.isfinite(x).all() for x in found):
            raise ValueError(f"{self.path}: {mean} or {covariance} holds NaN or infinity; make the file again")
        return Gaussian(*(torch.from_numpy(x.astype(np.float64)) for x in found))

    @contextmanager
    def _intact(self) -> Iterator[None]:
        """Turn the various exceptions of a damaged archive into one ValueError."""
        try:
            yield
        except (MemoryError, FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        # zipfile and numpy raise anything on damaged archives: OSError, NotImplementedError, ...
        except Exception as error:
            raise ValueError(f"{self.path}: not an npz file, or a damaged one ({error}); make it again") from error


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of the array that follows in the binary file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
