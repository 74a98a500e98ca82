"""Digits with a margin, 32 x 32, as a folder of images: sides that latents and patches can halve three times."""

from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F
from triptych_common import data
from triptych_common.images import png_bytes
from triptych_common.storage.files import new_folder

MARGIN = 2


def padded_digits(folder: Path, name: str) -> Path:
    """Write every image of a named data set to `folder/train` and `folder/held_out`, by class; once, whole or not at all."""
    if folder.exists():
        return folder
    with new_folder(folder, replaces="train") as new:
        for split in ("train", "held_out"):
            dataset = data.load(name, split)
            for label in range(dataset.num_classes):
                (new / split / str(label)).mkdir(parents=True)
            padded = with_margin(dataset.images)
            for index, (image, label) in enumerate(zip(padded, dataset.labels.tolist(), strict=True)):
                (new / split / str(label) / f"{index:05d}.png").write_bytes(png_bytes(image))
    return folder


def with_margin(images: UInt8[Tensor, "n channels 28 28"]) -> UInt8[Tensor, "n channels 32 32"]:
    """Two black pixels on every side."""
    return F.pad(images, (MARGIN,) * 4)


def without_margin(images: UInt8[Tensor, "n channels 32 32"]) -> UInt8[Tensor, "n channels 28 28"]:
    """The 28 x 28 pixels that the frozen instruments look at."""
    return images[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
