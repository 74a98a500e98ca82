"""Reading image files in the ADM evaluation suite's npz format, in bounded memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from triptych_common.metrics.distances import Gaussian
from triptych_common.metrics.inception import POOL_DIM, SPATIAL_DIM
from triptych_common.storage.arrays import Npz


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

    Opening reads only headers and statistics; `batches` streams the images and holds at most one batch.

    size: height and width, None without images. Gray images are repeated over three channels.
    Raises FileNotFoundError for an absent file, ValueError for one without either, or with images of wrong shape or type.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file = Npz(self.path)
        self.count, self.crc32, held = 0, None, self._file.headers
        self.size: tuple[int, int] | None = None
        if "arr_0" in held:
            shape, dtype, fortran, self.crc32 = held["arr_0"]
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
                wanted = "uint8 (n, height, width, 3), or 1 for gray, in 0..255"
                raise ValueError(f"{path}: arr_0 is {dtype} {shape}, expected {wanted}")
            if fortran:
                raise ValueError(f"{path}: arr_0 is in Fortran order; save numpy.ascontiguousarray of it")
            self.count, self.size = shape[0], (shape[1], shape[2])
        self.pool = self._gaussian("mu", "sigma", POOL_DIM)
        self.spatial = self._gaussian("mu_s", "sigma_s", SPATIAL_DIM)
        if not self.count and self.pool is None:
            names = ", ".join(sorted(held)) or "nothing"
            raise ValueError(f"{self.path}: holds {names}; expected images in arr_0 (NHWC uint8), or mu and sigma")

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "n channels height width"]]:
        """All images in order, `size` at a time.

        Raises ValueError if the file turns out to be damaged.
        """
        for rows in self._file.rows("arr_0", size):
            yield torch.from_numpy(rows).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)

    def _gaussian(self, mean: str, covariance: str, dim: int) -> Gaussian | None:
        held = {mean, covariance} & self._file.headers.keys()
        if not held:
            return None
        if len(held) == 1:
            raise ValueError(f"{self.path}: holds only one of {mean} and {covariance}; expected both")
        self._file.expect(mean, "floats", (dim,))
        self._file.expect(covariance, "floats", (dim, dim))
        found = self._file.array(mean), self._file.array(covariance)
        if not all(np.isfinite(x).all() for x in found):
            raise ValueError(f"{self.path}: {mean} or {covariance} holds NaN or infinity; make the file again")
        return Gaussian(*(torch.from_numpy(x.astype(np.float64)) for x in found))
