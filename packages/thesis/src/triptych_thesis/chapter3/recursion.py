"""Recursive prompting of networks from initialisers that the zoo does not have.  [thesis 3.4.3, Fig. 3.6]"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_gpt.evaluation.prompted import Update, advanced, starting_metrics
from triptych_gpt.evaluation.records import plain
from triptych_gpt.tasks.task import Metric, Task


@dataclass(frozen=True)
class Curve:
    """Networks of one initialiser after 0, 1, ..., K updates: every metric, and mean and standard error of the prompted one.

    rejected: updates that gave a network that is not finite; it stays as it was before such an update, and goes on from there.
    updates_to_reach: how many updates bring the mean within the margin of the known initialiser's first; None: more than K.
    """

    metrics: Mapping[str, Float[Tensor, "networks updates"]]
    mean: Float[Tensor, " updates"]
    standard_error: Float[Tensor, " updates"]
    rejected: int
    updates_to_reach: int | None


@dataclass(frozen=True)
class Recursion:
    """Curves by initialiser, `known` the zoo's own, whose mean after one update is `one_update`.

    within: the margin that `updates_to_reach` grants, as a fraction of `one_update`.
    """

    metric: str
    better: str
    prompt: float | int
    known: str
    one_update: float
    within: float | int
    curves: Mapping[str, Curve]

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, tensors as lists: JSON-able."""
        return plain(self)


def new_networks(
    task: Task, seed: int, networks: int, initialisers: Sequence[str] | None = None
) -> dict[str, Float[Tensor, "networks D"]]:
    """Networks of every initialiser of the task, its own first; unseen where `seed` is not the zoo's.  [thesis 3.4.3]"""
    return {name: task.initial(seed, range(networks), name) for name in initialisers or task.initialisers}


def recursive_prompting(
    update: Update,
    task: Task,
    metric: Metric,
    starts: Mapping[str, Float[Tensor, "networks D"]],
    *,
    known: str = "default",
    updates: int = 10,
    prompt: float | int | None = None,
    within: float | int = 0.1,
    networks_at_once: int = 256,
    first_index: int = 0,
) -> Recursion:
    """Prompt each network `updates` times, from its last result and the metric that this has.

    starts: networks by initialiser, those of `known`, which the update was trained on, among them. prompt: the metric's own for
    recursion where left out. Update k = 0, 1, ... of network i draws the noise of index first_index + k * networks + i, whatever
    its initialiser. Raises ValueError for starts without `known`, a metric without prompts, or networks that are not finite.
    """
    if known not in starts:
        raise ValueError(f"initialiser {known!r}: not among {', '.join(starts)}; its first update is the reference")
    if updates < 1:
        raise ValueError(f"updates {updates}: expected at least 1")
    if prompt is None and metric.prompts is None:
        raise ValueError(f"metric {metric.name} has no prompts of its own; give a prompt")
    prompt = metric.prompts.recursive if prompt is None else prompt
    options = {"networks_at_once": networks_at_once, "first_index": first_index}
    followed = {
        name: _follow(update, task, metric, theta, updates, prompt, **options) for name, theta in starts.items()
    }
    one_update = float(followed[known][0][metric.name][:, 1].mean())
    curves = {
        name: _curve(metric, metrics, rejected, one_update, within) for name, (metrics, rejected) in followed.items()
    }
    return Recursion(metric.name, metric.better, prompt, known, one_update, within, curves)


def _follow(
    update: Update,
    task: Task,
    metric: Metric,
    theta: Float[Tensor, "networks D"],
    updates: int,
    prompt: float | int,
    *,
    networks_at_once: int,
    first_index: int,
) -> tuple[dict[str, Float[Tensor, "networks updates"]], int]:
    """Every metric after 0 .. updates updates, and how many updates were rejected."""
    current = starting_metrics(task, theta, metric, networks_at_once=networks_at_once)
    history, rejected, networks = [current], 0, len(theta)
    for number in range(updates):
        first = first_index + number * networks
        indices = range(first, first + networks)
        theta, current, usable = advanced(
            update, task, theta, current, metric.name, prompt, indices, networks_at_once=networks_at_once
        )
        history.append(current)
        rejected += int((~usable).sum())
    return {name: torch.stack([one[name] for one in history], dim=1) for name in current}, rejected


def _curve(
    metric: Metric,
    metrics: Mapping[str, Float[Tensor, "networks updates"]],
    rejected: int,
    one_update: float,
    within: float | int,
) -> Curve:
    values = metrics[metric.name]
    mean = values.mean(0)
    error = values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.full_like(mean, torch.nan)
    behind = mean - one_update if metric.better == "lower" else one_update - mean
    reached = (behind <= within * abs(one_update)).nonzero()
    return Curve(metrics, mean, error, rejected, int(reached[0]) if len(reached) else None)
