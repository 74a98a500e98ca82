"""StyleGAN2 networks from other people's files, without running a line of them.

It reads pickles of stylegan2-ada-pytorch and stylegan3 (StyleGAN2 networks) and of their TensorFlow era, and checkpoints of
rosinality/stylegan2-pytorch, and checks a file's options against its tensors. Entry point: `weights.open_networks`.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from triptych_common.storage import foreign
from triptych_common.storage.pickle_machine import Refused

from triptych_gangealing.stylegan2 import rosinality, shapes, tensorflow_era
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.pickles import PickledNetwork, load_pickle

# NVIDIA's options: fields of our configs; values that every network here has; options of training or speed, or that shapes repeat.
_FIELDS = {name: name for name in ("c_dim", "channel_base", "channel_max", "architecture", "conv_clamp")}
_FIELDS |= {"img_resolution": "resolution", "img_channels": "image_channels", "num_layers": "mapping_layers"}
_GENERATOR_FIELDS = {**_FIELDS, "z_dim": "z_dim", "w_dim": "w_dim"}
_DISCRIMINATOR_FIELDS = {**_FIELDS, "mbstd_group_size": "mbstd_group_size", "mbstd_num_channels": "mbstd_channels"}
_NESTED = ("mapping_kwargs", "synthesis_kwargs", "block_kwargs", "epilogue_kwargs")
_FIXED: dict[str, Any] = {"resample_filter": [1, 3, 3, 1], "activation": "lrelu", "use_noise": True, "kernel_size": 3}
_FIXED |= {"lr_multiplier": 0.01}
_IGNORED = (
    *("num_fp16_res", "use_fp16", "fp16_channels_last", "channels_last", "fused_modconv_default"),
    *("w_avg_beta", "freeze_layers", "freeze_embed", "embed_features", "layer_features", "cmap_dim"),
)
_MODULE_SETTINGS = {
    "synthesis.b4.conv1.conv_clamp": "conv_clamp",
    "b4.conv.conv_clamp": "conv_clamp",
    "b4.mbstd.group_size": "mbstd_group_size",
    "b4.mbstd.num_channels": "mbstd_channels",
}
_SETTINGS = ("activation", "bias_gain", "conv_clamp", "architecture")


def read_rosinality(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of rosinality's code, as fields of `weights.Source`.

    Raises ValueError for one that would run code or holds no networks.
    """
    try:
        content = foreign.read(path)
    except ValueError as error:
        if not isinstance(error.__cause__, Refused):
            raise
        raise ValueError(f"{path}: {error.__cause__}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a checkpoint with g_ema")
    state = _located(path, lambda: rosinality.generator_state(content))
    discriminator_state = _located(path, lambda: rosinality.discriminator_state(content))
    if state is None and discriminator_state is None:
        raise ValueError(f"{path}: holds no networks; expected a checkpoint with g_ema, as rosinality's code writes")
    average = content["latent_avg"] if isinstance(content.get("latent_avg"), Tensor) else None
    found: dict[str, Any] = {"facts": {}}
    if state is not None:
        found["generator"] = lambda: _located(path, lambda: _rosinality_generator(state, average))
        if average is None:
            found["facts"]["w_avg"] = f"mean of {rosinality.MEAN_OF} latents; the file has none"
    if discriminator_state is not None:
        found["discriminator"] = lambda: _located(path, lambda: _rosinality_discriminator(discriminator_state))
    return {"format": "rosinality", **found}


def _rosinality_generator(state: Mapping[str, Any], average: Tensor | None) -> tuple[Generator, dict[str, Tensor]]:
    tensors = rosinality.generator_tensors(state, average)
    config = shapes.generator_config(tensors)
    generator = shapes.build(config, {"mapping.w_avg": torch.zeros(config.w_dim), **tensors})
    if average is None:
        generator.mapping.w_avg.copy_(rosinality.mean_style(generator))
    return generator, tensors


def _rosinality_discriminator(state: Mapping[str, Any]) -> tuple[Discriminator, dict[str, Tensor]]:
    tensors = rosinality.discriminator_tensors(state)
    return shapes.build(shapes.discriminator_config(tensors), tensors), tensors


def read_pickle(path: Path) -> dict[str, Any]:
    """The content of a pickle of NVIDIA's code, as fields of `weights.Source`. Raises as `load_pickle`."""
    networks = load_pickle(path)
    found: dict[str, Any] = {}
    key = "G_ema" if "G_ema" in networks else "G"
    if key in networks:
        found["generator"] = lambda: _located(path, lambda: _built(networks[key], is_generator=True), key)
    if "D" in networks:
        found["discriminator"] = lambda: _located(path, lambda: _built(networks["D"], is_generator=False), "D")
    old = next(iter(networks.values())).tensorflow
    return {"format": "nvidia tensorflow pickle" if old else "nvidia pickle", **found}


def _located(path: Path, function: Callable[[], Any], what: str = "") -> Any:
    try:
        return function()
    except ValueError as error:
        raise ValueError(f"{path}: {what + ': ' if what else ''}{error}") from error


def _built(network: PickledNetwork, *, is_generator: bool) -> tuple[Generator | Discriminator, dict[str, Tensor]]:
    if network.tensorflow:
        tensors, fields = (tensorflow_era.generator if is_generator else tensorflow_era.discriminator)(network)
    else:
        if any(name.startswith("synthesis.input.") for name in network.tensors):
            raise ValueError("a StyleGAN3 network; only StyleGAN2's are read")
        tensors = shapes.without_filters(network.tensors, {r".*\.resample_filter": 1.0})
        fields = _fields(network, _GENERATOR_FIELDS if is_generator else _DISCRIMINATOR_FIELDS)
    try:
        config = (shapes.generator_config if is_generator else shapes.discriminator_config)(tensors, **fields)
    except TypeError as error:
        raise ValueError(f"its options are of other types than expected ({error})") from error
    built = shapes.build(config, tensors)
    _check_settings(built, network.settings)
    return built, tensors


def _fields(network: PickledNetwork, fields: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a config out of NVIDIA's options, which older and newer files nest differently."""
    options = {name: value for name, value in network.kwargs.items() if name not in _NESTED}
    for name in _NESTED:
        nested = network.kwargs.get(name)
        options |= nested if isinstance(nested, dict) else {}
    found = shapes.fields_of(options, fields, _FIXED, _IGNORED)
    # Versions of their code differ in these defaults, so the modules' own attributes decide.
    for name, field_name in _MODULE_SETTINGS.items():
        if name in network.settings:
            value = network.settings[name]
            given = found.get(field_name, value)
            if given is not value and not shapes.agrees(given, value):
                raise ValueError(f"its option {field_name} is not its module's {name}, {ascii(value)[:40]}")
            found[field_name] = value
    return found


def _check_settings(network: Generator | Discriminator, settings: Mapping[str, Any]) -> None:
    """Raises ValueError for the first attribute of a module whose value differs here."""
    modules = dict(network.named_modules())
    for name, value in settings.items():
        path, _, attribute = name.rpartition(".")
        if attribute not in _SETTINGS or path not in modules:
            continue
        expected = getattr(modules[path], attribute, "lrelu" if attribute == "activation" else value)
        numbers = isinstance(value, float | int) and isinstance(expected, float | int)
        if value != expected and not (numbers and math.isclose(value, cast(float, expected), rel_tol=1e-6)):
            raise ValueError(f"{name[:100]} is {ascii(value)[:40]}, here it is {expected}")
