"""What a DiT trains on, behind one protocol: pixels in memory, or latents sampled from cached posterior moments."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from triptych_common import data, randomness

from triptych_dit.autoencoder.cache import LatentCache, is_latent_cache
from triptych_dit.autoencoder.model import scaled_sample
from triptych_dit.config import DiTConfig


@runtime_checkable
class TrainingData(Protocol):
    """Numbered examples with labels."""

    name: str
    identity: str  # what the data are, wherever they lie
    shape: tuple[int, int, int]  # channels, height, width of an example
    labels: Int[Tensor, " items"]
    num_classes: int
    facts: dict[str, Any]  # what a model trained on it must remember: the autoencoder of its latents, or None

    def __len__(self) -> int: ...

    def examples(
        self, items: Int[Tensor, " batch"], flipped: Bool[Tensor, " batch"], seed: int, counters: Sequence[int]
    ) -> Float[Tensor, "batch channels height width"]:
        """x_0 of some items, mirrored where `flipped`; what is random about it follows from (seed, counter)."""
        ...

    def check_flips(self) -> None:
        """Raises ValueError where mirrored examples are not to be had."""


class PixelData:
    """Images in [-1, 1]."""

    def __init__(self, dataset: data.ImageDataset) -> None:
        self.dataset, self.name = dataset, dataset.name
        self.identity = f"{dataset.name}, {len(dataset):,} images"
        self.shape = tuple(dataset.images.shape[1:])
        self.labels, self.num_classes = dataset.labels, dataset.num_classes
        self.facts = {"autoencoder": None, "lossy_data": dataset.lossy, "class_names": list(dataset.class_names)}

    def __len__(self) -> int:
        return len(self.dataset)

    def examples(self, items: Tensor, flipped: Tensor, seed: int, counters: Sequence[int]) -> Tensor:
        x_0 = self.dataset.scaled(items)
        return torch.where(flipped[:, None, None, None], x_0.flip(-1), x_0) if bool(flipped.any()) else x_0

    def check_flips(self) -> None:
        """Any image can be mirrored."""


class LatentData:
    """Latents, drawn anew from each image's posterior every time it comes up.  [thesis 2.4]"""

    def __init__(self, cache: LatentCache) -> None:
        self.cache, self.name = cache, str(cache.folder)
        contents = ",".join(shard["sha256"] for shard in cache.facts["shards"])
        digest = hashlib.sha256(contents.encode()).hexdigest()[:16]
        self.identity = f"latents of {cache.facts['source']['spec']}, {len(cache):,} images, {digest}"
        self.shape, self.labels, self.num_classes = cache.latent_shape, cache.labels, cache.num_classes
        self.facts = {
            "autoencoder": cache.facts["autoencoder"],
            "lossy_data": cache.facts["lossy"],
            "class_names": list(cache.class_names),
        }

    def __len__(self) -> int:
        return len(self.cache)

    def examples(self, items: Tensor, flipped: Tensor, seed: int, counters: Sequence[int]) -> Tensor:
        noise = randomness.normal(seed, "posterior", counters, self.shape)
        autoencoder = self.facts["autoencoder"]
        moments = self.cache.moments(items, flipped)
        return scaled_sample(moments, noise, autoencoder["scale_factor"], autoencoder["shift_factor"])

    def check_flips(self) -> None:
        self.cache.check_flips()


def open_training_data(spec: str, model: DiTConfig, split: str = "train") -> TrainingData:
    """What `spec` names: a cache of latents, a named data set, a folder of images, or "hub:OWNER/NAME".

    Images that are not of the model's input size are cropped to it, except those of named data sets.
    Raises ValueError or FileNotFoundError where there is nothing of that name, or it does not fit the model.
    """
    if is_latent_cache(Path(spec)):
        return LatentData(LatentCache(Path(spec)))
    if spec in data.DATASETS:
        return PixelData(data.load(spec, split))
    source = data.open_source(spec, split, unconditional=model.num_classes == 0)
    return PixelData(data.in_memory(source, model.input_size, channels=model.in_channels, split=split))


def shape_and_classes(spec: str, model: DiTConfig) -> tuple[tuple[int, int, int], int]:
    """Shape of an example and number of classes of what `open_training_data` would open, without reading its images."""
    if is_latent_cache(Path(spec)):
        cache = LatentCache(Path(spec))
        return cache.latent_shape, cache.num_classes
    if spec in data.DATASETS:
        opened = PixelData(data.load(spec, "train"))
        return opened.shape, opened.num_classes
    source = data.open_source(spec, "train", unconditional=model.num_classes == 0)
    return (model.in_channels, *model.input_size), source.num_classes


def check_fits(model: DiTConfig, training_data: TrainingData) -> None:
    """Raises ValueError unless the model takes these examples and classes."""
    expected = (model.in_channels, *model.input_size)
    if training_data.shape != expected:
        channels, height, width = training_data.shape
        raise ValueError(
            f"{training_data.name} has examples of {training_data.shape}, the model takes {expected}; "
            f"set --model.in-channels {channels} --model.input-size {height} {width}"
        )
    if 0 < model.num_classes < training_data.num_classes:
        raise ValueError(
            f"{training_data.name} has labels 0..{training_data.num_classes - 1}, the model num_classes="
            f"{model.num_classes}; pass --model.num-classes {training_data.num_classes}"
        )
