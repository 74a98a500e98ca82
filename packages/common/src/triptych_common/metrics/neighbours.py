"""Scores based on nearest neighbours: precision and recall, and near-duplicates.

Distances are computed in blocks of both sets, so that memory does not grow with them. A float32 matrix product proposes
neighbours; float64 differences of the proposed pairs decide. So results do not depend on block size or device, and copies
are at distance exactly 0.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SPARE = 4  # proposals beyond those needed, as float32 may rank close ones wrongly
CHUNK = 4096
EXACT = "donot_use_mm_for_euclid_dist"


def nearest_distances(
    queries: Float[Tensor, "n dim"], references: Float[Tensor, "m dim"], *, k: int = 1, chunk: int = CHUNK
) -> Float[Tensor, " n"]:
    """Euclidean distance from each query to its k-th nearest reference, computed in blocks of `chunk` by `chunk`.

    Raises ValueError for k outside 1..m.
    """
    if not 1 <= k <= len(references):
        raise ValueError(f"k={k}: expected 1..{len(references)}, the number of references")
    return _squared_radii(queries, references, k, chunk).sqrt().to(queries.dtype)


def precision_recall(
    real: Float[Tensor, "n dim"], fake: Float[Tensor, "m dim"], *, k: int = 3, chunk: int = CHUNK
) -> tuple[Float[Tensor, " m"], Float[Tensor, " n"]]:
    """Improved precision and recall.  [Kynkaanniemi et al. 2019]

    Returns two vectors of 0 and 1 whose means are the scores: for each fake, whether it lies in some real sample's ball,
    which reaches to the k-th nearest other real sample; for each real, the same against the fakes.
    Raises ValueError if a set has no more than k vectors or a value is not finite.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with k={k} need more than {k} vectors, got {len(real)} and {len(fake)}")
    if not bool(torch.isfinite(real).all() and torch.isfinite(fake).all()):
        raise ValueError("features hold NaN or infinity; the images or the network that made them are broken")
    return _covered(fake, real, k, chunk), _covered(real, fake, k, chunk)


def coverage(points: Float[Tensor, "n dim"], by: Float[Tensor, "m dim"], *, k: int = 3) -> Bool[Tensor, "n m"]:
    """Whether each point lies in the ball of each vector of `by`, which reaches to its k-th nearest other.

    `precision_recall` is whether any ball contains a point, in bounded memory; this keeps n x m distances.
    """
    radii = _squared_radii(by, by, k + 1, CHUNK)
    rows = (
        torch.cdist(part, by.double(), compute_mode=EXACT).square() <= radii for part in points.double().split(CHUNK)
    )
    return torch.cat(list(rows))


def _covered(points: Tensor, by: Tensor, k: int, chunk: int) -> Tensor:
    """Whether each point lies in the ball of some vector of `by`, which reaches to its k-th nearest other."""
    radii = _squared_radii(by, by, k + 1, chunk)  # the nearest is the vector itself
    near = _proposed(points, by, 1 + SPARE, chunk, radii)
    return (_squared_distances(points, by, near) <= radii[near]).any(dim=1).float()


def _squared_radii(queries: Tensor, references: Tensor, k: int, chunk: int) -> Float[Tensor, " n"]:
    near = _proposed(queries, references, k + SPARE, chunk)
    return _squared_distances(queries, references, near).kthvalue(k, dim=1).values


def _proposed(
    queries: Tensor, references: Tensor, count: int, chunk: int, radii: Tensor | None = None
) -> Int[Tensor, "n proposals"]:
    """Up to `count` references per query of smallest |q - r|^2, less their squared radius if given, in float32."""
    centre = references.mean(0)  # a common offset would cost |a|^2 + |b|^2 - 2ab its precision
    found = []
    for part in queries.split(chunk):
        part = (part - centre).to(torch.float32)
        scores, indices = part.new_empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.long, device=part.device)
        for start in range(0, len(references), chunk):
            block = (references[start : start + chunk] - centre).to(torch.float32)
            offset = block.square().sum(1)
            if radii is not None:
                offset = (offset - radii[start : start + chunk]).to(torch.float32)
            block_scores = torch.addmm(offset, part, block.T, alpha=-2)  # |q|^2 is the same for all
            best = block_scores.topk(min(count, len(block)), largest=False)
            scores, indices = torch.cat([scores, best.values], 1), torch.cat([indices, best.indices + start], 1)
            scores, kept = scores.topk(min(count, scores.shape[1]), largest=False)
            indices = indices.gather(1, kept)
        found.append(indices)
    return torch.cat(found)


def _squared_distances(
    queries: Tensor, references: Tensor, near: Int[Tensor, "n proposals"]
) -> Float[Tensor, "n proposals"]:
    """Squared distances from each query to the references indexed by `near`, from float64 differences."""
    parts = zip(queries.split(256), near.split(256), strict=True)
    return torch.cat([(q[:, None].double() - references[i].double()).square().sum(-1) for q, i in parts])
