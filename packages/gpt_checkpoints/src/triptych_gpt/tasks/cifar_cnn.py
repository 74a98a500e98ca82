"""Small convolutional networks on CIFAR-10: the thesis's second task.  [thesis 3.3]"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych_gpt.tasks.supervised import Items, SupervisedTask, classification
from triptych_gpt.tasks.task import Prompts

MEAN = (125.3, 123.0, 113.9)  # of the training pixels in 0 .. 255, red, green, blue
STD = (63.0, 62.1, 66.7)


@dataclass(frozen=True)
class Pictures:
    """A named set of color images, normalised channel by channel."""

    name: str = "cifar10"

    def __call__(self, part: str) -> Items:
        """Items of part "train" or "test", inputs [items, 3, 32, 32]."""
        from triptych_common.data import load

        images = load(self.name, "train" if part == "train" else "held_out")
        if images.images.shape[1:] != (3, 32, 32):
            raise ValueError(f"data {self.name!r}: images of {tuple(images.images.shape[1:])}; expected cifar10")
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        pixels = images.images.float().sub_(mean).div_(std)  # in place: 600 MB instead of three times as much
        return Items(pixels, images.labels)


@dataclass(frozen=True)
class FlipAndCrop:
    """Mirrors half of the images and shifts each by up to `padding` pixels, filling with zeros.

    offsets: how many of the 2 padding + 1 possible offsets on each axis are sampled.
    """

    padding: int = 4
    # Of 9 offsets the released recipe's random numbers never reach the last, so the published networks saw 8.
    offsets: int = 8

    def __post_init__(self) -> None:
        if self.padding < 0 or not 1 <= self.offsets <= 2 * self.padding + 1:
            most = 2 * self.padding + 1
            raise ValueError(f"offsets {self.offsets}: with padding {self.padding} expected 1 to {most}")

    def __call__(self, inputs: Tensor, rng: torch.Generator) -> Tensor:
        items, _, height, width = inputs.shape
        mirrored = torch.rand(items, generator=rng) < 0.5
        top, left = torch.randint(self.offsets, (2, items), generator=rng)
        columns = torch.arange(width) + left[:, None] - self.padding
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
        rows = torch.arange(height) + top[:, None] - self.padding
        return _pixels(inputs, rows.to(inputs.device), columns.to(inputs.device))


def _pixels(inputs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels of each image at its own rows and columns [items, n]; zero beyond the border."""
    items, _, height, width = inputs.shape
    padded = F.pad(inputs, (0, 1, 0, 1))  # index height or width: the border's zeros
    rows = torch.where((rows < 0) | (rows >= height), height, rows)
    columns = torch.where((columns < 0) | (columns >= width), width, columns)
    each = torch.arange(items, device=inputs.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class SmallConvNet:
    """Builds 3x3 convolutions of stride 2 and 1 without biases, ReLUs, global average pooling and a linear classifier."""

    channels: tuple[int, int] = (16, 32)

    def __call__(self) -> nn.Sequential:
        first, second = self.channels
        layers = {
            "conv1": nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False),
            "relu1": nn.ReLU(),
            "conv2": nn.Conv2d(first, second, 3, padding=1, bias=False),
            "relu2": nn.ReLU(),
            "pool": nn.AdaptiveAvgPool2d(1),
            "flatten": nn.Flatten(),
            "fc": nn.Linear(second, 10),
        }
        return nn.Sequential(OrderedDict(layers))


_SCORES = classification(Prompts(1.2, 1.4), Prompts(0.35, 0.45))

CIFAR_CNN = SupervisedTask("cifar_cnn", SmallConvNet(), Pictures(), epochs=50, augment=FlipAndCrop(), scores=_SCORES)
