"""Named data sets behind one function, `load`."""

from triptych_common.data.datasets import DATASETS, ImageDataset, load

__all__ = ["DATASETS", "ImageDataset", "load"]
