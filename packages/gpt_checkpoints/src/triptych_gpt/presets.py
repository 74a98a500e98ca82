"""Shapes of published models, one row each."""

import torch

from triptych_gpt.config import GptConfig
from triptych_gpt.symmetry.derivation import derive
from triptych_gpt.tasks.cifar_cnn import SmallConvNet
from triptych_gpt.tasks.mnist_mlp import Perceptron
from triptych_gpt.tasks.reinforcement.environments import Continuous
from triptych_gpt.tasks.reinforcement.policies import Selu, with_log_std

# Networks are built only for their symmetry, on meta, where layers draw no random numbers.
with torch.device("meta"):
    _MNIST, _CIFAR, _DIGITS = derive(Perceptron(784)()), derive(SmallConvNet()()), derive(Perceptron(196)())
    _CARTPOLE = derive(with_log_std(Selu()(), Continuous(1)))

# metric_factor: the released error models were trained on errors in per cent, ours are fractions.
PRESETS: dict[str, GptConfig] = {  # tokens of at most chunk_size  width  depth  heads
    "mnist_loss": GptConfig(_MNIST, "chunk", 1000, 1536, 12, 16, scalars="raw"),
    "mnist_error": GptConfig(_MNIST, "chunk", 1000, 1536, 12, 16, scalars="raw", metric_factor=100.0),
    "cifar10_loss": GptConfig(_CIFAR, "chunk", 576, 2048, 12, 16, scalars="raw"),
    "cifar10_error": GptConfig(_CIFAR, "chunk", 576, 2048, 12, 16, scalars="raw", metric_factor=100.0),
    "cartpole": GptConfig(_CARTPOLE, "layer", None, 1536, 12, 12, scalars="raw"),
    "laptop": GptConfig(_DIGITS, "neuron", None, 256, 4, 4),  # its metric_scale comes from the zoo
    "cartpole_small": GptConfig(_CARTPOLE, "neuron", None, 128, 4, 4),
}
