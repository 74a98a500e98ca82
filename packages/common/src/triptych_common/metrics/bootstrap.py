"""Intervals for scores."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from triptych_common.randomness import generator


class Estimate(NamedTuple):
    """A score with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_short(self.value)} [{_short(self.low)}, {_short(self.high)}]"


def _short(value: float) -> str:
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def bootstrap(score: Callable[..., float], *samples: Tensor, repeats: int = 100, seed: int = 0) -> Estimate:
    """`score(*samples)` with value +- 1.96 bootstrap standard deviations, each sample's rows resampled on their own.

    The interval is centred on the score, not taken from the resampled scores' percentiles: duplicates in a resample
    shift biased scores such as the Fréchet distance upward, while their spread stays right.
    """
    value = score(*samples)
    rng = generator(seed, "bootstrap")
    scores = torch.tensor(
        [score(*(s[torch.randint(len(s), (len(s),), generator=rng)] for s in samples)) for _ in range(repeats)],
        dtype=torch.float64,
    )
    margin = 1.96 * float(scores.std())
    return Estimate(value, value - margin, value + margin)
