"""Shapes of published models, one row each."""

from collections import OrderedDict

import torch
from torch import nn

from triptych_gpt.config import GptConfig
from triptych_gpt.symmetry.derivation import derive
from triptych_gpt.tasks.cifar_cnn import SmallConvNet
from triptych_gpt.tasks.mnist_mlp import Perceptron


def _policy() -> nn.Sequential:
    """The network of the released cartpole model, 4-32-32-1."""
    layers = {"fc1": nn.Linear(4, 32), "tanh1": nn.Tanh(), "fc2": nn.Linear(32, 32), "tanh2": nn.Tanh()}
    policy = nn.Sequential(OrderedDict({**layers, "fc3": nn.Linear(32, 1)}))
    policy.log_std = nn.Parameter(torch.empty(1))  # theta begins with it: a module's own parameters precede its layers'
    return policy


# Networks are built only for their symmetry, on meta, where layers draw no random numbers.
with torch.device("meta"):
    _MNIST, _CIFAR, _DIGITS = derive(Perceptron(784)()), derive(SmallConvNet()()), derive(Perceptron(196)())
    _CARTPOLE = derive(_policy())

# metric_factor: the released error models were trained on errors in per cent, ours are fractions.
PRESETS: dict[str, GptConfig] = {  # tokens of at most chunk_size  width  depth  heads
    "mnist_loss": GptConfig(_MNIST, "chunk", 1000, 1536, 12, 16, scalars="raw"),
    "mnist_error": GptConfig(_MNIST, "chunk", 1000, 1536, 12, 16, scalars="raw", metric_factor=100.0),
    "cifar10_loss": GptConfig(_CIFAR, "chunk", 576, 2048, 12, 16, scalars="raw"),
    "cifar10_error": GptConfig(_CIFAR, "chunk", 576, 2048, 12, 16, scalars="raw", metric_factor=100.0),
    "cartpole": GptConfig(_CARTPOLE, "layer", None, 1536, 12, 12, scalars="raw"),
    "laptop": GptConfig(_DIGITS, "neuron", None, 256, 4, 4),  # its metric_scale comes from the zoo
}
