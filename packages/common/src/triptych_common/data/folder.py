"""A folder of image files as a source of images."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

from triptych_common.cli import echo
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
        self.files, classes = _list_images(self.root)
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
        for file in self.files:
            digest.update(b"\n" + os.fsencode(file) + b"\0%d" % (self.root / file).stat().st_size)
        return f"names-and-sizes:{digest.hexdigest()}"


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


def _list_images(root: Path) -> tuple[list[str], list[str]]:
    """Image files, relative to `root`, and the subfolders of `root`, both sorted."""
    files: list[str] = []
    others: Counter[str] = Counter()
    classes: list[str] = []
    seen: set[tuple[int, int]] = {_inode(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_stop):
        visible = sorted(name for name in subfolders if not name.startswith("."))
        # A link to a folder above would be followed until the path is too long.
        subfolders[:] = [name for name in visible if _is_new(Path(folder, name), seen)]
        if folder == str(root):
            classes = list(subfolders)
        inside = Path(folder).relative_to(root)
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
            if name.startswith("."):
                continue
            path = Path(folder, name)
            if suffix in SUFFIXES and not path.is_file():
                others["pipes, devices, broken links"] += 1
            elif suffix in SUFFIXES and not _is_new(path, seen):
                others["links to files listed already"] += 1
            elif suffix in SUFFIXES:
                files.append((inside / name).as_posix())
            else:
                others[suffix or "no suffix"] += 1
    if not files:
        raise ValueError(f"{root}: no images found ({', '.join(SUFFIXES)})")
    if others:
        kinds = ", ".join(f"{suffix}: {n:,}" for suffix, n in sorted(others.items()))
        echo(f"{root}: {others.total():,} files are left out, not images by name or kind ({kinds})")
    # By folder, then by name: as strings, a-b/ would come before a/, since "-" comes before "/".
    return sorted(files, key=lambda file: file.split("/")), classes


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_new(path: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether a file or folder was not seen yet under another name; it is from now on."""
    inode = _inode(path)
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


def _stop(error: OSError) -> None:
    """Raise the error, where os.walk would skip an unreadable folder."""
    raise error
