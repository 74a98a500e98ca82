"""What an audit's numbers say, in plain words and no further than their intervals carry.

Intervals take networks to be independent. Held-out runs of one cohort share their minibatches, so that intervals are somewhat
optimistic.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate, bootstrap, bootstrap_rate

from triptych_gpt.nearest import Nearest

SAMPLES, HELD_OUT, HELD_OUT_FINALS = "samples", "held-out at the prompt's metric", "held-out finals"
COPY_SIGMA = 0.1  # noise in normalised units: what a training network may gain and still be called a copy
MARGIN = 0.02  # of a baseline's metric: who is worse by no more than that is called no worse
_REPEATS = 200


@dataclass(frozen=True)
class Group:
    """Networks of one origin, beside the training network that is nearest to each under matching.

    final_distance: to the nearest among final checkpoints. norm: Euclidean, of the networks themselves. agreement: share of test
    items that both give the same class; error_overlap: of the items either gets wrong, the share that both do. None where the task
    has no classes.
    """

    name: str
    nearest: Nearest
    final_distance: Float[Tensor, " n"]
    norm: Float[Tensor, " n"]
    metrics: dict[str, Float[Tensor, " n"]]
    agreement: Float[Tensor, " n"] | None = None
    error_overlap: Float[Tensor, " n"] | None = None

    @property
    def distance(self) -> Float[Tensor, " n"]:
        return self.nearest.distance

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: medians of distances, means of the rest, each with its 95% interval."""
        return {
            "name": self.name,
            "networks": len(self.distance),
            "median_distance": _estimated(_median, self.distance),
            "median_distance_to_finals": _estimated(_median, self.final_distance),
            "median_norm": _estimated(_median, self.norm),
            "metrics": {name: _estimated(_mean, values) for name, values in self.metrics.items()},
            "agreement": None if self.agreement is None else _estimated(_mean, self.agreement),
            "error_overlap": None if self.error_overlap is None else _estimated(_mean, self.error_overlap),
            "distances": self.distance.tolist(),
            "nearest_run": self.nearest.run.tolist(),
            "nearest_checkpoint": self.nearest.checkpoint.tolist(),
        }


def verdict(groups: tuple[Group, ...], metric: str, better: str, seed: int = 0) -> tuple[bool, list[str]]:
    """Whether more samples than held-out networks are copies, beyond doubt, and all that can be said, a sentence each.

    A sample is a copy if it is nearer to a training network than 95% of training networks with noise of COPY_SIGMA are.
    The samples beat a baseline if they are farther from training networks and perform better, or worse by no more than MARGIN
    of the baseline's metric; where an interval leaves that open, so does the sentence. Real held-out networks are put to the
    same question beside them. A network that is blurred, and so shrunken, is nearer to all others without copying any: norms
    that tell of that are told.
    """
    by_name = {group.name: group for group in groups}
    samples = by_name[SAMPLES]
    threshold = by_name[f"noised {COPY_SIGMA}"].distance.quantile(0.95)
    copies = bootstrap_rate(samples.distance <= threshold, seed=seed)
    false_alarms = bootstrap_rate(by_name[HELD_OUT].distance <= threshold, seed=seed)
    more = _excess(copies, false_alarms)
    memorised = more.low > 0
    lines = [
        f"{'Memorised' if memorised else 'Copies'}: {_percent(copies)} of {len(samples.distance):,} samples are as near to a "
        f"training network as one with noise of {COPY_SIGMA} (distance {threshold:.3g}), {_percent(false_alarms)} of held-out "
        f"networks; difference {_percent(more)}."
    ]
    lines += [_against_held_out(samples, by_name[name], seed) for name in (HELD_OUT_FINALS, HELD_OUT)]
    lines += _shrunken(samples, by_name[HELD_OUT_FINALS], seed)
    sign = -1.0 if better == "lower" else 1.0
    baselines = [group for group in groups if group.name not in (SAMPLES, HELD_OUT, HELD_OUT_FINALS)]
    return memorised, lines + [_against(samples, by_name[HELD_OUT], group, metric, sign, seed) for group in baselines]


def _against_held_out(samples: Group, held_out: Group, seed: int) -> str:
    difference = bootstrap(_median_difference, samples.distance, held_out.distance, repeats=_REPEATS, seed=seed)
    if difference.low >= 0:
        finding = "no smaller than"
    elif difference.high < 0:
        finding = "smaller than"
    else:
        finding = "not shown to differ from"
    text = (
        f"The samples' median distance to training networks, {_median(samples.distance):.3g}, is {finding} that of "
        f"{held_out.name}, {_median(held_out.distance):.3g} (difference {difference})"
    )
    if samples.agreement is not None:
        ours, theirs = (float(group.agreement.mean()) for group in (samples, held_out))
        text += f"; they agree with their nearest in {ours:.1%} of predictions, against {theirs:.1%}"
    return text + "."


def _excess(rate: Estimate, other: Estimate) -> Estimate:
    """The difference of two independent rates, the margins of their intervals added in quadrature (Newcombe 1998, method 10):
    resampling the difference would find none between 3 of 3 and 0 of 3.
    """
    value = rate.value - other.value
    low = value - math.hypot(rate.value - rate.low, other.high - other.value)
    return Estimate(value, low, value + math.hypot(rate.high - rate.value, other.value - other.low))


def _shrunken(samples: Group, held_out: Group, seed: int) -> list[str]:
    """A sentence where the samples are clearly smaller than real networks."""
    difference = bootstrap(_median_difference, samples.norm, held_out.norm, repeats=_REPEATS, seed=seed)
    if not difference.high < 0:
        return []
    return [
        f"The samples are shrunken: their median norm, {_median(samples.norm):.3g}, is below that of {held_out.name}, "
        f"{_median(held_out.norm):.3g} (difference {difference}); smaller networks are nearer to all others, copied or not."
    ]


def _against(samples: Group, held_out: Group, baseline: Group, metric: str, sign: float, seed: int) -> str:
    word, told = _compared(samples, baseline, metric, sign, seed)
    reference, _ = _compared(held_out, baseline, metric, sign, seed)
    return f"{word} {baseline.name}: {told}. By this measure {held_out.name}: {reference.lower()} it."


def _compared(group: Group, baseline: Group, metric: str, sign: float, seed: int) -> tuple[str, str]:
    farther = bootstrap(_median_difference, group.distance, baseline.distance, repeats=_REPEATS, seed=seed)
    ours, theirs = group.metrics[metric], baseline.metrics[metric]
    gain = bootstrap(_mean_difference, ours * sign, theirs * sign, repeats=_REPEATS, seed=seed)
    novel = "farther from" if farther.low > 0 else "nearer to" if farther.high < 0 else "about as far from"
    no_worse = gain.low >= -MARGIN * abs(_mean(theirs))
    if gain.low > 0:
        fit = "better"
    elif no_worse:
        fit = f"no worse by more than {MARGIN:.0%}"
    else:
        fit = "worse" if gain.high < 0 else "not shown to differ"
    if not math.isfinite(gain.value):
        word, fit = "Undecided against", "undefined for some networks"
    elif farther.high < 0 or (gain.high < 0 and not no_worse):
        word = "Does not beat"
    elif farther.low > 0 and no_worse:
        word = "Beats"
    else:
        word = "Undecided against"
    told = (
        f"{novel} training networks (median {_median(group.distance):.3g} against {_median(baseline.distance):.3g}, "
        f"difference {farther}), {metric} {fit} ({float(ours.mean()):.4g} against {float(theirs.mean()):.4g})"
    )
    return word, told


def _median(values: Tensor) -> float:
    return (
        float(values.median() - (-values).median()) / 2
    )  # of the two in the middle; quantile() takes five times as long


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _median_difference(a: Tensor, b: Tensor) -> float:
    return _median(a) - _median(b)


def _mean_difference(a: Tensor, b: Tensor) -> float:
    return _mean(a) - _mean(b)


def _percent(rate: Estimate) -> str:
    return f"{rate.value:.0%} [{rate.low:.0%}, {rate.high:.0%}]"


def _estimated(statistic: Callable[[Tensor], float], values: Float[Tensor, " n"]) -> dict[str, float | None]:
    estimate = bootstrap(statistic, values, repeats=_REPEATS)
    return {name: value if math.isfinite(value) else None for name, value in estimate._asdict().items()}
