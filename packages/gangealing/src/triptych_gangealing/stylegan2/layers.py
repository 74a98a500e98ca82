"""What StyleGAN2's networks are made of: resampling by a FIR filter, modulated convolution, layers with equalised learning rate.

The filter is always [1, 3, 3, 1], normalised. Nothing here inserts zeros: upsampling is a transposed convolution of each
channel, downsampling one with a stride, and a convolution after upsampling is a transposed convolution too. Works for any
rectangular size, floating type, device and memory format; differentiable twice.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Images = Float[Tensor, "batch channels height width"]
Resample = Literal["same", "up", "down"]
Activation = Literal["linear", "lrelu", "relu"]
ACTIVATION_GAINS = {"linear": 1.0, "lrelu": math.sqrt(2), "relu": math.sqrt(2)}  # they keep the variance at one


# --- Layers


class FullyConnected(nn.Module):
    """Linear layer whose weights are stored at unit variance and scaled when used: He's constant and `lr_multiplier`.

    [Karras et al. 2018, "Progressive Growing of GANs", 4.1]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: Activation = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation, self.bias_gain = activation, lr_multiplier
        # Stored weights are larger by 1 / lr_multiplier and used smaller: Adam's steps, of fixed size, count for less.
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))

    def forward(self, x: Float[Tensor, "batch in"]) -> Float[Tensor, "batch out"]:
        weight, bias = self.weight * self.weight_gain, self.bias * self.bias_gain
        return bias_act(F.linear(x, weight.to(x.dtype)), bias, self.activation)


class Conv2d(nn.Module):
    """Convolution with equalised learning rate, resampled twice up or down, with bias and activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        activation: Activation = "linear",
        resample: Resample = "same",
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.resample, self.conv_clamp = activation, resample, conv_clamp
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(
        self, x: Float[Tensor, "batch in height width"], gain: float = 1.0
    ) -> Float[Tensor, "batch out new_height new_width"]:
        scale = gain * ACTIVATION_GAINS[self.activation]
        x = conv2d(x, (self.weight * (self.weight_gain * scale)).to(x.dtype), resample=self.resample)
        bias = None if self.bias is None else self.bias * scale
        # The clamp is on the activation's own scale, before `gain`.
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, bias, self.activation, gain=1, clamp=clamp)


def normalize_2nd_moment(x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """Scaled to a mean square of one."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


class Mapping(nn.Module):
    """Latent z and class to style w: normalised, then fully connected layers that learn a hundred times slower.

    Without `z_dim` it embeds classes alone, for a conditional discriminator. The training loop keeps `w_avg`, a running mean of w
    over the batch of all ranks.
    """

    w_avg: Tensor

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
            expected = f"one-hot rows of {self.c_dim} classes" if self.c_dim else "none"
            raise ValueError(f"labels {given}: expected {expected}")
        # The embedding of one-hot rows is linear, so embedded classes span at most c_dim of w_dim dimensions.
        inputs = [*([] if z is None else [z]), *([] if c is None else [self.embed(c)])]
        x = torch.cat([normalize_2nd_moment(part) for part in inputs], dim=1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        return x


# --- Operations


def upsample2d(x: Images, gain: float = 1.0) -> Float[Tensor, "batch channels 2*height 2*width"]:
    """Twice up: zeros between the pixels, then the filter."""
    x, weight = _channels_last(x), _filters(x, 4 * gain)  # 4: of four pixels three are zeros
    return F.conv_transpose2d(x, weight, stride=2, padding=1, groups=x.shape[1])


def downsample2d(x: Images, gain: float = 1.0) -> Float[Tensor, "batch channels half_height half_width"]:
    """Twice down: the filter, then every second pixel; of an odd number, the last is left out."""
    x, weight = _channels_last(x), _filters(x, gain)
    return F.conv2d(x, weight, stride=2, padding=1, groups=x.shape[1])


def blur2d(x: Images, padding: int = 0, gain: float = 1.0) -> Float[Tensor, "batch channels new_height new_width"]:
    """The filter at every pixel: three rows and columns fewer, after zero padding on all sides."""
    x, weight = _channels_last(x), _filters(x, gain)
    return F.conv2d(x, weight, padding=padding, groups=x.shape[1])


def _filters(x: Tensor, gain: float) -> Float[Tensor, "channels 1 4 4"]:
    i = torch.arange(4, dtype=x.dtype, device=x.device)
    taps = (1 + i * (3 - i)) / 8  # [1, 3, 3, 1] / 8; a copy from the host would wait for the GPU
    return (gain * taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)


def _channels_last(x: Images) -> Images:
    # On a CPU depthwise convolutions are two to five times as fast in this format, and what follows is no slower.
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def bias_act(
    x: Float[Tensor, "batch channels *rest"],
    bias: Float[Tensor, " channels"] | None = None,
    activation: Activation = "linear",
    gain: float | None = None,
    clamp: float | None = None,
) -> Float[Tensor, "batch channels *rest"]:
    """x + bias, through the activation ("linear", "relu", or "lrelu" of slope 0.2), times `gain`, clamped to +-`clamp`.

    gain: by default the activation's own. Layers here scale weights and bias instead, which spares a pass over x.
    """
    if bias is not None:
        x = x + bias.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2))
    if activation == "lrelu":
        x = F.leaky_relu(x, 0.2, inplace=bias is not None)  # in place on the sum above, never on the caller's x
    elif activation == "relu":
        x = x.relu()
    gain = ACTIVATION_GAINS[activation] if gain is None else gain
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def modulated_conv2d(
    x: Images,
    weight: Float[Tensor, "out channels k k"],
    styles: Float[Tensor, "batch channels"],
    *,
    demodulate: bool = True,
    resample: Resample = "same",
    gain: float = 1.0,
) -> Float[Tensor, "batch out new_height new_width"]:
    """Convolution of maps scaled by each image's styles; output maps are scaled back to unit variance, times `gain`.

    [Karras et al. 2020, section 2.2]
    """
    # Activations are scaled rather than weights, so that one convolution serves the whole batch.
    if demodulate and x.dtype in (torch.float16, torch.bfloat16):  # demodulation cancels this; it only avoids overflow
        weight = weight * weight.square().mean(dim=(1, 2, 3), keepdim=True).rsqrt()
        styles = styles * styles.square().mean(dim=1, keepdim=True).rsqrt()
    x = x * styles.to(x.dtype)[:, :, None, None]
    x = conv2d(x, weight.to(x.dtype), resample=resample)
    if demodulate:
        norm = (styles.square() @ weight.square().sum(dim=(2, 3)).T + 1e-8).rsqrt()
        return x * (norm * gain).to(x.dtype)[:, :, None, None]
    return x if gain == 1 else x * gain


def conv2d(
    x: Images, weight: Float[Tensor, "out channels k k"], *, resample: Resample = "same"
) -> Float[Tensor, "batch out new_height new_width"]:
    """Convolution at the "same" resolution, or filtered and twice "up" or "down"; k is 1 or 3."""
    # A 1x1 convolution commutes with the filter, so it runs at the lower resolution.
    kernel_size = weight.shape[-1]
    if resample == "up":
        if kernel_size == 1:
            return upsample2d(F.conv2d(x, weight))
        return blur2d(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), padding=1, gain=4.0)
    if resample == "down":
        if kernel_size == 1:
            return F.conv2d(downsample2d(x), weight)
        return F.conv2d(blur2d(x, padding=2), weight, stride=2)
    return F.conv2d(x, weight, padding=kernel_size // 2)
