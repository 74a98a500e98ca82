"""Intervals for scores."""

from collections.abc import Callable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from triptych_common.metrics.estimate import Estimate
from triptych_common.randomness import generator


def bootstrap(
    score: Callable[..., float],
    *samples: Tensor,
    repeats: int = 100,
    seed: int = 0,
    groups: Int[Tensor, " n"] | None = None,
) -> Estimate:
    """`score(*samples)` with value +- 1.96 bootstrap standard deviations, each sample's rows resampled on their own.

    The interval is centred on the score, not taken from the resampled scores' percentiles: duplicates in a resample
    shift biased scores such as the Fréchet distance upward, while their spread errs, if at all, on the wide side. No
    repeats, no interval.

    groups: of each row of the samples, which all have as many; rows of a group are drawn together, as several pictures of one
    object must be, which resemble each other more than those of another.

    Raises ValueError for one repeat, which has no spread.
    """
    if repeats < 0 or repeats == 1:
        raise ValueError(f"repeats {repeats}: expected at least 2, or 0 for no intervals")
    value = score(*samples)
    if repeats == 0:
        return Estimate(value)
    rng = generator(seed, "bootstrap")
    members = None if groups is None else [(groups == group).nonzero().flatten() for group in groups.unique()]

    def resampled() -> list[Tensor]:
        if members is None:
            return [s[torch.randint(len(s), (len(s),), generator=rng)] for s in samples]
        drawn = torch.randint(len(members), (len(members),), generator=rng).tolist()
        rows = torch.cat([members[group] for group in drawn])
        return [s[rows] for s in samples]

    scores = torch.tensor([score(*resampled()) for _ in range(repeats)], dtype=torch.float64)
    margin = 1.96 * float(scores.std())
    return Estimate(value, value - margin, value + margin)


def bootstrap_rate(hits: Shaped[Tensor, " n"], *, repeats: int = 200, seed: int = 0) -> Estimate:
    """Share of hits (0 or 1 each), its interval within 0..1."""
    return as_share(bootstrap(_mean, hits, repeats=repeats, seed=seed), len(hits))


def as_share(estimate: Estimate, trials: int) -> Estimate:
    """The interval of a share of so many trials, within 0..1; at a bound, where resampling sees no spread, by the rule of three."""
    value, low, high = estimate
    if low is None or high is None:
        return estimate
    unseen = 3 / trials if value in (0.0, 1.0) else 0.0
    return Estimate(value, max(low - unseen, 0.0), min(high + unseen, 1.0))


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
