"""Edit propagation: an edit is drawn once, on the average aligned image, and laid over every picture.  [thesis 4.4.1]"""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from triptych_gangealing.warp import MAX_LEVEL, Warp, sample_pyramid, to_normalised, to_pixels

Images = Float[Tensor, "n 3 height width"]
REACH_PX = 6  # that a pixel of an edit reaches, in the coarsest copy of it


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
    Where its inverse has no solution, or leads out of the edit, the picture stays unchanged. Where a picture shows the edit
    smaller than it is, it is sampled from smaller copies, without aliasing.
    first, rows: for images that are a part of larger ones, their first row there, and the number of rows of the whole.
    """
    # Each pixel looks up its congealed place, so no holes appear. Where a flow folds it has several, and shows one of them.
    height, width = images.shape[2:]
    whole = (height if rows is None else rows, width)
    # Colours are multiplied by alpha first: transparent pixels have no colour to blend in.
    layer = torch.cat([(edit[:3] + 1) / 2 * edit[3:], edit[3:]])[None].to(images)
    forward = warp.map_points(_corners((edit.shape[1], edit.shape[2]), images).expand(len(images), -1, -1)).points
    places = to_pixels(forward, whole).unflatten(
        1, (edit.shape[1] + 1, edit.shape[2] + 1)
    )  # n edit_height+1 edit_width+1 2
    out = images.clone()
    for i, reached in enumerate(_reached(edit[3] > 0, places, whole)[:, first : first + height]):
        y, x = reached.nonzero(as_tuple=True)
        if not len(y):
            continue
        # The inverse takes most of the time, so only pixels that the edit can reach are inverted.
        point = to_normalised(torch.stack([x, y + first], 1).to(images), whole)[None]
        congealed = warp.select([i]).inverse().map_points(point)
        shown = (congealed.converged & congealed.inside)[0]
        grid = congealed.points[:, None].to(layer)  # 1 1 m 2
        level = F.grid_sample(_shrinkage(places[i : i + 1]), grid, padding_mode="border", align_corners=False)[:, 0]
        found = sample_pyramid(layer, grid, level, "zeros")[0, :, 0] * shown  # 4 m
        alpha = found[3].clamp(0, 1)
        mixed = (out[i, :, y, x] + 1) / 2 * (1 - alpha) + found[:3]
        out[i, :, y, x] = mixed * 2 - 1
    return out


def _corners(size: tuple[int, int], like: Tensor) -> Float[Tensor, "1 k 2"]:
    """The corners of an edit's pixels, row by row, normalised."""
    y, x = (torch.linspace(-1, 1, side + 1, dtype=like.dtype, device=like.device) for side in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(1, -1, 2)


def _reached(
    opaque: Bool[Tensor, "edit_height edit_width"], places: Float[Tensor, "n _ _ 2"], size: tuple[int, int]
) -> Bool[Tensor, "n height width"]:
    """The pixels of pictures that an edit may show in: boxes around where the corners of its pixels go, one pixel wider."""
    # What is sampled between pixels, or in smaller copies, reaches beyond its own pixel.
    support = F.max_pool2d(opaque.float()[None, None], 2 * REACH_PX + 1, 1, REACH_PX)[0, 0].bool()
    limit = torch.tensor([size[1], size[0]], device=places.device)
    found = []
    for corners in places:
        cells = torch.stack([corners[:-1, :-1], corners[:-1, 1:], corners[1:, :-1], corners[1:, 1:]])[:, support]
        low = torch.minimum((cells.amin(0).floor() - 1).clamp_min(0), limit).long()
        high = torch.minimum((cells.amax(0).ceil() + 2).clamp_min(0), limit).long()
        # A sum over corners of boxes is, at each pixel, the number of boxes that cover it.
        count = torch.zeros(size[0] + 1, size[1] + 1, dtype=torch.int32, device=places.device)
        for (x, y), sign in (((low[:, 0], low[:, 1]), 1), ((high[:, 0], low[:, 1]), -1), ((low[:, 0], high[:, 1]), -1),
                             ((high[:, 0], high[:, 1]), 1)):  # fmt: skip
            count.index_put_((y, x), torch.full_like(y, sign, dtype=torch.int32), accumulate=True)
        found.append(count.cumsum(0).cumsum(1)[:-1, :-1] > 0)
    return torch.stack(found)


def _shrinkage(places: Float[Tensor, "1 _ _ 2"]) -> Float[Tensor, "1 1 edit_height edit_width"]:
    """The pyramid level that each pixel of an edit is sampled from: log2 of how many of them a picture's pixel is wide or high."""
    across = torch.linalg.vector_norm(places.diff(dim=2), dim=-1)
    down = torch.linalg.vector_norm(places.diff(dim=1), dim=-1)
    side = torch.minimum((across[:, 1:] + across[:, :-1]) / 2, (down[:, :, 1:] + down[:, :, :-1]) / 2)
    return (-side.clamp(2**-MAX_LEVEL, 1).log2())[:, None]


def as_edit(pixels: UInt8[Tensor, "4 height width"]) -> Float[Tensor, "4 height width"]:
    """An RGBA picture in the values `propagate` takes."""
    values = pixels.float() / 255
    return torch.cat([values[:3] * 2 - 1, values[3:]])
