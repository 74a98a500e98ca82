"""People's own pictures, of any size: `align` and `correspond`, squares for the transformer, warps back to a picture's own pixels.

A folder is read twice, so that memory does not grow with the number of whole photographs.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from triptych_common.cli import echo
from triptych_common.data import ImageFolder
from triptych_common.data.decoding import UnreadableImage, read_reduced, to_tensor
from triptych_common.images import from_uint8
from triptych_common.storage.files import fitting

from triptych_gangealing.aligner import AT_ONCE, RESAMPLED, Aligner, Alignment, load_aligner
from triptych_gangealing.correspondence import Transferred, transfer
from triptych_gangealing.warp import Affine, Warp

_AT_ONCE_PX = 1 << 20  # pixels that are floats at the same time
LARGEST = 4  # times the output's size: pictures are reduced to it before they are sampled


@dataclass(frozen=True)
class Picture:
    """A picture and its name, as its folder has it.

    whole: (height, width) of the file's picture, where `pixels` are a reduced one.
    """

    name: str
    pixels: UInt8[Tensor, "3 height width"]
    whole: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), to which coordinates in pixels refer."""
        return self.whole or (self.pixels.shape[1], self.pixels.shape[2])

    def values(self) -> Float[Tensor, "1 3 height width"]:
        """In [-1, 1]."""
        return from_uint8(self.pixels[None])


class Folder:
    """A folder's pictures in the order of their names, without those that cannot be read.

    Iteration reads one picture after another, and reports the unreadable ones at its end; it raises ValueError where none can be
    read. Afterwards `seen` has the (height, width) of each readable picture by its name, `unreadable` a line for each other one.
    pngs: a distinct name of a PNG made of each. limit: how many pictures, from the first. at_least: pixels along the longer side
    that very large pictures keep, as `read_picture` takes it.
    Raises FileNotFoundError for no folder, ValueError for one without pictures.
    """

    def __init__(self, root: Path, limit: int | None = None, at_least: int | None = None) -> None:
        source = ImageFolder(root, unconditional=True)
        self.root, self.names, self.at_least = source.root, source.files[:limit], at_least
        self.pngs = dict(zip(self.names, png_names(self.names), strict=True))
        self.seen: dict[str, tuple[int, int]] = {}
        self.unreadable: list[str] = []

    def __iter__(self) -> Iterator[Picture]:
        self.seen.clear()
        self.unreadable.clear()
        for name in self.names:
            try:
                picture = self._read(name)
            except (UnreadableImage, OSError) as error:
                self.unreadable.append(" ".join(str(error).split()))
                continue
            self.seen[name] = picture.size
            yield picture
        if not self.seen:
            raise ValueError(f"none of {len(self.names):,} pictures can be read; the first: {self.unreadable[0]}")
        for line in self.unreadable:
            echo(f"left out: {line}")

    def again(self) -> Iterator[tuple[int, Picture]]:
        """The pictures in `seen`, read once more, each with its index there.

        Pictures that have vanished or changed since are reported and left out. Raises ValueError where none is left.
        """
        left = 0
        for number, (name, size) in enumerate(self.seen.items()):
            try:
                picture = self._read(name)
                if picture.size != size:
                    raise UnreadableImage(str(self.root / name), "replaced meanwhile by a picture of another size")
            except (UnreadableImage, OSError) as error:
                echo(f"left out: {' '.join(str(error).split())}")
                continue
            left += 1
            yield number, picture
        if not left:
            raise ValueError(f"{self.root}: none of {len(self.seen):,} pictures could be read a second time")

    def _read(self, name: str) -> Picture:
        return replace(read_picture(self.root / name, self.at_least), name=name)


def png_names(names: Sequence[str]) -> list[str]:
    """Distinct names of PNGs made of files: a.png for a.jpg, or a.jpg.png where another file would become a.png too."""
    paths = [Path(name) for name in names]
    short = [str(path.with_name(fitting(path.stem, ".png"))) for path in paths]
    long = [str(path.with_name(fitting(path.name, ".png"))) for path in paths]
    count, taken = Counter(short), set(long)
    pairs = zip(short, long, strict=True)
    return [brief if count[brief] == 1 and brief not in taken else whole for brief, whole in pairs]


def read_picture(path: Path, at_least: int | None = None) -> Picture:
    """A file's picture.

    at_least: as `read_reduced` takes it; by default the picture comes whole.
    Raises FileNotFoundError where there is none, UnreadableImage (a ValueError) for what is no picture.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such picture")
    image, size = read_reduced(path, at_least)
    return Picture(path.name, to_tensor(image, 3), size)


def squared(images: Float[Tensor, "n 3 height width"]) -> tuple[Float[Tensor, "n 3 side side"], Affine]:
    """Images in the middle of squares filled with their edges, and the map from a square's points to those of its image."""
    height, width = images.shape[2:]
    framed = F.pad(images, _frame(height, width), mode="replicate")
    return framed, Affine(from_square(height, width).to(images).repeat(len(images), 1, 1))


def _frame(height: int, width: int) -> tuple[int, int, int, int]:
    """Pixels to add at the left, right, top and bottom of an image for a square."""
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return left, side - width - left, top, side - height - top


def from_square(height: int, width: int) -> Float[Tensor, "2 3"]:
    """From a square's points to those of the image in its middle."""
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    # x of the square is pixel (x + 1) side / 2 from its left edge; less `left`, as a share of `width`, it is x of the picture.
    to_x = [side / width, 0, (side - 2 * left) / width - 1]
    to_y = [0, side / height, (side - 2 * top) / height - 1]
    return torch.tensor([to_x, to_y])


def shrunk(
    pixels: UInt8[Tensor, "3 height width"], size: tuple[int, int], frame: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> Float[Tensor, "1 3 new_height new_width"]:
    """A picture in [-1, 1], reduced to (height, width) `size` with an antialiasing tent filter.

    frame: pixels that repeat its left, right, top and bottom edges, added before.
    """
    # The filter is separable: rows first, some at a time, so that floats never take the memory of the whole.
    left, right, top, bottom = frame
    rows = max(1, _AT_ONCE_PX // (pixels.shape[2] + left + right))
    parts = []
    for some in pixels.split(rows, dim=1):
        framed = F.pad(from_uint8(some[None]), (left, right, 0, 0), mode="replicate")
        parts.append(_resized(framed, (some.shape[1], size[1])))
    return _resized(F.pad(torch.cat(parts, dim=2), (0, 0, top, bottom), mode="replicate"), size)


def _resized(images: Float[Tensor, "n 3 height width"], size: tuple[int, int]) -> Float[Tensor, "n 3 h w"]:
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def align_pictures(
    aligner: Aligner, pictures: Iterable[Picture], *, iterations: int = 1, flips: bool = False
) -> Alignment:
    """Warps from congealed coordinates to those of each picture; sizes may differ. Raises ValueError for no pictures."""
    reduced, ways = [], []
    # One at a time: a whole photograph takes hundreds of megabytes, the square that the transformer sees little.
    for picture in pictures:
        reduced.append(_seen(picture, RESAMPLED * aligner.config.input_size))
        ways.append(from_square(*picture.size)[None])
    if not reduced:
        raise ValueError("no pictures: expected at least one to align")
    by_size: dict[int, list[int]] = {}
    for index, image in enumerate(reduced):
        by_size.setdefault(image.shape[-1], []).append(index)
    batches = [some[i : i + AT_ONCE] for some in by_size.values() for i in range(0, len(some), AT_ONCE)]
    parts = []
    for batch in batches:
        images = torch.cat([reduced[index] for index in batch])
        parts.append(aligner.align(images, iterations=iterations, flips=flips))
    alignment = Alignment.cat(parts).select(torch.tensor(list(chain.from_iterable(batches))).argsort())
    # The composition reads left to right: a congealed point goes to the square first, then to the picture.
    return replace(alignment, warp=alignment.warp.compose(Warp((Affine(torch.cat(ways)),))))


def _seen(picture: Picture, most: int) -> Float[Tensor, "1 3 side side"]:
    """The square that a transformer sees, of a side of at most `most`: enough to find a warp for the original."""
    if max(picture.pixels.shape[1:]) <= most:
        return squared(picture.values())[0]
    return square_of(picture, most)


def square_of(picture: Picture, side: int) -> Float[Tensor, "1 3 {side} {side}"]:
    """The square around a picture, its edges repeated, at a size."""
    return shrunk(picture.pixels, (side, side), _frame(*picture.pixels.shape[1:]))


def align(
    images: Float[Tensor, "n 3 height width"] | str | Path | Sequence[Picture],
    aligner: Aligner | str | Path,
    *,
    iterations: int | None = None,
    flips: bool | None = None,
) -> Alignment:
    """Bring images into joint alignment: for each, the warp from congealed coordinates to its own.

    images: a tensor with values in [-1, 1], a folder of pictures of any sizes, or `Picture`s. The transformer sees squares; warps
    lead to the picture's own pixels.
    aligner: a trained one, its file, or the run folder of `triptych-gangealing train`.
    iterations: how often the similarity network looks; flips: whether images are mirrored where their flow is smoother then.
    Both by default as in training.

    Of pictures, the result has their `names` too; unreadable ones are reported and left out. Raises ValueError or OSError for
    what is no aligner, no folder of pictures, or an option that the transformer cannot follow.

    Example:
        >>> aligner = load_aligner("runs/align")
        >>> alignment = align(images, aligner)
        >>> average = alignment.warp.sample(images).mean(0)
        >>> alignment = align("photos", aligner)
        >>> list(zip(alignment.names, alignment.cluster.tolist()))
    """
    aligner = aligner if isinstance(aligner, Aligner) else load_aligner(aligner)
    options = aligner.options(iterations, flips)
    if isinstance(images, str | Path):
        folder = Folder(Path(images), at_least=detail(aligner))
        return replace(align_pictures(aligner, folder, **options), names=tuple(folder.seen))
    if not isinstance(images, Tensor):
        return replace(align_pictures(aligner, images, **options), names=tuple(picture.name for picture in images))
    if images.shape[2] == images.shape[3]:
        return aligner.align(images, **options)
    framed, way = squared(images)
    alignment = aligner.align(aligner.reduced(framed), **options)
    return replace(alignment, warp=alignment.warp.compose(Warp((way,))))


def correspond(
    points: Float[Tensor, "k 2"],
    source: Picture | str | Path,
    target: Picture | str | Path,
    aligner: Aligner | str | Path,
    *,
    iterations: int | None = None,
    flips: bool | None = None,
) -> Transferred:
    """Transfer points of one picture to another, through congealed space.  [thesis 4.4.2]

    points: (x, y) in pixels of the source, the centre of the first pixel at (0, 0). source, target: pictures or their files.
    aligner, iterations, flips: as for `align`.

    Returns points (k, 2) in pixels of the target, and for each whether the way to it is reliable. Raises ValueError for pictures
    of different clusters, and as `align` does.

    Example:
        >>> there = correspond(torch.tensor([[40.0, 25.0]]), "a.jpg", "b.jpg", load_aligner("runs/align"))
        >>> there.points[there.reliable]
    """
    here, there = (
        picture if isinstance(picture, Picture) else read_picture(Path(picture)) for picture in (source, target)
    )
    alignment = align([here, there], aligner, iterations=iterations, flips=flips)
    first, second = (alignment.select(torch.tensor([i])) for i in (0, 1))
    transferred = transfer(first, second, points[None], here.size, there.size)
    return Transferred(transferred.points[0], transferred.reliable[0])


def warped(picture: Picture, warp: Warp, size: int, padding: str) -> Float[Tensor, "1 3 {size} {size}"]:
    """A picture as its warp shows it, in [-1, 1]."""
    height, width = picture.size
    share = LARGEST * size / max(height, width)
    # The sampler's pyramid ends at 5.7 times the output's size, and a warp fits any size.
    smaller = max(1, round(height * share)), max(1, round(width * share))
    values = shrunk(picture.pixels, smaller) if share < 1 else picture.values()
    return warp.sample(values, (size, size), padding=padding)


def detail(aligner: Aligner, size: int = 1) -> int:
    """Pixels along the longer side that a very large picture keeps: twice as many as an aligned one of a `size` is made of."""
    return 2 * max(RESAMPLED * aligner.config.input_size, LARGEST * size)
