"""People's own pictures, of any size: squared for the transformer, and warps that lead back to their own pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from triptych_common.cli import say
from triptych_common.data import ImageFolder
from triptych_common.data.decoding import UnreadableImage, decode, to_tensor
from triptych_common.images import from_uint8

from triptych_gangealing.aligner import Aligner, Alignment
from triptych_gangealing.warp import Affine, Warp

LARGEST = 4  # times the output's size: of pictures as they are sampled


@dataclass(frozen=True)
class Picture:
    """A picture and its name, as its folder has it."""

    name: str
    pixels: UInt8[Tensor, "3 height width"]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def values(self) -> Float[Tensor, "1 3 height width"]:
        """In [-1, 1]."""
        return from_uint8(self.pixels[None])


class Folder:
    """A folder's pictures in the order of their names; what cannot be read is left out, and listed in `unreadable`.

    limit: the first so many only. Raises FileNotFoundError for no folder, ValueError for one without pictures.
    """

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.source = ImageFolder(root, unconditional=True)
        self.count = len(self.source) if limit is None else min(limit, len(self.source))
        self.unreadable: list[str] = []

    def __iter__(self) -> Iterator[Picture]:
        self.unreadable.clear()
        for index in range(self.count):
            try:
                image = self.source.image(index)
            except (UnreadableImage, OSError) as error:
                self.unreadable.append(" ".join(str(error).split()))
                continue
            yield Picture(self.source.files[index], to_tensor(image, 3))

    def complain(self) -> None:
        """Say which pictures were left out. Raises ValueError where none could be read."""
        if len(self.unreadable) == self.count:
            raise ValueError(f"none of {self.count:,} pictures can be read; the first: {self.unreadable[0]}")
        for line in self.unreadable:
            say(f"left out: {line}")


def read_picture(path: Path) -> Picture:
    """Raises FileNotFoundError where there is none, UnreadableImage (a ValueError) for what is no picture."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    return Picture(path.name, to_tensor(decode(path.read_bytes(), str(path)), 3))


def squared(picture: Picture) -> tuple[Float[Tensor, "1 3 side side"], Affine]:
    """The picture in the middle of a square whose rest repeats its edges, and the way from the square's points to its own."""
    height, width = picture.size
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    framed = F.pad(picture.values(), (left, side - width - left, top, side - height - top), mode="replicate")
    # A normalised coordinate of the square, in pixels of the picture, as a normalised coordinate of the picture.
    matrix = torch.tensor(
        [[[side / width, 0, (side - 2 * left) / width - 1], [0, side / height, (side - 2 * top) / height - 1]]]
    )
    return framed, Affine(matrix)


def align_pictures(
    aligner: Aligner, pictures: Sequence[Picture], *, iterations: int = 1, flips: bool = False, at_once: int = 64
) -> Alignment:
    """Warps from congealed coordinates to those of each picture. Pictures may differ in size."""
    seen, ways = [], []
    for picture in pictures:  # one at a time: whole photographs take hundreds of megabytes each
        framed, way = squared(picture)
        seen.append(aligner.reduced(framed))
        ways.append(way)
    by_size: dict[int, list[int]] = {}
    for index, image in enumerate(seen):
        by_size.setdefault(image.shape[-1], []).append(index)
    parts = []
    for indices in by_size.values():
        images = torch.cat([seen[i] for i in indices])
        parts.append(aligner.align(images, iterations=iterations, flips=flips, at_once=at_once))
    order = torch.tensor([i for indices in by_size.values() for i in indices])
    found = Alignment.cat(parts).select(order.argsort())
    back = Warp((Affine(torch.cat([way.matrix for way in ways])),))
    return Alignment(found.warp.compose(back), found.cluster, found.flipped, found.roughness)


def warped(pictures: Sequence[Picture], warp: Warp, size: int, padding: str) -> Float[Tensor, "n 3 size size"]:
    """Each picture as its warp shows it, in [-1, 1]."""
    parts = [
        warp.select([i]).sample(_no_larger(picture, LARGEST * size), (size, size), padding=padding)
        for i, picture in enumerate(pictures)
    ]
    return torch.cat(parts)


def _no_larger(picture: Picture, side: int) -> Float[Tensor, "1 3 new_height new_width"]:
    """Photographs are brought near the output's size first: the sampler's pyramid ends at 5.7 times it. Warps fit any size."""
    height, width = picture.size
    share = side / max(height, width)
    if share >= 1:
        return picture.values()
    smaller = max(1, round(height * share)), max(1, round(width * share))
    return F.interpolate(picture.values(), smaller, mode="bilinear", align_corners=False, antialias=True)
