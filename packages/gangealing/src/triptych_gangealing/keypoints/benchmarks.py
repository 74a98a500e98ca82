"""Pictures with annotated keypoints, and the pairs of them that a benchmark scores, read from the layouts they come in.

    benchmark = open_benchmark("spair:SPair-71k", category="cat")

Coordinates are (x, y) in pixels of a picture as its file has it (of its crop, where a benchmark crops), the centre of the first
pixel at (0, 0).
"""

import contextlib
import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from triptych_common import randomness
from triptych_common.fields import Interval
from triptych_common.storage.files import open_ended, read_bytes, read_json
from typing_extensions import TypedDict

from triptych_gangealing.pictures import Picture, read_picture

REMEDY = "fetch the data set again"
OUTSIDE_PX = 1.0  # by which an annotated point may lie outside its picture: some are at its very edge
CUB_PAIRS = 10_000
ATTRIBUTES = (
    "viewpoint_variation",
    "scale_variation",
    "truncation",
    "occlusion",
)  # of SPair's pairs  [thesis Fig. 4.7]

# Pairs of keypoints that a mirror exchanges, by SPair's numbers; the others stay as they are.
SPAIR_MIRRORS: dict[str, tuple[tuple[int, int], ...]] = {
    "aeroplane": ((4, 5), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15), (16, 17), (18, 19), (20, 21)),
    "bicycle": ((2, 3), (6, 7), (9, 10)),
    "bird": ((1, 2), (4, 5), (7, 8), (10, 11), (12, 13), (14, 15)),
    "boat": ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12)),
    "bottle": ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)),
    "bus": ((0, 1), (2, 3), (5, 6), (10, 20), (11, 21), (12, 22), (13, 23), (14, 24), (15, 25), (16, 17), (18, 19), (26, 27),
            (28, 29)),
    "car": ((0, 1), (2, 3), (6, 7), (10, 20), (11, 21), (12, 22), (13, 23), (14, 24), (15, 25), (16, 17), (18, 19), (26, 27),
            (28, 29)),
    "cat": ((0, 1), (2, 3), (4, 5), (6, 7), (9, 10), (11, 12)),
    "chair": ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13)),
    "cow": ((0, 1), (2, 3), (4, 5), (6, 7), (9, 10), (11, 12), (15, 16), (17, 18), (19, 20)),
    "dog": ((0, 1), (2, 3), (4, 5), (9, 10), (11, 12)),
    "horse": ((0, 1), (2, 3), (4, 5), (6, 7), (10, 11), (12, 13), (16, 17), (18, 19)),
    "motorbike": ((0, 1), (2, 3)),
    "person": ((0, 1), (2, 3), (8, 9), (10, 11), (12, 13), (14, 15), (16, 17), (18, 19)),
    "pottedplant": ((0, 2), (4, 5), (6, 8)),
    "sheep": ((0, 1), (2, 3), (4, 5), (6, 7), (9, 10), (11, 12), (15, 16), (17, 18), (19, 20)),
    "train": ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15), (16, 17)),
    "tvmonitor": ((0, 2), (3, 7), (4, 6), (8, 10), (11, 15), (12, 14)),
}  # fmt: skip
CUB_MIRRORS = ((6, 10), (7, 11), (8, 12))  # eyes, legs, wings
AP10K_MIRRORS = ((0, 1), (5, 8), (6, 9), (7, 10), (11, 14), (12, 15), (13, 16))  # eyes, forelegs, hind legs


@dataclass(frozen=True)
class Benchmark:
    """m pictures with k keypoints, and n pairs of them. Points that a picture lacks are NaN."""

    name: str
    files: tuple[Path, ...]
    size: Float[Tensor, "m 2"]  # width and height, in pixels
    points: Float[Tensor, "m k 2"]
    box: Float[Tensor, "m 4"]  # of the object: left, top, right, bottom
    pairs: Int[Tensor, "n 2"]  # indices of source and target
    listed: Bool[Tensor, "n k"]  # keypoints that count, by the benchmark's own list
    mirrored: Int[Tensor, " k"]  # the keypoint that each becomes in a mirror
    attributes: Mapping[str, Int[Tensor, " n"]]  # of pairs
    crops: Int[Tensor, "m 4"] | None = None  # squares of the files' pictures, which may reach beyond them

    def __len__(self) -> int:
        return len(self.pairs)

    def first(self, pairs: int | None) -> "Benchmark":
        """Its first pairs only; all pictures stay."""
        return self.select(torch.arange(len(self))[:pairs])

    def select(self, pairs: Int[Tensor, " some"]) -> "Benchmark":
        """Some of its pairs; all pictures stay."""
        attributes = {name: values[pairs] for name, values in self.attributes.items()}
        return replace(self, pairs=self.pairs[pairs], listed=self.listed[pairs], attributes=attributes)

    def used(self) -> list[int]:
        """Indices of the pictures that pairs have, in order."""
        return sorted(set(self.pairs.flatten().tolist()))

    def picture(self, index: int, at_least: int | None = None) -> Picture:
        """A picture, cropped where the benchmark crops; what is beyond the file's picture repeats its edges.

        at_least: as `read_picture` takes it. Raises ValueError for a picture of another size than annotated, and as
        `read_picture`.
        """
        path = self.files[index]
        if self.crops is None:
            picture = read_picture(path, at_least)
            width, height = (int(x) for x in self.size[index].tolist())
            if picture.size != (height, width):
                found = f"{picture.size[1]} x {picture.size[0]} pixels, annotated as {width} x {height}"
                raise ValueError(f"{path}: {found}; {REMEDY}")
            return picture
        whole = read_picture(path).pixels
        left, top, right, bottom = self.crops[index].tolist()
        rows = torch.arange(top, bottom + 1).clamp(0, whole.shape[1] - 1)
        columns = torch.arange(left, right + 1).clamp(0, whole.shape[2] - 1)
        return Picture(path.name, whole[:, rows][:, :, columns])


_Side = Annotated[int, Interval(ge=1, le=1 << 16)]  # pixels
_Grade = Annotated[int, Interval(ge=0, le=99)]


@open_ended
class _SpairPicture(TypedDict):
    filename: str
    image_width: _Side
    image_height: _Side
    bndbox: tuple[float, float, float, float]
    kps: dict[str, tuple[float, float] | None]


@open_ended
class _SpairPair(TypedDict):
    src_imname: str
    trg_imname: str
    category: str
    kps_ids: list[int | str]
    mirror: NotRequired[Literal[0]]
    viewpoint_variation: NotRequired[_Grade]
    scale_variation: NotRequired[_Grade]
    truncation: NotRequired[_Grade]
    occlusion: NotRequired[_Grade]


@open_ended
class _CocoPicture(TypedDict):
    id: int
    file_name: str
    width: _Side
    height: _Side


@open_ended
class _CocoAnnotation(TypedDict):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    keypoints: list[float]


@open_ended
class _CocoCategory(TypedDict):
    id: int
    name: str


@open_ended
class _Coco(TypedDict):
    images: list[_CocoPicture]
    annotations: list[_CocoAnnotation]
    categories: list[_CocoCategory]


def open_benchmark(data: str, category: str | None = None, split: str = "test", seed: int = 0) -> Benchmark:
    """A benchmark by its layout and folder, such as "spair:PATH"; of "cub", PATH may be ACSM's val_cub_cleaned.mat in the folder.

    Raises ValueError for another layout, category or split, and for annotations that are damaged or contradict each other,
    FileNotFoundError for a folder or picture that is absent.
    """
    layout, _, path = data.partition(":")
    if layout not in LAYOUTS or not path:
        expected = ", ".join(f"{name}:PATH" for name in LAYOUTS)
        raise ValueError(f"data {data}: expected mnist5k, mnist, or one of {expected}")
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such folder")
    found = LAYOUTS[layout](Path(path), category, split, seed)
    _check(found)
    return found


def spair(root: Path, category: str | None, split: str, seed: int = 0) -> Benchmark:
    """SPair-71k, or another data set in its layout, such as SPair-U.

    PairAnnotation/SPLIT/*:CATEGORY.json lists pairs, ImageAnnotation/CATEGORY/*.json all points of a picture.
    """
    if category not in SPAIR_MIRRORS:
        raise ValueError(f"category {category}: expected one of {', '.join(SPAIR_MIRRORS)}")
    if not (root / "PairAnnotation").is_dir():
        raise FileNotFoundError(f"{root}/PairAnnotation: no such folder; expected SPair-71k as it is unpacked")
    found = sorted((root / "PairAnnotation" / split).glob(f"*:{category}.json"))
    if not found:
        known = sorted(path.name for path in (root / "PairAnnotation").iterdir() if path.is_dir())
        raise ValueError(f"{root}/PairAnnotation/{split}: no pairs of {category}; splits are {', '.join(known)}")
    pairs = [read_json(path, _SpairPair, remedy=REMEDY) for path in found]
    numbers = [_numbered(path, pair["kps_ids"]) for path, pair in zip(found, pairs, strict=True)]
    for path, pair in zip(found, pairs, strict=True):
        with _naming(path):
            _plain(pair["src_imname"]), _plain(pair["trg_imname"])
    names = sorted({name for pair in pairs for name in (pair["src_imname"], pair["trg_imname"])})
    about = [_spair_picture(root, category, name) for name in names]
    ids = [
        *(max(pair) for pair in SPAIR_MIRRORS[category]),
        *(int(key) for one in about for key in one["kps"]),
        *chain(*numbers),
    ]
    k = 1 + max(ids)
    index = {name: i for i, name in enumerate(names)}
    points = torch.full((len(names), k, 2), torch.nan)
    for i, one in enumerate(about):
        for key, point in one["kps"].items():
            if point is not None:
                points[i, int(key)] = torch.tensor(point)
    listed = torch.zeros(len(pairs), k, dtype=torch.bool)
    for i, own in enumerate(numbers):
        listed[i, own] = True
    given = [name for name in ATTRIBUTES if all(name in pair for pair in pairs)]
    folder = root / "JPEGImages" / category
    return Benchmark(
        f"{root.name}, {category}, {split}",
        tuple(folder / _plain(one["filename"]) for one in about),
        torch.tensor([[one["image_width"], one["image_height"]] for one in about], dtype=torch.float32),
        points,
        torch.tensor([one["bndbox"] for one in about]),
        torch.tensor([[index[pair["src_imname"]], index[pair["trg_imname"]]] for pair in pairs]),
        listed,
        _permutation(k, SPAIR_MIRRORS[category]),
        {name: torch.tensor([pair[name] for pair in pairs]) for name in given},
    )


def _spair_picture(root: Path, category: str, name: str) -> dict[str, Any]:
    path = root / "ImageAnnotation" / category / f"{Path(_plain(name)).stem}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no annotation of {name}, which a pair names; {REMEDY}")
    about = read_json(path, _SpairPicture, remedy=REMEDY)
    _numbered(path, about["kps"])
    with _naming(path):
        _plain(about["filename"])
    return about


def _numbered(path: Path, keys: Iterable[int | str]) -> list[int]:
    """Keypoints by their numbers. Raises ValueError for other names, which SPair does not have."""
    found = [int(key) if str(key).isascii() and str(key).isdecimal() and len(str(key)) <= 2 else -1 for key in keys]
    if -1 in found:
        raise ValueError(f"{path}: keypoints {ascii(list(keys))[:60]}, expected numbers from 0 to 99; {REMEDY}")
    return found


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors name the file that a name came from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def cub(root: Path, category: str | None, split: str, seed: int = 0) -> Benchmark:
    """CUB-200-2011: squares around each bird, 10,000 disjoint pairs of a pass, reshuffled in every pass.  [ACSM; thesis 4.4.2]

    root: the unpacked folder, whose own test or train split is taken, or ACSM's val_cub_cleaned.mat within it, which lists
    pictures and boxes. category: a species, by a part of its folder's name; None: all.
    """
    mat = root if root.suffix == ".mat" else None
    root = root.parent if mat is not None else root
    table = {int(row[0]): row[1] for row in _table(root / "images.txt", 2)}
    where = {int(row[0]): [float(x) for x in row[1:]] for row in _table(root / "bounding_boxes.txt", 5)}
    if mat is not None:
        boxes = _acsm_boxes(mat)
    else:
        if split not in ("train", "test"):
            raise ValueError(f"split {split}: expected train or test")
        flags = {int(row[0]): row[1] == "1" for row in _table(root / "train_test_split.txt", 2)}
        chosen = [i for i in table if flags.get(i) == (split == "train") and (category is None or category in table[i])]
        # x, y, width, height, from 1 on; here the first and the last pixel, from 0 on.
        boxes = {i: (x - 1, y - 1, x + w - 2, y + h - 2) for i in chosen if i in where for x, y, w, h in [where[i]]}
    if len(boxes) < 2:
        raise ValueError(
            f"{root}: {len(boxes)} pictures of {category or 'any species'} in {split}, expected at least 2"
        )
    points = torch.full((len(boxes), 15, 2), torch.nan)
    order = {number: i for i, number in enumerate(boxes)}
    for row in _table(root / "parts" / "part_locs.txt", 5):
        number, part, x, y, visible = int(row[0]), int(row[1]), float(row[2]), float(row[3]), row[4]
        if number in order and visible == "1":
            points[order[number], part - 1] = torch.tensor([x - 1, y - 1])
    crops = torch.tensor([square_around(box) for box in boxes.values()])
    points = points - crops[:, None, :2]
    side = (crops[:, 2] - crops[:, 0] + 1).float()
    pairs = _disjoint_pairs(len(boxes), CUB_PAIRS, seed)
    inside = torch.tensor(list(boxes.values())) - crops[:, [0, 1, 0, 1]]
    return Benchmark(
        f"{root.name}, {category or 'all species'}, {split if mat is None else mat.name}",
        tuple(root / "images" / _inside(table[number]) for number in boxes),
        side[:, None].expand(-1, 2).clone(),
        points,
        inside,
        pairs,
        torch.ones(len(pairs), 15, dtype=torch.bool),
        _permutation(15, CUB_MIRRORS),
        {},
        crops,
    )


def square_around(box: Sequence[float], more: float = 0.05) -> tuple[int, int, int, int]:
    """The square of whole pixels around a box, enlarged by a share of its sides at each end; halves are rounded up.  [ACSM]"""
    left, top, right, bottom = box
    width, height = right - left + 1, bottom - top + 1
    grown = (left - more * width, top - more * height, right + more * width, bottom + more * height)
    left, top, right, bottom = (_half_up(x) for x in grown)
    width, height = right - left + 1, bottom - top + 1
    side = max(width, height)
    left, top = left - _half_up((side - width) / 2), top - _half_up((side - height) / 2)
    return left, top, left + side - 1, top + side - 1


def _half_up(x: float) -> int:
    return int(math.copysign(math.floor(abs(x) + 0.5), x))


def _acsm_boxes(path: Path) -> dict[int, tuple[float, float, float, float]]:
    """Boxes of the pictures that ACSM kept, by CUB's numbers. The file is MATLAB's, which holds arrays and nothing that runs."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path, simplify_cells=True)["images"]
        listed = content if isinstance(content, Sequence) else content.tolist()
        kept = {}
        for one in listed:
            box = one["bbox"]
            kept[int(one["id"])] = tuple(float(box[name]) - 1 for name in ("x1", "y1", "x2", "y2"))
    except (
        MatReadError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        OSError,
        NotImplementedError,
    ) as error:
        raise ValueError(
            f"{path}: no list of pictures with boxes, as ACSM's val_cub_cleaned.mat ({error}); {REMEDY}"
        ) from error
    return kept  # type: ignore[return-value]


def _disjoint_pairs(pictures: int, count: int, seed: int) -> Int[Tensor, "n 2"]:
    """Pairs of which no picture is in two, until all are used; then again, in another order."""
    a_pass = pictures // 2
    passes = -(-count // a_pass)
    found = [randomness.permutation(seed, "keypoints/pairs", turn, pictures)[: 2 * a_pass] for turn in range(passes)]
    return torch.cat(found).view(-1, 2)[:count]


def willow(root: Path, category: str | None, split: str = "test", seed: int = 0) -> Benchmark:
    """PF-Willow: test_pairs.csv or test_pairs_pf.csv with ten points of each of two pictures; the box is that of the points."""
    table = next((root / name for name in ("test_pairs.csv", "test_pairs_pf.csv") if (root / name).is_file()), None)
    if table is None:
        raise FileNotFoundError(f"{root}/test_pairs.csv: no such file; expected PF-Willow as it is unpacked")
    lines = list(csv.reader(read_bytes(table).decode("utf-8", "replace").splitlines()))[1:]
    files: dict[str, int] = {}
    points, pairs = list[Tensor](), list[tuple[int, int]]()
    for number, line in enumerate(lines, start=2):
        try:
            numbers = torch.tensor([float(x) for x in line[2:]]).view(2, 2, 10)  # picture, x and y, point
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{table}, line {number}: expected two names and 40 numbers; {REMEDY}") from error
        if category is not None and category not in line[0]:
            continue
        # A point of a picture is annotated once for each pair, so that a picture of two pairs comes twice.
        pairs.append((len(points), len(points) + 1))
        for name, (x, y) in zip(line[:2], numbers, strict=True):
            files[f"{len(points)}/{name}"] = len(points)
            points.append(torch.stack([x, y], 1))
    if not pairs:
        raise ValueError(f"{table}: no pairs of {category or 'any category'}")
    names = [_inside(key.split("/", 1)[1].removeprefix("PF-dataset/")) for key in files]
    paths = tuple(root / name for name in names)
    all_points = torch.stack(points)
    return Benchmark(
        f"{root.name}, {category or 'all categories'}",
        paths,
        torch.tensor([_size_of(path) for path in paths], dtype=torch.float32),
        all_points,
        torch.cat([all_points.amin(1), all_points.amax(1)], 1),
        torch.tensor(pairs),
        torch.ones(len(pairs), 10, dtype=torch.bool),
        torch.arange(10),  # no mirror pairs are published
        {},
    )


def ap10k(root: Path, category: str | None, split: str, seed: int = 0) -> Benchmark:
    """AP-10K: annotations/ap10k-SPLIT-split1.json in COCO's format; 10,000 disjoint pairs of animals of one species, or of all."""
    table = root / "annotations" / f"ap10k-{split}-split1.json"
    if not table.is_file():
        raise FileNotFoundError(
            f"{table}: no such file; expected AP-10K as it is unpacked, with --split train, val or test"
        )
    content = read_json(table, _Coco, remedy=REMEDY)
    species = {one["id"]: one["name"] for one in content["categories"]}
    if category is not None and category not in species.values():
        raise ValueError(f"category {category}: expected one of {', '.join(sorted(species.values()))}")
    pictures = {one["id"]: one for one in content["images"]}
    chosen = [one for one in content["annotations"] if category is None or species.get(one["category_id"]) == category]
    points = torch.full((len(chosen), 17, 2), torch.nan)
    for i, one in enumerate(chosen):
        if len(one["keypoints"]) != 51 or one["image_id"] not in pictures:
            raise ValueError(f"{table}: annotation {i} without its picture or with other than 17 keypoints; {REMEDY}")
        x, y, visible = torch.tensor(one["keypoints"]).view(17, 3).unbind(1)
        points[i, visible > 0] = torch.stack([x, y], 1)[visible > 0]
    if len(chosen) < 2:
        raise ValueError(f"{table}: {len(chosen)} animals of {category or 'any species'}, expected at least 2")
    about = [pictures[one["image_id"]] for one in chosen]
    boxes = torch.tensor([one["bbox"] for one in chosen])
    pairs = _disjoint_pairs(len(chosen), CUB_PAIRS, seed)
    return Benchmark(
        f"{root.name}, {category or 'all species'}, {split}",
        tuple(root / "data" / _plain(one["file_name"]) for one in about),
        torch.tensor([[one["width"], one["height"]] for one in about], dtype=torch.float32),
        points,
        torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
        pairs,
        torch.ones(len(pairs), 17, dtype=torch.bool),
        _permutation(17, AP10K_MIRRORS),
        {},
    )


LAYOUTS: dict[str, Callable[[Path, str | None, str, int], Benchmark]] = {
    "spair": spair, "cub": cub, "willow": willow, "ap10k": ap10k,
}  # fmt: skip


def _check(found: Benchmark) -> None:
    """Raises FileNotFoundError for absent pictures, ValueError for points beyond a picture and empty boxes."""
    used = found.used()
    missing = [found.files[i] for i in used if not found.files[i].is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]}: no such picture, and {len(missing) - 1:,} more of {len(used):,}; {REMEDY}"
        )
    limit = found.size[:, None] - 1 + OUTSIDE_PX
    outside = ((found.points < -OUTSIDE_PX) | (found.points > limit)).any(-1)  # never true of NaN
    if found.crops is not None:
        outside &= False  # a bird's part may lie beyond the square around its box
    for i in used:
        if bool(outside[i].any()):
            k = int(outside[i].nonzero()[0])
            x, y = found.points[i, k].tolist()
            size = " x ".join(f"{side:g}" for side in found.size[i].tolist())
            raise ValueError(f"{found.files[i]}: keypoint {k} at ({x:g}, {y:g}), outside its {size} pixels; {REMEDY}")
        if not bool((found.box[i, 2:] > found.box[i, :2]).all()):
            raise ValueError(f"{found.files[i]}: box {found.box[i].tolist()} without area; {REMEDY}")


def _permutation(k: int, mirrors: Sequence[tuple[int, int]]) -> Int[Tensor, " k"]:
    found = torch.arange(k)
    for a, b in mirrors:
        found[a], found[b] = b, a
    return found


def _table(path: Path, columns: int) -> list[list[str]]:
    """Rows of a text file with a number of columns, separated by spaces. Raises ValueError for another row."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected CUB-200-2011 as it is unpacked")
    found = [line.split() for line in read_bytes(path).decode("utf-8", "replace").splitlines() if line.strip()]
    for number, row in enumerate(found, start=1):
        if len(row) != columns or not row[0].isdecimal() or (columns == 5 and not all(map(_number, row))):
            raise ValueError(f"{path}, line {number}: expected {columns} columns; {REMEDY}")
    return found


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _plain(name: str) -> str:
    """A file's name. Raises ValueError for one that leads elsewhere."""
    if not name or Path(name).name != name or name in ("..", "."):
        raise ValueError(f"picture {ascii(name)[:80]}: expected the name of a file; {REMEDY}")
    return name


def _inside(name: str) -> str:
    """A path within its folder. Raises ValueError for one that leads out of it."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"picture {ascii(name)[:80]}: expected a path within its folder; {REMEDY}")
    return name


def _size_of(path: Path) -> tuple[int, int]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture; {REMEDY}")
    height, width = read_picture(path, 1).size
    return width, height
