"""The memorisation audit: are generated networks new, or training networks with their units reordered and a little noise?

Distances are to the nearest training network under the best matching of hidden units. They are compared with those of held-out
runs, which no model saw, and of trivial ways to make networks out of training networks of the same metric: noise on their
weights, averages of several, plain retrieval.
Source: Zeng et al., "Generalization or Memorization? Evaluating generative models of weights" (arXiv 2506.07998).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from triptych_common import randomness
from triptych_common.metrics.bootstrap import Estimate, bootstrap, bootstrap_rate

from triptych_gpt.evaluation.baselines import nearest_in_metric, nearest_in_runs
from triptych_gpt.nearest import Nearest, Pool, nearest
from triptych_gpt.symmetry.matching import canonicalise
from triptych_gpt.symmetry.spec import PermutationSpec
from triptych_gpt.tasks.supervised import SupervisedTask
from triptych_gpt.tasks.task import Task
from triptych_gpt.zoo.zoo import Zoo

SAMPLES, HELD_OUT, HELD_OUT_FINALS = "samples", "held-out at the prompt's metric", "held-out finals"
COPY_SIGMA = 0.1  # noise in normalised units, up to which a training network still counts as a copy
MARGIN = 0.02  # share of a baseline's metric by which samples may be worse and still count as no worse
_REPEATS = 200
SIGMAS = (0.05, COPY_SIGMA)  # of noise, in normalised units
AVERAGED = (2, 4)  # training networks averaged


@dataclass(frozen=True)
class Group:
    """Networks of one origin, each with its nearest training network under matching of units."""

    name: str
    nearest: Nearest
    final_distance: Float[Tensor, " n"]  # to the nearest final checkpoint
    norm: Float[Tensor, " n"]  # Euclidean, of the networks themselves
    metrics: dict[str, Float[Tensor, " n"]]
    # Share of test items that a network and its nearest classify alike; None for a task without classes.
    agreement: Float[Tensor, " n"] | None = None
    # Of the items that either gets wrong, the share that both get wrong.
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


@dataclass(frozen=True)
class Audit:
    """Every group of networks, the samples first, and the verdict of their comparison, a sentence for each result."""

    metric: str
    better: str
    searched: str
    memorised: bool
    verdict: tuple[str, ...]
    groups: tuple[Group, ...]

    def group(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "verdict": list(self.verdict), "groups": [group.as_dict() for group in self.groups]}


def audit(
    samples: Float[Tensor, "n D"],
    zoo: Zoo,
    task: Task,
    metric: str,
    targets: Float[Tensor, " n"],
    scale: float,
    *,
    seed: int = 0,
    every: int = 1,
    rows: Int[np.ndarray, " training"] | None = None,
) -> Audit:
    """Compare generated networks, prompted for `targets`, with the training networks of a zoo.

    samples: unnormalised; scale: normalised parameters over unnormalised ones. There are as many baselines and held-out networks as
    samples, each for the same target. every: search only every k-th training checkpoint, counted back from the final one. rows: of
    the runs that the model was trained on, by default all training runs.

    Raises ValueError for samples that do not fit the zoo or are not finite, an unknown metric, or a zoo without a test split.
    """
    # Intervals take networks to be independent: samples should come from different initial networks. Held-out runs of one cohort
    # share their minibatches, which makes intervals somewhat optimistic.
    samples, targets = samples.detach().cpu().float(), targets.detach().cpu().double()
    if len(targets) != len(samples):
        raise ValueError(f"{len(targets)} targets for {len(samples)} samples; give one for each")
    if not scale > 0:
        raise ValueError(f"scale {scale}: expected a number above 0, normalised units to one raw unit")
    training = zoo.runs_in("train") if rows is None else rows
    networks = {SAMPLES: samples, **held_out(zoo, metric, targets)}
    networks |= made_of_training(zoo, task.symmetry, metric, targets, scale, seed, training)
    retrieved = nearest_in_metric(zoo, metric, targets, rows=training)
    pool, finals = Pool.of(zoo, training, every), Pool.of(zoo, training, zoo.checkpoints)
    near = _nearest_of_each(networks, pool, task.symmetry)
    # A training network is its own nearest one: there is nothing to search for.
    networks["retrieval"] = zoo.theta(*retrieved)
    numbers = torch.from_numpy(zoo.runs.run)[retrieved.rows]
    near.append(Nearest(torch.zeros(len(samples), dtype=torch.float64), numbers, retrieved.checkpoints))
    near_finals = _nearest_of_each(networks, finals, task.symmetry)
    groups = tuple(
        _group(name, theta, zoo, task, *found)
        for (name, theta), *found in zip(networks.items(), near, near_finals, strict=True)
    )
    better = zoo.better[metric]
    memorised, lines = verdict(groups, metric, better, seed)
    searched = f"{len(pool):,} checkpoints of {len(training):,} training runs"
    if every > 1:
        searched += f", every {every}th of each run: nearest distances may be smaller"
    if not near[0].exact:
        searched += "; matched by coordinate ascent on a shortlist: distances are upper bounds"
    return Audit(metric, better, searched, memorised, tuple(lines), groups)


def held_out(zoo: Zoo, metric: str, targets: Float[Tensor, " n"]) -> dict[str, Float[Tensor, "_ D"]]:
    """Networks of test runs: final ones, one of each run, and those whose metric is nearest to each target, taking runs in turn."""
    rows = torch.from_numpy(zoo.runs_in("test"))
    finals, in_turn = rows[: len(targets)], rows[torch.arange(len(targets)) % len(rows)]
    theta = zoo.theta(finals, [zoo.checkpoints - 1] * len(finals))
    return {HELD_OUT_FINALS: theta, HELD_OUT: zoo.theta(in_turn, nearest_in_runs(zoo, in_turn, metric, targets))}


def made_of_training(
    zoo: Zoo, spec: PermutationSpec, metric: str, targets: Float[Tensor, " n"], scale: float, seed: int,
    rows: Int[np.ndarray, " training"],
) -> dict[str, Float[Tensor, "n D"]]:  # fmt: skip
    """Training networks of randomly sampled runs, each run's nearest in metric to the target: noised, or averaged."""
    training = torch.as_tensor(rows)
    made, numbers = {}, range(len(targets))
    for sigma in SIGMAS:
        noise = randomness.normal(seed, f"audit noise {sigma}", numbers, (zoo.layout.size,))
        base = _drawn(zoo, training, metric, targets, 1, seed, f"audit noised {sigma}")[:, 0]
        made[f"noised {sigma}"] = base + noise * (sigma / scale)
    for count in AVERAGED:
        several = _drawn(zoo, training, metric, targets, count, seed, f"audit averaged {count}")
        matched = [torch.cat([each[:1], canonicalise(spec, each[1:], each[0], seed)]) for each in several]
        made[f"mean of {count}"] = torch.stack(matched).mean(1)
    return made


def _drawn(
    zoo: Zoo, training: Int[Tensor, " r"], metric: str, targets: Float[Tensor, " n"], count: int, seed: int, stream: str
) -> Float[Tensor, "n count D"]:
    """For each target, checkpoints of `count` different training runs."""
    if len(training) < count:
        raise ValueError(f"{zoo.path}: {len(training)} training runs, the audit averages {count}; collect more")
    orders = [randomness.permutation(seed, stream, i, len(training)) for i in range(len(targets))]
    rows = torch.cat([training[order[:count]] for order in orders])
    checkpoints = nearest_in_runs(zoo, rows, metric, targets.repeat_interleave(count))
    return zoo.theta(rows, checkpoints).unflatten(0, (-1, count))


def _nearest_of_each(networks: dict[str, Float[Tensor, "_ D"]], pool: Pool, spec: PermutationSpec) -> list[Nearest]:
    """The search for every group, as one: the pool is read once."""
    found = nearest(torch.cat(list(networks.values())), pool, spec)
    sizes = [len(theta) for theta in networks.values()]
    parts = (values.split(sizes) for values in (found.distance, found.run, found.checkpoint))
    return [Nearest(distance, run, checkpoint, found.exact) for distance, run, checkpoint in zip(*parts, strict=True)]


def _group(name: str, theta: Float[Tensor, "n D"], zoo: Zoo, task: Task, found: Nearest, finals: Nearest) -> Group:
    agreement, overlap = None, None
    truth = task.items["test"].targets if isinstance(task, SupervisedTask) else None
    if isinstance(task, SupervisedTask) and truth is not None and truth.ndim == 1 and not truth.is_floating_point():
        rows = [zoo.row_of(run) for run in found.run.tolist()]
        ours, theirs = predictions(task, theta), predictions(task, zoo.theta(rows, found.checkpoint))
        agreement, overlap = (ours == theirs).double().mean(1), error_overlap(ours, theirs, truth)
    metrics = {name: values.double() for name, values in task.evaluate(theta).items()}
    return Group(name, found, finals.distance, theta.double().norm(dim=1), metrics, agreement, overlap)


def predictions(task: SupervisedTask, theta: Float[Tensor, "n D"]) -> Int[Tensor, "n items"]:
    """The class that each network gives each test item."""
    items = task.items["test"].to(theta.device, theta.dtype)
    at_once = max(1, (1 << 24) // (task.stack.widest(items.inputs[:1]) * len(items.inputs)))
    with torch.no_grad():
        scores = (task.stack(task.layout.unflatten(some), items.inputs) for some in theta.split(at_once))
        return torch.cat([each.argmax(-1) for each in scores])


def error_overlap(
    ours: Int[Tensor, "n items"], theirs: Int[Tensor, "n items"], truth: Int[Tensor, " items"]
) -> Float[Tensor, " n"]:
    """Items that both networks get wrong over items that either gets wrong (intersection over union); 1 where neither errs."""
    wrong, also = ours != truth, theirs != truth
    either = (wrong | also).sum(1)
    return torch.where(either > 0, (wrong & also).sum(1).double() / either.clamp(min=1), 1.0)


def verdict(groups: tuple[Group, ...], metric: str, better: str, seed: int = 0) -> tuple[bool, list[str]]:
    """Whether significantly more samples than held-out networks are copies, and every result as a sentence.

    A sample is a copy if it is no farther from a training network than 95% of training networks with noise of COPY_SIGMA are.
    The samples beat a baseline if they are farther from training networks, and better or at most MARGIN of its metric worse; if an
    interval leaves that open, so does the sentence. Held-out networks are compared in the same way.
    """
    by_name = {group.name: group for group in groups}
    samples = by_name[SAMPLES]
    threshold = by_name[f"noised {COPY_SIGMA}"].distance.quantile(0.95)
    copies = bootstrap_rate(samples.distance <= threshold, seed=seed)
    false_alarms = bootstrap_rate(by_name[HELD_OUT].distance <= threshold, seed=seed)
    more = _excess(copies, false_alarms)
    memorised = _ends(more)[0] > 0
    lines = [
        f"{'Memorised' if memorised else 'Copies'}: {_percent(copies)} of {len(samples.distance):,} samples are as near to a "
        f"training network as one with noise of {COPY_SIGMA} (distance {threshold:.3g}), {_percent(false_alarms)} of held-out "
        f"networks; difference {_percent(more)}."
    ]
    lines += [_against_held_out(samples, by_name[name], seed) for name in (HELD_OUT_FINALS, HELD_OUT)]
    # A blurred network has a smaller norm, and so is nearer to all others without copying any.
    lines += _shrunken(samples, by_name[HELD_OUT_FINALS], seed)
    sign = -1.0 if better == "lower" else 1.0
    baselines = [group for group in groups if group.name not in (SAMPLES, HELD_OUT, HELD_OUT_FINALS)]
    return memorised, lines + [_against(samples, by_name[HELD_OUT], group, metric, sign, seed) for group in baselines]


def _against_held_out(samples: Group, held_out: Group, seed: int) -> str:
    difference = bootstrap(_median_difference, samples.distance, held_out.distance, repeats=_REPEATS, seed=seed)
    low, high = _ends(difference)
    finding = "no smaller than" if low >= 0 else "smaller than" if high < 0 else "not shown to differ from"
    text = (
        f"The samples' median distance to training networks, {_median(samples.distance):.3g}, is {finding} that of "
        f"{held_out.name}, {_median(held_out.distance):.3g} (difference {difference})"
    )
    if samples.agreement is not None and held_out.agreement is not None:
        ours, theirs = float(samples.agreement.mean()), float(held_out.agreement.mean())
        text += f"; they agree with their nearest in {ours:.1%} of predictions, against {theirs:.1%}"
    return text + "."


def _excess(rate: Estimate, other: Estimate) -> Estimate:
    """The difference of two independent rates, the margins of their intervals added in quadrature (Newcombe 1998, method 10)."""
    # Resampling has no spread for 3 of 3 and 0 of 3, so that their difference would be certain.
    value, (low, high), (other_low, other_high) = rate.value - other.value, _ends(rate), _ends(other)
    below = math.hypot(rate.value - low, other_high - other.value)
    return Estimate(value, value - below, value + math.hypot(high - rate.value, other.value - other_low))


def _ends(estimate: Estimate) -> tuple[float, float]:
    """The ends of an estimate's interval, which every one of an audit has."""
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def _shrunken(samples: Group, held_out: Group, seed: int) -> list[str]:
    """A sentence if the samples are clearly smaller than real networks."""
    difference = bootstrap(_median_difference, samples.norm, held_out.norm, repeats=_REPEATS, seed=seed)
    if not _ends(difference)[1] < 0:
        return []
    return [
        f"The samples are shrunken: their median norm, {_median(samples.norm):.3g}, is below that of {held_out.name}, "
        f"{_median(held_out.norm):.3g} (difference {difference}); smaller networks are nearer to all others, copied or not."
    ]


def _against(samples: Group, held_out: Group, baseline: Group, metric: str, sign: float, seed: int) -> str:
    word, reasons = _compared(samples, baseline, metric, sign, seed)
    reference, _ = _compared(held_out, baseline, metric, sign, seed)
    return f"{word} {baseline.name}: {reasons}. By this measure {held_out.name}: {reference.lower()} it."


def _compared(group: Group, baseline: Group, metric: str, sign: float, seed: int) -> tuple[str, str]:
    farther = bootstrap(_median_difference, group.distance, baseline.distance, repeats=_REPEATS, seed=seed)
    ours, theirs = group.metrics[metric], baseline.metrics[metric]
    gain = bootstrap(lambda a, b: _mean(a) - _mean(b), ours * sign, theirs * sign, repeats=_REPEATS, seed=seed)
    (low, high), (gain_low, gain_high) = _ends(farther), _ends(gain)
    novel = "farther from" if low > 0 else "nearer to" if high < 0 else "about as far from"
    no_worse = gain_low >= -MARGIN * abs(_mean(theirs))
    fit = "worse" if gain_high < 0 else "not shown to differ"
    if no_worse:
        fit = "better" if gain_low > 0 else f"no worse by more than {MARGIN:.0%}"
    word = "Undecided against"
    if not math.isfinite(gain.value):
        fit = "undefined for some networks"
    elif high < 0 or (gain_high < 0 and not no_worse):
        word = "Does not beat"
    elif low > 0 and no_worse:
        word = "Beats"
    reasons = (
        f"{novel} training networks (median {_median(group.distance):.3g} against {_median(baseline.distance):.3g}, "
        f"difference {farther}), {metric} {fit} ({float(ours.mean()):.4g} against {float(theirs.mean()):.4g})"
    )
    return word, reasons


def _median(values: Tensor) -> float:
    # Between the two in the middle, of which median() returns the lower; quantile() takes five times as long.
    return float(values.median() - (-values).median()) / 2


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _median_difference(a: Tensor, b: Tensor) -> float:
    return _median(a) - _median(b)


def _percent(rate: Estimate) -> str:
    return f"{rate.value:.0%} [{rate.low:.0%}, {rate.high:.0%}]"


def _estimated(statistic: Callable[[Tensor], float], values: Float[Tensor, " n"]) -> dict[str, float | None]:
    estimate = bootstrap(statistic, values, repeats=_REPEATS)
    return {name: value if math.isfinite(value) else None for name, value in estimate._asdict().items()}
