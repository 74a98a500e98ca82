"""Settings of an encoder's training. Imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from triptych_common.fields import FREE, Ge, Gt, Interval
from triptych_common.training.settings import LoopSettings

from triptych_gangealing.config import EncoderConfig


@dataclass(frozen=True)
class EncoderTrainConfig(LoopSettings):
    """Train a small encoder by SimCLR on a generator's samples. Repeating the command resumes it."""

    out: Path = Path("runs/encoder")
    """run directory"""
    generator: Annotated[str, FREE] = "digits32"
    """a run folder, a network file, a foreign checkpoint, or the name of an embedded generator"""
    truncation_psi: float = 1.0
    """below 1, samples' styles move towards their mean"""
    pool_images: int = 8_000
    """distinct samples; their views are new every time"""
    total_images: Annotated[int, Gt(0)] = 16_000
    """samples to show, repeats counted, each in two views"""
    batch_size: int = 64
    """samples per step: each view is contrasted with the 2 (batch_size - 1) views of the others"""
    widths: tuple[int, ...] = (16, 32, 64, 128)
    """channels of each stage, which has half the resolution of the one before"""
    compared: int = 2
    """stages, the last ones, whose feature maps are compared, in training and after"""
    temperature: Annotated[float, Gt(0)] = 0.2
    """of the softmax over views"""
    crop_scale: Annotated[float, Interval(gt=0, le=1, wanted="a share of the area, above 0 and at most 1")] = 0.8
    """least share of a sample's area that a view shows; 1: all. Kept near 1, as the encoder must distinguish places and sizes"""
    recolour: Annotated[float, Interval(ge=0, le=1)] = 0.8
    """share of views whose colours are mapped by a random linear map, which may turn light into dark"""
    gray: Annotated[float, Interval(ge=0, le=1)] = 0.2
    """share of the recoloured views that become gray"""
    blur: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """share of views that are blurred, by at most 1/32 of the height"""
    lr: float = 0.002
    """AdamW's peak learning rate, reached over the first twentieth of the samples; then a cosine down to 0"""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """AdamW's weight decay"""
    log_every: int = 25
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.batch_size <= self.pool_images:
            expected = f"2 to {self.pool_images} (pool_images), so that there are others to contrast with"
            raise ValueError(f"batch_size {self.batch_size}: expected {expected}")
        self.encoder()

    def encoder(self) -> EncoderConfig:
        """Shape of the network."""
        return EncoderConfig(tuple(self.widths), self.compared)

    def learning_rate(self, images: int) -> float:
        """Of a step, by samples seen before it."""
        rise = min((images + self.batch_size) / (self.total_images / 20), 1)
        return self.lr * rise * math.cos(images / self.total_images * math.pi / 2) ** 2

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints."""
        from triptych_gangealing.encoders.perceptual import Encoder

        return super().resolved() | {"parameters": sum(p.numel() for p in Encoder(self.encoder()).parameters())}
