"""What a task is: networks that are trained in many runs, and the metrics that score their checkpoints.

A task need not be supervised: how it trains is its own affair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.symmetry.spec import PermutationSpec


@dataclass(frozen=True)
class Prompts:
    """Which values of a metric to prompt a generative model with.  [thesis 3.4]"""

    best: float  # for one update
    recursive: float  # for recursive updates
    worst: float = 1.0  # end of a sweep, as a fraction of a random network's value


@dataclass(frozen=True)
class Metric:
    """A number that scores a network, and which way is better."""

    name: str
    better: Literal["lower", "higher"]
    prompts: Prompts | None = None
    meaning: str = ""


@dataclass(frozen=True)
class Cohort:
    """A unit of work: consecutive runs that are trained together, and lie in one shard and one split.

    Everything in a run is a function of (seed, run), and of the cohort's number if minibatches are shared; how many networks are
    trained at once changes rounding only.
    """

    seed: int
    number: int
    runs: range
    checkpoints: int = 200
    initialiser: str = "default"
    shared_batches: bool = True
    # Half of the inner checkpoints are then mostly from the beginning of a run, where metrics change fast.
    early: bool = False


@dataclass(frozen=True)
class Trajectories:
    """Checkpoints of some runs, `steps` optimiser steps after the start of each.

    metrics: measured during training, besides `Task.metrics`, or in place of those that theta alone does not determine.
    """

    theta: Float[Tensor, "runs checkpoints D"]
    steps: Int[Tensor, "runs checkpoints"]
    metrics: Mapping[str, Float[Tensor, "runs checkpoints"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Speed:
    """Result of a short measurement: the best number of networks to train at once, and what a run then takes."""

    networks_at_once: int
    seconds_per_run: float
    seconds_per_score: float  # of one checkpoint


class Nominal(type(Protocol)):  # type: ignore[misc]
    """Makes instances of a class that inherits from the protocol instances of it without a look at their attributes."""

    # Python 3.11 would read a task's properties, and so load its data.

    def __instancecheck__(cls, instance: object) -> bool:
        return cls in type(instance).__mro__ or super().__instancecheck__(instance)


@runtime_checkable
class Task(Protocol, metaclass=Nominal):
    """What collecting, training and scoring need of a task."""

    name: str

    @property
    def layout(self) -> ParameterLayout:
        """Order of the parameters in theta."""

    @property
    def symmetry(self) -> PermutationSpec:
        """Permutations of theta that leave the network's function as it is."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What `evaluate` scores, the metric to prompt for first."""

    @property
    def initialisers(self) -> tuple[str, ...]:
        """Names of ways to initialise a network, the task's own first."""

    @property
    def steps(self) -> int:
        """Optimiser steps of a run, or other units that checkpoints are taken between."""

    def recipe(self) -> dict[str, Any]:
        """Everything that decides what a run is, JSON-able: zoos of one recipe are the same zoo."""

    def settings(self) -> dict[str, Any]:
        """Settings of every run for the index, such as the optimiser's."""

    def initial(self, seed: int, runs: Sequence[int], initialiser: str = "default") -> Float[Tensor, "runs D"]:
        """Networks before training, float32 on the CPU; a function of (seed, run) and the initialiser alone."""

    def train_cohort(self, cohort: Cohort, device: torch.device, networks_at_once: int) -> Trajectories:
        """Train the cohort's runs; returns their checkpoints on the CPU."""

    def evaluate(self, theta: Float[Tensor, "n D"]) -> Mapping[str, Float[Tensor, " n"]]:
        """Every metric of some networks, scored on theta's device."""

    def measure(self, device: torch.device, cohort_runs: int, shared_batches: bool = True) -> Speed:
        """How fast this machine trains and scores, `cohort_runs` networks at once at most."""
