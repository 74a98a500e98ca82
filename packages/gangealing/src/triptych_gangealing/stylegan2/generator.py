"""StyleGAN2's generator.  [Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN"]

Parameters are named as in the files of stylegan2-ada-pytorch, which also hold the resampling filter.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from triptych_common import randomness

from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.layers import (
    ACTIVATION_GAINS,
    Conv2d,
    FullyConnected,
    Mapping,
    Resample,
    bias_act,
    modulated_conv2d,
    upsample2d,
)

Images = Float[Tensor, "batch channels height width"]
Maps = Float[Tensor, "batch maps height width"]
NewMaps = Float[Tensor, "batch new_maps new_height new_width"]
NewImages = Float[Tensor, "batch channels new_height new_width"]
Latents = Float[Tensor, "batch z_dim"]
Classes = Float[Tensor, "batch c_dim"] | None  # one-hot; None for an unconditional model
Style = Float[Tensor, "batch w_dim"]
Styles = Float[Tensor, "batch num_ws w_dim"]
Noise = str | Float[Tensor, "batch noise_size"]
AT_ONCE = 64  # images, by default


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, noise, bias and activation."""

    noise_const: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, resolution: int, config: GeneratorConfig, *, up: bool
    ) -> None:
        super().__init__()
        self.resolution, self.conv_clamp = resolution, config.conv_clamp
        self.resample: Resample = "up" if up else "same"
        self.affine = FullyConnected(config.w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))

    def forward(self, x: Maps, w: Style, noise: Noise, gain: float = 1.0) -> NewMaps:
        # All gains enter before the activation, which is homogeneous: a pass over the maps less.
        scale = gain * ACTIVATION_GAINS["lrelu"]
        x = modulated_conv2d(x, self.weight, self.affine(w), resample=self.resample, gain=scale)
        if isinstance(noise, Tensor):
            noise = noise.view(-1, 1, self.resolution, self.resolution)
            x = x + (noise * (self.noise_strength * scale)).to(x.dtype)
        elif noise == "const":
            x = x + (self.noise_const * (self.noise_strength * scale)).to(x.dtype)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, self.bias * scale, "lrelu", gain=1, clamp=clamp)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to an image, without demodulation."""

    def __init__(self, in_channels: int, config: GeneratorConfig) -> None:
        super().__init__()
        self.conv_clamp = config.conv_clamp
        self.affine = FullyConnected(config.w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(config.image_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(config.image_channels))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x: Maps, w: Style) -> Images:
        # Without demodulation the weights' gain must come from somewhere: as published, from the styles.
        x = modulated_conv2d(x, self.weight, self.affine(w) * self.weight_gain, demodulate=False)
        return bias_act(x, self.bias, clamp=self.conv_clamp)


class SynthesisBlock(nn.Module):
    """What happens at one resolution; the first starts from a learned constant."""

    def __init__(self, resolution: int, config: GeneratorConfig) -> None:
        super().__init__()
        channels, last = config.channels_at(resolution), resolution == config.resolution
        self.first, self.architecture = resolution == 4, config.architecture
        if self.first:
            self.const = nn.Parameter(torch.randn(channels, 4, 4))
        else:
            before = config.channels_at(resolution // 2)
            self.conv0 = StyledConv(before, channels, resolution, config, up=True)
            if config.architecture == "resnet":
                self.skip = Conv2d(before, channels, 1, bias=False, resample="up")
        self.conv1 = StyledConv(channels, channels, resolution, config, up=False)
        self.torgb = ToRGB(channels, config) if last or config.architecture == "skip" else None
        self.num_convs = 1 if self.first else 2

    def forward(
        self, x: Maps | None, image: Images | None, ws: Styles, noises: list[Noise], dtype: torch.dtype
    ) -> tuple[NewMaps, NewImages | None]:
        w, noise = iter(ws.unbind(1)), iter(noises)
        if x is None:
            x = self.const.to(dtype).expand(len(ws), -1, -1, -1)
            x = self.conv1(x, next(w), next(noise))
        elif self.architecture == "resnet":
            x = x.to(dtype)
            skip = self.skip(x, gain=math.sqrt(0.5))
            x = self.conv0(x, next(w), next(noise))
            x = skip + self.conv1(x, next(w), next(noise), gain=math.sqrt(0.5))
        else:
            x = self.conv0(x.to(dtype), next(w), next(noise))
            x = self.conv1(x, next(w), next(noise))
        if image is not None:
            image = upsample2d(image)
        if self.torgb is not None:
            rgb = self.torgb(x, next(w)).to(ws.dtype)
            image = rgb if image is None else image + rgb
        return x, image


class Synthesis(nn.Module):
    """Styles to an image.

    `bf16_resolutions`: how many of the highest resolutions run in bfloat16 (mixed precision); sums of images stay as they are.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config, self.bf16_resolutions = config, 0
        for resolution in config.resolutions:
            self.add_module(f"b{resolution}", SynthesisBlock(resolution, config))
        self.noise_sizes = [r * r for r in config.resolutions for _ in range(1 if r == 4 else 2)]

    def forward(self, ws: Styles, *, noise: Noise = "const") -> Images:
        """An image for each row of styles, about in [-1, 1].

        noise: "const", the same for every image; "none"; or values for each image, `sum(noise_sizes)` of them, as `noise` draws.
        Raises ValueError for another number of styles or of noise values, or another word.
        """
        if ws.shape[1] != self.config.num_ws:
            raise ValueError(f"{ws.shape[1]} styles for each image: expected {self.config.num_ws}")
        if isinstance(noise, Tensor):
            if noise.shape[1] != sum(self.noise_sizes):
                raise ValueError(f"noise of {noise.shape[1]} values for each image: expected {sum(self.noise_sizes)}")
            noises: list[Noise] = list(noise.split(self.noise_sizes, dim=1))
        elif noise in ("const", "none"):
            noises = [noise] * len(self.noise_sizes)
        else:
            raise ValueError(f"noise {noise!r}: expected 'const', 'none' or values for each image")
        # Block b has its convolutions' styles, and one more for torgb, which it shares with the next block's first convolution.
        x = image = None
        used = 0
        for i, resolution in enumerate(self.config.resolutions):
            block = getattr(self, f"b{resolution}")
            low = i >= len(self.config.resolutions) - self.bf16_resolutions
            here = slice(used, used + block.num_convs)
            styles = ws[:, used : used + block.num_convs + 1]
            x, image = block(x, image, styles, noises[here], torch.bfloat16 if low else ws.dtype)
            used += block.num_convs
        assert image is not None
        return image

    def noise(self, seed: int, stream: str, indices: Sequence[int]) -> Float[Tensor, "batch noise_size"]:
        """Noise inputs number `indices` of a stream, on the device and of the type of the weights."""
        weight = self.get_parameter("b4.const")
        return randomness.normal(
            seed, stream, indices, (sum(self.noise_sizes),), dtype=weight.dtype, device=weight.device
        )


class Generator(nn.Module):
    """StyleGAN2's generator: latents z (n, z_dim) to images (n, channels, resolution, resolution), about -1 to 1.

    `synthesis(styles(z))`; a conditional one also takes c, one-hot classes (n, c_dim).  [Karras et al. 2020]
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.mapping = Mapping(config.z_dim, config.c_dim, config.w_dim, config.mapping_layers)
        self.synthesis = Synthesis(config)

    @property
    def num_ws(self) -> int:
        """Number of styles of an image."""
        return self.config.num_ws

    def styles(
        self, z: Latents, c: Classes = None, *, truncation_psi: float = 1.0, truncation_cutoff: int | None = None
    ) -> Styles:
        """The style of each layer: w repeated, in the first `truncation_cutoff` layers (None: all) moved towards the mean w.

        Raises ValueError for a conditional model without classes, or classes for an unconditional one.
        """
        ws = self.mapping(z, c).unsqueeze(1).repeat(1, self.num_ws, 1)
        if truncation_psi == 1:
            return ws
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        # psi 1 is w itself, 0 the mean; negative values give the "opposite" image.
        truncated = self.mapping.w_avg.lerp(ws[:, :cutoff], float(truncation_psi))
        return torch.cat([truncated, ws[:, cutoff:]], dim=1)

    def forward(
        self,
        z: Latents,
        c: Classes = None,
        *,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise: Noise = "const",
    ) -> Images:
        """Images of latents; see `styles` and `Synthesis`."""
        ws = self.styles(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        return self.synthesis(ws, noise=noise)


# --- Samples by their number


@torch.inference_mode()
def sample_images(
    generator: Generator,
    indices: range,
    *,
    seed: int = 0,
    truncation_psi: float = 1.0,
    truncation_cutoff: int | None = None,
    labels: Tensor | None = None,
    at_once: int = AT_ONCE,
) -> UInt8[Tensor, "n channels height width"]:
    """Samples number `indices` of a seed, on the CPU; of a conditional generator all classes in turn, or `labels`."""
    from triptych_common.images import to_uint8

    out = []
    for start in range(0, len(indices), at_once):
        part = indices[start : start + at_once]
        z = latents_of(generator, part, seed)
        c = classes_of(generator, part, None if labels is None else labels[start : start + at_once])
        # Latents, classes and noise depend on a sample's number alone: portions of any size give the same images.
        noise = generator.synthesis.noise(seed, "sample/noise", part)
        ws = generator.styles(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        out.append(to_uint8(generator.synthesis(ws, noise=noise)).cpu())
    return torch.cat(out)


def latents_of(generator: Generator, indices: range, seed: int) -> Float[Tensor, "n z_dim"]:
    """Latents number `indices` of a seed, on the device of the generator's weights."""
    return randomness.normal(seed, "sample/z", indices, (generator.config.z_dim,)).to(next(generator.parameters()))


def classes_of(generator: Generator, indices: Sequence[int], labels: Tensor | None = None) -> Classes:
    """One-hot classes of images for a conditional generator: those of `labels`, or all in turn."""
    classes = generator.config.c_dim
    if not classes:
        return None
    numbers = torch.tensor(indices) % classes if labels is None else labels
    return F.one_hot(numbers, classes).to(next(generator.parameters()))
