"""Tasks: what networks are trained to do, and how. `open_task` finds one by name, or in a file of the user's."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych_gpt.tasks.measures import cross_entropy, zero_one
    from triptych_gpt.tasks.optimizers import OptimizerSettings, momentum_sgd
    from triptych_gpt.tasks.registry import TASKS, open_task
    from triptych_gpt.tasks.supervised import Items, Score, SupervisedTask, classification
    from triptych_gpt.tasks.task import Cohort, Metric, Prompts, Speed, Task, Trajectories

_HOMES = {  # imported when first used: a model is trained without the networks of any task but its own
    "measures": ("cross_entropy", "zero_one"),
    "optimizers": ("OptimizerSettings", "momentum_sgd"),
    "registry": ("TASKS", "open_task"),
    "supervised": ("Items", "Score", "SupervisedTask", "classification"),
    "task": ("Cohort", "Metric", "Prompts", "Speed", "Task", "Trajectories"),
}

__all__ = [
    "TASKS",
    "Cohort",
    "Items",
    "Metric",
    "OptimizerSettings",
    "Prompts",
    "Score",
    "Speed",
    "SupervisedTask",
    "Task",
    "Trajectories",
    "classification",
    "cross_entropy",
    "momentum_sgd",
    "open_task",
    "zero_one",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
