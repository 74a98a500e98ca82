"""Diffusion transformers for images: chapter 2 of the thesis."""

from triptych_dit.config import PRESETS, DiTConfig
from triptych_dit.model import DiT

__all__ = ["PRESETS", "DiT", "DiTConfig"]
