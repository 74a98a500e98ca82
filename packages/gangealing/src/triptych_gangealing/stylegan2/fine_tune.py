"""Starting from networks that exist: a finished run's, or somebody else's."""

import torch
from torch import nn
from triptych_common.cli import say

from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.interop import open_networks
from triptych_gangealing.stylegan2.weights import locate


def take_over(source: str, generator: Generator, discriminator: Discriminator) -> None:
    """Replace the weights of both networks by those of `source`: a run folder, a file of ours, or a foreign checkpoint.

    A source without a discriminator leaves that one freshly initialised, and says so.
    Raises ValueError naming the first tensor that does not fit, FileNotFoundError where there is nothing.
    """
    found = open_networks(locate(source))
    if found.generator is None:
        raise ValueError(f"{source}: holds no generator to start from")
    _copy(found.generator()[0], generator, source)
    if found.discriminator is None:
        say(f"{source}: no discriminator in it; one is trained from scratch")
    else:
        _copy(found.discriminator()[0], discriminator, source)


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module, where: str) -> None:
    theirs, kind = source.state_dict(), type(target).__name__.lower()
    for name, tensor in target.state_dict().items():
        if name not in theirs or theirs[name].shape != tensor.shape:
            shape = tuple(theirs[name].shape) if name in theirs else "absent"
            raise ValueError(
                f"{where}: {kind} has {name} {shape}, this config wants {tuple(tensor.shape)}; "
                "pass its own resolution, channels, z_dim and classes"
            )
    target.load_state_dict({name: theirs[name] for name in target.state_dict()})
