"""Starting from networks that exist: a finished run's, or somebody else's."""

import torch
from torch import nn
from triptych_common.cli import echo

from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.interop import open_networks


def take_over(source: str, generator: Generator, discriminator: Discriminator) -> None:
    """Replace the weights of both networks by those of `source`: a run folder, a file of ours, or a foreign checkpoint.

    A source without a discriminator leaves that one freshly initialised, and says so.
    Raises ValueError naming the first tensor that does not fit, FileNotFoundError where there is nothing.
    """
    found = open_networks(source)
    if found.generator is None:
        raise ValueError(f"{source}: holds no generator to start from")
    _copy(found.generator()[0], generator, source)
    if found.discriminator is None:
        echo(f"{source}: no discriminator in it; one is trained from scratch")
    else:
        _copy(found.discriminator()[0], discriminator, source)


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module, where: str) -> None:
    theirs, ours, kind = source.state_dict(), target.state_dict(), type(target).__name__.lower()
    for name in [*ours, *theirs]:
        has, wants = (tuple(state[name].shape) if name in state else "absent" for state in (theirs, ours))
        if has != wants:
            raise ValueError(
                f"{where}: {kind} has {name} {has}, this config wants {wants}; "
                "pass its own resolution, channels, z_dim, classes and architecture"
            )
    target.load_state_dict(theirs)
