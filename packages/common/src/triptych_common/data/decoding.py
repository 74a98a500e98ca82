"""Image files to pixels, the same way wherever the bytes come from.

Convention: uint8, channels first; sizes are (height, width), or one number for a square.

Pixels stand as people see them: the EXIF orientation is applied; gray is repeated over the channels; transparency is
laid over white; CMYK and palettes are converted, colour profiles ignored; 16-bit values keep their high byte, as Pillow
itself does for 16-bit colour; of an animation the first frame counts.
"""

import io

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


class UnreadableImage(ValueError):
    """An image that cannot be used: `path` and `reason`. Whoever reads many lists and counts them, or stops."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it survives the way out of a worker process
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class ImageTooSmall(UnreadableImage):
    """An intact image that the crop would have to enlarge."""


def decode(content: bytes, path: str) -> Image.Image:
    """An encoded image, upright and RGB; `path` is for the message.

    Raises UnreadableImage for what is truncated, no image, too large to be one, or has no defined white.
    """
    if not content:
        raise UnreadableImage(path, "the file is empty")
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = "not an image in a known format, or cut short"
    except Exception as error:  # fed junk, decoders raise anything: OSError, SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
    raise UnreadableImage(path, reason)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save it with 8 or 16 bits")
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
    """The middle of an image: halved by a box filter while twice too large, brought to where it just covers the target
    by a bicubic one, and cut.  [as ADM and DiT prepare ImageNet, for any rectangle]

    Raises ImageTooSmall, naming `path`, unless `allow_upscale`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"crop {size}: expected a height and width of at least 1")
    if (image.height < height or image.width < width) and not allow_upscale:
        raise ImageTooSmall(
            path,
            f"{image.width}x{image.height} pixels are fewer than the crop's {width}x{height} (width x height); "
            "choose a smaller size or allow upscaling",
        )
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image, channels: int = 3) -> UInt8[Tensor, "channels height width"]:
    """Pixels of an RGB image, or with `channels` 1 its luma (ITU-R 601), which is exact for gray."""
    if channels not in (1, 3):
        raise ValueError(f"channels {channels}: expected 1 (gray) or 3 (RGB)")
    pixels = np.array(image.convert("L") if channels == 1 else image)
    return torch.from_numpy(pixels.reshape(image.height, image.width, channels)).permute(2, 0, 1).contiguous()
