"""GptConfig, the shape of a G.pt."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_common.fields import Checked, Gt, OneOf

from triptych_gpt.symmetry.spec import PermutationSpec

TOKENIZERS = ("layer", "chunk", "neuron")
SCALARS = ("raw", "normalised")


@dataclass(frozen=True)
class MetricScale:
    """What a metric's values are measured against before they become tokens, in the metric's own units.

    low, high: range in training. knots: ascending quantiles of the training checkpoints; they resolve the end where most of them
    are, such as low losses. At equal levels, so that equal shares lie between neighbours, but where some were merged.
    """

    low: float
    high: float
    knots: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "knots", tuple(self.knots))
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"metric scale from {self.low} to {self.high}: expected an ascending, finite range")
        if len(self.knots) < 2 or not all(a < b for a, b in zip(self.knots, self.knots[1:], strict=False)):
            raise ValueError(f"metric scale with knots {self.knots}: expected at least two, strictly ascending")

    @classmethod
    def of(cls, metrics: Float[Tensor, "..."], knots: int = 33) -> "MetricScale":
        """The scale of training checkpoints' metrics. Knots closer than 1/10,000 of the range are merged: a metric may take
        few distinct values, or crowd at its bound. More than an equal share then lies about the one that is kept.

        Raises ValueError for metrics that are not finite, or all the same.
        """
        values = metrics.detach().flatten().double()
        if not len(values) or not values.isfinite().all() or values.min() == values.max():
            raise ValueError(
                f"{len(values)} metrics, of which no range can be taken: expected finite ones, not all alike"
            )
        ascending, levels = values.sort().values, torch.linspace(0, 1, knots, dtype=torch.float64)
        positions = levels * (len(ascending) - 1)
        below = positions.floor().long().clamp(max=len(ascending) - 2)
        quantiles = torch.lerp(ascending[below], ascending[below + 1], positions - below).tolist()
        least = (quantiles[-1] - quantiles[0]) * 1e-4
        kept = quantiles[:1]
        for value in quantiles[1:-1]:
            if value - kept[-1] > least and quantiles[-1] - value > least:
                kept.append(value)
        return cls(quantiles[0], quantiles[-1], (*kept, quantiles[-1]))


@dataclass(frozen=True)
class GptConfig(Checked):
    """Shape of a G.pt.  [thesis 3.2.2]"""

    symmetry: PermutationSpec
    """parameters of the networks it reads and writes, and which of their axes permute"""
    tokenizer: Annotated[str, OneOf(TOKENIZERS)] = "neuron"
    """a token a parameter tensor (thesis), a chunk of one (released models), or a hidden unit"""
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
    scalars: Annotated[str, OneOf(SCALARS)] = "normalised"
    """metrics and timestep by 128 frequencies over 14 octaves as they are (released), or scaled first"""
    num_frequencies: Annotated[int, Gt(0)] = 32
    """frequencies of a normalised scalar"""
    octaves: Annotated[float, Gt(0)] = 8.0
    """over how many octaves they lie, the lowest a quarter of a wave over the range"""
    metric_factor: Annotated[float, Gt(0)] = 1.0
    """multiplies raw metrics: the released error models were trained on per cent, our errors are fractions"""
    metric_scale: MetricScale | None = None
    """what normalised metrics are measured against; taken from training data"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}; change one of them")
        if self.tokenizer == "chunk" and not (self.chunk_size and self.chunk_size > 0):
            raise ValueError(f"chunk_size {self.chunk_size}: chunk tokens need one above 0, such as {self.width}")
        if self.tokenizer != "chunk" and self.chunk_size is not None:
            raise ValueError(f"chunk_size {self.chunk_size}: {self.tokenizer} tokens have none; leave it out")
        if self.scalars == "normalised" and self.metric_factor != 1:
            raise ValueError(
                f"metric_factor {self.metric_factor}: normalised metrics have their own scale; leave it at 1, or use raw scalars"
            )

    def to_json(self) -> dict[str, Any]:
        """All fields, JSON-able; what `from_json` reads."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        scale = self.metric_scale and {**asdict(self.metric_scale), "knots": list(self.metric_scale.knots)}
        return {**content, "symmetry": self.symmetry.to_json(), "metric_scale": scale}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "GptConfig":
        """The config that `to_json` described. Raises ValueError for anything else."""
        try:
            symmetry, scale = PermutationSpec.from_json(content["symmetry"]), content["metric_scale"]
            if scale is not None:
                scale = MetricScale(**{**scale, "knots": tuple(scale["knots"])})
            return cls(**{**content, "symmetry": symmetry, "metric_scale": scale})
        except (KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"not the config of a G.pt ({reason}); make or fetch the file again") from error
