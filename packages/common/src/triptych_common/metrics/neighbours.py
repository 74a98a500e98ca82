"""Scores by nearest neighbours: precision and recall, and near-duplicates."""

import torch
from jaxtyping import Float
from torch import Tensor


def nearest_distances(
    queries: Float[Tensor, "n dim"], references: Float[Tensor, "m dim"], *, k: int = 1, chunk: int = 2048
) -> Float[Tensor, " n"]:
    """Euclidean distance from each query to its k-th nearest reference, computed in chunks of queries."""
    if not 1 <= k <= len(references):
        raise ValueError(f"k={k}: expected 1..{len(references)}, the number of references")
    return torch.cat([torch.cdist(part, references).kthvalue(k, dim=1).values for part in queries.split(chunk)])


def precision_recall(
    real: Float[Tensor, "n dim"], fake: Float[Tensor, "m dim"], *, k: int = 3
) -> tuple[Float[Tensor, " m"], Float[Tensor, " n"]]:
    """Improved precision and recall.  [Kynkaanniemi et al. 2019]

    Returns two float vectors of 0 and 1 whose means are the scores: for each fake, whether it lies within some real
    sample's distance to its k-th nearest other real sample; for each real, the same against the fakes.
    Raises ValueError when a set has no more than k vectors.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with k={k} need more than {k} vectors, got {len(real)} and {len(fake)}")
    return _covered(fake, real, k), _covered(real, fake, k)


def _covered(points: Tensor, by: Tensor, k: int, chunk: int = 2048) -> Tensor:
    radii = nearest_distances(by, by, k=k + 1)  # the nearest is the point itself
    inside = [(torch.cdist(part, by) <= radii).any(dim=1) for part in points.split(chunk)]
    return torch.cat(inside).float()
