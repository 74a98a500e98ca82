"""Distances between two sets of feature vectors."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Features = Float[Tensor, "_ dim"]  # any number of vectors


class Gaussian(NamedTuple):
    """Mean and covariance of a set of features, float64: all that the Fréchet distance depends on."""

    mean: Float[Tensor, " dim"]
    covariance: Float[Tensor, "dim dim"]


def fit_gaussian(features: Features, *, device: torch.device | str = "cpu", chunk: int = 4096) -> Gaussian:
    """Mean and unbiased covariance of all rows, of which `chunk` at a time are cast to float64.  [Chan et al. 1979]

    Raises ValueError for fewer than two rows or a value that is not finite.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} feature vectors: expected at least two for a covariance")
    count, dim = 0, features.shape[1]
    total_mean = torch.zeros(dim, dtype=torch.float64, device=device)
    scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean)(x - mean)^T
    for part in features.split(chunk):
        x = _finite(part).to(total_mean.device, torch.float64)
        mean, n = x.mean(0), len(x)
        x = x - mean
        scatter.addmm_(x.T, x)
        # Each part is centred on its own mean: sums of squares would cancel where the mean is large.
        gap = mean - total_mean
        scatter.addr_(gap, gap, alpha=count * n / (count + n))
        total_mean += gap * (n / (count + n))
        count += n
    return Gaussian(total_mean, scatter / (count - 1))


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features, in float64.  [Heusel et al. 2017, eq. 6]

    Small n bias it upward: compare distances at equal n, and beside the distance between two real sets.
    Raises ValueError if a set has fewer than two vectors or a value is not finite.
    """
    return gaussian_frechet(fit_gaussian(_checked(a)), fit_gaussian(_checked(b)))


def gaussian_frechet(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance between two Gaussians.

    |mean_a - mean_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))
    """
    # S_a S_b has the eigenvalues of the symmetric F^T S_b F, where S_a = F F^T: real and non-negative, which those of a
    # general matrix square root, as other implementations compute it, need not be.
    factor = _factor(a.covariance)
    return _distance(a, b, torch.linalg.eigvalsh(factor.T @ b.covariance @ factor))


def frechet_influence(
    features: Features, fitted: Gaussian, target: Gaussian, *, chunk: int = 4096
) -> tuple[float, Float[Tensor, " n"]]:
    """Fréchet distance from `fitted`, the Gaussian of all features, to `target`, and each vector's influence on it; float64.

    The influence is the first-order change of the distance per unit of weight on x, up to a constant:
    2 (m - m_target).(x - m) + (x - m)^T (I - T) (x - m), where T is the optimal linear map from fitted to target. Its
    standard deviation over sqrt(n) is the standard error of the distance.
    """
    # Bootstrapping the distance itself would need a decomposition per repeat, and overstate the error of small or good sets
    # up to twofold, as duplicates in a resample deflate the covariance.
    factor = _factor(target.covariance)
    values, vectors = torch.linalg.eigh(factor.T @ fitted.covariance @ factor)
    significant = values > _rounding(values)
    half = factor @ (vectors[:, significant] * values[significant] ** -0.25)
    push = half @ half.T  # T
    slope = torch.eye(len(push), dtype=push.dtype, device=push.device) - push
    gap, influence = fitted.mean - target.mean, []
    for part in features.split(chunk):
        x = part.to(push.device, torch.float64) - fitted.mean
        influence.append((2 * x @ gap + ((x @ slope) * x).sum(1)).cpu())
    return _distance(target, fitted, values), torch.cat(influence)


def _distance(a: Gaussian, b: Gaussian, eigenvalues: Tensor) -> float:
    """Fréchet distance, given the squares of the eigenvalues of (S_a S_b)^(1/2)."""
    gap, cross = a.mean - b.mean, eigenvalues.clamp(min=0).sqrt().sum()
    return float(gap @ gap + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def kernel_distance(a: Features, b: Features) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / dim + 1)^3: KID.  [Binkowski et al. 2018]

    Unlike that of the Fréchet distance, its expectation does not depend on n; it can be negative.
    Raises ValueError as `frechet_distance` does.
    """
    a, b = _checked(a).to(torch.float64), _checked(b).to(torch.float64)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    aa, bb, n, m = kernel(a, a), kernel(b, b), len(a), len(b)
    within = (aa.sum() - aa.trace()) / (n * (n - 1)) + (bb.sum() - bb.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(a, b).mean())


def _factor(covariance: Tensor) -> Float[Tensor, "dim rank"]:
    """F such that F F^T = covariance, without directions whose variance is only rounding error."""
    values, vectors = torch.linalg.eigh(covariance)
    significant = values > _rounding(values)
    return vectors[:, significant] * values[significant].sqrt()


def _rounding(eigenvalues: Tensor) -> Tensor:
    """The threshold below which an eigenvalue may be only rounding error."""
    return eigenvalues.max() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {tuple(features.shape)}: expected at least two vectors (n, dim)")
    return _finite(features)


def _finite(features: Tensor) -> Tensor:
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features hold NaN or infinity; the images or the network that made them are broken")
    return features
