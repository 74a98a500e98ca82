"""Zoos of neural-network checkpoints, and generative models of them (thesis, chapter 3)."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych_gpt.config import PRESETS, GptConfig
    from triptych_gpt.derive import Residual, derive
    from triptych_gpt.interop import load_released
    from triptych_gpt.layout import ParameterLayout
    from triptych_gpt.matching import canonicalise
    from triptych_gpt.model import Gpt
    from triptych_gpt.prompt import Answer, prompt
    from triptych_gpt.symmetry import Axis, PermutationSpec
    from triptych_gpt.tasks import TASKS, SupervisedTask, Task, open_task
    from triptych_gpt.trained import SamplerSettings, TrainedGpt, load
    from triptych_gpt.zoo.pairs import Pairs
    from triptych_gpt.zoo.zoo import Zoo

_HOMES = {  # imported when first asked for: torch alone takes seconds, and --help needs none of it
    "PRESETS": "config", "GptConfig": "config", "load_released": "interop", "Gpt": "model", "Answer": "prompt",
    "prompt": "prompt", "SamplerSettings": "trained", "TrainedGpt": "trained", "load": "trained",
    "TASKS": "tasks", "Axis": "symmetry", "Pairs": "zoo.pairs", "ParameterLayout": "layout", "PermutationSpec": "symmetry",
    "Residual": "derive", "SupervisedTask": "tasks", "Task": "tasks", "Zoo": "zoo.zoo", "canonicalise": "matching",
    "derive": "derive", "open_task": "tasks",
}  # fmt: skip

__all__ = [
    "PRESETS",
    "TASKS",
    "Answer",
    "Axis",
    "Gpt",
    "GptConfig",
    "Pairs",
    "ParameterLayout",
    "PermutationSpec",
    "Residual",
    "SamplerSettings",
    "SupervisedTask",
    "Task",
    "TrainedGpt",
    "Zoo",
    "canonicalise",
    "derive",
    "load",
    "load_released",
    "open_task",
    "prompt",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


class _Package(ModuleType):
    """Importing a submodule binds its name here: `prompt` and `derive` shall stay the functions of modules so called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
