"""Bootstrap confidence intervals for scores."""

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
    """`score(*samples)` with a 95% interval of 1.96 bootstrap standard deviations around it.

        estimate = bootstrap(frechet_distance, generated_features, real_features, repeats=50)

    samples: tensors whose rows are resampled with replacement, each independently of the others.
    repeats: number of resamples; 0 gives no interval.
    groups: the group of each row; all samples must then have equally many rows. Groups are resampled as a whole, since rows
        of one group, such as several pictures of one object, are not independent.
    Raises ValueError for a single repeat, which has no spread.
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
    # Centred on the score instead of using percentiles of the resampled scores: duplicates in a resample shift biased
    # scores, such as the Fréchet distance, upward, while their spread is at worst too wide.
    margin = 1.96 * float(scores.std())
    return Estimate(value, value - margin, value + margin)


def bootstrap_rate(hits: Shaped[Tensor, " n"], *, repeats: int = 200, seed: int = 0) -> Estimate:
    """The share of hits (each 0 or 1) with a 95% interval, see `as_share`."""
    return as_share(bootstrap(_mean, hits, repeats=repeats, seed=seed), len(hits))


def as_share(estimate: Estimate, trials: int) -> Estimate:
    """A share of `trials`, with its interval clipped to 0..1.

    At 0 or 1, where resampling sees no spread, the interval is widened by 3 / trials, the rule of three.
    """
    value, low, high = estimate
    if low is None or high is None:
        return estimate
    unseen = 3 / trials if value in (0.0, 1.0) else 0.0
    return Estimate(value, max(low - unseen, 0.0), min(high + unseen, 1.0))


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
