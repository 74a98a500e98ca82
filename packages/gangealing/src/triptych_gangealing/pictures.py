"""People's own pictures, of any size: `align` and `correspond`, squares for the transformer, warps back to a picture's own pixels.

A folder is read twice, one picture at a time: first what the transformer looks at, much smaller, is kept of each; then each is read
again where its pixels are needed. So memory does not grow with the number of whole photographs.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from triptych_common.cli import echo
from triptych_common.data import ImageFolder
from triptych_common.data.decoding import UnreadableImage, decode, to_tensor
from triptych_common.images import from_uint8

from triptych_gangealing.aligner import Aligner, Alignment, load_aligner
from triptych_gangealing.correspondence import Transferred, transfer
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


@dataclass(frozen=True)
class Seen:
    """What is remembered of a picture: its name, the name of a PNG made of it, and its (height, width)."""

    name: str
    png: str
    size: tuple[int, int]


class Folder:
    """A folder's pictures in the order of their names; those that cannot be read are left out, and listed in `unreadable`.

    Iteration reads one picture after another; afterwards `seen` lists those that could be read. limit: how many, from the first.
    Raises FileNotFoundError for no folder, ValueError for one without pictures.
    """

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.source = ImageFolder(root, unconditional=True)
        self.names = self.source.files[: len(self.source) if limit is None else limit]
        self.pngs = dict(zip(self.names, png_names(self.names), strict=True))
        self.seen: list[Seen] = []
        self.unreadable: list[str] = []

    def __iter__(self) -> Iterator[Picture]:
        self.seen.clear()
        self.unreadable.clear()
        for index, name in enumerate(self.names):
            try:
                picture = Picture(name, to_tensor(self.source.image(index), 3))
            except (UnreadableImage, OSError) as error:
                self.unreadable.append(" ".join(str(error).split()))
                continue
            self.seen.append(Seen(name, self.pngs[name], picture.size))
            yield picture

    def again(self) -> Iterator[tuple[int, Picture]]:
        """The pictures in `seen`, read once more, each with its index there.

        Pictures that vanished or changed meanwhile are reported and left out. Raises ValueError where none is left.
        """
        left = 0
        for number, seen in enumerate(self.seen):
            path = self.source.root / seen.name
            try:
                picture = Picture(seen.name, to_tensor(decode(path.read_bytes(), str(path)), 3))
                if picture.size != seen.size:
                    raise UnreadableImage(str(path), "another size than a moment ago; it was replaced meanwhile")
            except (UnreadableImage, OSError) as error:
                echo(f"left out: {' '.join(str(error).split())}")
                continue
            left += 1
            yield number, picture
        if not left:
            raise ValueError(f"{self.source.root}: none of {len(self.seen):,} pictures could be read a second time")

    def complain(self) -> None:
        """Report which pictures were left out. Raises ValueError where none could be read."""
        if not self.seen:
            raise ValueError(f"none of {len(self.names):,} pictures can be read; the first: {self.unreadable[0]}")
        for line in self.unreadable:
            echo(f"left out: {line}")


def png_names(names: Sequence[str]) -> list[str]:
    """Distinct names of PNGs made of files: a.png for a.jpg, or a.jpg.png where another file would become a.png too."""
    short = [Path(name).with_suffix(".png").as_posix() for name in names]
    count, long = Counter(short), {f"{name}.png" for name in names}
    return [
        brief if count[brief] == 1 and brief not in long else f"{name}.png"
        for brief, name in zip(short, names, strict=True)
    ]


def read_picture(path: Path) -> Picture:
    """Raises FileNotFoundError where there is none, UnreadableImage (a ValueError) for what is no picture."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    return Picture(path.name, to_tensor(decode(path.read_bytes(), str(path)), 3))


def squared(images: Float[Tensor, "n 3 height width"]) -> tuple[Float[Tensor, "n 3 side side"], Affine]:
    """Images in the middle of squares whose rest repeats their edges, and the way from a square's points to those of its image."""
    height, width = images.shape[2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    framed = F.pad(images, (left, side - width - left, top, side - height - top), mode="replicate")
    # A normalised coordinate of the square, in pixels of the picture, as a normalised coordinate of the picture.
    matrix = images.new_tensor(
        [[side / width, 0, (side - 2 * left) / width - 1], [0, side / height, (side - 2 * top) / height - 1]]
    )
    return framed, Affine(matrix.repeat(len(images), 1, 1))


def align_pictures(
    aligner: Aligner, pictures: Iterable[Picture], *, iterations: int = 1, flips: bool = False, at_once: int = 64
) -> Alignment:
    """Warps from congealed coordinates to those of each picture; sizes may differ.

    Pictures are taken one at a time, and only their reduced squares kept. Raises ValueError for no pictures.
    """
    seen, ways = [], []
    for picture in pictures:  # one at a time: whole photographs take hundreds of megabytes each
        framed, way = squared(picture.values())
        seen.append(aligner.reduced(framed))
        ways.append(way)
    if not seen:
        raise ValueError("no pictures: expected at least one to align")
    by_size: dict[int, list[int]] = {}
    for index, image in enumerate(seen):
        by_size.setdefault(image.shape[-1], []).append(index)
    parts, order = [], []
    for indices in by_size.values():
        for i in range(0, len(indices), at_once):
            some = indices[i : i + at_once]
            images = torch.cat([seen[index] for index in some])
            parts.append(aligner.align(images, iterations=iterations, flips=flips, at_once=at_once))
            order += some
    found = Alignment.cat(parts).select(torch.tensor(order).argsort())
    back = Warp((Affine(torch.cat([way.matrix for way in ways])),))
    return Alignment(found.warp.compose(back), found.cluster, found.flipped, found.roughness)


def align(
    images: Float[Tensor, "n 3 height width"] | str | Path | Sequence[Picture],
    aligner: Aligner | str | Path,
    *,
    iterations: int | None = None,
    flips: bool | None = None,
) -> Alignment:
    """Bring images into joint alignment: for each, the warp from congealed coordinates to its own.

    images: a tensor with values in [-1, 1]; or a folder of pictures of any sizes, or such `Picture`s. What is not square is
    put into a square for the transformer, and the warp leads back to the picture's own pixels.
    aligner: a trained one, its file, or the run folder of `triptych-gangealing train`.
    iterations: how often the similarity network looks; flips: whether images are mirrored where their flow is smoother then.
    Both by default as in training.

    Returns warps, cluster, mirroring and roughness of each image; of a folder, also the `names` of the pictures, without those
    that could not be read, which are reported. Raises ValueError or OSError for what is no aligner, no folder of pictures, or
    an option that the transformer cannot follow.

    Example:
        >>> aligner = load_aligner("runs/align")
        >>> found = align(images, aligner)
        >>> average = found.warp.sample(images).mean(0)
        >>> found = align("photos", aligner)
        >>> list(zip(found.names, found.cluster.tolist()))
    """
    aligner = aligner if isinstance(aligner, Aligner) else load_aligner(aligner)
    options = _options(aligner, iterations, flips)
    if isinstance(images, str | Path):
        folder = Folder(Path(images))
        found = align_folder(aligner, folder, **options)
        return replace(found, names=tuple(seen.name for seen in folder.seen))
    if not isinstance(images, Tensor):
        return replace(align_pictures(aligner, images, **options), names=tuple(picture.name for picture in images))
    if images.shape[2] == images.shape[3]:
        return aligner.align(images, **options)
    framed, way = squared(images)
    found = aligner.align(aligner.reduced(framed), **options)
    return replace(found, warp=found.warp.compose(Warp((way,))))


def correspond(
    points: Float[Tensor, "k 2"],
    source: Picture | str | Path,
    target: Picture | str | Path,
    aligner: Aligner | str | Path,
    *,
    iterations: int | None = None,
    flips: bool | None = None,
) -> Transferred:
    """Where points of one picture lie in another: through congealed space.  [thesis 4.4.2]

    points: (x, y) in pixels of the source, the centre of the first pixel at (0, 0). source, target: pictures or their files.
    aligner, iterations, flips: as for `align`.

    Returns points (k, 2) in pixels of the target, and for each whether the way to it is reliable. Raises ValueError for pictures
    of different clusters, and as `align` does.

    Example:
        >>> found = correspond(torch.tensor([[40.0, 25.0]]), "a.jpg", "b.jpg", load_aligner("runs/align"))
        >>> found.points[found.reliable]
    """
    here, there = (
        picture if isinstance(picture, Picture) else read_picture(Path(picture)) for picture in (source, target)
    )
    found = align([here, there], aligner, iterations=iterations, flips=flips)
    first, second = (found.select(torch.tensor([i])) for i in (0, 1))
    transferred = transfer(first, second, points[None], here.size, there.size)
    return Transferred(transferred.points[0], transferred.reliable[0])


def _options(aligner: Aligner, iterations: int | None, flips: bool | None) -> dict[str, Any]:
    """Options of `Aligner.align`: as in training where nothing else is asked for."""
    return {
        "iterations": aligner.facts.get("iterations", 1) if iterations is None else iterations,
        "flips": aligner.facts.get("flips", False) if flips is None else flips,
    }


def align_folder(aligner: Aligner, folder: Folder, **options: Any) -> Alignment:
    """`align_pictures` of a folder's pictures; reports those that cannot be read. Raises ValueError where none can."""

    def pictures() -> Iterator[Picture]:
        yield from folder
        folder.complain()

    return align_pictures(aligner, pictures(), **options)


def warped(picture: Picture, warp: Warp, size: int, padding: str) -> Float[Tensor, "1 3 {size} {size}"]:
    """A picture as its warp shows it, in [-1, 1]."""
    return warp.sample(_no_larger(picture, LARGEST * size), (size, size), padding=padding)


def _no_larger(picture: Picture, side: int) -> Float[Tensor, "1 3 new_height new_width"]:
    """A picture reduced to about the output's size: the sampler's pyramid ends at 5.7 times it, and a warp fits any size."""
    height, width = picture.size
    share = side / max(height, width)
    if share >= 1:
        return picture.values()
    smaller = max(1, round(height * share)), max(1, round(width * share))
    return F.interpolate(picture.values(), smaller, mode="bilinear", align_corners=False, antialias=True)
