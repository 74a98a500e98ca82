"""Diversity of samples: distances between networks, raw and with hidden units matched.  [thesis 3.4.5]"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_gpt.evaluation.prompted import Update, prompted, starting_metrics
from triptych_gpt.evaluation.records import plain
from triptych_gpt.symmetry.matching import canonicalise
from triptych_gpt.symmetry.spec import PermutationSpec
from triptych_gpt.tasks.task import Metric, Task


class Spread(NamedTuple):
    """Mean Euclidean distance over pairs of networks: as they are, and with one's hidden units matched to the other's."""

    raw: float
    matched: float


@dataclass(frozen=True)
class Diversity:
    """How far samples lie apart for one prompt.

    noise: those of one start that differ in sampling noise, averaged over starts. starts: those of different starts, one each.
    before: the starting networks themselves. metric_mean: what all samples achieve. non_finite samples are left out.
    """

    metric: str
    prompt: float | int
    noise: Spread
    starts: Spread
    before: Spread
    metric_mean: float
    non_finite: int

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, {"raw", "matched"} for each spread: JSON-able."""
        return plain(self)


def spread(spec: PermutationSpec, thetas: Float[Tensor, "n D"]) -> Spread:
    """Mean distances over all pairs of networks; NaN for fewer than two.

    Raises ValueError for networks that are not finite.
    """
    thetas = thetas.detach().to("cpu", torch.float64)
    raw, matched = [], []
    for i in range(1, len(thetas)):
        raw.append((thetas[:i] - thetas[i]).norm(dim=1))
        matched.append((canonicalise(spec, thetas[:i], thetas[i]) - thetas[i]).norm(dim=1))
    return Spread(_mean(raw), _mean(matched))


def diversity(
    update: Update,
    task: Task,
    metric: Metric,
    theta: Float[Tensor, "starts D"],
    *,
    prompt: float | int | None = None,
    samples: int = 16,
    networks_at_once: int = 256,
    first_index: int = 0,
) -> Diversity:
    """Draw `samples` updates of every start towards one prompt (the metric's best where left out), and compare them.

    Sample j of start i draws the noise of index first_index + i * samples + j. Raises ValueError for a metric without prompts, or
    starts that are not finite.
    """
    prompt = low_prompt(metric, prompt)
    start = starting_metrics(task, theta, metric, networks_at_once=networks_at_once)[metric.name]
    count = len(theta) * samples
    target = torch.full((count,), float(prompt), dtype=torch.float64)
    indices = range(first_index, first_index + count)
    repeated = theta.repeat_interleave(samples, dim=0)
    at_once = {"networks_at_once": networks_at_once}
    new = prompted(update, task, repeated, start.repeat_interleave(samples), target, indices, **at_once)
    values, usable = new.metrics[metric.name].view(len(theta), samples), new.theta.isfinite().all(dim=1).cpu()
    groups, usable = new.theta.detach().cpu().view(len(theta), samples, -1), usable.view(len(theta), samples)
    of_each = [spread(task.symmetry, group[kept]) for group, kept in zip(groups, usable, strict=True)]
    firsts = [group[kept][0] for group, kept in zip(groups, usable, strict=True) if kept.any()]
    return Diversity(
        metric=metric.name,
        prompt=prompt,
        noise=Spread(*(float(torch.tensor(one, dtype=torch.float64).nanmean()) for one in zip(*of_each, strict=True))),
        starts=spread(task.symmetry, torch.stack(firsts)) if firsts else Spread(torch.nan, torch.nan),
        before=spread(task.symmetry, theta),
        metric_mean=float(values.nanmean()),
        non_finite=int((~usable).sum()),
    )


def low_prompt(metric: Metric, prompt: float | int | None) -> float | int:
    """The prompt given, or the metric's best. Raises ValueError where there is neither."""
    if prompt is None and metric.prompts is None:
        raise ValueError(f"metric {metric.name} has no prompts of its own; give a prompt")
    return metric.prompts.best if prompt is None else prompt


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).mean()) if parts else torch.nan
