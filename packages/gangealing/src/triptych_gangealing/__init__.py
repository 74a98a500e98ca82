"""StyleGAN2 in plain PyTorch, and visual alignment learned from it (thesis, chapter 4)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych_gangealing.digits32 import Digits32
    from triptych_gangealing.stylegan2.augment import augment
    from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
    from triptych_gangealing.stylegan2.discriminator import Discriminator
    from triptych_gangealing.stylegan2.generator import Generator
    from triptych_gangealing.stylegan2.pickles import load_pickle
    from triptych_gangealing.stylegan2.train_config import PRESETS, GanTrainConfig
    from triptych_gangealing.stylegan2.weights import load_discriminator, load_generator

_HOMES = {  # imported when first asked for: torch alone takes seconds, and --help needs none of it
    "Digits32": "digits32",
    "augment": "stylegan2.augment",
    "Discriminator": "stylegan2.discriminator",
    "DiscriminatorConfig": "stylegan2.config",
    "GanTrainConfig": "stylegan2.train_config",
    "Generator": "stylegan2.generator",
    "GeneratorConfig": "stylegan2.config",
    "PRESETS": "stylegan2.train_config",
    "load_discriminator": "stylegan2.weights",
    "load_generator": "stylegan2.weights",
    "load_pickle": "stylegan2.pickles",
}

__all__ = [
    "PRESETS",
    "Digits32",
    "Discriminator",
    "DiscriminatorConfig",
    "GanTrainConfig",
    "Generator",
    "GeneratorConfig",
    "augment",
    "load_discriminator",
    "load_generator",
    "load_pickle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
