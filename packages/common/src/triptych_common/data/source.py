"""What every source of images offers, whether it lies in memory, in a folder or in a Hugging Face data set."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from triptych_common.data.decoding import center_crop, to_tensor

HELD_OUT_NAMES = ("held_out", "val", "validation", "valid", "test")


@runtime_checkable
class ImageSource(Protocol):
    """Numbered images with labels 0 .. num_classes-1; an unconditional source has one class.

    Sources are small when pickled and read one image at a time, so that worker processes can share the work.
    """

    name: str
    labels: Int[Tensor, " items"]
    num_classes: int
    class_names: tuple[str, ...]
    lossy: bool

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """One image as it is, upright and RGB. Raises UnreadableImage for a damaged one."""
        ...

    def locate(self, index: int) -> str:
        """Where an image stands, for messages and lists."""
        ...

    def fingerprint(self) -> str:
        """A hash that tells whether two sources are the same data, for provenance; its prefix says what was hashed."""
        ...

    def read(
        self, index: int, size: int | tuple[int, int] | None = None, *, channels: int = 3, allow_upscale: bool = False
    ) -> UInt8[Tensor, "channels height width"]:
        """One image, cropped as `center_crop` does to (height, width) or a square; gray where `channels` is 1.

        Raises UnreadableImage for a damaged image, ImageTooSmall for one that would have to grow.
        """
        image = self.image(index)
        if size is not None:
            image = center_crop(image, size, allow_upscale=allow_upscale, path=self.locate(index))
        return to_tensor(image, channels)


def choose_split(split: str, available: Sequence[str], where: str) -> str:
    """The part of that name; for "held_out" the first there is of val, validation, valid, test.

    Raises ValueError where there is none.
    """
    for name in HELD_OUT_NAMES if split == "held_out" else (split,):
        if name in available:
            return name
    raise ValueError(f"split {split!r} of {where}: expected one of {', '.join(available)}")
