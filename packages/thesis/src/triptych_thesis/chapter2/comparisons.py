"""Whether one set of samples scores better than another: differences with intervals, the noise of seeds, correlations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from triptych_common.metrics import Estimate, as_share

from triptych_thesis.study.estimates import quantile
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, UNDECIDED

STRONG = 0.5  # a correlation beyond this is called strong
LOWER_IS_BETTER = ("frechet", "spatial_frechet")


@dataclass(frozen=True)
class Score:
    """One metric of one set of samples.

    Replicate r of two sets of equal size resamples the same sample numbers and real digits, so that differences are paired.
    """

    value: float
    replicates: tuple[float, ...] = ()  # the same metric of bootstrap resamples
    deviation: float = 0.0  # one standard deviation, where there are no replicates
    trials: int = 0  # of a share: its interval then stays within 0..1 and never closes at either end

    @property
    def spread(self) -> float:
        """One standard deviation of the noise of sampling."""
        return _deviation(self.replicates) if self.replicates else self.deviation

    @property
    def estimate(self) -> Estimate:
        """The value with its 95% interval."""
        estimate = Estimate(self.value, self.value - 1.96 * self.spread, self.value + 1.96 * self.spread)
        return as_share(estimate, self.trials) if self.trials else estimate


class SeedNoise(NamedTuple):
    """How much retraining with another seed moves a metric: one standard deviation, and from how many pairs of runs."""

    deviation: float
    pairs: int


NO_SEEDS = SeedNoise(0.0, 0)
NO_NOISES = (NO_SEEDS, NO_SEEDS)


def compare(
    better: tuple[str, Score],
    worse: tuple[str, Score],
    metric: str,
    noises: tuple[SeedNoise, SeedNoise] = NO_NOISES,
    **about: Any,
) -> dict[str, Any]:
    """Whether `better`, as the thesis claims, beats `worse` by one metric: a positive "difference", with its 95% interval.

    Fréchet distances compare as the logarithm of worse over better, so 0.69 is half the distance; other metrics as better minus
    worse. The interval holds the noise of sampling, and each side's noise of training seeds where it is known.
    """
    (name, a), (other, b) = better, worse
    if metric in LOWER_IS_BETTER:
        value = math.log(max(b.value, 1e-9) / max(a.value, 1e-9))
        scales = (-1 / max(a.value, 1e-9), 1 / max(b.value, 1e-9))  # of the logarithm, by the delta method
    else:
        value, scales = a.value - b.value, (1.0, -1.0)
    if a.replicates and len(a.replicates) == len(b.replicates):  # paired: what both sides share cancels
        sampled = _deviation([scales[0] * x + scales[1] * y for x, y in zip(a.replicates, b.replicates, strict=True)])
    else:
        sampled = math.hypot(scales[0] * a.spread, scales[1] * b.spread)
    pairs = min(noise.pairs for noise in noises)  # degrees of freedom of Student's t
    margin = quantile(pairs) * math.sqrt(sampled**2 + sum(noise.deviation**2 for noise in noises))
    difference = Estimate(value, value - margin, value + margin)
    return {"better": name, "worse": other, "difference": difference._asdict(), "about": about}


def seed_noise(pairs: Sequence[tuple[Score, Score]], metric: str) -> SeedNoise:
    """From pairs of runs that differ by their seed alone; includes what is left of the noise of sampling."""
    if not pairs:
        return NO_SEEDS
    logarithmic = metric in LOWER_IS_BETTER
    gaps = [math.log(a.value / b.value) if logarithmic else a.value - b.value for a, b in pairs]
    squares = [gap**2 / 2 for gap in gaps]
    return SeedNoise(math.sqrt(sum(squares) / len(squares)), len(pairs))


def correlation(x: Sequence[float], scores: Sequence[Score]) -> Estimate:
    """Pearson's correlation of x with the scores. Its 95% interval is Fisher's for as many models, widened by the noise of
    sampling: both are variances of atanh(r). No interval for fewer than four models, or where x or the scores do not vary.
    """
    values = [score.value for score in scores]
    r = pearson(x, values)
    if len(x) < 4 or not math.isfinite(r):
        return Estimate(r if math.isfinite(r) else 0.0)
    sampled = 0.0
    if all(score.replicates for score in scores):
        centred = [[v + s.value - sum(s.replicates) / len(s.replicates) for v in s.replicates] for s in scores]
        sampled = _deviation([_atanh(pearson(x, column)) for column in zip(*centred, strict=True)])
    margin = 1.96 * math.sqrt(1 / (len(x) - 3) + sampled**2)
    return Estimate(r, math.tanh(_atanh(r) - margin), math.tanh(_atanh(r) + margin))


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """NaN where x or y do not vary."""
    a, b = (torch.tensor(list(map(float, each)), dtype=torch.float64) for each in (x, y))
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm()))


def strong(r: Mapping[str, Any], sign: int) -> str:
    """The verdict on "this correlation of that sign is strong": its whole interval beyond 0.5 confirms, none of it refutes."""
    low, high = r["low"], r["high"]
    if low is None or high is None:
        return UNDECIDED
    low, high = (low, high) if sign > 0 else (-high, -low)
    return CONFIRMED if low > STRONG else REFUTED if high < STRONG else UNDECIDED


def _atanh(r: float) -> float:
    return math.atanh(max(-0.9999, min(0.9999, r)))


def _deviation(values: Sequence[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).std())
