"""The interface of every source of images, whether in memory, in a folder or in a Hugging Face data set."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from triptych_common.data.contents import Contents
from triptych_common.data.decoding import center_crop, to_tensor

HELD_OUT_NAMES = ("held_out", "val", "validation", "valid", "test")


@runtime_checkable
class ImageSource(Protocol):
    """A sequence of images with labels 0 .. num_classes-1; an unconditional source has one class.

    Sources other than data sets in memory are small when pickled, so that worker processes can share the reading.
    """

    name: str
    labels: Int[Tensor, " items"]
    num_classes: int
    class_names: tuple[str, ...]
    lossy: bool

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """An image in its own size, upright and RGB. Raises UnreadableImage for a damaged one."""
        ...

    def locate(self, index: int) -> str:
        """The path or position of an image, for messages and lists."""
        ...

    def fingerprint(self) -> str:
        """A hash that identifies the data, for provenance; its prefix names what was hashed."""
        ...

    def listing(self) -> Contents | None:
        """What `fingerprint` stands for, by class, where that is names and sizes of files."""
        return None

    def changed_since(self, time_ns: int, indices: Sequence[int]) -> list[int]:
        """Those of some images whose files may have been replaced since a time, under the same `fingerprint`; often none."""
        return []

    def read(
        self, index: int, size: int | tuple[int, int] | None = None, *, channels: int = 3, allow_upscale: bool = False
    ) -> UInt8[Tensor, "channels height width"]:
        """An image, cropped by `center_crop` to (height, width) or a square; gray if `channels` is 1.

        Raises UnreadableImage for a damaged image, ImageTooSmall for one smaller than `size` unless `allow_upscale`.
        """
        image = self.image(index)
        if size is not None:
            image = center_crop(image, size, allow_upscale=allow_upscale, path=self.locate(index))
        return to_tensor(image, channels)


def choose_split(split: str, available: Sequence[str], where: str) -> str:
    """The name of `split` among those `available`; "held_out" also matches val, validation, valid or test, in this order.

    Raises ValueError if none matches.
    """
    for name in HELD_OUT_NAMES if split == "held_out" else (split,):
        if name in available:
            return name
    raise ValueError(f"split {split!r} of {where}: expected one of {', '.join(available)}")
