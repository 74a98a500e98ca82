"""Shapes of the spatial transformer and of the encoder of images: one row a published shape. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from triptych_common.fields import Checked, Ge, Interval

Padding = Literal["border", "reflection", "zeros"]
Flips = Literal["trained", "yes", "no"]  # mirror images whose flow is smoother then; trained: where the training did
SMALLEST = 4  # pixels of the feature maps that the similarity network ends with
DESCRIPTOR_POOL = 8_000  # most generated images that a descriptor is trained on and groups are formed of


@dataclass(frozen=True)
class SpatialTransformerConfig(Checked):
    """Shape of a spatial transformer."""

    input_size: int = 128
    """height and width of what the networks see, a power of two; images of other sizes are resampled to it"""
    channel_max: Annotated[int, Ge(1)] = 512
    """feature maps from a quarter of input_size down"""
    channel_multiplier: Annotated[float, Interval(gt=0, lt=math.inf, wanted="a positive number")] = 0.5
    """factor on the feature maps above: channel_max / 2 at half of input_size, channel_max / 4 at input_size"""
    heads: Annotated[int, Ge(1)] = 1
    """warps of each image: one for each cluster"""
    transforms: tuple[Literal["similarity", "flow"], ...] = ("similarity", "flow")
    """networks in the order in which they see the image: similarity, flow, or both"""
    flow_size: int = 16
    """height and width of the grid of displacements that the flow network predicts, a power of two"""
    flow_upsampling: Annotated[int, Ge(1)] = 8
    """how many times finer the flow is than that grid"""
    flow_unit_factor: Annotated[float, Interval(gt=0, lt=math.inf, wanted="a positive number")] = 1.0
    """factor on the flow; 8 in the released code, which treats normalised units as cells of the coarse grid"""
    flow_padding: Literal["replicate", "zeros"] = "replicate"
    """displacements beyond the coarse grid; zeros, as in the released code, weaken them at borders and even more in corners"""
    flow_activation: Literal["lrelu", "relu"] = "lrelu"
    """between the two convolutions of the flow network's heads; relu in the released code"""
    classifier: Literal["clusters", "sides"] = "clusters"
    """what the classifier tells apart: clusters, or also pictures from mirror images, as in the released code"""
    classifier_hidden: bool = True
    """a hidden layer before the classifier's last; the released code has none"""
    padding: Padding = "border"
    """what the networks see beyond the edges of an already warped image"""
    image_channels: Annotated[int, Ge(1)] = 3
    """colours of the images"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transforms not in (("similarity",), ("flow",), ("similarity", "flow")):
            raise ValueError(f"transforms {self.transforms}: expected similarity, flow, or both in this order")
        if self.input_size.bit_count() != 1 or self.input_size <= SMALLEST:
            raise ValueError(f"input_size {self.input_size}: expected a power of two, at least {2 * SMALLEST}")
        if self.flow_size.bit_count() != 1 or not SMALLEST <= self.flow_size <= self.input_size:
            expected = f"a power of two from {SMALLEST} to the input_size, {self.input_size}"
            raise ValueError(f"flow_size {self.flow_size}: expected {expected}")

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "SpatialTransformerConfig":
        """The config whose `dataclasses.asdict` went through JSON, which has no tuples."""
        return cls(**{**facts, "transforms": tuple(facts["transforms"])})

    @property
    def classes(self) -> int:
        """Outputs of the classifier: clusters, then those of their mirror images where it tells sides apart."""
        return self.heads * (2 if self.classifier == "sides" else 1)

    def channels_at(self, size: int) -> int:
        """Feature maps `size` pixels high and wide."""
        coarser = 4 * size / self.input_size
        return self.channel_max if coarser <= 1 else max(1, int(self.channel_max * self.channel_multiplier / coarser))


# Where the released code's networks differ from ours, see docs/deviations.md; flow_unit_factor is always the upsampling.
DESIGNS: dict[str, dict[str, Any]] = {
    "own": {},
    "released": {
        "flow_unit_factor": 8.0, "flow_padding": "zeros", "flow_activation": "relu", "classifier": "sides",
        "classifier_hidden": False,
    },
}  # fmt: skip
PRESETS: dict[str, SpatialTransformerConfig] = {
    "paper": SpatialTransformerConfig(),  # 22.42M and 20.63M parameters
    "digits32": SpatialTransformerConfig(  # 0.07M and 0.12M
        input_size=32, channel_max=32, channel_multiplier=2.0, flow_size=8, flow_upsampling=4
    ),
}


@dataclass(frozen=True)
class EncoderConfig:
    """widths: channels of each stage, at half the resolution of the one before; the first has that of the images.
    compared: how many stages, the last ones, give the features; those before see little but colours.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128)
    compared: int = 2

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "EncoderConfig":
        """The config whose `dataclasses.asdict` went through JSON, which has no tuples."""
        return cls(**{**facts, "widths": tuple(facts["widths"])})

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths {self.widths}: expected at least one stage, each of at least 1 channel")
        if not 1 <= self.compared <= len(self.widths):
            raise ValueError(f"compared {self.compared}: expected 1 to {len(self.widths)}, the stages there are")
