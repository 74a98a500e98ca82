"""Prompt alignment: how well an update obeys, as R^2 between prompts and achieved values.  [thesis 3.4.4]"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate, bootstrap

from triptych_gpt.evaluation.records import plain
from triptych_gpt.evaluation.sweep import Sweep, prompt_sweep
from triptych_gpt.evaluation.update import Update
from triptych_gpt.tasks.task import Metric, Task


@dataclass(frozen=True)
class Alignment:
    """R^2 over prompts of one network, averaged over networks, and what else tells whether prompts are obeyed.

    1 is perfect obedience; the identity, asked for 0 to its own metric, scores about -2.7. Intervals are 95%, by bootstrap over
    networks. An update that is not finite counts as the worst value that its network has in the sweep, before or after updates.
    """

    metric: str
    better: str
    networks: int
    prompts: int
    r2: Estimate
    r2_median: float
    r2_reachable: (
        Estimate | None
    )  # over prompts no better than the best training checkpoint; None: not known, or fewer than two
    r2_each: tuple[float, ...]  # of every network
    spearman: (
        float  # rank correlation of prompt and achieved value, averaged over networks; 0 for one that never changes
    )
    mean_gap: float  # mean of |achieved - prompt|
    non_finite: int  # updates, of networks x prompts
    prompt_range: tuple[float, float]  # lowest and highest
    achieved_at_best: Estimate  # mean over networks of what the best prompt gave

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, estimates as {"value", "low", "high"}: JSON-able."""
        return plain(self)


def prompt_alignment(
    update: Update, task: Task, metric: Metric, theta: Float[Tensor, "networks D"], **options: Any
) -> Alignment:
    """Prompt alignment of an update on (unseen) networks; options are `prompt_sweep`'s, and so is what it raises."""
    return alignment_of(prompt_sweep(update, task, metric, theta, **options))


def alignment_of(sweep: Sweep, *, repeats: int = 1000, seed: int = 0) -> Alignment:
    """How well a sweep's achieved values follow its prompts; `repeats` bootstrap samples of its networks."""
    prompts = sweep.prompts
    achieved = filled(sweep)
    r2 = r_squared(prompts, achieved)
    return Alignment(
        metric=sweep.metric,
        better=sweep.better,
        networks=len(prompts),
        prompts=prompts.shape[1],
        r2=_average(r2, repeats, seed),
        r2_median=float(r2.quantile(0.5)),
        r2_reachable=_reachable(sweep, achieved, repeats, seed),
        r2_each=tuple(r2.tolist()),
        spearman=_spearman(prompts, achieved),
        mean_gap=float((achieved - prompts).abs().mean()),
        non_finite=int(sweep.achieved[sweep.metric].isnan().sum()),
        prompt_range=(float(prompts.min()), float(prompts.max())),
        achieved_at_best=_average(achieved[:, 0], repeats, seed),
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
    """Achieved values of the prompted metric; the worst that the network has, its start included, where one is not finite."""
    achieved, start = sweep.achieved[sweep.metric], sweep.start[sweep.metric][:, None]
    seen = torch.where(achieved.isnan(), start, achieved)
    worst = torch.maximum(seen, start).amax(1) if sweep.better == "lower" else torch.minimum(seen, start).amin(1)
    return torch.where(achieved.isnan(), worst[:, None], achieved)


def _reachable(sweep: Sweep, achieved: Float[Tensor, "networks prompts"], repeats: int, seed: int) -> Estimate | None:
    limit = sweep.trained_best.get(sweep.metric)
    if limit is None:
        return None
    within = sweep.prompts >= limit if sweep.better == "lower" else sweep.prompts <= limit
    r2 = r_squared(sweep.prompts, achieved, within)
    r2 = r2[~r2.isnan()]
    return _average(r2, repeats, seed) if len(r2) else None


def _average(values: Float[Tensor, " n"], repeats: int, seed: int) -> Estimate:
    return bootstrap(lambda some: float(some.mean()), values, repeats=repeats if len(values) > 1 else 0, seed=seed)


def _spearman(prompts: Float[Tensor, "networks prompts"], achieved: Float[Tensor, "networks prompts"]) -> float:
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(values.numpy(), axis=1)) for values in (prompts, achieved)]
    a, b = (values - values.mean(1, keepdim=True) for values in ranks)
    spread = a.norm(dim=1) * b.norm(dim=1)
    return float(torch.where(spread > 0, (a * b).sum(1) / spread.clamp(min=1e-30), 0.0).mean())
