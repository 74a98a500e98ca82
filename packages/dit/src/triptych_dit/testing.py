"""Support for tests: the command line in this process, and small random networks."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from triptych_common.cli import main
from triptych_common.testing import Done, run_here

from triptych_dit.cli import COMMANDS
from triptych_dit.config import DiTConfig
from triptych_dit.model import DiT

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def run_dit(*words: object) -> Done:
    """Run `triptych-dit` in this process, capturing its output."""
    return run_here(partial(main, "triptych-dit", COMMANDS), *words)


def random_model(
    config: DiTConfig, *, seed: int = 0, std: float = 0.2, dtype: torch.dtype = torch.float64, trainable: bool = False
) -> DiT:
    """A DiT in evaluation mode whose every weight is random: a freshly initialised one is mostly zero."""
    model = DiT(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.normal_(std=std, generator=generator)
    return model if trainable else model.requires_grad_(False)


def random_vae(block_out_channels: tuple[int, ...] = (4, 8), *, seed: int = 0, **config: Any) -> "AutoencoderKL":
    """An untrained autoencoder of diffusers; `config` as for `AutoencoderKL`."""
    from diffusers import AutoencoderKL

    depth = len(block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            block_out_channels=block_out_channels,
            norm_num_groups=block_out_channels[0] // 2,
            **config,
        ).eval()
