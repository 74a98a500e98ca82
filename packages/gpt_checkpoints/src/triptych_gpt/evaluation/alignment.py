"""Prompt sweeps and prompt alignment: R^2 between prompts and achieved values.  [thesis 3.4.4]"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate, bootstrap

from triptych_gpt.evaluation.prompted import Update, prompted, starting_metrics
from triptych_gpt.tasks.task import Metric, Task
from triptych_gpt.zoo.zoo import Zoo


@dataclass(frozen=True)
class Sweep:
    """Prompts of one metric for each network, and every metric that its updates achieved.  [thesis Fig. 3.5]"""

    metric: str
    better: str
    prompts: Float[Tensor, "networks prompts"]  # from the best to the worst
    achieved: Mapping[str, Float[Tensor, "networks prompts"]]  # NaN if an update is not finite
    start: Mapping[str, Float[Tensor, " networks"]]  # before the update
    trained_best: Mapping[str, float]  # of the training checkpoints, where known


def prompt_sweep(
    update: Update,
    task: Task,
    metric: Metric,
    theta: Float[Tensor, "networks D"],
    *,
    prompts: int = 20,
    trained_best: Mapping[str, float] | None = None,
    networks_at_once: int = 256,
    first_index: int = 0,
) -> Sweep:
    """One update of each network to each of `prompts` values, evenly spaced over the range that the metric declares.

    first_index: prompt j of network i samples with the noise of index first_index + i * prompts + j.
    Raises ValueError if a network's worst prompt is no worse than the best, or for a metric without prompts or a NaN network.
    """
    if metric.prompts is None:
        raise ValueError(f"metric {metric.name} has no prompts of its own; give it a best and a worst one")
    if prompts < 2:
        raise ValueError(f"prompts {prompts}: expected at least 2, from the best to the worst")
    start = starting_metrics(task, theta, metric, networks_at_once=networks_at_once)
    targets = swept(metric, start[metric.name], metric.prompts.best, metric.prompts.worst, prompts)
    before, indices = start[metric.name].repeat_interleave(prompts), range(first_index, first_index + targets.numel())
    repeated = theta.repeat_interleave(prompts, dim=0)  # prompts of a network side by side
    updated = prompted(update, task, repeated, before, targets.flatten(), indices, networks_at_once=networks_at_once)
    achieved = {name: values.view(targets.shape) for name, values in updated.metrics.items()}
    return Sweep(metric.name, metric.better, targets, achieved, start, dict(trained_best or {}))


def swept(
    metric: Metric, start: Float[Tensor, " networks"], best: float, worst_fraction: float, prompts: int
) -> Float[Tensor, "networks prompts"]:
    """Prompts in float64 from `best` to worst_fraction x the metric that each network starts from.

    Raises ValueError if a network's worst prompt would be no worse than the best.
    """
    worst = start.double() * worst_fraction
    room = worst - best if metric.better == "lower" else best - worst
    if not (room > 0).all():
        network = int((~(room > 0)).nonzero()[0])
        own = f"{worst_fraction:g} x its {metric.name} of {float(start[network]):.4g}"
        remedy = "give untrained networks or another best prompt"
        raise ValueError(f"network {network}: {own} is no worse than the best prompt {best:g}; {remedy}")
    return best + (worst - best)[:, None] * torch.linspace(0, 1, prompts, dtype=torch.float64)


def trained_best(zoo: Zoo, rows: Int[np.ndarray, " runs"]) -> dict[str, float]:
    """The best value of every metric over the checkpoints of the runs at these rows."""
    best, chosen = dict[str, float](), torch.as_tensor(rows)
    for name, better in zoo.better.items():
        values = zoo.metrics(name)[chosen]
        values = values[values.isfinite()]
        best[name] = float(values.min() if better == "lower" else values.max())
    return best


@dataclass(frozen=True)
class Alignment:
    """Prompt alignment: R^2 between a network's prompts and achieved values, averaged over networks.  [thesis 3.4.4]

    1 if every prompt is achieved exactly; about -2.7 for the identity, prompted from 0 to a network's own metric. Intervals are
    95%, by bootstrap over networks. An update that is not finite counts as its network's worst value in the sweep, see `filled`.
    """

    metric: str
    better: str
    networks: int
    prompts: int
    r2: Estimate
    r2_median: float
    # over prompts no better than the best training checkpoint; None if that is unknown or there are fewer than two
    r2_reachable: Estimate | None
    r2_each: tuple[float, ...]  # of every network
    spearman: float  # rank correlation of prompts and achieved values, averaged over networks; 0 for constant values
    mean_gap: float  # mean of |achieved - prompt|
    non_finite: int  # updates, of networks x prompts
    prompt_range: tuple[float, float]  # lowest and highest
    achieved_at_best: Estimate  # value achieved with the best prompt, mean over networks


def prompt_alignment(
    update: Update, task: Task, metric: Metric, theta: Float[Tensor, "networks D"], **options: Any
) -> Alignment:
    """Prompt alignment of an update on networks; takes the options of `prompt_sweep` and raises what it raises."""
    return alignment_of(prompt_sweep(update, task, metric, theta, **options))


def alignment_of(sweep: Sweep) -> Alignment:
    """How well a sweep's achieved values follow its prompts."""
    prompts, achieved = sweep.prompts, filled(sweep)
    r2 = r_squared(prompts, achieved)
    return Alignment(
        metric=sweep.metric,
        better=sweep.better,
        networks=len(prompts),
        prompts=prompts.shape[1],
        r2=_average(r2),
        r2_median=float(r2.quantile(0.5)),
        r2_reachable=_reachable(sweep, achieved),
        r2_each=tuple(r2.tolist()),
        spearman=_spearman(prompts, achieved),
        mean_gap=float((achieved - prompts).abs().mean()),
        non_finite=int(sweep.achieved[sweep.metric].isnan().sum()),
        prompt_range=(float(prompts.min()), float(prompts.max())),
        achieved_at_best=_average(achieved[:, 0]),
    )


def r_squared(
    prompts: Float[Tensor, "networks prompts"],
    achieved: Float[Tensor, "networks prompts"],
    counted: Bool[Tensor, "networks prompts"] | None = None,
) -> Float[Tensor, " networks"]:
    """1 - sum (achieved - prompt)^2 / sum (prompt - mean prompt)^2 of every network, over the prompts counted.

    NaN for a network with fewer than two different prompts.
    """
    weight = torch.ones_like(prompts) if counted is None else counted.to(prompts)
    mean = (weight * prompts).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    residual = (weight * (achieved - prompts).square()).sum(1)
    total = (weight * (prompts - mean).square()).sum(1)
    return torch.where(total > 0, 1 - residual / total, torch.nan)


def filled(sweep: Sweep) -> Float[Tensor, "networks prompts"]:
    """Achieved values of the prompted metric, those that are not finite replaced by the network's worst, its start included."""
    achieved, start = sweep.achieved[sweep.metric], sweep.start[sweep.metric][:, None]
    seen = torch.where(achieved.isnan(), start, achieved)
    worst = torch.maximum(seen, start).amax(1) if sweep.better == "lower" else torch.minimum(seen, start).amin(1)
    return torch.where(achieved.isnan(), worst[:, None], achieved)


def _reachable(sweep: Sweep, achieved: Float[Tensor, "networks prompts"]) -> Estimate | None:
    limit = sweep.trained_best.get(sweep.metric)
    if limit is None:
        return None
    within = sweep.prompts >= limit if sweep.better == "lower" else sweep.prompts <= limit
    r2 = r_squared(sweep.prompts, achieved, within)
    r2 = r2[~r2.isnan()]
    return _average(r2) if len(r2) else None


def _average(values: Float[Tensor, " n"]) -> Estimate:
    return bootstrap(lambda some: float(some.mean()), values, repeats=1000 if len(values) > 1 else 0)


def _spearman(prompts: Float[Tensor, "networks prompts"], achieved: Float[Tensor, "networks prompts"]) -> float:
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(values.numpy(), axis=1)) for values in (prompts, achieved)]
    a, b = (values - values.mean(1, keepdim=True) for values in ranks)
    spread = a.norm(dim=1) * b.norm(dim=1)
    return float(torch.where(spread > 0, (a * b).sum(1) / spread.clamp(min=1e-30), 0.0).mean())


class Quality(NamedTuple):
    """Prompt alignment of a model's updates with one sampler at one number of model evaluations."""

    sampler: str
    model_evaluations: int
    alignment: Alignment


def quality_against_steps(
    updates: Mapping[tuple[str, int], Update],
    task: Task,
    metric: Metric,
    theta: Float[Tensor, "networks D"],
    **options: Any,
) -> list[Quality]:
    """Prompt alignment of each update, on the same networks with the same prompts and noise.

    updates: by sampler and model evaluations for one update. options are `prompt_sweep`'s. Returned by sampler in the order
    given, fewest evaluations first.
    """
    samplers = list(dict.fromkeys(sampler for sampler, _ in updates))
    order = sorted(updates, key=lambda key: (samplers.index(key[0]), key[1]))
    return [Quality(*key, prompt_alignment(updates[key], task, metric, theta, **options)) for key in order]
