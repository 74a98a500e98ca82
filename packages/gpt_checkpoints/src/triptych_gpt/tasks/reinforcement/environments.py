"""What training needs of environments: many of them, for many policies, stepped at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from triptych_gpt.tasks.task import Nominal


@dataclass(frozen=True)
class Continuous:
    """Actions of real numbers, [policies, size, environments]; the environment clips them to its bounds."""

    size: int


@dataclass(frozen=True)
class Discrete:
    """Actions 0 .. choices-1, [policies, 1, environments]."""

    choices: int


Actions = Continuous | Discrete


class Step(NamedTuple):
    """What a step returns.

    final: what is observed in the state that the action led to; `observation` differs from it where the next episode has begun.
    """

    observation: Float[Tensor, "policies observations environments"]
    reward: Float[Tensor, "policies environments"]
    terminated: Bool[Tensor, "policies environments"]
    truncated: Bool[Tensor, "policies environments"]  # stopped by its time limit, not terminated
    final: Float[Tensor, "policies observations environments"]


@runtime_checkable
class Environments(Protocol):
    """Environments [policies, environments], which start the next episode by themselves."""

    def reset(self) -> Step:
        """Start every episode; the reward is that of its first state, if it has one."""

    def step(self, actions: Tensor) -> Step:
        """Take an action in each."""

    def keep(self, rows: Tensor) -> None:
        """Go on with the environments of these policies alone."""

    def close(self) -> None:
        """Free what they hold."""


@runtime_checkable
class World(Protocol, metaclass=Nominal):
    """A kind of environment."""

    @property
    def observations(self) -> int:
        """Numbers in an observation."""

    @property
    def actions(self) -> Actions:
        """What an action is."""

    @property
    def max_steps(self) -> int:
        """Steps of an evaluated episode, at most."""

    def training(
        self, seed: int, runs: Sequence[int], environments: int, device: torch.device, dtype: torch.dtype
    ) -> Environments:
        """Environments for each run, a function of (seed, run)."""

    def evaluation(self, networks: int, episodes: int, device: torch.device, dtype: torch.dtype) -> Environments:
        """The same episodes for each network."""

    def describe(self) -> dict[str, Any]:
        """Everything that decides what the environments are, JSON-able."""
