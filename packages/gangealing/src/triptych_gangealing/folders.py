"""Commands for people's own pictures: align a folder, average it, propagate an edit through it, match two pictures."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate
from triptych_common.cli import echo
from triptych_common.data.decoding import UnreadableImage, read_image
from triptych_common.images import from_uint8, image_grid, to_uint8, write_png
from triptych_common.storage.files import read_json, write_bytes, write_text

from triptych_gangealing import settings
from triptych_gangealing.aligner import Aligner, Alignment, open_aligner
from triptych_gangealing.correspondence import matches_figure, middle_points, transfer
from triptych_gangealing.edit import RunningAverage, as_edit, propagate
from triptych_gangealing.pictures import Folder, align_pictures, detail, read_picture, shrunk, warped
from triptych_gangealing.warp import Warp, to_normalised, to_pixels

SHOWN, CELL_PX = 10, 96  # pictures in each row of a grid, and their size there
SHOWN_PX = 256  # an eighth of the pixels that a very large picture keeps in a figure of matches
EDITED_PX = 1 << 21  # pixels of a picture that are edited at once, which takes 250 bytes for each
FARTHEST_PX = 1e6  # largest coordinate of a point: beyond any picture, and still exact enough in float32
CORNERS = torch.tensor([[[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]])


def _open(config: settings.UseOptions) -> tuple[Aligner, dict[str, Any]]:
    """The aligner, and the options of `Aligner.align`.

    Raises ValueError where the output would lie inside the folder that is read.
    """
    if isinstance(config, settings.FolderOptions):
        out, images = config.out.resolve(), config.images.resolve()
        if images in (out, *out.parents):
            raise ValueError(f"out {config.out}: lies in the pictures' folder {config.images}; choose one elsewhere")
        for written in (out / "aligned", out / "pictures"):
            if written in (images, *images.parents):
                raise ValueError(f"out {config.out}: would overwrite {config.images}; choose another")
    return open_aligner(config.aligner, config.device, config.iterations, config.flips)


def _shown(config: settings.WarpedOptions, aligner: Aligner) -> tuple[int, str]:
    """Height and width of aligned pictures, and the padding."""
    padding = aligner.facts["padding"] if config.padding == "trained" else config.padding
    return config.size or aligner.config.input_size, padding


def write_aligned(config: settings.AlignConfig) -> dict[str, Any]:
    """Write aligned pictures, a grid of some before and after, and where the corners of each come from.

    Raises ValueError or OSError for what is no aligner, or a folder of which no picture can be read.
    """
    aligner, options = _open(config)
    size, padding = _shown(config, aligner)
    folder = Folder(config.images, config.limit, detail(aligner, size))
    alignment = align_pictures(aligner, folder, **options)
    averages, rows = Averages(heads=aligner.config.heads), []
    cells: list[tuple[Tensor, Tensor]] = []
    for i, picture in folder.again():
        warp, png = alignment.warp.select([i]), folder.pngs[picture.name]
        image = warped(picture, warp, size, padding)
        write_png(config.out / "aligned" / png, to_uint8(image)[0])
        averages.add(int(alignment.cluster[i]), image, warp)
        if len(cells) < SHOWN:
            cells.append((shrunk(picture.pixels, (CELL_PX, CELL_PX)), _cell(from_uint8(to_uint8(image)))))
        row = {
            "picture": picture.name,
            "aligned": png,
            "cluster": int(alignment.cluster[i]),
            "flipped": bool(alignment.flipped[i]),
            "roughness": float(alignment.roughness[i]),
            "corners": to_pixels(warp.map_points(CORNERS).points[0], picture.size).tolist(),
        }
        rows.append(json.dumps(row) + "\n")
    write_text(config.out / "alignment.jsonl", "".join(rows))
    # Before in the first row, after below.
    columns = [torch.cat(cell) for cell in zip(*cells, strict=True)]
    write_png(config.out / "grid.png", image_grid(to_uint8(torch.cat(columns)), columns=len(cells)))
    files = {"aligned": "aligned", "table": "alignment.jsonl", "grid": "grid.png"}
    paths = {name: str(config.out / file) for name, file in files.items()}
    return _reported(paths | averages.write(config.out)) | {"pictures": len(rows)}


def write_average(config: settings.AverageConfig) -> dict[str, Any]:
    """Write the average aligned picture of each cluster, or of its `keep` smoothest warps.

    Raises ValueError where a transformer without flow should rank pictures, otherwise as `write_aligned`.
    """
    aligner, options = _open(config)
    if config.keep < 1 and aligner.transformer.flow is None:
        raise ValueError(f"keep {config.keep}: a transformer without flow cannot rank its warps; pass --keep 1")
    size, padding = _shown(config, aligner)
    folder = Folder(config.images, config.limit, detail(aligner, size))
    alignment = align_pictures(aligner, folder, **options)
    kept = smoothest(alignment, config.keep)
    averages = Averages(heads=aligner.config.heads)
    for i, picture in folder.again():
        if i in kept:
            warp = alignment.warp.select([i])
            averages.add(int(alignment.cluster[i]), warped(picture, warp, size, padding), warp)
    return _reported(averages.write(config.out))


def smoothest(alignment: Alignment, share: float) -> set[int]:
    """Indices of this share of each cluster's pictures, at least one of each: those with the smoothest flows."""
    kept: set[int] = set()
    for cluster in alignment.cluster.unique():
        here = (alignment.cluster == cluster).nonzero().flatten()
        best = alignment.roughness[here].argsort(stable=True)[: max(1, round(share * len(here)))]
        kept.update(here[best].tolist())
    return kept


def propagate_to_folder(config: settings.PropagateConfig) -> dict[str, Any]:
    """Write every picture with the edit laid over it, or where the points are in each.

    Raises ValueError for an edit of another size than the average picture, else as `write_aligned`.
    """
    if (config.edit is None) == (config.points is None):
        raise ValueError("propagate: expected one of --edit PICTURE and --points FILE")
    aligner, options = _open(config)
    size = config.size or aligner.config.input_size
    if not 0 <= config.cluster < aligner.config.heads:
        raise ValueError(f"cluster {config.cluster}: expected 0 to {aligner.config.heads - 1}")
    edit = None if config.edit is None else _read_edit(config.edit, size)
    points = None if config.points is None else _read_points(config.points)
    folder = Folder(config.images, config.limit)
    alignment = align_pictures(aligner, folder, **options)
    here = (alignment.cluster == config.cluster).nonzero().flatten().tolist()
    if not here:
        raise ValueError(f"cluster {config.cluster}: has none of {len(folder.seen):,} pictures; align lists clusters")
    if edit is not None:
        return _edited(config.out / "pictures", edit, set(here), folder, alignment)
    assert points is not None
    places, seen = {}, list(folder.seen.items())
    for i in here:
        (name, its_size), mapped = seen[i], alignment.warp.select([i]).map_points(to_normalised(points, (size, size)))
        places[name] = {"points": to_pixels(mapped.points, its_size)[0].tolist(), "inside": mapped.inside[0].tolist()}
    write_text(config.out / "points.json", json.dumps(places, indent=1, allow_nan=False))
    return _reported({"points": str(config.out / "points.json")}) | {"pictures": len(here)}


def _edited(
    out: Path, edit: Float[Tensor, "4 size size"], here: set[int], folder: Folder, alignment: Alignment
) -> dict[str, Any]:
    edited = 0
    for i, picture in folder.again():
        pixels = picture.pixels
        if i in here:
            pixels, edited = _with_edit(edit, alignment.warp.select([i]), pixels), edited + 1
        write_png(out / folder.pngs[picture.name], pixels)
    return _reported({"pictures": str(out)}) | {"edited": edited}


def _with_edit(
    edit: Float[Tensor, "4 size size"], warp: Warp, pixels: UInt8[Tensor, "3 height width"]
) -> UInt8[Tensor, "3 height width"]:
    """A picture with an edit laid over it, some rows at a time where it is larger than `EDITED_PX`."""
    _, height, width = pixels.shape
    out = torch.empty_like(pixels)
    step = max(1, EDITED_PX // width)
    for first in range(0, height, step):
        rows = from_uint8(pixels[None, :, first : first + step])
        out[:, first : first + step] = to_uint8(propagate(edit, warp, rows, first=first, rows=height))[0]
    return out


def write_matches(config: settings.CorrespondConfig) -> dict[str, Any]:
    """Write where points of the source are in the target, and a picture of it.

    Raises ValueError for pictures of different clusters, else as `write_aligned`.
    """
    aligner, options = _open(config)
    source, target = (read_picture(path, detail(aligner, SHOWN_PX)) for path in (config.source, config.target))
    here, there = (align_pictures(aligner, [picture], **options) for picture in (source, target))
    if config.points is None:
        start = here.warp.map_points(middle_points(config.spacing))
        points = to_pixels(start.points, source.size)[:, start.inside[0]]
    else:
        points = _read_points(config.points)
    transferred = transfer(here, there, points, source.size, target.size)
    reliable = transferred.reliable[0]
    if not bool(reliable.any()):
        where = (
            f"{config.source} to {config.target}: none of {points.shape[1]} points has a reliable place in the target"
        )
        raise ValueError(f"{where}; choose points on the object, or pictures that align shows upright")
    matches = {
        "source": str(config.source),
        "target": str(config.target),
        "source_points": points[0].tolist(),
        "target_points": transferred.points[0].tolist(),
        "reliable": reliable.tolist(),
    }
    write_text(config.out / "matches.json", json.dumps(matches, indent=1, allow_nan=False))
    shown = [
        to_pixels(to_normalised(place[0, reliable], picture.size), (picture.pixels.shape[1], picture.pixels.shape[2]))
        for place, picture in ((points, source), (transferred.points, target))
    ]
    picture = matches_figure(source.pixels, target.pixels, shown[0], shown[1], (source.name, target.name))
    write_bytes(config.out / "matches.png", picture)
    return _reported({"matches": str(config.out / "matches.json"), "picture": str(config.out / "matches.png")})


class Averages:
    """Running averages of aligned pictures by cluster: `average.png`, or `average-K.png` for each of several heads."""

    def __init__(self, *, heads: int) -> None:
        self.heads, self.of = heads, defaultdict[int, RunningAverage](RunningAverage)

    def add(self, cluster: int, aligned: Float[Tensor, "1 3 size size"], warp: Warp) -> None:
        """One more picture, and the warp that shows it."""
        self.of[cluster].add(aligned, warp.inside((aligned.shape[2], aligned.shape[3])))

    def write(self, out: Path) -> dict[str, str]:
        """Files by name."""
        files = {}
        for cluster, average in sorted(self.of.items()):
            name = "average" if self.heads == 1 else f"average-{cluster}"
            write_png(out / f"{name}.png", to_uint8(average.result()))
            files[name] = str(out / f"{name}.png")
        return files


def _cell(image: Float[Tensor, "1 3 height width"]) -> Float[Tensor, "1 3 side side"]:
    return interpolate(image, (CELL_PX, CELL_PX), mode="bilinear", antialias=True)


def _read_edit(path: Path, size: int) -> Float[Tensor, "4 size size"]:
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"edit {path}: no such picture; expected an RGBA one such as PNG, drawn on the average")
    try:
        pixels = torch.from_numpy(np.array(read_image(path, mode="RGBA"))).permute(2, 0, 1)
    except UnreadableImage as error:
        problem = f"no picture, or cut short ({error.reason})"
        raise ValueError(f"edit {path}: {problem}; save it as RGBA such as PNG") from error
    if pixels.shape[1:] != (size, size):
        height, width = pixels.shape[1:]
        remedy = f"draw on that, or pass --size {max(height, width)} to both commands"
        raise ValueError(f"{path}: {width}x{height} pixels, expected {size}x{size} as the average picture; {remedy}")
    if bool((pixels[3] == 255).all()):
        raise ValueError(
            f"edit {path}: opaque everywhere, and would cover whole pictures; save it with transparency (alpha)"
        )
    if not bool(pixels[3].any()):
        raise ValueError(f"edit {path}: transparent everywhere; draw something on it")
    return as_edit(pixels)


def _read_points(path: Path) -> Float[Tensor, "1 k 2"]:
    if not path.is_file():
        raise FileNotFoundError(f"points {path}: no such file; expected a JSON list of [x, y]")
    try:
        points = torch.tensor(read_json(path, list[tuple[float, float]], remedy="expected a JSON list of [x, y]"))
    except OverflowError as error:
        raise ValueError(f"{path}: a number beyond float32; expected a JSON list of [x, y]") from error
    if not len(points):
        raise ValueError(f"{path}: expected a JSON list of [x, y], found none")
    wrong = ~(points.abs() <= FARTHEST_PX).all(1)  # NaN too
    if bool(wrong.any()):
        number = int(wrong.nonzero()[0])
        point = f"{path}: point {number} is {points[number].tolist()}"
        raise ValueError(f"{point}, expected finite pixels of a picture; correct it, or leave it out")
    return points[None]


def _reported(files: dict[str, str]) -> dict[str, Any]:
    for name, path in files.items():
        echo(f"{name}: {path}")
    return files
