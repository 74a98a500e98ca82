"""Prompt sweeps: what one update achieves of every prompt, from the best down to a random network's.  [thesis Fig. 3.5]"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from triptych_gpt.evaluation.prompted import prompted, starting_metrics
from triptych_gpt.evaluation.records import plain
from triptych_gpt.evaluation.update import Update
from triptych_gpt.tasks.task import Metric, Task
from triptych_gpt.zoo.zoo import Zoo


@dataclass(frozen=True)
class Sweep:
    """A curve for each network: prompts of one metric, and every metric that its updates then had.

    achieved is NaN where an update gave a network that is not finite. start: metrics before the update. trained_best: the best
    of each metric among the training checkpoints, where known. Prompts run from the best to the worst.
    """

    metric: str
    better: str
    prompts: Float[Tensor, "networks prompts"]
    achieved: Mapping[str, Float[Tensor, "networks prompts"]]
    start: Mapping[str, Float[Tensor, " networks"]]
    trained_best: Mapping[str, float | int]

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, tensors as lists of rows, None where not finite: JSON-able."""
        return plain(self)


def prompt_sweep(
    update: Update,
    task: Task,
    metric: Metric,
    theta: Float[Tensor, "networks D"],
    *,
    best: float | int | None = None,
    worst_fraction: float | int | None = None,
    prompts: int = 20,
    trained_best: Mapping[str, float | int] | None = None,
    networks_at_once: int = 256,
    first_index: int = 0,
) -> Sweep:
    """Ask for `prompts` values at equal distances from `best` to worst_fraction x each network's own metric, in one update each.

    best and worst_fraction are the metric's own `prompts` where left out. Prompt j of network i draws the noise of index
    first_index + i * prompts + j. Raises ValueError where there is nothing between the two, for a metric without prompts, and
    for networks that are not finite.
    """
    best, worst_fraction = _ends(metric, best, worst_fraction)
    if prompts < 2:
        raise ValueError(f"prompts {prompts}: expected at least 2, from the best to the worst")
    start = starting_metrics(task, theta, metric, networks_at_once=networks_at_once)
    asked = swept(metric, start[metric.name], best, worst_fraction, prompts)
    updated = prompted(
        update,
        task,
        theta.repeat_interleave(prompts, dim=0),
        start[metric.name].repeat_interleave(prompts),
        asked.flatten(),
        range(first_index, first_index + asked.numel()),
        networks_at_once=networks_at_once,
    )
    achieved = {name: values.view(asked.shape) for name, values in updated.metrics.items()}
    return Sweep(metric.name, metric.better, asked, achieved, start, dict(trained_best or {}))


def swept(
    metric: Metric, start: Float[Tensor, " networks"], best: float | int, worst_fraction: float | int, prompts: int
) -> Float[Tensor, "networks prompts"]:
    """Prompts for networks that start from these metrics, float64; where higher is better they fall from `best`.

    Raises ValueError where a network's worst prompt would be no worse than the best.
    """
    worst = start.double() * worst_fraction
    room = worst - best if metric.better == "lower" else best - worst
    if not (room > 0).all():
        network = int((~(room > 0)).nonzero()[0])
        raise ValueError(
            f"network {network}: {worst_fraction:g} x its {metric.name} of {float(start[network]):.4g} is no worse than the best "
            f"prompt {best:g}; give untrained networks or another best prompt"
        )
    return best + (worst - best)[:, None] * torch.linspace(0, 1, prompts, dtype=torch.float64)


def trained_best(zoo: Zoo, split: str = "train", rows: Int[np.ndarray, " runs"] | None = None) -> dict[str, float]:
    """The best value of every metric among the checkpoints of a split, or of the runs at `rows` alone."""
    best, rows = {}, torch.as_tensor(zoo.runs_in(split) if rows is None else rows)
    for name, better in zoo.better.items():
        values = zoo.metrics(name)[rows]
        values = values[values.isfinite()]
        best[name] = float(values.min() if better == "lower" else values.max())
    return best


def _ends(
    metric: Metric, best: float | int | None, worst_fraction: float | int | None
) -> tuple[float | int, float | int]:
    if metric.prompts is None and (best is None or worst_fraction is None):
        raise ValueError(f"metric {metric.name} has no prompts of its own; give best and worst_fraction")
    best = metric.prompts.best if best is None else best
    return best, metric.prompts.worst if worst_fraction is None else worst_fraction
