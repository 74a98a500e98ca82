"""What a task is: networks that are trained in many runs, and the metrics their checkpoints are scored by.

A task need not be supervised. All it promises is a layout of theta, its symmetry, metrics, initial networks, cohorts of
training runs and scores; how it trains is its own affair.
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
    """Which values of a metric to ask a generative model for.  [thesis 3.4]

    best: what one-step prompting asks for; recursive: what recursive prompting asks for; worst: the largest (smallest, where
    higher is better) value of a sweep, as a fraction of a random network's.
    """

    best: float
    recursive: float
    worst: float = 1.0


@dataclass(frozen=True)
class Metric:
    """A number that scores a network, and which way is better."""

    name: str
    better: Literal["lower", "higher"]
    prompts: Prompts | None = None
    meaning: str = ""


@dataclass(frozen=True)
class Cohort:
    """A unit of work: consecutive runs that are trained together, lie in one shard and never in two splits.

    number: of the cohort; its runs share minibatches unless `shared_batches` is off. Everything a run does is a function of
    (seed, run), and of the cohort's number where minibatches are shared: how many networks are trained at once changes rounding
    only. early: half of the checkpoints between the first and the last crowd the beginning of a run, where metrics change fast.
    """

    seed: int
    number: int
    runs: range
    checkpoints: int = 200
    initialiser: str = "default"
    shared_batches: bool = True
    early: bool = False


@dataclass(frozen=True)
class Trajectories:
    """Checkpoints of some runs: `steps` optimiser steps after the start of each.

    metrics holds what is measured while training, for each checkpoint: beyond `Task.metrics`, or in place of some of them where
    scoring theta alone cannot give them.
    """

    theta: Float[Tensor, "runs checkpoints D"]
    steps: Int[Tensor, "runs checkpoints"]
    metrics: Mapping[str, Float[Tensor, "runs checkpoints"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Speed:
    """What a short measurement says: the best number of networks to train at once, and what a run then takes."""

    networks_at_once: int
    seconds_per_run: float
    seconds_per_score: float  # of one checkpoint


class _Nominal(type(Protocol)):  # type: ignore[misc]
    """A class that inherits from the protocol is an instance of it: Python 3.11 would read its properties, and so load its data."""

    def __instancecheck__(cls, instance: object) -> bool:
        return cls in type(instance).__mro__ or super().__instancecheck__(instance)


@runtime_checkable
class Task(Protocol, metaclass=_Nominal):
    """What collecting, training and scoring ask of a task."""

    name: str

    @property
    def layout(self) -> ParameterLayout:
        """Order of the parameters in theta."""
        ...

    @property
    def symmetry(self) -> PermutationSpec:
        """Permutations of theta that leave the network's function as it is."""
        ...

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What `evaluate` scores, the one to prompt for first."""
        ...

    @property
    def initialisers(self) -> tuple[str, ...]:
        """Ways to draw a network before training, the task's own first."""
        ...

    @property
    def steps(self) -> int:
        """Optimiser steps of a run."""
        ...

    def recipe(self) -> dict[str, Any]:
        """Everything that decides what a run is, JSON-able: two zoos of one recipe are the same zoo."""
        ...

    def settings(self) -> dict[str, Any]:
        """What the index notes of every run: the optimiser's settings."""
        ...

    def initial(self, seed: int, runs: Sequence[int], initialiser: str = "default") -> Float[Tensor, "runs D"]:
        """Networks before training, float32 on the CPU; a function of (seed, run) and the initialiser alone."""
        ...

    def train_cohort(self, cohort: Cohort, device: torch.device, networks_at_once: int) -> Trajectories:
        """Train the cohort's runs; returns their checkpoints on the CPU."""
        ...

    def evaluate(self, theta: Float[Tensor, "n D"]) -> dict[str, Float[Tensor, " n"]]:
        """Every metric of some networks, scored on theta's device."""
        ...

    def measure(self, device: torch.device, cohort_runs: int, shared_batches: bool = True) -> Speed:
        """How fast this machine trains and scores, `cohort_runs` networks at once at most."""
        ...
