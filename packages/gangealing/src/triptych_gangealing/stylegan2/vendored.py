"""NVIDIA's own StyleGAN2 networks in place of ours, for those who accept their licence (non-commercial).

`make vendor-stylegan2-ada` fetches a pinned commit of stylegan2-ada-pytorch into third_party/, which git ignores; none of it is
part of this project. The same tests of parity run on both.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator

FOLDER = Path("third_party/stylegan2-ada-pytorch")
COMMIT = "d72cc7d041b42ec8e806021a205ed9349f87c6a4"
_MODULES = ("torch_utils", "dnnlib", "training")


def vendored(network: Generator | Discriminator, folder: Path = FOLDER) -> nn.Module:
    """Their network with the shape and weights of ours, called as ours is.

    Runs the code in `folder`. Raises FileNotFoundError where it was not fetched, ImportError where it lacks a package of its own,
    ValueError where its tensors are not ours.
    """
    if not (folder / "training" / "networks.py").is_file():
        raise FileNotFoundError(f"{folder}: no stylegan2-ada-pytorch there; run make vendor-stylegan2-ada")
    with _importable(folder):
        try:
            networks = importlib.import_module("training.networks")
        except ModuleNotFoundError as error:
            raise ImportError(f"{folder} needs a package: pip install {error.name}") from error
        theirs = _generator(networks, network) if isinstance(network, Generator) else _discriminator(networks, network)
    ours = network.state_dict()
    filters = {name for name in theirs.state_dict() if name.endswith("resample_filter")}
    if differing := sorted((theirs.state_dict().keys() - filters) ^ ours.keys()):
        raise ValueError(f"{folder}: {differing[0]} is not in both networks; fetch commit {COMMIT[:12]}")
    theirs.load_state_dict(ours, strict=False)
    theirs.requires_grad_(False).eval()
    return VendoredGenerator(theirs) if isinstance(network, Generator) else VendoredDiscriminator(theirs)


class VendoredGenerator(nn.Module):
    """Their generator behind our call: noise is "const" or "none"."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        z: Float[Tensor, "batch z_dim"],
        c: Float[Tensor, "batch c_dim"] | None = None,
        *,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise: str = "const",
    ) -> Float[Tensor, "batch channels height width"]:
        labels = z.new_zeros(len(z), 0) if c is None else c
        return self.network(
            z,
            labels,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            noise_mode=noise,
            force_fp32=True,
        )


class VendoredDiscriminator(nn.Module):
    """Their discriminator behind our call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, images: Float[Tensor, "batch channels height width"], c: Float[Tensor, "batch c_dim"] | None = None
    ) -> Float[Tensor, " batch"]:
        labels = images.new_zeros(len(images), 0) if c is None else c
        return self.network(images, labels, force_fp32=True).squeeze(1)


def _generator(networks: ModuleType, network: Generator) -> nn.Module:
    config = network.config
    return networks.Generator(
        **_images(config),
        z_dim=config.z_dim,
        w_dim=config.w_dim,
        mapping_kwargs={"num_layers": config.mapping_layers},
        synthesis_kwargs=_layers(config),
    )


def _discriminator(networks: ModuleType, network: Discriminator) -> nn.Module:
    config = network.config
    return networks.Discriminator(
        **_images(config),
        **_layers(config),
        mapping_kwargs={"num_layers": config.mapping_layers},
        epilogue_kwargs={"mbstd_group_size": config.mbstd_group_size, "mbstd_num_channels": config.mbstd_channels},
    )


def _images(config: GeneratorConfig | DiscriminatorConfig) -> dict[str, Any]:
    return {"c_dim": config.c_dim, "img_resolution": config.resolution, "img_channels": config.image_channels}


def _layers(config: GeneratorConfig | DiscriminatorConfig) -> dict[str, Any]:
    return {
        "channel_base": config.channel_base,
        "channel_max": config.channel_max,
        "architecture": config.architecture,
        "conv_clamp": config.conv_clamp,
    }


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """With their top-level modules, whose names anybody may use, importable for as long as it takes."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in _MODULES}
    sys.path.insert(0, str(folder.resolve()))
    try:
        with torch.no_grad():
            yield
    finally:
        sys.path.remove(str(folder.resolve()))
        for name in [name for name in sys.modules if name.split(".")[0] in _MODULES]:
            del sys.modules[name]
        sys.modules.update(before)
