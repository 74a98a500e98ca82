"""A folder of image files as a source of images."""

import errno
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from triptych_common.cli import echo
from triptych_common.data.contents import Contents, summary
from triptych_common.data.decoding import read_image
from triptych_common.data.source import HELD_OUT_NAMES, ImageSource, choose_split

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif",
)  # fmt: skip


class ImageFolder(ImageSource):
    """Images in `folder/class/**/*.png` (jpg, webp, ...), with classes and files ordered by name.

    Without subfolders, or if `unconditional`, all images form one class. In a folder divided into train/ and val/
    (validation, valid, test, held_out), `split` is read. Hidden files are ignored; other files are counted and reported, and
    so are pipes, devices, and links to what is listed already.
    Raises FileNotFoundError for an absent folder, ValueError for one without images, with an empty class or with images
    beside its class folders.
    """

    lossy = False

    def __init__(self, root: str | Path, split: str = "train", *, unconditional: bool = False) -> None:
        self.root = _enter(Path(root), split)
        self.name = os.fsencode(Path(root).resolve().name).decode(errors="replace")
        listed, classes = _list_images(self.root)
        self.files = [file.path for file in listed]
        self._sizes, self._changed_ns = (torch.tensor(column) for column in list(zip(*listed, strict=True))[1:])
        if unconditional or not classes:
            self.class_names: tuple[str, ...] = (self.name,)
            self.labels = torch.zeros(len(self.files), dtype=torch.long)
        else:
            self.class_names = tuple(classes)
            self.labels = torch.tensor(_labels(self.root, self.files, classes))
        self.num_classes = len(self.class_names)

    def image(self, index: int) -> Image.Image:
        return read_image(self.root / self.files[index])

    def locate(self, index: int) -> str:
        return str(self.root / self.files[index])

    def fingerprint(self) -> str:
        """A hash of class names, file names and sizes, so that moving the folder does not change it."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for file, size in zip(self.files, self._sizes.tolist(), strict=True):
            digest.update(b"\n" + os.fsencode(file) + b"\0%d" % size)
        return f"names-and-sizes:{digest.hexdigest()}"

    def listing(self) -> Contents:
        parts = zip(self.files, self._sizes.tolist(), strict=True)
        return summary(self, (b"%b\0%d\n" % (os.fsencode(file), size) for file, size in parts))

    def changed_since(self, time_ns: int, indices: Sequence[int]) -> list[int]:
        changed = self._changed_ns[list(indices)] > time_ns
        return [index for index, newer in zip(indices, changed.tolist(), strict=True) if newer]


def _enter(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: {'a file' if root.exists() else 'no such folder'}; expected a folder of images"
        )
    parts = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if "train" in parts and parts <= {"train", *HELD_OUT_NAMES}:
        return root / choose_split(split, sorted(parts), str(root))
    if split != "train":
        raise ValueError(f"split {split!r} of {root}: expected a folder that is divided into train/ and val/")
    return root


class _Listed(NamedTuple):
    """An image file: its path relative to the folder, its size, and when it was last modified, moved or otherwise changed."""

    path: str
    size: int
    changed_ns: int


def _list_images(root: Path) -> tuple[list[_Listed], list[str]]:
    """Image files and the subfolders of `root`, both sorted; each is looked at once."""
    files: list[_Listed] = []
    others: Counter[str] = Counter()
    classes: list[str] = []
    seen = {_inode(root.stat())}
    pending = [("", str(root))]  # folders, relative and absolute, the next one last
    while pending:
        inside, folder = pending.pop()
        with os.scandir(folder) as entries:
            visible = sorted(
                (entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name
            )
        subfolders = []
        for entry in visible:
            status, suffix = _status(entry), os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
            if status is not None and stat.S_ISDIR(status.st_mode):
                if _is_new(status, seen):  # a link to a folder above would be followed until the path is too long
                    subfolders.append(entry)
            elif suffix not in SUFFIXES:
                others[suffix or "no suffix"] += 1
            elif status is None or not stat.S_ISREG(status.st_mode):
                others["pipes, devices, broken links"] += 1
            elif not _is_new(status, seen):
                others["links to files listed already"] += 1
            else:
                changed = min(max(status.st_mtime_ns, status.st_ctime_ns), torch.iinfo(torch.int64).max)  # ends in 2262
                files.append(_Listed(inside + entry.name, status.st_size, changed))
        pending += [(f"{inside}{entry.name}/", entry.path) for entry in reversed(subfolders)]
        if not inside:
            classes = [entry.name for entry in subfolders]
    if not files:
        raise ValueError(f"{root}: no images found ({', '.join(SUFFIXES)})")
    if others:
        kinds = ", ".join(f"{suffix}: {n:,}" for suffix, n in sorted(others.items()))
        echo(f"{root}: {others.total():,} files are left out, not images by name or kind ({kinds})")
    # By folder, then by name: as strings, a-b/ would come before a/, since "-" comes before "/".
    return sorted(files, key=lambda file: file.path.split("/")), classes


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """What an entry, or the target of a link, is; None for a link that leads nowhere."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_new(status: os.stat_result, seen: set[tuple[int, int]]) -> bool:
    """Whether a file or folder was not seen yet under another name; it is from now on."""
    inode = _inode(status)
    new = inode not in seen
    seen.add(inode)
    return new


def _labels(root: Path, files: list[str], classes: list[str]) -> list[int]:
    if loose := [file for file in files if "/" not in file]:
        raise ValueError(
            f"{root}: {len(loose):,} images, such as {loose[0]}, are beside the class folders; "
            "move them into one, or read the folder as unconditional"
        )
    if odd := [name for name in classes if not name.isascii() and os.fsencode(name).decode(errors="ignore") != name]:
        # Model files record the names as text.
        raise ValueError(f"{root}: the name of class folder {os.fsencode(odd[0])!r} is not UTF-8; rename it")
    label_of = {name: label for label, name in enumerate(classes)}
    labels = [label_of[file.partition("/")[0]] for file in files]
    if empty := sorted(set(range(len(classes))) - set(labels)):
        raise ValueError(f"{root}: class folder {classes[empty[0]]} has no images ({', '.join(SUFFIXES)}); remove it")
    return labels
