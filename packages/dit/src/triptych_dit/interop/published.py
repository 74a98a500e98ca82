"""The two files that the authors of DiT offer, fetched by name."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from triptych_common.data.datasets import data_root
from triptych_common.data.files import fetch

from triptych_dit.config import PRESETS, DiTConfig
from triptych_dit.flops import parameter_count

_URL = "https://dl.fbaipublicfiles.com/DiT/models/"


class Published(NamedTuple):
    """One file that the authors offer."""

    file: str
    url: str
    config: DiTConfig
    size: int | None = None  # bytes, where known
    sha256: str | None = None


# The authors publish no hash: these are what public projects pin for the first file; nobody is known to pin the second's.
_XL_2_256 = Published(
    "DiT-XL-2-256x256.pt", f"{_URL}DiT-XL-2-256x256.pt", PRESETS["DiT-XL/2"], 2_700_611_775,
    "9ec1876e4c03471bca126663a30e2d1b20610b6d2f87850a39a36f25cc685521",
)  # fmt: skip
_XL_2_512 = Published("DiT-XL-2-512x512.pt", f"{_URL}DiT-XL-2-512x512.pt", PRESETS["DiT-XL/2@512"])
PUBLISHED = {
    "DiT-XL/2": _XL_2_256, "DiT-XL/2@256": _XL_2_256, _XL_2_256.file: _XL_2_256,
    "DiT-XL/2@512": _XL_2_512, _XL_2_512.file: _XL_2_512,
}  # fmt: skip


def published_file(name: str) -> Path:
    """The file of a published name, downloaded to `$TRIPTYCH_DATA/dit` once, checked by size and, where one is known, hash.

    Raises FileNotFoundError where it cannot be fetched, ValueError for another file in its place.
    """
    entry = PUBLISHED[name]
    path = data_root() / "dit" / entry.file
    fetch(f"model {name}", entry.url, path, "put the file there, or pass the path of one")
    size, least = path.stat().st_size, 4 * parameter_count(entry.config)
    if not least < size < least + 2**20 or size != (entry.size or size):  # tensors, and at most a megabyte of names
        raise ValueError(f"{path}: {size:,} bytes, expected {entry.size or least:,}; delete the file and repeat")
    if entry.sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry.sha256:
            raise ValueError(f"{path}: SHA-256 {found[:16]}, expected {entry.sha256[:16]}; delete the file and repeat")
    return path
