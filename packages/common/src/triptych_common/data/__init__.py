"""Images to train on: named data sets, folders and Hugging Face data sets behind `open_source`, in memory by `load`."""

from triptych_common.data.datasets import DATASETS, ImageDataset, in_memory, load, load_folder, open_source
from triptych_common.data.decoding import ImageTooSmall, UnreadableImage, center_crop, decode, to_tensor
from triptych_common.data.folder import ImageFolder
from triptych_common.data.hub import HubImages
from triptych_common.data.source import ImageSource

__all__ = [
    "DATASETS",
    "HubImages",
    "ImageDataset",
    "ImageFolder",
    "ImageSource",
    "ImageTooSmall",
    "UnreadableImage",
    "center_crop",
    "decode",
    "in_memory",
    "load",
    "load_folder",
    "open_source",
    "to_tensor",
]
