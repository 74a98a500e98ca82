"""Edit propagation: an edit is drawn once, on the average aligned image, and laid over every picture.  [thesis 4.4.1]"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from triptych_gangealing.warp import Warp, centres

Images = Float[Tensor, "n 3 height width"]


class RunningAverage:
    """A running mean of aligned images. Each pixel is averaged over the images that cover it, or over all if none does."""

    def __init__(self) -> None:
        self.n: int = 0
        # Sums in float64: over all images, over those that cover a pixel, and the number of these.
        self.plain, self.reaching, self.weight = (torch.zeros((), dtype=torch.float64) for _ in range(3))

    def add(self, aligned: Images, inside: Float[Tensor, "n 1 height width"]) -> None:
        """Images, and 1 where a pixel comes from within its image, else 0."""
        values, weights = aligned.double(), inside.double()
        self.n += len(values)
        self.plain = self.plain + values.sum(0)
        self.reaching = self.reaching + (values * weights).sum(0)
        self.weight = self.weight + weights.sum(0)

    def result(self) -> Float[Tensor, "3 height width"]:
        """Raises ValueError before the first image."""
        if not self.n:
            raise ValueError("an average of no images: add at least one")
        mean = torch.where(self.weight > 0, self.reaching / self.weight.clamp(min=1), self.plain / self.n)
        return mean.float()


def propagate(
    edit: Float[Tensor, "4 edit_height edit_width"],
    warp: Warp,
    images: Images,
    *,
    first: int = 0,
    rows: int | None = None,
) -> Images:
    """Pictures in [-1, 1] with an edit laid over them.

    edit: RGB in [-1, 1] and alpha in 0..1, in congealed coordinates. warp: of each picture, from congealed to its coordinates.
    Where its inverse has no solution, or leads out of the edit, the picture stays unchanged.
    first, rows: for images that are a part of larger ones, their first row there, and the number of rows of the whole.
    """
    # Each pixel looks up its congealed place, so no holes appear. Where a flow folds it has several, and shows one of them.
    n, _, height, width = images.shape
    places = centres((height, width), images, first=first, rows=rows).view(1, -1, 2).expand(n, -1, -1)
    congealed = warp.inverse().map_points(places)
    shown = (congealed.converged & congealed.inside).view(n, 1, height, width)
    # Colours are multiplied by alpha first: transparent pixels have no colour to blend in.
    premultiplied = torch.cat([(edit[:3] + 1) / 2 * edit[3:], edit[3:]])[None].expand(n, -1, -1, -1)
    grid = congealed.points.view(n, height, width, 2).to(premultiplied)
    layer = F.grid_sample(premultiplied, grid, align_corners=False) * shown
    alpha = layer[:, 3:].clamp(0, 1)
    mixed = (images + 1) / 2 * (1 - alpha) + layer[:, :3]
    return mixed * 2 - 1


def as_edit(pixels: UInt8[Tensor, "4 height width"]) -> Float[Tensor, "4 height width"]:
    """An RGBA picture in the values `propagate` takes."""
    values = pixels.float() / 255
    return torch.cat([values[:3] * 2 - 1, values[3:]])
