"""What a spatial transformer sees with: networks of the blocks of StyleGAN2's discriminator.  [thesis 4.3.1]

Both that warp end in layers of zeros: their first answer is the identity.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from triptych_common.fields import Checked, Ge, Interval

from triptych_gangealing.stylegan2.layers import Conv2d, FullyConnected

Images = Float[Tensor, "n channels height width"]
SMALLEST = 4  # pixels of the feature maps that the similarity network ends with


@dataclass(frozen=True)
class SpatialTransformerConfig(Checked):
    """Shape of a spatial transformer."""

    input_size: int = 128
    """height and width of what the networks see, a power of two; images of other sizes are resampled to it"""
    channel_max: Annotated[int, Ge(1)] = 512
    """feature maps from a quarter of input_size down"""
    channel_multiplier: Annotated[float, Interval(gt=0, lt=math.inf, wanted="a positive number")] = 0.5
    """scales the feature maps above: channel_max / 2 at half of input_size and channel_max / 4 at input_size, times this"""
    heads: Annotated[int, Ge(1)] = 1
    """warps of each image: one for each cluster"""
    transforms: tuple[Literal["similarity", "flow"], ...] = ("similarity", "flow")
    """networks, in the order in which they look at the image; either may stand alone"""
    flow_size: int = 16
    """height and width of the grid of displacements that the flow network predicts, a power of two"""
    flow_upsampling: Annotated[int, Ge(1)] = 8
    """how many times finer the flow is than that grid"""
    flow_unit_factor: Annotated[float, Interval(gt=0, lt=math.inf, wanted="a positive number")] = 1.0
    """scales the flow; 8 as in the released code, which takes its normalised units for cells of the coarse grid"""
    flow_padding: Literal["replicate", "zeros"] = "replicate"
    """displacements beyond the coarse grid; zeros, as in the released code, shrink those at borders and more so in corners"""
    padding: Literal["border", "reflection", "zeros"] = "border"
    """what the flow network, and the similarity network when it looks again, see beyond the image"""
    image_channels: Annotated[int, Ge(1)] = 3
    """colours of the images"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transforms not in (("similarity",), ("flow",), ("similarity", "flow")):
            raise ValueError(f"transforms {self.transforms}: expected similarity, flow, or both in this order")
        if self.input_size.bit_count() != 1 or self.input_size <= SMALLEST:
            raise ValueError(f"input_size {self.input_size}: expected a power of two, at least {2 * SMALLEST}")
        if self.flow_size.bit_count() != 1 or not SMALLEST <= self.flow_size <= self.input_size:
            raise ValueError(
                f"flow_size {self.flow_size}: expected a power of two from {SMALLEST} to the input_size, {self.input_size}"
            )

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "SpatialTransformerConfig":
        """The config whose `dataclasses.asdict` went through JSON, which knows no tuples."""
        return cls(**{**facts, "transforms": tuple(facts["transforms"])})

    def channels_at(self, size: int) -> int:
        """Feature maps `size` pixels high and wide."""
        coarser = 4 * size / self.input_size
        return self.channel_max if coarser <= 1 else max(1, int(self.channel_max * self.channel_multiplier / coarser))


PRESETS: dict[str, SpatialTransformerConfig] = {
    "paper": SpatialTransformerConfig(),  # 22.42M and 20.63M parameters
    "digits32": SpatialTransformerConfig(  # 0.07M and 0.12M
        input_size=32, channel_max=32, channel_multiplier=2.0, flow_size=8, flow_upsampling=4
    ),
}


class Residual(nn.Module):
    """The block of StyleGAN2's discriminator, which halves height and width, or not."""

    def __init__(self, channels: int, after: int, resample: Literal["same", "down"] = "down") -> None:
        super().__init__()
        self.conv0 = Conv2d(channels, channels, 3, activation="lrelu")
        self.conv1 = Conv2d(channels, after, 3, activation="lrelu", resample=resample)
        self.skip = Conv2d(channels, after, 1, bias=False, resample=resample)

    def forward(self, x: Float[Tensor, "n maps height width"]) -> Float[Tensor, "n new_maps new_height new_width"]:
        skip = self.skip(x, gain=math.sqrt(0.5))
        return skip + self.conv1(self.conv0(x), gain=math.sqrt(0.5))


def _down_to(size: int, config: SpatialTransformerConfig) -> list[nn.Module]:
    """From an image to feature maps of `size` pixels."""
    layers: list[nn.Module] = [
        Conv2d(config.image_channels, config.channels_at(config.input_size), 1, activation="lrelu")
    ]
    at = config.input_size
    while at > size:
        layers.append(Residual(config.channels_at(at), config.channels_at(at // 2)))
        at //= 2
    return layers


class SimilarityTrunk(nn.Sequential):
    """Images of `input_size` to features."""

    def __init__(self, config: SpatialTransformerConfig) -> None:
        channels = config.channels_at(SMALLEST)
        super().__init__(
            *_down_to(SMALLEST, config),
            Conv2d(channels, channels, 3, activation="lrelu"),
            nn.Flatten(),
            FullyConnected(channels * SMALLEST**2, channels, activation="lrelu"),
        )


class SimilarityNetwork(nn.Module):
    """Images of `input_size` to four numbers a head: rotation before its tanh, log scale, shift in x and in y."""

    def __init__(self, config: SpatialTransformerConfig) -> None:
        super().__init__()
        self.heads, self.trunk = config.heads, SimilarityTrunk(config)
        self.head = FullyConnected(config.channels_at(SMALLEST), 4 * config.heads)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Images) -> Float[Tensor, "n heads 4"]:
        return self.head(self.trunk(images)).unflatten(1, (self.heads, 4))


class FlowNetwork(nn.Module):
    """Images of `input_size` to displacements in normalised units: of one head each, or of all heads in turn."""

    def __init__(self, config: SpatialTransformerConfig) -> None:
        super().__init__()
        self.config, channels = config, config.channels_at(config.flow_size)
        self.trunk = nn.Sequential(
            *_down_to(config.flow_size, config),
            Residual(channels, channels, resample="same"),
            Conv2d(channels, channels, 3, activation="lrelu"),
        )
        self.delta = _two_convolutions(channels, 2 * config.heads)
        nn.init.zeros_(self.delta[-1].weight)
        self.mask = _two_convolutions(channels, 9 * config.flow_upsampling**2 * config.heads)

    def forward(self, images: Images, head: Int[Tensor, " n"] | None) -> Float[Tensor, "rows 2 fine_height fine_width"]:
        config, x = self.config, self.trunk(images)
        delta = chosen(self.delta(x).unflatten(1, (config.heads, 2)), head)
        cells = (config.heads, 9, config.flow_upsampling, config.flow_upsampling)
        mask = chosen(self.mask(x).unflatten(1, cells), head)
        return convex_upsample(delta, mask, config.flow_padding) * config.flow_unit_factor


def _two_convolutions(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(Conv2d(channels, channels, 3, activation="lrelu"), Conv2d(channels, out, 3))


def convex_upsample(
    delta: Float[Tensor, "n 2 height width"],
    mask: Float[Tensor, "n 9 factor factor height width"],
    padding: Literal["replicate", "zeros"] = "replicate",
) -> Float[Tensor, "n 2 fine_height fine_width"]:
    """Displacements on a grid `factor` times finer: each a convex combination of the 3 x 3 coarse ones around, in their units.

    mask: logits of the weights of the neighbours (row by row) for each of the finer points of a cell (row, column).
    [Teed and Deng 2020, "RAFT", 3.3; there displacements are in cells, and so grow with the grid]
    """
    (n, _, height, width), factor = delta.shape, mask.shape[2]
    framed = F.pad(delta, (1, 1, 1, 1), mode="replicate" if padding == "replicate" else "constant")
    neighbours = F.unfold(framed, 3).view(n, 2, 9, 1, 1, height, width)
    fine = (neighbours * mask.softmax(dim=1)[:, None]).sum(dim=2).permute(0, 1, 4, 2, 5, 3)
    return fine.reshape(n, 2, height * factor, width * factor)


def chosen(values: Float[Tensor, "n heads *rest"], head: Int[Tensor, " n"] | None) -> Float[Tensor, "rows *rest"]:
    """Of each image the values of its head, or those of all heads in turn."""
    return values.flatten(0, 1) if head is None else values[torch.arange(len(values), device=values.device), head]
