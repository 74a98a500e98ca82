"""The task of checkpoints that came without one: networks known by their parameters alone, which nobody here can run."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, cast

import torch
from jaxtyping import Float
from torch import Tensor

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.symmetry.spec import PermutationSpec
from triptych_gpt.tasks.task import Cohort, Metric, Speed, Task, Trajectories


class UnknownTask(Task):
    """A layout and the metrics that a zoo records. Its symmetry is unknown, so that no units are permuted.

    Raises ValueError where networks would have to be initialised, trained or scored.
    """

    name = "none"
    initialisers: tuple[str, ...] = ()
    steps = 0

    def __init__(self, layout: ParameterLayout, better: Mapping[str, str]) -> None:
        self._layout, self._better = layout, dict(better)

    @property
    def layout(self) -> ParameterLayout:
        return self._layout

    @property
    def symmetry(self) -> PermutationSpec:
        return PermutationSpec(self.layout, {name: (None,) * len(shape) for name, shape in self.layout.shapes.items()})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(Metric(name, cast(Literal["lower", "higher"], way)) for name, way in self._better.items())

    def recipe(self) -> dict[str, Any]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {}

    def initial(self, seed: int, runs: Sequence[int], initialiser: str = "default") -> Float[Tensor, "runs D"]:
        self._refuse("initialised")

    def train_cohort(self, cohort: Cohort, device: torch.device, networks_at_once: int) -> Trajectories:
        self._refuse("trained")

    def evaluate(self, theta: Float[Tensor, "n D"]) -> dict[str, Float[Tensor, " n"]]:
        self._refuse("scored")

    def measure(self, device: torch.device, cohort_runs: int, shared_batches: bool = True) -> Speed:
        self._refuse("trained")

    def _refuse(self, what: str) -> NoReturn:
        problem = f"these checkpoints came without a task, so that networks cannot be {what}"
        raise ValueError(f"{problem}; give --task file.py:NAME (and --validation-every 0 trains without scoring)")
