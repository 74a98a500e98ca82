"""Diffusion transformers for images: chapter 2 of the thesis."""

from triptych_dit.config import PRESETS, DiTConfig
from triptych_dit.flops import gflops
from triptych_dit.interop import from_diffusers, load_released, to_diffusers
from triptych_dit.model import DiT
from triptych_dit.weights import load_model

__all__ = [
    "PRESETS",
    "DiT",
    "DiTConfig",
    "from_diffusers",
    "gflops",
    "load_model",
    "load_released",
    "to_diffusers",
]
