"""Layers with equalised learning rate, which both networks are made of."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from triptych_gangealing.stylegan2 import ops


class FullyConnected(nn.Module):
    """Linear layer whose weights are stored at unit variance and scaled as used: He's constant and `lr_multiplier`.

    [Karras et al. 2018, "Progressive Growing of GANs", 4.1]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: str = "linear",
        lr_multiplier: float | int = 1.0,
        bias_init: float | int = 0.0,
    ) -> None:
        super().__init__()
        self.activation, self.bias_gain = activation, lr_multiplier
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))

    def forward(self, x: Float[Tensor, "batch in"]) -> Float[Tensor, "batch out"]:
        weight, bias = self.weight * self.weight_gain, self.bias * self.bias_gain
        return ops.bias_act(F.linear(x, weight.to(x.dtype)), bias, self.activation)


class Conv2d(nn.Module):
    """Convolution with equalised learning rate, resampled twice up or down, with bias and activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        activation: str = "linear",
        resample: str = "same",
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.resample, self.conv_clamp = activation, resample, conv_clamp
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(
        self, x: Float[Tensor, "batch in height width"], gain: float | int = 1.0
    ) -> Float[Tensor, "batch out new_height new_width"]:
        scale = gain * ops.ACTIVATION_GAINS[self.activation]
        x = ops.conv2d(x, (self.weight * (self.weight_gain * scale)).to(x.dtype), resample=self.resample)
        bias = None if self.bias is None else self.bias * scale
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return ops.bias_act(x, bias, self.activation, gain=1, clamp=clamp)


def normalize_2nd_moment(x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """Scaled to a mean square of one."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


class Mapping(nn.Module):
    """Latent z and class to style w: normalised, then fully connected layers that learn a hundred times slower.

    Without `z_dim` it embeds classes alone, as a conditional discriminator does. `w_avg` is a running mean of w, which the
    training loop keeps: over the batch of all ranks.
    """

    def __init__(self, z_dim: int, c_dim: int, w_dim: int, num_layers: int, *, w_avg: bool = True) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_layers = z_dim, c_dim, w_dim, num_layers
        if c_dim:
            self.embed = FullyConnected(c_dim, w_dim)
        features = z_dim + (w_dim if c_dim else 0)
        for i in range(num_layers):
            layer = FullyConnected(features if i == 0 else w_dim, w_dim, activation="lrelu", lr_multiplier=0.01)
            self.add_module(f"fc{i}", layer)
        if w_avg:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self, z: Float[Tensor, "batch z_dim"] | None, c: Float[Tensor, "batch c_dim"] | None = None
    ) -> Float[Tensor, "batch w_dim"]:
        if (c is None) == bool(self.c_dim) or (c is not None and c.shape[1] != self.c_dim):
            given = "none" if c is None else f"of {c.shape[1]} classes"
            raise ValueError(
                f"labels {given}: expected {f'one-hot rows of {self.c_dim} classes' if self.c_dim else 'none'}"
            )
        parts = []
        if z is not None:
            parts.append(normalize_2nd_moment(z))
        if c is not None:
            parts.append(normalize_2nd_moment(self.embed(c)))
        x = torch.cat(parts, dim=1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        return x
