"""npz and npy files of others: shapes and types are compared with what is expected before an array is unpacked."""

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from triptych_common.storage.files import reason, regular

_MOST_PACKED = 64  # times that pictures get smaller; zeros get a thousand times smaller
_ALWAYS = 1 << 26  # bytes that any file may unpack to


class Header(NamedTuple):
    """Of an array: shape, type, whether in Fortran order, and the checksum of its bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    crc32: str


class Npz:
    """An open npz file, whose arrays hold numbers only.

    Opening reads the archive's directory and the arrays' headers.
    Raises FileNotFoundError for an absent file, ValueError for a damaged one, or one that would unpack to far more than its size.
    """

    def __init__(self, path: Path, *, absent: str = "no such npz file") -> None:
        self.path, self.headers = path, dict[str, Header]()
        if not path.exists():
            raise FileNotFoundError(f"{path}: {absent}")
        if not path.is_file():
            raise ValueError(f"{path}: expected an npz file, which no folder, pipe or device is")
        most = _MOST_PACKED * path.stat().st_size + _ALWAYS
        with _intact(path), zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            unpacked = sum(info.file_size for info in members)
            if unpacked > most:
                raise ValueError(f"its arrays of {unpacked:,} bytes are packed more than {_MOST_PACKED}-fold")
            for info in members:
                with archive.open(info) as file:
                    shape, fortran, dtype = _header(file)
                    size = file.tell() + math.prod(shape) * dtype.itemsize
                name = info.filename.removesuffix(".npy")
                if dtype.hasobject:
                    raise ValueError(f"{name} holds Python objects")
                if size != info.file_size:
                    raise ValueError(f"{name} has {info.file_size:,} of {size:,} bytes")
                self.headers[name] = Header(shape, dtype, fortran, f"{info.CRC:08x}")

    def array(self, name: str) -> np.ndarray:
        """An array, whole. Check its header first: it has any shape."""
        with _intact(self.path), np.load(self.path, allow_pickle=False) as arrays:
            return arrays[name]

    def rows(self, name: str, size: int) -> Iterator[np.ndarray]:
        """An array in C order, `size` rows at a time, of which one part is in memory."""
        (count, *rest), dtype, *_ = self.headers[name]
        row_bytes = math.prod(rest) * dtype.itemsize
        with _intact(self.path), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
            _header(file)
            for start in range(0, count, size):
                n = min(size, count - start)
                content = file.read(n * row_bytes)
                if len(content) != n * row_bytes:
                    raise EOFError(f"{name} ends early")
                yield np.frombuffer(bytearray(content), dtype).reshape(n, *rest)

    def expect(self, name: str, types: str, shape: Sequence[int | None]) -> None:
        """Raise ValueError unless an array is of one of these types ("uint8", "integers", "floats") and shape; None: any number."""
        held, dtype, *_ = self.headers[name]
        fits = len(held) == len(shape) and all(n in (None, m) for n, m in zip(shape, held, strict=True))
        if not fits or not (
            dtype == types if types == "uint8" else dtype.kind in {"integers": "iu", "floats": "f"}[types]
        ):
            wanted = str(tuple("n" if n is None else n for n in shape)).replace("'", "")
            raise ValueError(f"{self.path}: {name} is {dtype} {held}, expected {types} {wanted}")


def npy(path: Path) -> np.ndarray:
    """The array in a .npy file, mapped into memory. Raises ValueError for a damaged one, or one of Python objects."""
    with _intact(regular(path), "array file"):
        return np.lib.format.open_memmap(path, mode="r")


@contextmanager
def _intact(path: Path, kind: str = "npz file") -> Iterator[None]:
    """Turn the various exceptions of a damaged file into one ValueError."""
    try:
        yield
    except (MemoryError, PermissionError, FileNotFoundError):
        raise
    # zipfile and numpy raise anything on damaged files: OSError, NotImplementedError, ...
    except Exception as error:
        raise ValueError(f"{path}: not an {kind}, or a damaged one ({reason(error)}); make it again") from error


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of the array that follows in the binary file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
