"""What is drawn once, on the average aligned image, in every picture.  [thesis 4.4.1]"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from triptych_gangealing.warp import Warp, centres


def average(
    aligned: Float[Tensor, "n 3 height width"], inside: Float[Tensor, "n 1 height width"] | None = None
) -> Float[Tensor, "3 height width"]:
    """The mean of aligned images, of each pixel over those whose own pixels reach there; over all where none do."""
    if inside is None:
        return aligned.mean(0)
    weights = torch.where(inside.sum(0, keepdim=True) > 0, inside, 1.0)
    return (aligned * weights).sum(0) / weights.sum(0)


def propagate(
    edit: Float[Tensor, "4 edit_height edit_width"], warp: Warp, images: Float[Tensor, "n 3 height width"]
) -> Float[Tensor, "n 3 height width"]:
    """Pictures in [-1, 1] with an edit laid over them: RGB in [-1, 1], alpha in 0..1, in congealed coordinates.

    Each pixel of a picture looks up where it is in congealed space, by the inverse of its warp: no holes, no splatting. Where
    the inverse is not found, or leads out of the edit, the picture stays. Where a flow folds, several places lead to one pixel,
    which shows what lies at one of them.
    """
    n, _, height, width = images.shape
    places = centres((height, width), images).view(1, -1, 2).expand(n, -1, -1)
    found = warp.inverse().map_points(places)
    shown = (found.converged & found.inside).view(n, 1, height, width)
    premultiplied = torch.cat([(edit[:3] + 1) / 2 * edit[3:], edit[3:]])[None].expand(n, -1, -1, -1)
    grid = found.points.view(n, height, width, 2).to(premultiplied)
    layer = F.grid_sample(premultiplied, grid, align_corners=False) * shown
    alpha = layer[:, 3:].clamp(0, 1)
    mixed = (images + 1) / 2 * (1 - alpha) + layer[:, :3]
    return mixed * 2 - 1


def as_edit(pixels: UInt8[Tensor, "4 height width"]) -> Float[Tensor, "4 height width"]:
    """An RGBA picture in the values `propagate` takes."""
    values = pixels.float() / 255
    return torch.cat([values[:3] * 2 - 1, values[3:]])
