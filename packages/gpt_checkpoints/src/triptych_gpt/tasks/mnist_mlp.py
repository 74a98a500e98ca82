"""Two-layer perceptrons on digits: the thesis's MNIST task, and a small sibling for laptops.  [thesis 3.3]"""

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn
from torch.nn import functional as F

from triptych_gpt.tasks.supervised import Items, SupervisedTask, classification
from triptych_gpt.tasks.task import Prompts

MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels in [0, 1], as the released recipe rounds them


@dataclass(frozen=True)
class Digits:
    """A named set of digits, normalised; side 14 averages 2x2 pixels. Raises ValueError, when called, for other images."""

    name: str = "mnist"
    side: int = 28

    def __post_init__(self) -> None:
        if self.side < 1 or 28 % self.side:
            raise ValueError(f"side {self.side}: expected a divisor of 28, over which pixels are averaged")

    def __call__(self, part: str) -> Items:
        """Items of part "train" or "test", inputs [items, side * side]."""
        from triptych_common.data import load

        images = load(self.name, "train" if part == "train" else "held_out")
        pixels = images.images.float() / 255
        if pixels.shape[1:] != (1, 28, 28):
            shape = tuple(pixels.shape[1:])
            raise ValueError(f"data {self.name!r}: images of {shape}; expected digits, mnist or mnist5k")
        return Items(((F.avg_pool2d(pixels, 28 // self.side) - MEAN) / STD).flatten(1), images.labels)


@dataclass(frozen=True)
class Perceptron:
    """Builds inputs-hidden-10 with ReLU; every layer starts as in PyTorch, U(+-1/sqrt(fan-in))."""

    inputs: int
    hidden: int = 10

    def __call__(self) -> nn.Sequential:
        layers = {"fc1": nn.Linear(self.inputs, self.hidden), "relu": nn.ReLU(), "fc2": nn.Linear(self.hidden, 10)}
        return nn.Sequential(OrderedDict(layers))


_SCORES = classification(Prompts(0.0, 0.0, 0.9), Prompts(0.05, 0.05, 0.9))

MNIST_MLP = SupervisedTask("mnist_mlp", Perceptron(784), Digits("mnist"), epochs=25, scores=_SCORES)
MNIST_MLP_14 = SupervisedTask("mnist_mlp_14", Perceptron(196), Digits("mnist5k", side=14), epochs=25, scores=_SCORES)
