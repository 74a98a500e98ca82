"""How far a comparison of scores carries: differences with intervals, correlations, and verdicts made of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from triptych_common.metrics import Estimate, as_share

HOLDS, FAILS, UNCLEAR = "holds at this size", "does not hold at this size", "cannot be told apart from noise"
SHOWN = "nothing measured here decides it"
STRONG = 0.5  # a correlation beyond this is called strong
LOWER_IS_BETTER = ("frechet", "spatial_frechet")


@dataclass(frozen=True)
class Score:
    """One metric of one set of samples.

    replicates: the same metric of bootstrap resamples. Replicate r of two sets of equal size resamples the same sample
    numbers and the same real digits, so that differences are paired. deviation: one standard deviation where there are no
    replicates. trials: of a share, of how many; its interval then stays within 0..1, and never closes at either.
    """

    value: float
    replicates: tuple[float, ...] = ()
    deviation: float = 0.0
    trials: int = 0

    @property
    def spread(self) -> float:
        """One standard deviation of sampling."""
        return _deviation(self.replicates) if self.replicates else self.deviation

    @property
    def estimate(self) -> Estimate:
        found = Estimate(self.value, self.value - 1.96 * self.spread, self.value + 1.96 * self.spread)
        return as_share(found, self.trials) if self.trials else found


class SeedNoise(NamedTuple):
    """How much retraining with another seed moves a metric after some number of images: one standard deviation, from so many
    pairs of runs."""

    deviation: float
    pairs: int


NO_SEEDS = SeedNoise(0.0, 0)


@dataclass(frozen=True)
class Comparison:
    """Whether `better` beats `worse`, by one metric.

    difference: positive where it does. Fréchet distances compare as the logarithm of worse over better, so 0.69 is half the
    distance; other metrics as better minus worse.
    """

    better: str
    worse: str
    difference: Estimate
    verdict: str
    about: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "difference": self.difference._asdict(), "about": dict(self.about)}


def compare(
    better: tuple[str, Score],
    worse: tuple[str, Score],
    metric: str,
    noises: tuple[SeedNoise, SeedNoise] = (NO_SEEDS, NO_SEEDS),
    **about: Any,
) -> Comparison:
    """`better` and `worse` are names with scores. The interval, of 95%, holds the noise of sampling (paired where both have as
    many replicates) and, where it is known, each side's of training seeds, by Student's t with as many degrees as pairs.
    """
    (name, a), (other, b) = better, worse
    logarithmic = metric in LOWER_IS_BETTER
    if logarithmic:
        value = math.log(max(b.value, 1e-9) / max(a.value, 1e-9))
        scales = (-1 / max(a.value, 1e-9), 1 / max(b.value, 1e-9))
    else:
        value, scales = a.value - b.value, (1.0, -1.0)
    if a.replicates and len(a.replicates) == len(b.replicates):
        sampled = _deviation([scales[0] * x + scales[1] * y for x, y in zip(a.replicates, b.replicates, strict=True)])
    else:
        sampled = math.hypot(scales[0] * a.spread, scales[1] * b.spread)
    pairs = min(noise.pairs for noise in noises)
    margin = student(pairs) * math.sqrt(sampled**2 + sum(noise.deviation**2 for noise in noises))
    difference = Estimate(value, value - margin, value + margin)
    return Comparison(name, other, difference, sign_verdict(difference), about)


def sign_verdict(difference: Estimate) -> str:
    """Holds where the whole interval is positive, does not where it is negative; touching zero decides nothing."""
    return HOLDS if difference.low > 0 else FAILS if difference.high < 0 else UNCLEAR


def overall(verdicts: Iterable[str]) -> str:
    """Of a claim that consists of several: it holds where all do, and does not where any does not."""
    found = list(verdicts)
    if len(set(found)) == 1:
        return found[0]
    return FAILS if FAILS in found else UNCLEAR


def seed_noise(pairs: Sequence[tuple[Score, Score]], metric: str) -> SeedNoise:
    """From pairs of runs that differ by their seed alone; Fréchet distances by their logarithms. What is left of the noise of
    sampling is in it too.
    """
    if not pairs:
        return NO_SEEDS
    squares = []
    for a, b in pairs:
        gap = math.log(a.value / b.value) if metric in LOWER_IS_BETTER else a.value - b.value
        squares.append(gap**2 / 2)
    return SeedNoise(math.sqrt(sum(squares) / len(squares)), len(pairs))


def correlation(x: Sequence[float], scores: Sequence[Score]) -> Estimate:
    """Pearson's, of x with the scores. Its interval, of 95%, is Fisher's for as many models, widened by the noise of sampling:
    both are variances of atanh(r). No interval for fewer than four models, or where all points are one.
    """
    values = [score.value for score in scores]
    r = pearson(x, values)
    if len(x) < 4 or not math.isfinite(r):
        return Estimate(r if math.isfinite(r) else 0.0)
    sampled = 0.0
    if all(score.replicates for score in scores):
        centred = [[v + s.value - _mean(s.replicates) for v in s.replicates] for s in scores]
        sampled = _deviation([_atanh(pearson(x, column)) for column in zip(*centred, strict=True)])
    margin = 1.96 * math.sqrt(1 / (len(x) - 3) + sampled**2)
    return Estimate(r, math.tanh(_atanh(r) - margin), math.tanh(_atanh(r) + margin))


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """NaN where x or y do not vary."""
    a, b = (torch.tensor(list(map(float, each)), dtype=torch.float64) for each in (x, y))
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm()))


def strong_verdict(r: Estimate, sign: int) -> str:
    """Whether a correlation of that sign is strong: the whole interval beyond 0.5, or none of it."""
    if r.low is None or r.high is None:
        return UNCLEAR
    low, high = (r.low, r.high) if sign > 0 else (-r.high, -r.low)
    return HOLDS if low > STRONG else FAILS if high < STRONG else UNCLEAR


def student(degrees: int) -> float:
    """0.975 quantile of Student's t; 0 degrees stand for the normal distribution's 1.96."""
    if degrees == 0:
        return 1.96
    angle = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)  # t = sqrt(degrees) tan(angle)
    density = torch.cos(angle).clamp(min=0) ** (degrees - 1)
    mass = torch.cumulative_trapezoid(density, angle)
    found = int(torch.searchsorted(mass, 0.95 * mass[-1]))
    return math.sqrt(degrees) * math.tan(float(angle[found + 1]))


def _atanh(r: float) -> float:
    return math.atanh(max(-0.9999, min(0.9999, r)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).std())
