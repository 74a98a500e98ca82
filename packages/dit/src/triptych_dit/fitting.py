"""What a training run takes from its data where it is not told: classes, channels and size."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from triptych_common import data as sources
from triptych_common.cli import echo, option

from triptych_dit.config import CheckpointOptions, DiTConfig
from triptych_dit.objective import pictures
from triptych_dit.train_config import TrainConfig
from triptych_dit.weights import PICTURES, LatentSpace

LOOKED_AT = 64  # pictures, from all over a source
LAPTOP_SIDE = 32  # a model of larger pixels takes hours without a GPU; larger pictures are for latents, or on request


class Look(NamedTuple):
    """What pictures have in common. sides: the shorter one of each, in order; smallest, largest: width x height."""

    channels: int
    sides: list[int]
    smallest: str
    largest: str

    def usable(self, least: int, most: int) -> int:
        """The side, at most `most`, that pictures have; 0 if none has `least`. Much smaller ones, such as icons, do not count."""
        least = max(least, math.ceil(min(most, self.sides[len(self.sides) // 2]) / 2))
        sides = [side for side in self.sides if side >= least]
        return min(most, sides[0]) if sides else 0

    def __str__(self) -> str:
        kind = "gray" if self.channels == 1 else "colour"
        span = self.smallest if self.smallest == self.largest else f"{self.smallest} to {self.largest}"
        return f"{kind}, {span} pixels"


class Found(NamedTuple):
    """What data say about a run: channels, height and width, number of classes, how they came about, and whether there are
    mirror images.
    """

    in_channels: int
    input_size: tuple[int, int]
    num_classes: int
    reason: str
    flips: bool = True


def fit(config: TrainConfig, argv: Sequence[str], data: str, init_from: str | None = None) -> TrainConfig:
    """A training preset with a model that fits the data, which is reported: defaults that other options override.

    Raises ValueError or OSError for data that cannot be opened, and for pictures where the preset is one of latents.
    """
    model, space = config.model, None
    if init_from:
        from triptych_dit.interop import load_any

        stated = {name: option(argv, name.replace("_", "-"))[0] for name in CheckpointOptions.__dataclass_fields__}
        options: dict[str, Any] = {
            n: int(value) if value.isdecimal() else value for n, value in stated.items() if value
        }
        source = load_any(init_from, **options)
        model, config = source.model.config, replace(config, predict=source.diffusion.predict)
        space = source.space
    typed = {name: option(argv, f"model.{name.replace('_', '-')}")[0] for name in DiTConfig.__dataclass_fields__}
    patch = typed["patch_size"] or ""
    if patch.isdecimal() and int(patch) and not init_from:
        model = replace(model, patch_size=int(patch), input_size=(int(patch), int(patch)))
    found = look_at(data, model, typed, keep_size=bool(init_from), space=space)
    if init_from and found.in_channels != model.in_channels:
        raise ValueError(
            f"data {data}: {found.in_channels} channels, those of the model to start from have {model.in_channels}; "
            "choose data as that model's, or leave --init-from out"
        )
    given: dict[str, Any] = {
        "num_classes": found.num_classes if model.num_classes or not init_from else 0, "input_size": found.input_size,
        "in_channels": model.in_channels if init_from else found.in_channels,
    }  # fmt: skip
    taken = {name: value for name, value in given.items() if typed[name] is None}
    said = [_said(name, value) for name, value in taken.items()]
    if config.horizontal_flip and not found.flips:
        config = replace(config, horizontal_flip=False)  # what is typed holds
        said.append("--no-horizontal-flip")
    if said:
        echo(f"from {data}: {', '.join(said)} ({found.reason})")
    return replace(config, data=data, model=replace(model, **taken))


def _said(name: str, value: Any) -> str:
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return f"--model.{name.replace('_', '-')} {shown}"


def look_at(
    data: str, model: DiTConfig, typed: dict[str, str | None], *, keep_size: bool, space: LatentSpace | None = None
) -> Found:  # fmt: skip
    """What a model is to be like for some data.

    typed: what options say of it. keep_size: pictures are cropped to its own. space: of its latents, if known.
    """
    from triptych_dit.autoencoder.cache import LatentCache, is_latent_cache
    from triptych_dit.autoencoder.features import refuse_features

    if is_latent_cache(Path(data)):
        cache = LatentCache(Path(data))
        channels, *size = cache.latent_shape
        reason = f"{len(cache):,} latents" + ("" if cache.has_flips else " without mirror images")
        return Found(channels, (size[0], size[1]), _classes(cache.num_classes), reason, cache.has_flips)
    if model.in_channels not in PICTURES and typed["in_channels"] is None:
        refuse_features(data)
        if data not in sources.DATASETS and not data.startswith("hub:") and not Path(data).exists():
            raise FileNotFoundError(
                f"data {data}: no such folder; triptych-dit encode --out {data} makes a cache of latents"
            )
        raise ValueError(_encode_first(data, model, space))
    source = pictures(data, unconditional=typed["num_classes"] == "0")
    classes = _classes(source.num_classes)
    reason = f"{len(source):,} pictures"
    if classes:
        names = ", ".join(source.class_names[:5]) + (", ..." if classes > 5 else "")
        reason += f" in {classes:,} classes: {names}"
    if isinstance(source, sources.ImageDataset):
        _, channels, height, width = source.images.shape
        return Found(channels, (height, width), classes, reason)
    if keep_size or (typed["input_size"] is not None and typed["in_channels"] is not None):
        return Found(model.in_channels, model.input_size, classes, reason)
    look = look_over(source)
    side = look.usable(model.patch_size, LAPTOP_SIDE) // model.patch_size * model.patch_size
    if not side:
        raise ValueError(f"{data}: pictures of {look.smallest} are smaller than a patch; pass --model.patch-size 2")
    return Found(look.channels, (side, side), classes, f"{reason}; {look}")


def _classes(count: int) -> int:
    """The classes of a model: a single one is none."""
    return count if count > 1 else 0


def look_over(source: sources.ImageSource) -> Look:
    """Look at some pictures. Raises ValueError if none of them can be read."""
    sizes, gray, refused = [], True, None
    for index in range(0, len(source), -(-len(source) // LOOKED_AT)):
        try:
            image = source.image(index)
        except sources.UnreadableImage as error:
            refused = refused or error
            continue
        sizes.append(image.size)
        pixels = np.asarray(image)
        gray = gray and bool((pixels == pixels[..., :1]).all())
    if not sizes:
        raise ValueError(f"{source.name}: none of the pictures looked at can be read ({refused})")
    sizes.sort(key=min)
    smallest, largest = (f"{width}x{height}" for width, height in (sizes[0], sizes[-1]))
    return Look(1 if gray else 3, list(map(min, sizes)), smallest, largest)


def _encode_first(data: str, model: DiTConfig, space: LatentSpace | None) -> str:
    """How to come from pictures to the latents that a model is for, as commands to paste."""
    name = Path(data).name.replace(":", "-")
    if space is not None:
        vae, side, first = space.spec, model.input_size[0] * (space.downsampling or 8), ""
    elif model.input_size[0] * 8 in (256, 512):
        vae, side, first = "stabilityai/sd-vae-ft-ema", model.input_size[0] * 8, ""
    else:
        vae, side = "runs/autoencoder", model.input_size[0] * 4
        first = f"triptych-dit autoencoder --data {data} --out {vae} && "
    flips = " --no-flips" if data in ("mnist5k", "mnist") else ""
    cache = f"latents/{name}-{side}"
    return (
        f"data {data}: pictures, but the model is for latents; make them once: {first}triptych-dit encode --source {data} "
        f"--vae {vae} --image-size {side}{flips} --out {cache}; then pass --data {cache}. Or leave "
        "--preset and --init-from out, to train on pixels"
    )
