"""GptConfig, the shape of a G.pt."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_common.fields import Checked, Gt, OneOf

from triptych_gpt.symmetry.spec import PermutationSpec


@dataclass(frozen=True)
class MetricScale:
    """The range and quantiles by which a metric is scaled before it becomes tokens, in the metric's own units."""

    low: float
    high: float
    knots: tuple[float, ...]  # ascending quantiles of the training checkpoints, with equal shares of them in between

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"metric scale from {self.low} to {self.high}: expected an ascending, finite range")
        if len(self.knots) < 2 or not all(a < b for a, b in zip(self.knots, self.knots[1:], strict=False)):
            raise ValueError(f"metric scale with knots {self.knots}: expected at least two, strictly ascending")

    @classmethod
    def of(cls, metrics: Float[Tensor, "..."], knots: int = 33) -> "MetricScale":
        """The scale of training checkpoints' metrics. Raises ValueError for metrics that are not finite, or all equal."""
        values = metrics.detach().flatten().double()
        if not len(values) or not values.isfinite().all() or values.min() == values.max():
            raise ValueError(f"{len(values)} metrics: no range can be taken; expected finite ones, not all equal")
        ascending, levels = values.sort().values, torch.linspace(0, 1, knots, dtype=torch.float64)
        positions = levels * (len(ascending) - 1)
        below = positions.floor().long().clamp(max=len(ascending) - 2)
        # By hand: torch.quantile refuses more than 16 million values.
        quantiles = torch.lerp(ascending[below], ascending[below + 1], positions - below).tolist()
        # Close knots are merged: a metric may take few distinct values, or crowd at its bound.
        least = (quantiles[-1] - quantiles[0]) * 1e-4
        distinct = quantiles[:1]
        for value in quantiles[1:-1]:
            if value - distinct[-1] > least and quantiles[-1] - value > least:
                distinct.append(value)
        return cls(quantiles[0], quantiles[-1], (*distinct, quantiles[-1]))


@dataclass(frozen=True)
class GptConfig(Checked):
    """Shape of a G.pt.  [thesis 3.2.2]"""

    symmetry: PermutationSpec
    """parameters of the networks it reads and writes, and which of their axes permute"""
    tokenizer: Annotated[str, OneOf(("layer", "chunk", "neuron"))] = "neuron"
    """a token for each parameter tensor (published), chunk of one (released models), or hidden unit"""
    chunk_size: int | None = None
    """most parameters of a token (chunk only)"""
    width: Annotated[int, Gt(0)] = 256
    """hidden size of the transformer"""
    depth: Annotated[int, Gt(0)] = 4
    """number of transformer blocks"""
    num_heads: Annotated[int, Gt(0)] = 4
    """attention heads; width must be a multiple"""
    edge_width: Annotated[int, Gt(0)] = 32
    """channels of a weight between two hidden units (neuron only; networks of one hidden layer have none)"""
    scalars: Annotated[str, OneOf(("raw", "normalised"))] = "normalised"
    """metrics and timestep embedded as they are, by 128 frequencies over 14 octaves (released), or scaled first"""
    num_frequencies: Annotated[int, Gt(0)] = 32
    """frequencies of a normalised scalar"""
    octaves: Annotated[float, Gt(0)] = 8.0
    """range of these frequencies; the lowest is a quarter of a wave over the metric's range"""
    metric_factor: Annotated[float, Gt(0)] = 1.0
    """multiplies raw metrics: the released error models were trained on per cent, our errors are fractions"""
    metric_scale: MetricScale | None = None
    """scale of normalised metrics, from the training data"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}; change one of them")
        if self.tokenizer == "chunk" and not (self.chunk_size and self.chunk_size > 0):
            raise ValueError(f"chunk_size {self.chunk_size}: chunk tokens need one above 0, such as {self.width}")
        if self.tokenizer != "chunk" and self.chunk_size is not None:
            raise ValueError(f"chunk_size {self.chunk_size}: {self.tokenizer} tokens have none; leave it out")
        if self.scalars == "normalised" and self.metric_factor != 1:
            problem = "normalised metrics have their own scale; leave it at 1, or use raw scalars"
            raise ValueError(f"metric_factor {self.metric_factor}: {problem}")

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        scale = self.metric_scale and {**vars(self.metric_scale), "knots": list(self.metric_scale.knots)}
        return {**vars(self), "symmetry": self.symmetry.to_json(), "metric_scale": scale}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "GptConfig":
        """The inverse of `to_json`. Raises ValueError for anything else."""
        try:
            symmetry, scale = PermutationSpec.from_json(content["symmetry"]), content["metric_scale"]
            scale = scale and MetricScale(scale["low"], scale["high"], tuple(scale["knots"]))
            return cls(**{**content, "symmetry": symmetry, "metric_scale": scale})
        except (KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"not the config of a G.pt ({reason}); make or fetch the file again") from error
