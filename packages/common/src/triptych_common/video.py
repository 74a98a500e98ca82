"""Frames of a walk between samples, and videos: MP4 with PyAV (extra: video), or an animated GIF with Pillow."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from triptych_common.extras import import_extra
from triptych_common.images import gif_bytes
from triptych_common.storage.files import write_bytes

SMALLEST_SIDE = 256  # smaller frames are enlarged by repeating pixels: players and codecs would blur them


def course(stops: int, frames: int, *, loop: bool) -> Float[Tensor, "n 3"]:
    """The frames of a walk over `stops`, each as (stop, next stop, fraction of the way), with `frames` per leg.

    It ends on the last stop, or, if it loops, one frame before the first.
    """
    legs = [(i, i + 1) for i in range(stops - 1)] + ([(stops - 1, 0)] if loop else [])
    rows = [(here, there, i / frames) for here, there in legs for i in range(frames)]
    return torch.tensor(rows if loop else [*rows, (stops - 1, stops - 1, 0.0)], dtype=torch.float64)


def ends(stops: Float[Tensor, "stops *shape"], leg: Float[Tensor, "n 3"]) -> tuple[Tensor, Tensor]:
    """The stops before and after each frame."""
    return stops[leg[:, 0].long()], stops[leg[:, 1].long()]


def write_video(path: Path, frames: UInt8[Tensor, "n channels height width"], *, fps: int, loop: bool = False) -> None:
    """Write gray or RGB frames to `path`, an .mp4 or a .gif, atomically; `loop` makes a GIF repeat for ever.

    Raises ImportError, saying what to install, if an .mp4 needs PyAV and it is absent; OSError when the disk refuses.
    """
    scale = max(1, -(-SMALLEST_SIDE // min(frames.shape[2:])))
    frames = frames.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    write_bytes(path, _mp4(frames, fps) if path.suffix == ".mp4" else gif_bytes(frames, fps=fps, loop=loop))


def import_av() -> Any:
    """The module of PyAV. Raises ImportError, saying what to install, if it is absent."""
    return import_extra("av", "mp4 needs a package: pip install 'triptych-common[video]'; gif needs none")


def _mp4(frames: UInt8[Tensor, "n channels height width"], fps: int) -> bytes:
    av = import_av()
    rgb = frames.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    # Sides must be even, as chroma has half the resolution.
    rgb = np.pad(rgb, [(0, 0), (0, rgb.shape[1] % 2), (0, rgb.shape[2] % 2), (0, 0)], mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = container.add_stream(codec, rate=fps, options={"crf": "16"} if codec == "libx264" else {"q:v": "2"})
        stream.height, stream.width, stream.pix_fmt = rgb.shape[1], rgb.shape[2], "yuv420p"
        for image in rgb:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
