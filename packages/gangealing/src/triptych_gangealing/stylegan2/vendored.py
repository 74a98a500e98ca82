"""NVIDIA's own StyleGAN2 networks in place of ours, for those who accept their non-commercial licence.

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

from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Classes, Generator, Images, Latents

FOLDER = Path("third_party/stylegan2-ada-pytorch")
COMMIT = "d72cc7d041b42ec8e806021a205ed9349f87c6a4"
_MODULES = ("torch_utils", "dnnlib", "training")


def vendored(network: Generator | Discriminator, folder: Path = FOLDER) -> nn.Module:
    """Their network with the shape and weights of ours, behind our interface. Runs the code in `folder`.

    Raises FileNotFoundError where it was not fetched, ImportError where it lacks a package of its own,
    ValueError where its tensors are not ours.
    """
    if not (folder / "training" / "networks.py").is_file():
        raise FileNotFoundError(f"{folder}: no stylegan2-ada-pytorch there; run make vendor-stylegan2-ada")
    with _importable(folder):
        try:
            networks = importlib.import_module("training.networks")
        except ModuleNotFoundError as error:
            raise ImportError(f"{folder} needs a package: pip install {error.name}") from error
        theirs = _theirs(networks, network)
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

    def forward(self, z: Latents, c: Classes = None, *, noise: str = "const", **truncation: Any) -> Images:
        """truncation: truncation_psi and truncation_cutoff."""
        labels = z.new_zeros(len(z), 0) if c is None else c
        return self.network(z, labels, **truncation, noise_mode=noise, force_fp32=True)


class VendoredDiscriminator(nn.Module):
    """Their discriminator behind our call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Images, c: Classes = None) -> Float[Tensor, " batch"]:
        labels = images.new_zeros(len(images), 0) if c is None else c
        return self.network(images, labels, force_fp32=True).squeeze(1)


def _theirs(networks: ModuleType, network: Generator | Discriminator) -> nn.Module:
    """A freshly initialised network of theirs with the shape of ours."""
    config = network.config
    common: dict[str, Any] = {
        "c_dim": config.c_dim, "img_resolution": config.resolution, "img_channels": config.image_channels,
        "mapping_kwargs": {"num_layers": config.mapping_layers},
    }  # fmt: skip
    layers = {name: getattr(config, name) for name in ("channel_base", "channel_max", "architecture", "conv_clamp")}
    if isinstance(config, GeneratorConfig):
        return networks.Generator(**common, z_dim=config.z_dim, w_dim=config.w_dim, synthesis_kwargs=layers)
    epilogue = {"mbstd_group_size": config.mbstd_group_size, "mbstd_num_channels": config.mbstd_channels}
    return networks.Discriminator(**common, **layers, epilogue_kwargs=epilogue)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """With their top-level modules importable. Others may use the same names, so `sys.modules` is restored."""
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
