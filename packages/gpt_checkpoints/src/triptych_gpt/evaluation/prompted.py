"""One update of networks towards a prompt, by a model or by a baseline, and the metrics of the networks it gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from triptych_gpt.tasks.task import Metric, Prompts, Task

Update = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]
"""(theta [n, D], metric [n], target [n], indices) -> theta_star [n, D]: one update of each network from its metric towards the
prompted one, in unnormalised parameters. A sample's noise follows from its index, not from its place in the batch."""


def with_prompts(name: str, metrics: Sequence[Metric], trained_best: float) -> Metric:
    """The metric of this name, with prompts. If the task declares none, the best prompt is the training checkpoints' best value,
    and a sweep ends at a network's own value.

    Raises ValueError if the task does not score it.
    """
    known = {metric.name: metric for metric in metrics}
    if name not in known:
        raise ValueError(f"metric {name!r}: the task scores {', '.join(known)}; choose one of these")
    metric = known[name]
    return metric if metric.prompts is not None else replace(metric, prompts=Prompts(trained_best, trained_best))


class Updated(NamedTuple):
    """Networks after one update, on the device they came from, and every metric of the task, as `measured`."""

    theta: Float[Tensor, "n D"]
    metrics: Mapping[str, Float[Tensor, " n"]]


def prompted(
    update: Update,
    task: Task,
    theta: Float[Tensor, "n D"],
    metric: Float[Tensor, " n"],
    target: Float[Tensor, " n"],
    indices: Sequence[int],
    *,
    networks_at_once: int = 256,
) -> Updated:
    """One update of each network from its metric towards a target, and the metrics of the updated networks.

    indices: of the samples, from which their noise follows. networks_at_once: batch size, which changes rounding only.
    Raises ValueError for an update that does not return one network for each.
    """
    metric, target = (values.to(theta.device, theta.dtype) for values in (metric, target))
    batches = [slice(at, at + networks_at_once) for at in range(0, len(theta), networks_at_once)]
    updated = [update(theta[some], metric[some], target[some], list(indices[some])) for some in batches]
    theta_star = torch.cat(updated)
    if theta_star.shape != theta.shape:
        shapes = f"{tuple(theta_star.shape)} for {tuple(theta.shape)}"
        raise ValueError(f"an update gave networks of shape {shapes}; expected one for each")
    return Updated(theta_star, measured(task, theta_star, networks_at_once=networks_at_once))


class Advanced(NamedTuple):
    """Networks after one more update, and every metric; those whose update is not `usable` (on the CPU) are as before."""

    theta: Float[Tensor, "n D"]
    metrics: Mapping[str, Float[Tensor, " n"]]
    usable: Bool[Tensor, " n"]


def advanced(
    update: Update,
    task: Task,
    theta: Float[Tensor, "n D"],
    metrics: Mapping[str, Float[Tensor, " n"]],
    metric: str,
    prompt: float,
    indices: Sequence[int],
    *,
    networks_at_once: int = 256,
) -> Advanced:
    """One step of recursive prompting, every network with the same prompt.  [thesis 3.4.3]

    A network whose update is not finite, or has no finite metric, stays as it is.
    """
    target = torch.full((len(theta),), float(prompt), dtype=torch.float64)
    new = prompted(update, task, theta, metrics[metric], target, indices, networks_at_once=networks_at_once)
    usable = ~new.metrics[metric].isnan()
    metrics = {name: torch.where(usable, values, metrics[name]) for name, values in new.metrics.items()}
    return Advanced(torch.where(usable.to(theta.device)[:, None], new.theta, theta), metrics, usable)


def measured(task: Task, theta: Float[Tensor, "n D"], *, networks_at_once: int = 256) -> dict[str, Float[Tensor, " n"]]:
    """Every metric of the networks, float64 on the CPU; NaN for those with entries that are not finite."""
    metrics = {metric.name: torch.full((len(theta),), torch.nan, dtype=torch.float64) for metric in task.metrics}
    # Networks that are not finite are not run: a classifier of NaNs would get the error of chance.
    finite = theta.isfinite().all(dim=1).nonzero()[:, 0]
    for rows in finite.split(networks_at_once):
        for name, values in task.evaluate(theta[rows]).items():
            metrics[name][rows.cpu()] = values.to("cpu", torch.float64)
    for values in metrics.values():
        values[~values.isfinite()] = torch.nan
    return metrics


def starting_metrics(
    task: Task, theta: Float[Tensor, "n D"], metric: Metric, *, networks_at_once: int = 256
) -> dict[str, Float[Tensor, " n"]]:
    """Every metric of networks before their update.

    Raises ValueError for a metric that the task does not score, and for networks that are not finite or score nothing finite.
    """
    known = [scored.name for scored in task.metrics]
    if metric.name not in known:
        raise ValueError(f"metric {metric.name!r}: task {task.name} scores {', '.join(known)}; give one of its metrics")
    metrics = measured(task, theta, networks_at_once=networks_at_once)
    bad = metrics[metric.name].isnan().nonzero()
    if len(bad):
        raise ValueError(f"network {int(bad[0])}: its {metric.name} is not finite; give networks of finite weights")
    return metrics
