"""Zoos of neural-network checkpoints, and generative models of them (thesis, chapter 3)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych_gpt.config import GptConfig
    from triptych_gpt.interop import load_released
    from triptych_gpt.layout import ParameterLayout
    from triptych_gpt.model import Gpt
    from triptych_gpt.presets import PRESETS
    from triptych_gpt.prompting import Answer, prompt
    from triptych_gpt.symmetry.derivation import Residual, derive
    from triptych_gpt.symmetry.matching import canonicalise
    from triptych_gpt.symmetry.spec import Axis, PermutationSpec
    from triptych_gpt.tasks import TASKS, SupervisedTask, Task, open_task
    from triptych_gpt.trained import SamplerSettings, TrainedGpt, load
    from triptych_gpt.zoo.pairs import Pairs
    from triptych_gpt.zoo.zoo import Zoo

_HOMES = {  # imported when first asked for: torch alone takes seconds, and --help needs none of it
    "PRESETS": "presets", "GptConfig": "config", "load_released": "interop", "Gpt": "model", "Answer": "prompting",
    "prompt": "prompting", "SamplerSettings": "trained", "TrainedGpt": "trained", "load": "trained",
    "TASKS": "tasks", "Axis": "symmetry.spec", "Pairs": "zoo.pairs", "ParameterLayout": "layout",
    "PermutationSpec": "symmetry.spec",
    "Residual": "symmetry.derivation",
    "SupervisedTask": "tasks", "Task": "tasks", "Zoo": "zoo.zoo", "canonicalise": "symmetry.matching",
    "derive": "symmetry.derivation", "open_task": "tasks",
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
