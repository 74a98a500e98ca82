"""Shapes of StyleGAN2's two networks."""

from dataclasses import dataclass
from typing import Annotated, Literal

from triptych_common.fields import Checked, Ge

Architecture = Literal["skip", "resnet", "orig"]


@dataclass(frozen=True)
class _Shape(Checked):
    resolution: int = 32
    """height and width of the images: a power of two, 8..1024"""
    channel_base: int = 32768
    """feature maps at resolution r: channel_base / r, at most channel_max; 16384 halves the published full width"""
    channel_max: Annotated[int, Ge(1)] = 512
    """maximum number of feature maps of a layer"""
    c_dim: Annotated[int, Ge(0, "a number of classes, or 0 for an unconditional model")] = 0
    """number of classes of a conditional model; 0: unconditional"""
    image_channels: Annotated[int, Ge(1)] = 3
    """colours of the images"""
    conv_clamp: float | None = None
    """bound on the activations of every convolution; 256 in mixed precision, None: none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution not in (8, 16, 32, 64, 128, 256, 512, 1024):
            raise ValueError(f"resolution {self.resolution}: expected a power of two from 8 to 1024")
        if self.channel_base < self.resolution:
            raise ValueError(f"channel_base {self.channel_base}: expected at least the resolution, {self.resolution}")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Those of the blocks: 4, 8 .. resolution."""
        return tuple(2**i for i in range(2, self.resolution.bit_length()))

    def channels_at(self, resolution: int) -> int:
        """Feature maps at a resolution."""
        return min(self.channel_base // resolution, self.channel_max)


@dataclass(frozen=True)
class GeneratorConfig(_Shape):
    """Shape of a generator.  [Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN"]"""

    z_dim: Annotated[int, Ge(1)] = 512
    """dimensions of z"""
    w_dim: Annotated[int, Ge(1)] = 512
    """dimensions of w"""
    mapping_layers: Annotated[int, Ge(1)] = 8
    """layers from z to w"""
    architecture: Architecture = "skip"
    """how blocks make the image: a sum of RGB images, residual blocks, or plain ones"""

    @property
    def num_ws(self) -> int:
        """Number of style inputs: one for each convolution, the last layer's to RGB included."""
        return 2 * len(self.resolutions)


@dataclass(frozen=True)
class DiscriminatorConfig(_Shape):
    """Shape of a discriminator.  [Karras et al. 2020]"""

    architecture: Architecture = "resnet"
    """how blocks read the image: residual blocks, one RGB image for each, or plain ones"""
    mapping_layers: Annotated[int, Ge(1)] = 8
    """layers of the class embedding of a conditional discriminator"""
    mbstd_group_size: Annotated[int, Ge(1)] = 4
    """images over which the minibatch standard deviation is taken"""
    mbstd_channels: Annotated[int, Ge(0)] = 1
    """feature maps that carry it; 0: none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mbstd_channels and self.channels_at(4) % self.mbstd_channels:
            expected = f"a divisor of the {self.channels_at(4)} feature maps at 4x4"
            raise ValueError(f"mbstd_channels {self.mbstd_channels}: expected {expected}")
