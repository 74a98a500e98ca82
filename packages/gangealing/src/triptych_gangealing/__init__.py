"""Visual alignment learned from a generator (GANgealing), and StyleGAN2 in plain PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych_gangealing.aligner import Aligner, Alignment, load_aligner
    from triptych_gangealing.digits32 import Digits32
    from triptych_gangealing.keypoints.pck import pck
    from triptych_gangealing.pictures import align, correspond
    from triptych_gangealing.spatial_transformer import SpatialTransformer, SpatialTransformerConfig
    from triptych_gangealing.stylegan2.augment import augment
    from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
    from triptych_gangealing.stylegan2.discriminator import Discriminator
    from triptych_gangealing.stylegan2.generator import Generator
    from triptych_gangealing.stylegan2.pickles import load_pickle
    from triptych_gangealing.stylegan2.train_config import PRESETS, GanTrainConfig
    from triptych_gangealing.stylegan2.weights import load_discriminator, load_generator
    from triptych_gangealing.warp import Warp

_HOMES = {  # imported when first asked for: torch alone takes seconds, and --help needs none of it
    "align": "pictures",
    "Aligner": "aligner",
    "Alignment": "aligner",
    "augment": "stylegan2.augment",
    "correspond": "pictures",
    "Digits32": "digits32",
    "Discriminator": "stylegan2.discriminator",
    "DiscriminatorConfig": "stylegan2.config",
    "GanTrainConfig": "stylegan2.train_config",
    "Generator": "stylegan2.generator",
    "GeneratorConfig": "stylegan2.config",
    "load_aligner": "aligner",
    "load_discriminator": "stylegan2.weights",
    "load_generator": "stylegan2.weights",
    "load_pickle": "stylegan2.pickles",
    "pck": "keypoints.pck",
    "PRESETS": "stylegan2.train_config",
    "SpatialTransformer": "spatial_transformer",
    "SpatialTransformerConfig": "spatial_transformer",
    "Warp": "warp",
}

__all__ = [
    "PRESETS",
    "Aligner",
    "Alignment",
    "Digits32",
    "Discriminator",
    "DiscriminatorConfig",
    "GanTrainConfig",
    "Generator",
    "GeneratorConfig",
    "SpatialTransformer",
    "SpatialTransformerConfig",
    "Warp",
    "align",
    "augment",
    "correspond",
    "load_aligner",
    "load_discriminator",
    "load_generator",
    "load_pickle",
    "pck",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
