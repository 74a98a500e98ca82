"""Image files to pixels, the same way wherever the bytes come from.

Convention: uint8, channels first; sizes are (height, width), or one number for a square.

The EXIF orientation is applied; gray is repeated over the channels; transparency is composited over white; CMYK and
palettes are converted, colour profiles ignored; 16-bit values keep their high byte, as in Pillow for 16-bit colour; of an
animation the first frame is read.

What a file may cost is bounded before its pixels are decoded: formats that Pillow decodes in this process (an EPS file would
start Ghostscript), sides of at most 32,768 pixels, and 64 megapixels in all, or $TRIPTYCH_MAX_MEGAPIXELS.
"""

import io
import math
import os
import stat
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(["AVIF"] if features.check("avif") else []))
_REDUCIBLE = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
MAX_SIDE = 32_768
MAX_MEGAPIXELS = 64.0
MAX_MEGAPIXELS_VARIABLE = "TRIPTYCH_MAX_MEGAPIXELS"
MAX_FILE_BYTES = 1 << 30
WHOLE_MEGAPIXELS = 16  # pictures up to this size, as most cameras make them, are never reduced while they are read


class UnreadableImage(ValueError):
    """An image that cannot be used, with its `path` and the `reason`, so that callers can list such images or stop."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both arguments, so that it can be pickled in a worker process
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class ImageTooSmall(UnreadableImage):
    """An intact image smaller than the crop."""


def decode(content: bytes, path: str, *, mode: Literal["RGB", "RGBA"] = "RGB") -> Image.Image:
    """Decode an image file's content, upright and in a mode; `path` is for error messages.

    Raises UnreadableImage if it is truncated, no image in one of `FORMATS`, larger than what may be decoded, or of a format
    without a defined white.
    """
    return _decoded(content, path, mode)[0]


def _decoded(content: bytes, path: str, mode: str, at_least: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """`decode`, and the (height, width) of the whole; see `read_reduced` for `at_least`."""
    if not content:
        raise UnreadableImage(path, "the file is empty")
    try:
        image = _opened(content)
        width, height = image.size
        least = at_least if at_least is not None and width * height > WHOLE_MEGAPIXELS * 1e6 else max(image.size)
        size = (width, height) if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8) else (height, width)
        if (factor := max(image.size) // least) > 1:
            image.draft(None, (width // factor, height // factor))  # JPEG decodes at a half, a quarter or an eighth
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if (factor := max(image.size) // least) > 1:
            image = (image if image.mode in _REDUCIBLE else _to_rgb(image)).reduce(factor)
        return _to_rgb(image) if mode == "RGB" else image.convert(mode), size
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = f"not an image in a known format ({', '.join(FORMATS)}), or cut short"
    except Exception as error:  # on damaged input decoders raise anything: OSError, SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
    raise UnreadableImage(path, reason)


def read_image(path: Path, *, mode: Literal["RGB", "RGBA"] = "RGB") -> Image.Image:
    """`decode` of a file. Raises UnreadableImage also for a pipe or device and a file above 1 GB, OSError as `open` does."""
    return decode(_content(path), str(path), mode=mode)


def read_reduced(path: Path, at_least: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """`read_image`, and the (height, width) of the whole picture.

    at_least: above `WHOLE_MEGAPIXELS` it comes reduced, by a box filter and a whole number, if its longer side keeps that many
        pixels, so that memory follows what is made of the picture. Smaller ones always come as they are.
    """
    return _decoded(_content(path), str(path), "RGB", at_least)


def _content(path: Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImage(str(path), "not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise UnreadableImage(str(path), f"{status.st_size:,} bytes, above the {MAX_FILE_BYTES:,} of an image file")
    return path.read_bytes()


def max_megapixels() -> float:
    """The largest image that is decoded. Raises ValueError for a variable that is no positive number."""
    text = os.environ.get(MAX_MEGAPIXELS_VARIABLE, str(MAX_MEGAPIXELS))
    try:
        limit = float(text)
    except ValueError:
        limit = 0
    if not limit > 0:
        raise ValueError(f"{MAX_MEGAPIXELS_VARIABLE}={text!r}: expected a number of megapixels above 0")
    return limit


def _opened(content: bytes) -> Image.Image:
    """An image whose pixels are not decoded yet. Raises ValueError for one whose pixels would take too much memory."""
    limit = max_megapixels()
    # Pillow has a bound of its own, which holds a user back who raised ours.
    if Image.MAX_IMAGE_PIXELS is not None and limit * 1e6 > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = math.ceil(limit * 1e6)
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{width}x{height} pixels: a side above {MAX_SIDE:,}; cut it into parts")
    if width * height > limit * 1e6:
        raise ValueError(
            f"{width}x{height} pixels: above {limit:g} megapixels; reduce it, or set "
            f"{MAX_MEGAPIXELS_VARIABLE}={math.ceil(width * height / 1e6)}"
        )
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save it with 8 or 16 bits")
    # Pillow's own conversion of integer pixels clips them at 255, which makes nearly everything white.
    if image.mode.startswith("I"):
        values = np.array(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no defined white; save it with 8 or 16 bits")
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = 65535
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(
    image: Image.Image, size: int | tuple[int, int], *, allow_upscale: bool = False, path: str = "image"
) -> Image.Image:
    """Resize an image until it just covers `size`, and crop its centre, as ADM and DiT prepare ImageNet.

    Raises ImageTooSmall, naming `path`, for an image smaller than `size`, unless `allow_upscale`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"crop {size}: expected a height and width of at least 1")
    if (image.height < height or image.width < width) and not allow_upscale:
        sizes = f"{image.width}x{image.height} pixels are fewer than the crop's {width}x{height} (width x height)"
        raise ImageTooSmall(path, f"{sizes}; choose a smaller size or allow upscaling")
    # A box filter halves it while it is at least twice too large; bicubic interpolation alone would alias.
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image, channels: int = 3) -> UInt8[Tensor, "channels height width"]:
    """The pixels of an RGB image, or, if `channels` is 1, its luma (ITU-R 601), which is exact for gray images.

    Raises ValueError for other numbers of channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels {channels}: expected 1 (gray) or 3 (RGB)")
    pixels = np.array(image.convert("L") if channels == 1 else image)
    return torch.from_numpy(pixels.reshape(image.height, image.width, channels)).permute(2, 0, 1).contiguous()
