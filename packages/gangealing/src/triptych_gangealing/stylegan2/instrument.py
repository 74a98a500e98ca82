"""The frozen instrument for coloured jittered digits: a feature network that also reads digit, pose and colours.

It was trained once, on fresh jitters of `mnist5k`'s 4,000 training digits; see `weights/instruments.json`.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from triptych_common.images import from_uint8
from triptych_common.metrics.bootstrap import Estimate, bootstrap
from triptych_common.metrics.distances import frechet_distance, kernel_distance
from triptych_common.metrics.instruments import load_frozen
from triptych_common.randomness import permutation

from triptych_gangealing.digits32 import MAX_GRADIENT, MAX_SHIFT_PX, Digits32
from triptych_gangealing.stylegan2.weights import EMBEDDED

NAME, SIZE, DIM = "digits32_features", 32, 64
PARTS = [10, 2, 1, 2, 3, 3, 2]  # outputs: logits, cosine and sine of the angle, scale, shift, two colours, gradient
HELD_OUT_PER_DIGIT = 100


def feature_network() -> nn.Sequential:
    """32x32 RGB digits to 64 features (`[:-1]`), then to the 23 numbers of `PARTS`."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.SiLU()]
    # As the outputs include pose and colours, features see what a classifier ignores; and as each has variance 1, what is small in
    # pixels, such as a hue, is not small in them.
    features = nn.Linear(64 * 4 * 4, DIM, bias=False), nn.BatchNorm1d(DIM, affine=False)
    return nn.Sequential(*layers, nn.Flatten(), *features, nn.Linear(DIM, sum(PARTS)))


class Reading(NamedTuple):
    """The instrument's estimate of digits and how they are drawn; units as in `Jitters`."""

    logits: Float[Tensor, "n 10"]
    angle: Float[Tensor, " n"]  # radians
    scale: Float[Tensor, " n"]
    shift_px: Float[Tensor, "n 2"]
    foreground: Float[Tensor, "n 3"]
    background: Float[Tensor, "n 3"]
    gradient: Float[Tensor, "n 2"]

    @property
    def labels(self) -> Int[Tensor, " n"]:
        return self.logits.argmax(1)


@dataclass(frozen=True)
class Digits32Instrument:
    """The frozen network with the facts a score must carry."""

    network: nn.Sequential
    sha256: str
    record: dict

    def features(self, images: Tensor) -> Float[Tensor, "n 64"]:
        """Of uint8 images (n, 3, 32, 32), on the CPU. Raises ValueError for images of another shape or type."""
        return self._run(self.network[:-1], images)

    def read(self, images: Tensor) -> Reading:
        """Digit, place and colours of uint8 images (n, 3, 32, 32). Raises as `features` does."""
        return reading(self._run(self.network, images))

    @torch.inference_mode()
    def _run(self, network: nn.Module, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
            found = f"instrument {NAME}: images are {images.dtype} {tuple(images.shape)}"
            raise ValueError(f"{found}, expected uint8 (n, 3, {SIZE}, {SIZE})")
        return torch.cat([network(from_uint8(part)) for part in images.cpu().split(256)])


def reading(outputs: Float[Tensor, "n 23"]) -> Reading:
    """The network's 23 numbers as angles, pixels and colours."""
    logits, turn, scale, shift, foreground, background, gradient = outputs.split(PARTS, dim=1)
    angle = torch.atan2(turn[:, 1], turn[:, 0])
    return Reading(logits, angle, scale[:, 0], shift * MAX_SHIFT_PX, foreground, background, gradient * MAX_GRADIENT)


@cache
def load_instrument(folder: Path = EMBEDDED) -> Digits32Instrument:
    """The instrument, checked against its recorded hash. Raises ValueError where that differs."""
    network, sha256, record = load_frozen(NAME, feature_network(), folder)
    return Digits32Instrument(cast(nn.Sequential, network), sha256, record)


class GanScores(NamedTuple):
    """Distances of generated to held-out images in the instrument's features; `floor_`: those of as many training images."""

    n: int
    frechet: Estimate
    kernel: Estimate
    floor_frechet: Estimate
    floor_kernel: Estimate


def gan_scores(images: UInt8[Tensor, "n 3 32 32"], digit: int | None = None, *, seed: int = 0) -> GanScores:
    """Score generated coloured digits, of one digit or all, against as many items of the held-out digits, jittered anew.

    Raises ValueError for fewer than 100 images.
    """
    n = len(images)
    if n < 100:
        raise ValueError(f"{n} images: expected at least 100, and 1,000 for scores that mean much")
    instrument = load_instrument()

    def real(split: str) -> Tensor:
        copies = max(25, math.ceil(n / HELD_OUT_PER_DIGIT))  # enough for equal counts
        digits = Digits32(split, digit, copies=copies, seed=seed + 1)  # jitters that no training run of seed 0 saw
        return instrument.features(digits.batch(permutation(seed, f"score/{split}", 0, len(digits))[:n]))

    held_out, train, made = real("held_out"), real("train"), instrument.features(images)
    distances = frechet_distance, kernel_distance
    scores = [bootstrap(d, x, held_out, repeats=50, seed=seed) for x in (made, train) for d in distances]
    return GanScores(n, *scores)
