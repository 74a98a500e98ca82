"""Digits with a margin, 32 x 32, as a folder of images: sides that latents and patches can halve three times."""

from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F
from triptych_common import data
from triptych_common.images import png_bytes
from triptych_common.storage.atomic import new_folder

SIDE, MARGIN = 32, 2


def padded_digits(folder: Path, name: str) -> Path:
    """`folder/train` and `folder/held_out` with every image of a named data set of digits, by class; made once, whole or not at
    all.
    """
    if folder.exists():
        return folder
    with new_folder(folder, replaces="train") as new:
        for split in ("train", "held_out"):
            dataset = data.load(name, split)
            for label in range(dataset.num_classes):
                (new / split / str(label)).mkdir(parents=True)
            padded = F.pad(dataset.images, (MARGIN,) * 4)
            for index, (image, label) in enumerate(zip(padded, dataset.labels.tolist(), strict=True)):
                (new / split / str(label) / f"{index:05d}.png").write_bytes(png_bytes(image))
    return folder


def without_margin(images: UInt8[Tensor, "n channels 32 32"]) -> UInt8[Tensor, "n channels 28 28"]:
    """What the frozen instruments look at."""
    return images[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
