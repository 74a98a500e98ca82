"""Labelled items in memory: what supervised tasks train and score networks on."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Items:
    """One part of a data set, in memory.

    Raises ValueError for inputs that are not floating-point, or not as many as targets.
    """

    inputs: Float[Tensor, "items *shape"]
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets) or not len(self.inputs):
            raise ValueError(
                f"{len(self.inputs)} inputs and {len(self.targets)} targets: expected as many, at least one"
            )
        if not self.inputs.is_floating_point():
            raise ValueError(f"inputs of {self.inputs.dtype}: expected floating-point, normalised; use .float()")

    def spread(self, count: int) -> "Items":
        """Items spread evenly over all, `count` at most."""
        count = min(count, len(self.inputs))
        chosen = torch.arange(count) * len(self.inputs) // count
        return Items(self.inputs[chosen], self.targets[chosen])

    def to(self, device: torch.device, dtype: torch.dtype) -> "Items":
        return Items(self.inputs.to(device, dtype), self.targets.to(device))
