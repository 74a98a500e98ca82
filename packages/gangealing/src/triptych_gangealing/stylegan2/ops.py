"""StyleGAN2's operations: resampling by a FIR filter, bias with activation, and modulated convolution.

The filter is always [1, 3, 3, 1], normalised. Nothing here inserts zeros: twice up is a transposed convolution of each
channel, twice down one with a stride, and a convolution after a two-fold upsampling is a transposed convolution too. Any
rectangular size, floating type, device and memory format (resampled on a CPU, images are channels last); everything may be
differentiated twice.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Images = Float[Tensor, "batch channels height width"]
Resample = Literal["same", "up", "down"]


def upsample2d(x: Images, gain: float | int = 1.0) -> Float[Tensor, "batch channels 2*height 2*width"]:
    """Twice up: zeros between the pixels, then the filter."""
    x, weight = _channels_last(x), _filters(x, 4 * gain)
    return F.conv_transpose2d(x, weight, stride=2, padding=1, groups=x.shape[1])


def downsample2d(x: Images, gain: float | int = 1.0) -> Float[Tensor, "batch channels half_height half_width"]:
    """Twice down: the filter, then every second pixel; of an odd number, the last is left out."""
    x, weight = _channels_last(x), _filters(x, gain)
    return F.conv2d(x, weight, stride=2, padding=1, groups=x.shape[1])


def blur2d(
    x: Images, padding: int = 0, gain: float | int = 1.0
) -> Float[Tensor, "batch channels new_height new_width"]:
    """The filter at every pixel: three rows and columns fewer, after zero padding on all sides."""
    x, weight = _channels_last(x), _filters(x, gain)
    return F.conv2d(x, weight, padding=padding, groups=x.shape[1])


def _filters(x: Tensor, gain: float | int) -> Float[Tensor, "channels 1 4 4"]:
    i = torch.arange(4, dtype=x.dtype, device=x.device)
    taps = (1 + i * (3 - i)) / 8  # 1, 3, 3, 1, without a copy from the host, which would make it wait for the GPU
    return (gain * taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)


def _channels_last(x: Images) -> Images:
    """As a CPU convolves each channel by itself two to five times as fast, and all of what follows no slower."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


ACTIVATION_GAINS = {"linear": 1.0, "lrelu": math.sqrt(2)}  # which keep unit variance


def bias_act(
    x: Float[Tensor, "batch channels *rest"],
    bias: Float[Tensor, " channels"] | None = None,
    activation: Literal["linear", "lrelu"] = "linear",
    gain: float | int | None = None,
    clamp: float | int | None = None,
) -> Float[Tensor, "batch channels *rest"]:
    """x + bias, through the activation ("linear", or "lrelu" of slope 0.2), times `gain`, clamped to +-`clamp`.

    gain: by default the activation's own. Both activations are homogeneous: scaling weights and bias beforehand instead, as
    layers here do, spares a pass over x.
    """
    if bias is not None:
        x = x + bias.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2))
    if activation == "lrelu":
        x = F.leaky_relu(x, 0.2, inplace=bias is not None)  # of the sum, which nobody else holds
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
    gain: float | int = 1.0,
) -> Float[Tensor, "batch out new_height new_width"]:
    """Convolution whose input maps are scaled by each image's styles, and whose output maps are scaled back to unit variance,
    times `gain`.

    Scaling activations rather than weights leaves one convolution for the whole batch.  [Karras et al. 2020, section 2.2]
    """
    if demodulate and x.dtype in (torch.float16, torch.bfloat16):  # of no effect but that nothing overflows
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
