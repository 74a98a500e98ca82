"""PCK, the percentage of correct keypoints, of every variant in use, each by its name.

A predicted point is correct if it lies within alpha x size of the true one, the bound included; size is the longer side of
the target's box, or of its image. Published tables pool all points (GANgealing, thesis 4.4.2), average over images (as
supervised methods do), or do either without saying so. The numbers differ by several percent: never compare across variants.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate, as_share, bootstrap

ALPHAS = (0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01)
BOX, IMAGE = "target box", "image"
PER_POINT, PER_IMAGE = "per point", "per image"


class Score(NamedTuple):
    """PCK of one variant at one alpha: 0 to 1, with the 95% interval over images."""

    threshold: str  # target box, image: alpha is a share of its longer side
    average: str  # per point: all points pooled; per image: the mean of each image's share
    alpha: float
    threshold_px: float  # on average
    pck: Estimate


@dataclass(frozen=True)
class PckTable:
    """Scores of all variants, and how many images and points they are over."""

    images: int
    points: int
    scores: tuple[Score, ...]

    def __getitem__(self, variant: tuple[str, str, float]) -> Estimate:
        """PCK by (threshold, average, alpha), such as ("target box", "per point", 0.1). Raises KeyError."""
        for score in self.scores:
            if score[:3] == variant:
                return score.pck
        raise KeyError(f"no PCK {variant}: there are {sorted({score[:2] for score in self.scores})}")

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows for a report: a row for each variant and alpha, in percent."""
        header = ["threshold", "average", "alpha", "threshold, px", "PCK, %", "95% interval"]
        rows = []
        for threshold, average, alpha, threshold_px, (value, low, high) in self.scores:
            interval = "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"
            rows.append([threshold, average, f"{alpha:g}", f"{threshold_px:.2f}", f"{100 * value:.1f}", interval])
        return header, rows

    def as_dict(self) -> dict[str, dict[str, float | None]]:
        return {f"{s.threshold}, {s.average}, {s.alpha:g}": s.pck._asdict() for s in self.scores}


def box_size(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
    """The longer side of boxes x0, y0, x1, y1."""
    return (boxes[:, 2:] - boxes[:, :2]).amax(dim=1)


def pck(
    predicted: Float[Tensor, "n k 2"],
    target: Float[Tensor, "n k 2"],
    valid: Bool[Tensor, "n k"],
    sizes: Mapping[str, Float[Tensor, " n"]],
    alphas: Sequence[float] = ALPHAS,
    *,
    repeats: int = 200,
    seed: int = 0,
    groups: Int[Tensor, " n"] | None = None,
) -> PckTable:
    """Percentage of correct keypoints: a predicted point is correct if its error is at most alpha times a size.

    predicted, target: k points (x, y) of each of n images, in pixels of the target.
    valid: which points count; a counted prediction that is not finite is a miss. An image without valid points is in no average.
    sizes: what alpha is a share of, by name: {"target box": box_size(boxes), "image": longer sides}; each is scored per point and
        per image.
    repeats: resamples of an interval; 0 for none. groups: images that intervals resample together, such as those of one object;
        by default each image alone.
    Raises ValueError for shapes that differ, no valid point, or an alpha or size that is not positive.
    """
    n, k = valid.shape
    if predicted.shape != (n, k, 2) or target.shape != (n, k, 2):
        shapes = f"points predicted {tuple(predicted.shape)} and true {tuple(target.shape)}"
        raise ValueError(f"{shapes}: expected ({n}, {k}, 2), as valid")
    if not bool(valid.any()):
        raise ValueError("no valid point in any image: nothing to score")
    if not alphas or min(alphas) <= 0:
        raise ValueError(f"alphas {tuple(alphas)}: expected shares above 0, such as 0.1")
    counted = valid.any(1)
    distance = torch.linalg.vector_norm(predicted.double() - target.double(), dim=-1)
    scores = []
    for threshold, size in sizes.items():
        if size.shape != (n,) or not bool((size[counted] > 0).all()):
            raise ValueError(f"sizes of {threshold!r}: expected {n} numbers above 0, in pixels")
        for average in (PER_POINT, PER_IMAGE):
            for alpha in alphas:
                radius = alpha * size.double()
                hits = (distance <= radius[:, None]) & valid  # never true of NaN
                estimate = averaged(hits, valid, average, repeats=repeats, seed=seed, groups=groups)
                scores.append(Score(threshold, average, float(alpha), float(radius[counted].mean()), estimate))
    return PckTable(int(counted.sum()), int(valid.sum()), tuple(scores))


def averaged(
    hits: Bool[Tensor, "n k"],
    valid: Bool[Tensor, "n k"],
    average: str,
    *,
    repeats: int,
    seed: int,
    groups: Int[Tensor, " n"] | None = None,
) -> Estimate:
    """The share of valid points that are hits, `average` as in `Score`; intervals as `pck` describes them."""
    # Images are resampled, not points: points of one image are right or wrong together.
    counted = valid.any(1)
    tally = torch.stack([hits.sum(1), valid.sum(1)], dim=1)[counted].double()
    together = None if groups is None else groups[counted]
    estimate = bootstrap(_AVERAGES[average], tally, repeats=repeats, seed=seed, groups=together)
    return as_share(estimate, len(tally) if together is None else len(together.unique()))


def _pooled(tally: Float[Tensor, "n 2"]) -> float:
    hits, points = tally.sum(0).tolist()
    return hits / points


def _mean_of_images(tally: Float[Tensor, "n 2"]) -> float:
    return float((tally[:, 0] / tally[:, 1]).mean())


_AVERAGES = {PER_POINT: _pooled, PER_IMAGE: _mean_of_images}
