"""Commands that use an aligner on people's own pictures: align a folder, average it, draw on all of it, match two of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from triptych_common.cli import say
from triptych_common.images import from_uint8, image_grid, to_uint8, write_png
from triptych_common.run import write_bytes, write_text

from triptych_gangealing.align_config import (
    AlignConfig,
    AverageConfig,
    CorrespondConfig,
    FolderOptions,
    PropagateConfig,
)
from triptych_gangealing.aligner import Aligner, Alignment
from triptych_gangealing.correspondence import middle_points, transfer
from triptych_gangealing.edit import as_edit, average, propagate
from triptych_gangealing.figures import matches_figure
from triptych_gangealing.pictures import Folder, Picture, align_pictures, read_picture, warped
from triptych_gangealing.warp import to_normalised, to_pixels

SHOWN = 10  # pictures in rows of a grid
CELL_PX = 96  # of them


def align(config: AlignConfig) -> dict[str, Any]:
    """Write aligned pictures, a grid of some before and after, and where each pixel of the corners comes from.

    Raises ValueError or OSError for what is no aligner, or a folder none of whose pictures can be read.
    """
    aligner, options = config.open()
    size, padding = config.shown(aligner)
    pictures, found = _aligned(aligner, config, options)
    images = to_uint8(warped(pictures, found.warp, size, padding))
    for picture, image in zip(pictures, images, strict=True):
        write_png(_named(config.out / "aligned", picture, pictures), image)
    rows = [
        {
            "picture": picture.name,
            "cluster": int(found.cluster[i]),
            "flipped": bool(found.flipped[i]),
            "roughness": float(found.roughness[i]),
            "corners": to_pixels(_corners(found, i), picture.size).tolist(),
        }
        for i, picture in enumerate(pictures)
    ]
    write_text(config.out / "alignment.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_png(config.out / "grid.png", before_and_after(pictures, images))
    averages = _write_averages(config.out, pictures, found, size, padding, heads=aligner.config.heads)
    files = {"aligned": "aligned", "table": "alignment.jsonl", "grid": "grid.png"}
    return _told({name: str(config.out / file) for name, file in files.items()} | averages) | {
        "pictures": len(pictures)
    }


def write_average(config: AverageConfig) -> dict[str, Any]:
    """Write the average aligned picture of each cluster. Raises as `align`."""
    aligner, options = config.open()
    size, padding = config.shown(aligner)
    pictures, found = _aligned(aligner, config, options)
    best = found.roughness.argsort(stable=True)[: max(1, round(config.keep * len(pictures)))].sort().values
    return _told(
        _write_averages(
            config.out,
            [pictures[i] for i in best.tolist()],
            found.select(best),
            size,
            padding,
            heads=aligner.config.heads,
        )
    )


def propagate_to_folder(config: PropagateConfig) -> dict[str, Any]:
    """Write every picture with the edit laid over it, or where the points are in each.

    Raises ValueError for an edit of another size than the average picture, else as `align`.
    """
    if (config.edit is None) == (config.points is None):
        raise ValueError("propagate: expected one of --edit PICTURE and --points FILE")
    aligner, options = config.open()
    size = config.size or aligner.config.input_size
    if not 0 <= config.cluster < aligner.config.heads:
        raise ValueError(f"cluster {config.cluster}: expected 0 to {aligner.config.heads - 1}")
    edit = None if config.edit is None else _read_edit(config.edit, size)
    points = None if config.points is None else _read_points(config.points)
    pictures, found = _aligned(aligner, config, options)
    here = [i for i in range(len(pictures)) if int(found.cluster[i]) == config.cluster]
    if not here:
        raise ValueError(
            f"cluster {config.cluster}: none of {len(pictures):,} pictures is of it; average says which are"
        )
    if edit is not None:
        for i, picture in enumerate(pictures):
            image = picture.values()
            if i in here:
                image = propagate(edit, found.warp.select([i]), image)
            write_png(_named(config.out / "pictures", picture, pictures), to_uint8(image)[0])
        return _told({"pictures": str(config.out / "pictures")}) | {"edited": len(here)}
    places = {}
    for i in here:
        mapped = found.warp.select([i]).map_points(to_normalised(points, (size, size)))
        pixels = to_pixels(mapped.points, pictures[i].size)[0]
        places[pictures[i].name] = {"points": pixels.tolist(), "inside": mapped.inside[0].tolist()}
    write_text(config.out / "points.json", json.dumps(places, indent=1))
    return _told({"points": str(config.out / "points.json")}) | {"pictures": len(here)}


def correspond(config: CorrespondConfig) -> dict[str, Any]:
    """Write where points of the source are in the target, and a picture of it.

    Raises ValueError for pictures of different clusters, else as `align`.
    """
    aligner, options = config.open()
    source, target = read_picture(config.source), read_picture(config.target)
    here, there = (align_pictures(aligner, [picture], **options) for picture in (source, target))
    if config.points is None:
        start = here.warp.map_points(middle_points(config.spacing))
        points = to_pixels(start.points, source.size)[:, start.inside[0]]
    else:
        points = _read_points(config.points)
    found = transfer(here, there, points, source.size, target.size)
    matches = {
        "source": str(config.source),
        "target": str(config.target),
        "source_points": points[0].tolist(),
        "target_points": found.points[0].tolist(),
        "reliable": found.reliable[0].tolist(),
    }
    write_text(config.out / "matches.json", json.dumps(matches, indent=1))
    reliable = found.reliable[0]
    ends = points[0, reliable], found.points[0, reliable]
    picture = matches_figure(source.pixels, target.pixels, *ends, (source.name, target.name))
    write_bytes(config.out / "matches.png", picture)
    return _told({"matches": str(config.out / "matches.json"), "picture": str(config.out / "matches.png")})


def before_and_after(
    pictures: list[Picture], aligned: UInt8[Tensor, "n 3 size size"]
) -> UInt8[Tensor, "3 height width"]:
    """Some pictures as they are, and aligned, below one another."""
    from torch.nn.functional import interpolate

    def cell(image: Float[Tensor, "1 3 height width"]) -> Tensor:
        return interpolate(image, (CELL_PX, CELL_PX), mode="bilinear", antialias=True)

    above = torch.cat([cell(picture.values()) for picture in pictures[:SHOWN]])
    below = torch.cat([cell(from_uint8(image[None])) for image in aligned[:SHOWN]])
    return image_grid(to_uint8(torch.cat([above, below])), columns=min(SHOWN, len(pictures)))


def _named(folder: Path, picture: Picture, pictures: Sequence[Picture]) -> Path:
    """Where a picture's own goes: a.jpg to a.png, or to a.jpg.png beside another a."""
    path = Path(picture.name)
    alone = sum(Path(other.name).with_suffix("") == path.with_suffix("") for other in pictures) == 1
    return folder / (path.with_suffix(".png") if alone else path.with_name(path.name + ".png"))


def _aligned(aligner: Aligner, config: FolderOptions, options: dict[str, Any]) -> tuple[list[Picture], Alignment]:
    for name in ("aligned", "pictures"):
        if (config.out / name).resolve() == config.images.resolve():
            raise ValueError(f"out {config.out}: would overwrite {config.images}; choose another")
    folder = Folder(config.images, config.limit)
    pictures = list(folder)
    folder.complain()
    return pictures, align_pictures(aligner, pictures, **options)


def _write_averages(
    out: Path, pictures: list[Picture], found: Alignment, size: int, padding: str, *, heads: int
) -> dict[str, str]:
    files = {}
    for cluster in found.cluster.unique().tolist():
        members = (found.cluster == cluster).nonzero().flatten().tolist()
        warp = found.warp.select(members)
        images = warped([pictures[i] for i in members], warp, size, padding)
        name = "average" if heads == 1 else f"average-{cluster}"
        write_png(out / f"{name}.png", to_uint8(average(images, warp.inside((size, size)))))
        files[name] = str(out / f"{name}.png")
    return files


def _read_edit(path: Path, size: int) -> Float[Tensor, "4 size size"]:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: no picture; expected an RGBA one such as PNG") from error
    if pixels.shape[1:] != (size, size):
        height, width = pixels.shape[1:]
        raise ValueError(
            f"{path}: {width}x{height} pixels, expected {size}x{size} as the average picture; draw on that, or pass "
            f"--size {max(height, width)} to both commands"
        )
    return as_edit(pixels)


def _read_points(path: Path) -> Float[Tensor, "1 k 2"]:
    try:
        points = torch.tensor(json.loads(path.read_text()), dtype=torch.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected a JSON list of [x, y]") from error
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"{path}: expected a JSON list of [x, y], found shape {tuple(points.shape)}")
    return points[None]


def _corners(found: Alignment, index: int) -> Float[Tensor, "4 2"]:
    corners = torch.tensor([[[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]])
    return found.warp.select([index]).map_points(corners).points[0]


def _told(files: dict[str, str]) -> dict[str, Any]:
    for name, path in files.items():
        say(f"{name}: {path}")
    return files
