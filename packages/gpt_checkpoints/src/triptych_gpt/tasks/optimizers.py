"""Elementwise optimisers, which therefore train a stack of networks as if each were alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from math import cos, pi
from typing import Any, Literal

import torch
from torch import Tensor

ELEMENTWISE_OPTIMIZERS = (
    "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
)  # fmt: skip


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimiser of `torch.optim` by name, its keyword arguments, and the schedule of its learning rate.

    schedule: "cosine" multiplies the rate of epoch e of E by (1 + cos(pi e / E)) / 2, as in the released recipes.
    Raises ValueError for an optimiser that mixes networks, such as LBFGS.
    """

    name: str = "SGD"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        if self.name not in ELEMENTWISE_OPTIMIZERS:
            raise ValueError(f"optimizer {self.name!r}: expected one of {', '.join(ELEMENTWISE_OPTIMIZERS)}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule {self.schedule!r}: expected cosine or constant")
        known = signature(getattr(torch.optim, self.name)).parameters
        unknown = [name for name in self.arguments if name not in known or name == "params"]
        if unknown or "lr" not in self.arguments:
            problem = f"unknown {unknown[0]!r}" if unknown else "lr is missing; give it"
            raise ValueError(f"arguments of {self.name}: {problem}")
        if not (isinstance(self.arguments["lr"], float | int) and self.arguments["lr"] > 0):
            raise ValueError(f"arguments of {self.name}: lr {self.arguments['lr']!r}; expected a number above 0")

    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of some parameters, fused if possible. Raises ValueError for arguments that it refuses."""
        kind = getattr(torch.optim, self.name)
        chosen = {"fused", "foreach", "differentiable"} & self.arguments.keys()
        fused = {"fused": True} if "fused" in signature(kind).parameters and not chosen else {}
        try:  # not in __post_init__, since the first optimiser of a process takes seconds of imports
            return kind(list(parameters), **self.arguments, **fused)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"arguments of {self.name}: {error}") from error

    def rate(self, epoch: int, epochs: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        factor = 0.5 * (1 + cos(pi * epoch / epochs)) if self.schedule == "cosine" else 1.0
        return float(self.arguments["lr"]) * factor


def momentum_sgd(lr: float = 0.1, weight_decay: float = 5e-4) -> OptimizerSettings:
    """SGD with Nesterov momentum 0.9 and cosine annealing: what trained the networks of the thesis.  [thesis 3.3]"""
    arguments = {"lr": lr, "momentum": 0.9, "nesterov": True, "weight_decay": weight_decay}
    return OptimizerSettings("SGD", arguments, "cosine")
