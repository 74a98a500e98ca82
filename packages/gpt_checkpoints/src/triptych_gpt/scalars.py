"""Tokens of the numbers a G.pt is told: timestep, change of metric, metric wished for, metric at the start."""

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from triptych_gpt.config import GptConfig, MetricScale

TOKENS = {"raw": 4, "normalised": 2}
RAW_FREQUENCIES, RAW_OCTAVES = 128, 14.0


class ScalarTokens(nn.Module):
    """Timestep, target - metric, target and metric, in the released order.  [thesis 3.2.2]

    Raw: a token each, every scalar x as [sin(f x), cos(f x), x] for 128 frequencies f from 1 to 2^14, t counting 0..999.
    Normalised: a token of t / 1000, and one of the metrics, which are told on two scales: from -1 to 1 linearly over the training
    range, and by the place they have among the scale's knots, which is their quantile among training checkpoints where no knots
    were merged; the change is the difference on each. Beyond the range the linear scale goes on and the place stays at its end.
    Frequencies then begin at pi / 4. Two tokens fewer are an eighth fewer products for a network of ten units.

    Raises ValueError for normalised scalars without a metric scale.
    """

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        if config.scalars == "normalised" and config.metric_scale is None:
            raise ValueError(
                "normalised scalars need a metric_scale: give MetricScale.of(training metrics), or scalars='raw'"
            )
        self.config = config
        told = (1, 1, 1, 1) if config.scalars == "raw" else (1, 6)  # numbers in each token
        size = 2 * len(_frequencies(config)) + 1
        self.encoders = nn.ModuleList(nn.Linear(count * size, config.width, bias=False) for count in told)

    def forward(
        self, t: Num[Tensor, " n"], metric: Float[Tensor, " n"], target: Float[Tensor, " n"]
    ) -> Float[Tensor, "n tokens width"]:
        dtype = self.encoders[0].weight.dtype
        frequencies = _frequencies(self.config).to(t.device, dtype)
        scalars = self._scaled(t.to(dtype), metric.to(dtype), target.to(dtype))
        embedded = [_embed(x, frequencies) for x in scalars]
        return torch.stack([encode(x) for encode, x in zip(self.encoders, embedded, strict=True)], dim=1)

    def _scaled(self, t: Tensor, metric: Tensor, target: Tensor) -> list[Float[Tensor, "n numbers"]]:
        if self.config.scalars == "raw":
            metric, target = metric * self.config.metric_factor, target * self.config.metric_factor
            return [x[:, None] for x in (t, target - metric, target, metric)]
        metric, target = (both_scales(self.config.metric_scale, x) for x in (metric, target))
        return [t[:, None] / 1000, torch.cat([target - metric, target, metric], dim=1)]


def both_scales(scale: MetricScale, metric: Float[Tensor, " n"]) -> Float[Tensor, "n 2"]:
    """A metric linearly, and by its place among the knots, every interval as long as the others; both from -1 to 1."""
    linear = (metric - scale.low) / (scale.high - scale.low)
    knots = torch.tensor(scale.knots, dtype=torch.float64).to(metric.device, metric.dtype)
    passed = ((metric[:, None] - knots[:-1]) / knots.diff()).clamp(0, 1)  # share of each interval that lies below
    return torch.stack([linear, passed.mean(1)], dim=1) * 2 - 1


def _frequencies(config: GptConfig) -> Float[Tensor, " frequencies"]:
    """Float32 powers of two, as released: raw ones turn t = 999 into 16 million radians, where another rounding is another
    token. Made afresh in each pass: a buffer outside the state dict would be lost where a model is built on meta.
    """
    if config.scalars == "raw":
        return 2 ** torch.linspace(0, RAW_OCTAVES, RAW_FREQUENCIES, device="cpu")
    return math.pi / 4 * 2 ** torch.linspace(0, config.octaves, config.num_frequencies, device="cpu")


def _embed(x: Float[Tensor, "n scales"], frequencies: Float[Tensor, " frequencies"]) -> Float[Tensor, "n features"]:
    """[sin, cos, x] of each scale, one after another."""
    angles = x[:, :, None] * frequencies
    return torch.cat([angles.sin(), angles.cos(), x[:, :, None]], dim=2).flatten(1)
