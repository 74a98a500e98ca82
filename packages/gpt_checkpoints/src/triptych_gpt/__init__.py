"""Zoos of neural-network checkpoints, and generative models of them (thesis, chapter 3)."""

from triptych_gpt.derive import Residual, derive
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.matching import canonicalise
from triptych_gpt.symmetry import Axis, PermutationSpec
from triptych_gpt.tasks import TASKS, SupervisedTask, Task, open_task
from triptych_gpt.zoo.pairs import Pairs
from triptych_gpt.zoo.zoo import Zoo

__all__ = [
    "TASKS",
    "Axis",
    "Pairs",
    "ParameterLayout",
    "PermutationSpec",
    "Residual",
    "SupervisedTask",
    "Task",
    "Zoo",
    "canonicalise",
    "derive",
    "open_task",
]
