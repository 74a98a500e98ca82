"""Shapes of published models, one row a model; making this table builds their networks, to derive the symmetry."""

import torch

from triptych_gpt.config import GptConfig
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.symmetry.derivation import derive
from triptych_gpt.symmetry.spec import Axis, PermutationSpec
from triptych_gpt.tasks.cifar_cnn import SmallConvNet
from triptych_gpt.tasks.mnist_mlp import Perceptron


def _cartpole() -> PermutationSpec:
    """The policy of the released cartpole model: 4-32-32-1, its log standard deviation first."""
    first, second = Axis("fc1"), Axis("fc2")
    axes = {
        "log_std": (None,),
        "fc1.weight": (first, None),
        "fc1.bias": (first,),
        "fc2.weight": (second, first),
        "fc2.bias": (second,),
        "fc3.weight": (None, second),
        "fc3.bias": (None,),
    }
    shapes = {"log_std": (1,), "fc1.weight": (32, 4), "fc1.bias": (32,), "fc2.weight": (32, 32), "fc2.bias": (32,),
              "fc3.weight": (1, 32), "fc3.bias": (1,)}  # fmt: skip
    return PermutationSpec(ParameterLayout(shapes), axes)


with torch.device("meta"):  # where layers draw no random numbers
    _MNIST, _CIFAR, _DIGITS = derive(Perceptron(784)()), derive(SmallConvNet()()), derive(Perceptron(196)())

PRESETS: dict[str, GptConfig] = {  # tokens of at most chunk_size  width  depth  heads
    "mnist_loss": GptConfig(_MNIST, "chunk", 1000, 1536, 12, 16, scalars="raw"),
    "mnist_error": GptConfig(_MNIST, "chunk", 1000, 1536, 12, 16, scalars="raw", metric_factor=100.0),
    "cifar10_loss": GptConfig(_CIFAR, "chunk", 576, 2048, 12, 16, scalars="raw"),
    "cifar10_error": GptConfig(_CIFAR, "chunk", 576, 2048, 12, 16, scalars="raw", metric_factor=100.0),
    "cartpole": GptConfig(_cartpole(), "layer", None, 1536, 12, 12, scalars="raw"),
    "laptop": GptConfig(_DIGITS, "neuron", None, 256, 4, 4),  # its metric_scale comes from the zoo
}
