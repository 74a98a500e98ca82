"""Images to train a generator on, from any source, behind one class."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from triptych_common.cli import echo
from triptych_common.data import (
    DATASETS,
    ImageDataset,
    ImageSource,
    ImageTooSmall,
    UnreadableImage,
    contents_of,
    in_memory,
    open_source,
    report_unusable,
)
from triptych_common.data.contents import Contents

from triptych_gangealing.digits32 import Digits32

Batches = Callable[[Tensor], UInt8[Tensor, "n channels height width"]]  # pixels of items by number


class TrainingImages:
    """Square RGB images of one size and their classes; with `x_flip` the second half of the items mirrors the first.

    contents: of those that are no named data set. unusable: the errors of those that were left out.
    """

    contents: Contents | None = None
    unusable: Sequence[UnreadableImage] = ()

    def __init__(self, source: ImageSource, read: Batches, resolution: int, *, x_flip: bool = False) -> None:
        self.name, self.resolution, self.x_flip = source.name, resolution, x_flip
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.labels: Int[Tensor, " items"] = source.labels.repeat(2) if x_flip else source.labels
        self._source, self._read = source, read

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int] | Tensor) -> UInt8[Tensor, "n 3 resolution resolution"]:
        """Items as pixels, on the CPU. Raises IndexError for an item out of range."""
        items = torch.as_tensor(indices, dtype=torch.long).reshape(-1)
        if len(items) and not 0 <= int(items.min()) <= int(items.max()) < len(self):
            raise IndexError(f"{self.name}: items {int(items.min())}..{int(items.max())}, expected 0..{len(self) - 1}")
        pixels = self._read(items % len(self._source))
        if self.x_flip:
            mirrored = items >= len(self._source)
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        return pixels

    def fingerprint(self) -> str:
        """Hash of content, size and mirroring, independent of the images' location."""
        text = f"{self._source.fingerprint()} {self.resolution} {self.x_flip}"
        return f"images:{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def open_images(
    spec: str, resolution: int, *, split: str = "train", conditional: bool = False, x_flip: bool = False,
    out: Path | None = None,
) -> TrainingImages:  # fmt: skip
    """Open `digits32`, `digits32:3` (one digit), a named data set, a folder of images, or `hub:OWNER/NAME`.

    Pictures are cropped to their central square and reduced to `resolution`, grey ones become RGB; small named data sets are
    enlarged. Several sizes are reported. conditional: classes are required. out: a run's folder that will list pictures which
    are damaged or smaller than `resolution`, rather than that the first of them raises.
    Raises ValueError or OSError for data that are absent, empty, cannot be used, or lack classes.
    """
    name, colon, digit = spec.partition(":")
    if name != "digits32":
        source = open_source(spec, split, unconditional=not conditional)
    elif colon and digit not in tuple("0123456789"):
        raise ValueError(f"data {spec!r}: expected digits32, or digits32:0 to digits32:9")
    else:
        source = Digits32(split, int(digit) if digit else None, size=resolution)
    if conditional and source.num_classes < 2:
        raise ValueError(f"data {spec!r}: has no classes for a conditional model; put each into a subfolder of its own")
    if isinstance(source, Digits32):
        return TrainingImages(source, source.batch, resolution, x_flip=x_flip)
    unusable: list[UnreadableImage] | None = None if out is None else []
    held = _read(source, spec, resolution, split, unusable)
    images = TrainingImages(held, lambda items: held.images[items], resolution, x_flip=x_flip)
    images.contents = None if spec in DATASETS else contents_of(held)
    if unusable and out is not None:
        report_unusable(unusable, len(source), out)
        images.unusable = unusable
    return images


def _read(
    source: ImageSource, spec: str, resolution: int, split: str, unusable: list[UnreadableImage] | None
) -> ImageDataset:
    """All pictures in memory; reports it where they had several sizes."""
    measured = _Measured(source)
    try:
        held = in_memory(measured, resolution, allow_upscale=spec in DATASETS, split=split, unusable=unusable)
    except ImageTooSmall as error:
        found = f"{_by(*measured.last)} pixels are fewer than the resolution {_by(resolution, resolution)}"
        remedy = "choose a smaller resolution or leave such pictures out"
        raise ValueError(f"{error.path}: {found}; {remedy}") from error
    if len(measured.sizes) > 1:
        widths, heights = zip(*measured.sizes, strict=True)
        echo(
            f"{spec}: pictures of {len(measured.sizes)} sizes, {_by(min(widths), min(heights))} to "
            f"{_by(max(widths), max(heights))}: of each the central square is reduced to {_by(resolution, resolution)}"
        )
    return held


def _by(width: int, height: int) -> str:
    return f"{width}x{height}"


class _Measured(ImageSource):
    """A source that remembers the sizes (width, height) of the pictures it has read."""

    def __init__(self, source: ImageSource) -> None:
        self.name, self.labels, self.num_classes = source.name, source.labels, source.num_classes
        self.class_names, self.lossy, self._source = source.class_names, source.lossy, source
        self.sizes: set[tuple[int, int]] = set()
        self.last = (0, 0)

    def image(self, index: int) -> Image.Image:
        picture = self._source.image(index)
        self.last = picture.size
        self.sizes.add(self.last)
        return picture

    def locate(self, index: int) -> str:
        return self._source.locate(index)

    def fingerprint(self) -> str:
        return self._source.fingerprint()
