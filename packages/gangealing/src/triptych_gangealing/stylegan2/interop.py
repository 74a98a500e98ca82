"""StyleGAN2 networks out of anyone's files, without running a line of them.

Read are: pickles of stylegan2-ada-pytorch and stylegan3 (StyleGAN2 networks), and of their TensorFlow era; checkpoints of
rosinality/stylegan2-pytorch; and our own. What a file says of its networks is checked against their tensors.
"""

import argparse
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from triptych_common.cli import echo

from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.weights import DISCRIMINATOR_FILE, GENERATOR_FILE, locate, read_network

if TYPE_CHECKING:
    from triptych_gangealing.stylegan2.pickles import PickledNetwork

_LEGACY_TORCH = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save's files began before they were zip archives
)

# NVIDIA's options: fields of our configs, those that every network here has, and those of training, speed or telling shapes
_FIELDS = {
    "img_resolution": "resolution",
    "img_channels": "image_channels",
    "c_dim": "c_dim",
    "channel_base": "channel_base",
    "channel_max": "channel_max",
    "architecture": "architecture",
    "conv_clamp": "conv_clamp",
    "num_layers": "mapping_layers",
}
_GENERATOR_FIELDS = {**_FIELDS, "z_dim": "z_dim", "w_dim": "w_dim"}
_DISCRIMINATOR_FIELDS = {**_FIELDS, "mbstd_group_size": "mbstd_group_size", "mbstd_num_channels": "mbstd_channels"}
_NESTED = ("mapping_kwargs", "synthesis_kwargs", "block_kwargs", "epilogue_kwargs")
_FIXED: dict[str, Any] = {
    "resample_filter": [1, 3, 3, 1],
    "activation": "lrelu",
    "use_noise": True,
    "kernel_size": 3,
    "lr_multiplier": 0.01,
}
_IGNORED = {
    *("num_fp16_res", "use_fp16", "fp16_channels_last", "channels_last", "fused_modconv_default"),
    *("w_avg_beta", "freeze_layers", "freeze_embed", "embed_features", "layer_features", "cmap_dim"),
}
_SETTINGS = ("activation", "bias_gain", "conv_clamp", "architecture")


@dataclass(frozen=True)
class Source:
    """A file with networks in it.

    generator, discriminator: build them, in float32 on the CPU for evaluation, beside their tensors by NVIDIA's names as the
    file has them; None where it has none. Building raises ValueError, one line, for what cannot be represented.
    """

    path: Path
    format: str
    generator: Callable[[], tuple[Generator, dict[str, Tensor]]] | None = None
    discriminator: Callable[[], tuple[Discriminator, dict[str, Tensor]]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def load_generator(path: str | Path) -> Generator:
    """The generator of a file, the averaged one where it has several, or one that ships ("digits32", "digits32-3").

    Raises FileNotFoundError where there is no file; ValueError, one line naming what is wrong, for one that is damaged, would run
    code, holds no generator, or one that contradicts its own settings.
    """
    source = open_networks(path)
    if source.generator is None:
        raise ValueError(f"{path}: holds no generator")
    return source.generator()[0]


def load_discriminator(path: str | Path) -> Discriminator:
    """The same of its discriminator."""
    source = open_networks(path)
    if source.discriminator is None:
        raise ValueError(f"{path}: holds no discriminator")
    return source.discriminator()[0]


def take_over(source: str, generator: Generator, discriminator: Discriminator) -> None:
    """Replace the weights of both networks by those of `source`: a run folder, a file of ours, or a foreign checkpoint.

    A source without a discriminator leaves that one freshly initialised, and says so.
    Raises ValueError naming the first tensor that does not fit, FileNotFoundError where there is nothing.
    """
    found = open_networks(source)
    if found.generator is None:
        raise ValueError(f"{source}: holds no generator to start from")
    _copy_weights(found.generator()[0], generator, source)
    if found.discriminator is None:
        echo(f"{source}: no discriminator in it; one is trained from scratch")
    else:
        _copy_weights(found.discriminator()[0], discriminator, source)


@torch.no_grad()
def _copy_weights(source: nn.Module, target: nn.Module, where: str) -> None:
    theirs, ours, kind = source.state_dict(), target.state_dict(), type(target).__name__.lower()
    for name in [*ours, *theirs]:
        has, wants = (tuple(state[name].shape) if name in state else "absent" for state in (theirs, ours))
        if has != wants:
            raise ValueError(
                f"{where}: {kind} has {name} {has}, this config wants {wants}; "
                "pass its own resolution, channels, z_dim, classes and architecture"
            )
    target.load_state_dict(theirs)


def open_networks(path: str | Path) -> Source:
    """What a file holds, by its content; of a folder, our own files in it. Raises as `load_generator`."""
    path = locate(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return _own(path)
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_TORCH))
    if zipfile.is_zipfile(path) or start == _LEGACY_TORCH:
        return _rosinality(path)
    return _pickle(path)


def _own(path: Path) -> Source:
    files = [path / name for name in (GENERATOR_FILE, DISCRIMINATOR_FILE)] if path.is_dir() else [path]
    loaded = [read_network(file) for file in files if not path.is_dir() or file.exists()]
    if not loaded:
        raise FileNotFoundError(f"{path}: no {GENERATOR_FILE} or {DISCRIMINATOR_FILE} in this folder")
    found: dict[str, Any] = {"facts": {k: v for k, v in loaded[0].facts.items() if k not in ("kind", "config")}}
    for network, _ in loaded:
        name = "generator" if isinstance(network, Generator) else "discriminator"
        found[name] = lambda network=network: (network, network.state_dict())
    return Source(path, "triptych", **found)


def _rosinality(path: Path) -> Source:
    # Readers of foreign files are imported where one is met: training from a file of ours needs none of them.
    from triptych_common.storage import foreign

    from triptych_gangealing.stylegan2 import rosinality
    from triptych_gangealing.stylegan2.pickles import refused_name

    try:
        content = foreign.read(path, allow=[argparse.Namespace])  # the options of a training run
    except ValueError as error:
        if error.__cause__ is None or (name := refused_name(error.__cause__)) is None:
            raise
        raise ValueError(
            f"{path}: names {name}, which no network needs and which could run code; nothing was run"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a checkpoint with g_ema")
    state, discriminator_state = rosinality.generator_state(content), rosinality.discriminator_state(content)
    if state is None and discriminator_state is None:
        raise ValueError(f"{path}: holds no networks; expected a checkpoint with g_ema, as rosinality's code writes")
    average = content.get("latent_avg")
    average = average if isinstance(average, Tensor) else None
    found: dict[str, Any] = {"facts": {}}
    if state is not None:
        found["generator"] = lambda: _located(path, lambda: _rosinality_generator(state, average))
        if average is None:
            found["facts"]["w_avg"] = f"mean of {rosinality.MEAN_OF} latents; the file has none"
    if discriminator_state is not None:
        found["discriminator"] = lambda: _located(path, lambda: _rosinality_discriminator(discriminator_state))
    return Source(path, "rosinality", **found)


def _rosinality_generator(state: Mapping[str, Any], average: Tensor | None) -> tuple[Generator, dict[str, Tensor]]:
    from triptych_gangealing.stylegan2 import rosinality
    from triptych_gangealing.stylegan2.shapes import build, generator_config

    tensors = rosinality.generator_tensors(state, average)
    config = generator_config(tensors)
    generator = build(config, {"mapping.w_avg": torch.zeros(config.w_dim), **tensors})
    if average is None:
        generator.mapping.w_avg.copy_(rosinality.mean_style(generator))
    return generator, tensors


def _rosinality_discriminator(state: Mapping[str, Any]) -> tuple[Discriminator, dict[str, Tensor]]:
    from triptych_gangealing.stylegan2 import rosinality
    from triptych_gangealing.stylegan2.shapes import build, discriminator_config

    tensors = rosinality.discriminator_tensors(state)
    return build(discriminator_config(tensors), tensors), tensors


def _pickle(path: Path) -> Source:
    from triptych_gangealing.stylegan2.pickles import load_pickle

    networks = load_pickle(path)
    found: dict[str, Any] = {}
    key = "G_ema" if "G_ema" in networks else "G"
    if key in networks:
        found["generator"] = lambda: _located(path, lambda: _built(networks[key], is_generator=True), key)
    if "D" in networks:
        found["discriminator"] = lambda: _located(path, lambda: _built(networks["D"], is_generator=False), "D")
    old = next(iter(networks.values())).tensorflow
    return Source(path, "nvidia tensorflow pickle" if old else "nvidia pickle", **found)


def _located(path: Path, function: Callable[[], Any], what: str = "") -> Any:
    try:
        return function()
    except ValueError as error:
        raise ValueError(f"{path}: {what + ': ' if what else ''}{error}") from error


def _built(network: "PickledNetwork", *, is_generator: bool) -> tuple[Generator | Discriminator, dict[str, Tensor]]:
    from triptych_gangealing.stylegan2 import tensorflow_era
    from triptych_gangealing.stylegan2.shapes import build, discriminator_config, generator_config, without_filters

    if network.tensorflow:
        tensors, fields = (tensorflow_era.generator if is_generator else tensorflow_era.discriminator)(network)
    else:
        if any(name.startswith("synthesis.input.") for name in network.tensors):
            raise ValueError("a StyleGAN3 network; only StyleGAN2's are read")
        tensors = without_filters(network.tensors, {r".*\.resample_filter": 1.0})
        fields = _fields(network, _GENERATOR_FIELDS if is_generator else _DISCRIMINATOR_FIELDS)
    try:
        config = (generator_config if is_generator else discriminator_config)(tensors, **fields)
    except TypeError as error:
        raise ValueError(f"its options are of other types than expected ({error})") from error
    built = build(config, tensors)
    _check_settings(built, network.settings)
    return built, tensors


def _fields(network: "PickledNetwork", fields: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a config out of NVIDIA's options, which older and newer files nest differently.

    What their versions have different defaults for is taken from the modules' own attributes.
    """
    from triptych_gangealing.stylegan2.shapes import agrees

    options = {name: value for name, value in network.kwargs.items() if name not in _NESTED}
    for name in _NESTED:
        nested = network.kwargs.get(name)
        options |= nested if isinstance(nested, dict) else {}
    found = {}
    for name, value in options.items():
        if name in fields:
            found[fields[name]] = value
        elif name in _FIXED and not agrees(value, _FIXED[name]):
            raise ValueError(f"its option {name} is not {_FIXED[name]}, as all networks here have it")
        elif name not in _FIXED and name not in _IGNORED:
            raise ValueError(f"its option {ascii(name)[:60]} is not known here")
    told = {
        "synthesis.b4.conv1.conv_clamp": "conv_clamp",
        "b4.conv.conv_clamp": "conv_clamp",
        "b4.mbstd.group_size": "mbstd_group_size",
        "b4.mbstd.num_channels": "mbstd_channels",
    }
    for name, field_name in told.items():
        if name in network.settings:
            value = network.settings[name]
            given = found.get(field_name, value)
            if given is not value and not agrees(given, value):
                raise ValueError(f"its option {field_name} is not its module's {name}, {ascii(value)[:40]}")
            found[field_name] = value
    return found


def _check_settings(network: Generator | Discriminator, settings: Mapping[str, Any]) -> None:
    """Raises ValueError for the first attribute of a module in a file that is another one's here."""
    modules = dict(network.named_modules())
    for name, value in settings.items():
        path, _, attribute = name.rpartition(".")
        if attribute not in _SETTINGS or path not in modules:
            continue
        expected = getattr(modules[path], attribute, "lrelu" if attribute == "activation" else value)
        both_numbers = isinstance(value, float | int) and isinstance(expected, float | int)
        if not (math.isclose(value, expected, rel_tol=1e-6) if both_numbers else value == expected):
            raise ValueError(f"{name[:100]} is {ascii(value)[:40]}, here it is {expected}")
