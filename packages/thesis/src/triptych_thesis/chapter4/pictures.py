"""Grids of digits as PNG files in a study's folder, where its report finds them without a model."""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from triptych_common.images import image_grid, png_bytes, to_uint8
from triptych_common.storage.files import write_bytes
from triptych_gangealing.baselines.moments import ink
from triptych_gangealing.warp import Warp

COLUMNS = 12


def save_grid(
    folder: Path, name: str, images: Float[Tensor, "n 3 height width"], *, columns: int = COLUMNS, scale: int = 3
) -> None:
    """Write images in [-1, 1] as a grid, for `Study.figure` of the study in `folder`; `scale`: screen pixels of a pixel."""
    grid = image_grid(to_uint8(images), columns=columns)
    write_bytes(folder / "figures" / f"{name}.png", png_bytes(grid, scale=scale))


def inked(images: Float[Tensor, "n 3 height width"], warp: Warp) -> Float[Tensor, "n 1 height width"]:
    """The ink of warped images, 0 to 1."""
    return warp.sample(ink(images), padding="zeros")


def as_grey(strokes: Float[Tensor, "1 height width"]) -> Float[Tensor, "3 height width"]:
    """Ink, 0 to 1, as a grey image in [-1, 1]."""
    return strokes.expand(3, -1, -1) * 2 - 1
