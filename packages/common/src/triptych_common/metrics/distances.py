"""Distances between two sets of feature vectors."""

import torch
from jaxtyping import Float
from torch import Tensor


def frechet_distance(a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"]) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features, in float64.

    |mean_a - mean_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)), the last trace by the eigenvalues of the symmetric
    S_a^(1/2) S_b S_a^(1/2), which are real and non-negative (a general matrix square root has given wrong scores).
    Biased upward by small n: compare at equal n, beside the distance between two real sets.
    [Heusel et al. 2017, eq. 6]

    Raises ValueError when a set has fewer than two vectors or a value is not finite.
    """
    a, b = _checked(a), _checked(b)
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return float(difference @ difference + cov_a.trace() + cov_b.trace() - 2 * cross)


def kernel_distance(a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"]) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / dim + 1)^3: KID.  [Binkowski et al. 2018]

    Unlike the Fréchet distance its expectation does not depend on n; it can fall below zero.
    Raises ValueError as `frechet_distance` does.
    """
    a, b = _checked(a), _checked(b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    aa, bb, n, m = kernel(a, a), kernel(b, b), len(a), len(b)
    within = (aa.sum() - aa.trace()) / (n * (n - 1)) + (bb.sum() - bb.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(a, b).mean())


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {tuple(features.shape)}: expected at least two vectors (n, dim)")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features hold NaN or infinity; the images or the network that made them are broken")
    return features.to(torch.float64)
