"""CIFAR-10: the authors' binary version, or else a copy of it as image files, which is marked as lossy."""

import hashlib
import tarfile
from collections.abc import Iterator
from gzip import BadGzipFile
from lzma import LZMAError
from pathlib import Path
from zlib import error as ZlibError

import numpy as np
from jaxtyping import UInt8

from triptych_common.data.decoding import decode
from triptych_common.data.files import fetch

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/"
ARCHIVE, UNPACKED = "cifar-10-binary.tar.gz", "cifar-10-batches-bin"
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
PARTS = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
CIFAR10_SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
LARGEST = 1 << 25  # bytes of a file in an archive: the binary ones have 31 million
PER_CLASS = {"train": 5000, "test": 1000}

Images = UInt8[np.ndarray, "items 3 32 32"]
Labels = UInt8[np.ndarray, " items"]


def read_cifar10(folder: Path, part: str, url: str = CIFAR10_URL) -> tuple[Images, Labels, Path | None]:
    """Images and labels of the "train" or "test" part, and the path of the lossy copy they come from, None if exact.

    `folder` is searched for the binary version (unpacked, then packed), then for a copy as image files
    (train/<class>/*.jpg and test/, or cifar10-jpeg.tar.xz of these). If it has neither, the binary version is downloaded.
    Raises FileNotFoundError if that fails, ValueError for damaged files.
    """
    archive = folder / ARCHIVE
    if all((folder / UNPACKED / name).is_file() for name in PARTS[part]):
        contents = {name: (folder / UNPACKED / name).read_bytes() for name in PARTS[part]}
        return *_records(contents, folder / UNPACKED), None
    if not archive.exists():
        if copy := _find_copy(folder):
            return *_read_copy(copy, part), copy
        remedy = f"repeat the command to go on, or point TRIPTYCH_DATA at a folder that has cifar10/{ARCHIVE}"
        fetch("data set cifar10", f"{url}{ARCHIVE}", archive, remedy)
    members = {path.split("/")[-1]: content for path, content in _members(archive, UNPACKED)}
    return *_records({name: members.get(name, b"") for name in PARTS[part]}, archive), None


def _records(contents: dict[str, bytes], where: Path) -> tuple[Images, Labels]:
    """Images and labels from files of records, checked by SHA-256."""
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != CIFAR10_SHA256[name]:
            file, part = (where / name, "content") if where.is_dir() else (where, name)
            raise ValueError(
                f"{file}: {part} is not CIFAR-10's (SHA-256 differs); delete the file and repeat the command"
            )
    # Each record is a byte of label and the red, green and blue planes, row by row.
    rows = np.frombuffer(b"".join(contents.values()), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    return rows[:, 1:].reshape(-1, 3, 32, 32).copy(), rows[:, 0].copy()


def _members(archive: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of an archive's files below `folder`, read in one pass without unpacking to disk."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() and folder in member.name.split("/")[:-1] else None
                if content is not None:
                    yield member.name, content.read(LARGEST)
    except (tarfile.TarError, EOFError, BadGzipFile, LZMAError, ZlibError) as error:
        raise ValueError(f"{archive}: damaged, or no archive; delete the file and repeat the command") from error


def _find_copy(folder: Path) -> Path | None:
    for place in (folder, folder / "cifar10-jpeg"):
        if (place / "train").is_dir() and (place / "test").is_dir():
            return place
    return next(iter(sorted(folder.glob("cifar10-jpeg.tar*"))), None)


def _read_copy(copy: Path, part: str) -> tuple[Images, Labels]:
    """Images and labels of `part`, ordered by class and file name."""
    found: Iterator[tuple[str, bytes]]
    if copy.is_dir():
        found = ((path.relative_to(copy).as_posix(), path.read_bytes()) for path in (copy / part).glob("*/*.*"))
    else:
        found = _members(copy, part)
    files = {tuple(name.split("/")[-3:]): content for name, content in found}
    items = sorted(item for item in files if item[0] == part)
    counts = {name: sum(item[1] == name for item in items) for name in CIFAR10_CLASSES}
    if len(items) != sum(counts.values()) or set(counts.values()) != {PER_CLASS[part]}:
        raise ValueError(
            f"{copy}: expected {PER_CLASS[part]:,} images of each class in {part}/, "
            f"found {', '.join(f'{name} {n:,}' for name, n in counts.items())} of {len(items):,} files"
        )
    images = np.empty((len(items), 32, 32, 3), np.uint8)
    for i, item in enumerate(items):
        image = decode(files[item], str(copy / "/".join(item)))
        if image.size != (32, 32):
            raise ValueError(f"{copy / '/'.join(item)}: expected 32x32 pixels, got {image.width}x{image.height}")
        images[i] = np.asarray(image)
    return images.transpose(0, 3, 1, 2).copy(), np.array([CIFAR10_CLASSES.index(item[1]) for item in items], np.uint8)
