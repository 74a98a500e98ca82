"""StyleGAN2's discriminator.  [Karras et al. 2020]  Parameters are named as in the files of stylegan2-ada-pytorch."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triptych_gangealing.stylegan2.config import DiscriminatorConfig
from triptych_gangealing.stylegan2.layers import Conv2d, FullyConnected, Mapping, downsample2d

Images = Float[Tensor, "batch channels height width"]
Maps = Float[Tensor, "batch maps height width"]
NewMaps = Float[Tensor, "batch new_maps new_height new_width"]
NewImages = Float[Tensor, "batch channels new_height new_width"]


class DiscriminatorBlock(nn.Module):
    """What happens at one resolution, down to half of it."""

    def __init__(self, resolution: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        channels, after = config.channels_at(resolution), config.channels_at(resolution // 2)
        self.architecture, first = config.architecture, resolution == config.resolution
        clamp = config.conv_clamp
        self.fromrgb = None
        if first or config.architecture == "skip":
            self.fromrgb = Conv2d(config.image_channels, channels, 1, activation="lrelu", conv_clamp=clamp)
        self.conv0 = Conv2d(channels, channels, 3, activation="lrelu", conv_clamp=clamp)
        self.conv1 = Conv2d(channels, after, 3, activation="lrelu", resample="down", conv_clamp=clamp)
        if config.architecture == "resnet":
            self.skip = Conv2d(channels, after, 1, bias=False, resample="down")

    def forward(self, x: Maps | None, image: Images | None, dtype: torch.dtype) -> tuple[NewMaps, NewImages | None]:
        if x is not None:
            x = x.to(dtype)
        if self.fromrgb is not None:
            assert image is not None
            read = self.fromrgb(image.to(dtype))
            x = read if x is None else x + read
            image = downsample2d(image) if self.architecture == "skip" else None
        # Both branches times sqrt(1/2): their sum has unit variance.
        if self.architecture == "resnet":
            skip = self.skip(x, gain=math.sqrt(0.5))
            return skip + self.conv1(self.conv0(x), gain=math.sqrt(0.5)), image
        return self.conv1(self.conv0(x)), image


class Epilogue(nn.Module):
    """4x4 feature maps and their spread over a group of images, to a logit, or to a vector whose product with the class is one."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        channels = config.channels_at(4)
        self.config = config
        self.fromrgb = None
        if config.architecture == "skip":
            self.fromrgb = Conv2d(config.image_channels, channels, 1, activation="lrelu")
        self.conv = Conv2d(
            channels + config.mbstd_channels, channels, 3, activation="lrelu", conv_clamp=config.conv_clamp
        )
        self.fc = FullyConnected(channels * 16, channels, activation="lrelu")
        self.out = FullyConnected(channels, channels if config.c_dim else 1)

    def forward(self, x: Float[Tensor, "batch maps 4 4"], image: Images | None) -> Float[Tensor, "batch outputs"]:
        if self.fromrgb is not None:
            x = x + self.fromrgb(image)
        if self.config.mbstd_channels:
            spread = minibatch_std(x, self.config.mbstd_group_size, self.config.mbstd_channels)
            x = torch.cat([x, spread], dim=1)
        return self.out(self.fc(self.conv(x).flatten(1)))


def minibatch_std(
    x: Images, group_size: int, num_channels: int = 1
) -> Float[Tensor, "batch num_channels height width"]:
    """Standard deviation over groups of images, averaged over pixels and parts of the channels, as constant feature maps.

    Image i is in group i mod (batch / group_size), as published; a batch smaller than a group is one group.
    Raises ValueError for a batch that does not divide into groups.  [Karras et al. 2018, 3]
    """
    n, channels, height, width = x.shape
    size = min(group_size, n)
    if n % size:
        raise ValueError(f"{n} images do not divide into groups of {size} (mbstd_group_size); use a multiple")
    y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    # member group part channel height width: the image's number varies over groups first
    y = y.reshape(size, n // size, num_channels, channels // num_channels, height, width)
    y = (y - y.mean(dim=0)).square().mean(dim=0)
    y = (y + 1e-8).sqrt().mean(dim=(2, 3, 4))
    return y.to(x.dtype).view(-1, num_channels, 1, 1).repeat(size, 1, height, width)


def grouped(n: int, group_size: int) -> list[int]:
    """Order of n images in which `minibatch_std` puts each `group_size` consecutive ones in a group.

    With it, groups do not depend on how a batch is divided into ranks and micro-batches.
    """
    size = min(group_size, n)
    return [group * size + member for member in range(size) for group in range(n // size)]


class Discriminator(nn.Module):
    """StyleGAN2's discriminator: images (n, channels, resolution, resolution) to logits (n,), positive for real.

    bf16_resolutions: how many of the highest resolutions run in bfloat16.  [Karras et al. 2020]
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config, self.bf16_resolutions = config, 0
        # From the image's resolution down to 8; `b4` is the epilogue.
        for resolution in config.resolutions[:0:-1]:
            self.add_module(f"b{resolution}", DiscriminatorBlock(resolution, config))
        if config.c_dim:
            self.mapping = Mapping(0, config.c_dim, config.channels_at(4), config.mapping_layers, w_avg=False)
        self.b4 = Epilogue(config)

    def forward(self, images: Images, c: Float[Tensor, "batch c_dim"] | None = None) -> Float[Tensor, " batch"]:
        """Raises ValueError for images of another shape, or labels missing or too many."""
        config = self.config
        expected = (config.image_channels, config.resolution, config.resolution)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}: expected {expected}")
        if c is not None and not config.c_dim:
            raise ValueError("labels for an unconditional discriminator: expected none")
        x, image = None, images
        for i, resolution in enumerate(config.resolutions[:0:-1]):
            low = i < self.bf16_resolutions
            x, image = getattr(self, f"b{resolution}")(x, image, torch.bfloat16 if low else images.dtype)
        assert x is not None
        x = self.b4(x.to(images.dtype), image)
        if not config.c_dim:
            return x.squeeze(1)
        # Projection discriminator: the logit is a product with the embedded class.
        return (x * self.mapping(None, c)).sum(dim=1) / math.sqrt(config.channels_at(4))
