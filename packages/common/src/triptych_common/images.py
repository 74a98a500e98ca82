"""Images for display: conversion to 8 bits, grids, PNG and GIF."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from triptych_common.storage.atomic import write_bytes


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Map [-1, 1] to 0..255: 127.5 x + 128, clamped and truncated, as the released DiT writes its PNGs."""
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
    grid = torch.full(
        (channels, rows * (height + padding) + padding, columns * (width + padding) + padding), background,
        dtype=torch.uint8,
    )  # fmt: skip
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + padding) + padding, (i % columns) * (width + padding) + padding
        grid[:, top : top + height, left : left + width] = image
    return grid


def png_bytes(
    image: UInt8[Tensor, "channels height width"], *, scale: int = 1, text: Mapping[str, str] | None = None
) -> bytes:
    """A gray or RGB image as PNG, each pixel enlarged to `scale` x `scale`; `text` is stored as the file's metadata."""
    from PIL import Image, PngImagePlugin

    pixels = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def gif_bytes(frames: UInt8[Tensor, "n channels height width"], *, fps: int, loop: bool = False) -> bytes:
    """Gray or RGB frames as an animated GIF. Its clock counts hundredths of a second; a frame lasts at least two."""
    from PIL import Image

    pixels = frames.permute(0, 2, 3, 1).cpu().numpy()
    pictures = [Image.fromarray(np.ascontiguousarray(each[..., 0] if each.shape[-1] == 1 else each)) for each in pixels]
    forever = {"loop": 0} if loop else {}
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=max(20, round(1000 / fps)), **forever
    )
    return buffer.getvalue()


def write_png(path: Path, image: UInt8[Tensor, "channels height width"], *, scale: int = 1) -> None:
    """Write a PNG file, atomically."""
    write_bytes(path, png_bytes(image, scale=scale))
