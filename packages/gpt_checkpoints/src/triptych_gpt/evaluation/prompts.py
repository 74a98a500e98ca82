"""What to prompt for: a task's own prompts, or those that follow from what training checkpoints scored."""

from collections.abc import Sequence
from dataclasses import replace

from triptych_gpt.tasks.task import Metric, Prompts


def with_prompts(name: str, metrics: Sequence[Metric], trained_best: float | int) -> Metric:
    """The metric of this name; where the task names no prompts, asking for the best means the best of training checkpoints, and
    a sweep reaches to a network's own value.

    Raises ValueError where the task does not score it.
    """
    known = {metric.name: metric for metric in metrics}
    if name not in known:
        raise ValueError(f"metric {name!r}: the task scores {', '.join(known)}; choose one of these")
    metric = known[name]
    return metric if metric.prompts is not None else replace(metric, prompts=Prompts(trained_best, trained_best))
