"""Distances between two sets of feature vectors."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Gaussian(NamedTuple):
    """Mean and covariance of a set of features, float64: all that the Fréchet distance depends on."""

    mean: Float[Tensor, " dim"]
    covariance: Float[Tensor, "dim dim"]


class Moments:
    """Mean and covariance, in float64, of features that arrive in batches or on several ranks.  [Chan et al. 1979]

    However the rows are split, the result is the same up to float64 rounding.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean)(x - mean)^T

    def update(self, features: Float[Tensor, "n dim"]) -> None:
        """Add a batch of features.

        Raises ValueError when a value is not finite.
        """
        if len(features) == 0:
            return
        x = _finite(features).to(self.mean.device, torch.float64)
        mean = x.mean(0)
        x = x - mean
        self.scatter.addmm_(x.T, x)
        self._shift(len(x), mean)

    def merge(self, other: "Moments") -> None:
        """Add the features that another instance has seen."""
        if other.count:
            self.scatter += other.scatter.to(self.scatter.device)
            self._shift(other.count, other.mean.to(self.mean.device))

    def _shift(self, count: int, mean: Tensor) -> None:
        """Account for `count` more vectors around `mean`; their own scatter is already added."""
        gap, total = mean - self.mean, self.count + count
        self.scatter.addr_(gap, gap, alpha=self.count * count / total)
        self.mean += gap * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance.

        Raises ValueError when fewer than two vectors were seen.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} feature vectors: expected at least two for a covariance")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


def fit_gaussian(
    features: Float[Tensor, "n dim"], *, device: torch.device | str = "cpu", chunk: int = 4096
) -> Gaussian:
    """The Gaussian fitted to all rows, of which `chunk` at a time are cast to float64.

    Raises ValueError for fewer than two rows or a value that is not finite.
    """
    moments = Moments(features.shape[1], device)
    for part in features.split(chunk):
        moments.update(part)
    return moments.gaussian()


def frechet_distance(a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"]) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features, in float64.  [Heusel et al. 2017, eq. 6]

    Small n bias it upward: compare distances at equal n, and beside the distance between two real sets.
    Raises ValueError if a set has fewer than two vectors or a value is not finite.
    """
    return gaussian_frechet(fit_gaussian(_checked(a)), fit_gaussian(_checked(b)))


def gaussian_frechet(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance between two Gaussians.

    |mean_a - mean_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)). The last trace is computed from the eigenvalues of the
    symmetric F^T S_b F, where S_a = F F^T, which are real and non-negative; general matrix square roots can be inaccurate.
    """
    factor = _factor(a.covariance)
    return _distance(a, b, torch.linalg.eigvalsh(factor.T @ b.covariance @ factor))


def frechet_influence(
    features: Float[Tensor, "n dim"], fitted: Gaussian, target: Gaussian, *, chunk: int = 4096
) -> tuple[float, Float[Tensor, " n"]]:
    """Fréchet distance from `fitted`, the Gaussian of all features, to `target`, and each vector's influence on it; float64.

    The influence is the first-order change of the distance per unit of weight on x, up to a constant:
    2 (m - m_target).(x - m) + (x - m)^T (I - T) (x - m), where T is the optimal linear map from fitted to target. Its
    standard deviation over sqrt(n) is the standard error of the distance. Bootstrapping the distance itself would need a
    decomposition per repeat and overstate the error of small or good sets up to twofold, as duplicates deflate the covariance.
    """
    factor = _factor(target.covariance)
    values, vectors = torch.linalg.eigh(factor.T @ fitted.covariance @ factor)
    kept = values > _rounding(values)
    half = factor @ (vectors[:, kept] * values[kept] ** -0.25)
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


def kernel_distance(a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"]) -> float:
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
    kept = values > _rounding(values)
    return vectors[:, kept] * values[kept].sqrt()


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
