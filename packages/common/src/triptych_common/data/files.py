"""Files of the named data sets, read from disk or downloaded, and always checked by SHA-256."""

import contextlib
import gzip
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import numpy as np
from filelock import FileLock
from jaxtyping import UInt8

from triptych_common.progress import Progress

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# SHA-256 of the unpacked files, which does not depend on how a copy was compressed.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

MNIST_BYTES = 16 + 60_000 * 28 * 28  # of the largest file


def read_mnist(
    folder: Path, part: str, url: str = MNIST_URL
) -> tuple[UInt8[np.ndarray, "items 28 28"], UInt8[np.ndarray, " items"]]:
    """Images and labels of MNIST's "train" or "t10k" part in `folder`, to which missing files are downloaded.

    Raises FileNotFoundError if a download fails, ValueError if a checksum differs.
    """
    # IDX files: a magic number and the size of each axis, 4 bytes each, then the values.
    images = np.frombuffer(_mnist_file(folder, f"{part}-images-idx3-ubyte", url), np.uint8, offset=16)
    labels = np.frombuffer(_mnist_file(folder, f"{part}-labels-idx1-ubyte", url), np.uint8, offset=8)
    return images.reshape(-1, 28, 28).copy(), labels.copy()


def _mnist_file(folder: Path, name: str, url: str) -> bytes:
    plain, packed = folder / name, folder / f"{name}.gz"
    if not plain.exists():
        remedy = f"point TRIPTYCH_DATA at a folder that has mnist/{name}.gz, or use mnist5k, which needs no download"
        fetch("data set mnist", f"{url}{name}.gz", packed, remedy)
    path = plain if plain.exists() else packed
    try:
        with plain.open("rb") if plain.exists() else gzip.open(packed) as file:
            content = file.read(MNIST_BYTES + 1)  # few bytes can unpack to many
        intact = hashlib.sha256(content).hexdigest() == MNIST_SHA256[name]
    except (EOFError, zlib.error, gzip.BadGzipFile):
        intact = False
    if not intact:
        raise ValueError(f"{path}: content is not MNIST's (SHA-256 differs); delete the file and repeat the command")
    return content


_refusal: ContextVar[str | None] = ContextVar("refusal", default=None)


@contextlib.contextmanager
def only_on_disk(remedy: str) -> Iterator[None]:
    """Refuse, within the block, to download what is absent: for data that only a file names. remedy: what fetches it."""
    token = _refusal.set(remedy)
    try:
        yield
    finally:
        _refusal.reset(token)


def fetch(what: str, url: str, path: Path, remedy: str) -> None:
    """Download a file unless `path` exists; a lock makes other processes of this machine wait.

    Raises FileNotFoundError, naming `what` and the `remedy`, if the download fails, or within `only_on_disk`.
    """
    if path.exists():
        return
    if refusal := _refusal.get():
        raise FileNotFoundError(f"{what}: {path} is absent, and nothing is fetched because a file names it; {refusal}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                download(url, path)
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise FileNotFoundError(f"{what}: {path} is absent and {url} cannot be fetched ({reason}); {remedy}") from error


def download(url: str, path: Path) -> None:
    """Download `url` to `path`, resuming an earlier attempt; `path` appears only when complete.

    Raises OSError, such as urllib.error.URLError, if the transfer fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            # A server may ignore the range and send everything again.
            resumed = response.status == 206
            expected = int(response.headers.get("Content-Length", 0)) + (have if resumed else 0)
            with (
                partial.open("ab" if resumed else "wb") as file,
                Progress(f"downloading {path.name}", expected // 10**6, "MB", enabled=expected > 10**7) as progress,
                contextlib.suppress(http.client.IncompleteRead),  # the size is checked below
            ):
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    progress.at(file.tell() // 10**6)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the partial file is already complete
            raise
        expected = have
    if expected and partial.stat().st_size != expected:
        raise OSError(f"{url}: connection ended after {partial.stat().st_size:,} of {expected:,} bytes")
    os.replace(partial, path)
