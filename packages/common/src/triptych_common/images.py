"""Images for display: conversion to 8 bits, grids, PNG and GIF."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from triptych_common.storage.files import write_bytes

if TYPE_CHECKING:
    from PIL import Image


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Map [-1, 1] to 0..255: 127.5 x + 128, clamped and truncated, as the released DiT writes its PNGs."""
    # Truncation after adding 128 rounds 127.5 (x + 1) to the nearest integer.
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(images: UInt8[Tensor, "*shape"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Map 0..255 to [-1, 1] (0 to -1, 255 to 1), computed in `dtype`; `to_uint8` inverts it exactly from float32."""
    return images.to(dtype) / 127.5 - 1


def image_grid(
    images: UInt8[Tensor, "n channels height width"], columns: int, *, padding: int = 2, background: int = 128
) -> UInt8[Tensor, "channels grid_height grid_width"]:
    """Images side by side in `columns`, row by row, with `padding` pixels of gray level `background` around each."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    size = rows * (height + padding) + padding, columns * (width + padding) + padding
    grid = torch.full((channels, *size), background, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + padding) + padding, (i % columns) * (width + padding) + padding
        grid[:, top : top + height, left : left + width] = image
    return grid


def png_bytes(
    image: UInt8[Tensor, "channels height width"], *, scale: int = 1, text: Mapping[str, str] | None = None
) -> bytes:
    """A gray or RGB image as PNG, each pixel enlarged to `scale` x `scale`; `text` is stored as the file's metadata."""
    from PIL import PngImagePlugin

    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    _picture(image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def gif_bytes(frames: UInt8[Tensor, "n channels height width"], *, fps: int, loop: bool = False) -> bytes:
    """Gray or RGB frames as an animated GIF, at no more than 50 frames a second."""
    first, *others = map(_picture, frames)
    forever: dict[str, int] = {"loop": 0} if loop else {}  # without it a GIF plays once
    buffer = io.BytesIO()
    # The clock counts hundredths of a second, and browsers slow down frames that last only one.
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=max(20, round(1000 / fps)), **forever)
    return buffer.getvalue()


def _picture(image: UInt8[Tensor, "channels height width"]) -> "Image.Image":
    from PIL import Image

    pixels = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def write_png(path: Path, image: UInt8[Tensor, "channels height width"], *, scale: int = 1) -> None:
    """Write a PNG file, atomically."""
    write_bytes(path, png_bytes(image, scale=scale))
