"""For all readers of foreign files: renaming tensors, checking options, inferring a config from shapes, building the network.

Tensors here have the names of NVIDIA's PyTorch files, which are also those of our own networks.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args, overload

import torch
from torch import Tensor
from triptych_common.storage.bounded import Bounded
from triptych_common.storage.model_file import non_finite

from triptych_gangealing.stylegan2.config import Architecture, DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator

Tensors = Mapping[str, Tensor]
Row = tuple[str, str, str]  # our name of a tensor, theirs, and how theirs becomes ours
_LARGEST = 2**20  # of any number in a config
FILTER = torch.outer(torch.tensor([1.0, 3.0, 3.0, 1.0]), torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64


def generator_config(tensors: Tensors, **known: Any) -> GeneratorConfig:
    """The config that a generator's tensors fit; fields that are `known` are not inferred.

    Raises ValueError, naming the tensor, where a needed one is missing, for numbers of feature maps that no config has, and for
    a known field of another type.
    """
    resolutions = _resolutions(tensors, "synthesis.")
    w_dim, features = _shape(tensors, "mapping.fc0.weight", 2)
    widths = {r: _shape(tensors, f"synthesis.b{r}.conv1.weight", 4)[0] for r in resolutions}
    inferred = _inferred(tensors, widths) | {
        "z_dim": features - (w_dim if "mapping.embed.weight" in tensors else 0),  # the embedded class follows z
        "w_dim": w_dim,
        "image_channels": _shape(tensors, f"synthesis.b{resolutions[-1]}.torgb.weight", 4)[0],
        "architecture": _architecture(tensors, "synthesis.b4.torgb.weight", "synthesis.b8.skip.weight"),
    }
    return GeneratorConfig(**{**inferred, **_checked(known)})


def discriminator_config(tensors: Tensors, **known: Any) -> DiscriminatorConfig:
    """The config that a discriminator's tensors fit; see `generator_config`."""
    resolutions = _resolutions(tensors, "")
    widths = {r: _shape(tensors, f"b{r}.conv0.weight", 4)[0] for r in resolutions if r > 4}
    widths[4] = _shape(tensors, "b4.conv.weight", 4)[0]
    inferred = _inferred(tensors, widths) | {
        "image_channels": _shape(tensors, f"b{resolutions[-1]}.fromrgb.weight", 4)[1],
        "architecture": _architecture(tensors, "b4.fromrgb.weight", "b8.skip.weight"),
        "mbstd_channels": _shape(tensors, "b4.conv.weight", 4)[1] - widths[4],
    }
    return DiscriminatorConfig(**{**inferred, **_checked(known)})


def _inferred(tensors: Tensors, widths: Mapping[int, int]) -> dict[str, Any]:
    base, most = _widths(widths)
    return {
        "resolution": max(widths),
        "channel_base": base,
        "channel_max": most,
        "c_dim": _shape(tensors, "mapping.embed.weight", 2)[1] if "mapping.embed.weight" in tensors else 0,
        # An unconditional discriminator has no mapping layers, and its config their default number.
        "mapping_layers": len(numbers(tensors, r"mapping\.fc(\d+)\.weight")) or 8,
    }


@overload
def build(config: GeneratorConfig, tensors: Tensors) -> Generator: ...
@overload
def build(config: DiscriminatorConfig, tensors: Tensors) -> Discriminator: ...
def build(config: GeneratorConfig | DiscriminatorConfig, tensors: Tensors) -> Generator | Discriminator:
    """The network of a config with these tensors in float32, for evaluation.

    Raises ValueError for the first tensor that is missing, of another shape, or no part of such a network.
    """
    network_class: Any = Generator if isinstance(config, GeneratorConfig) else Discriminator
    with (
        Bounded(sum(value.nbytes for value in tensors.values())),
        torch.device("meta"),
    ):  # shapes alone: a wrong config may be huge
        expected = {name: tuple(value.shape) for name, value in network_class(config).state_dict().items()}
    widths = f"channel_base {config.channel_base}, channel_max {config.channel_max}"
    by_config = f"expected by its resolution {config.resolution}, {widths}"
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"lacks {name} {shape}, {by_config}")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not {shape} as {by_config}")
    for name, value in tensors.items():
        if name not in expected:
            raise ValueError(f"{name[:100]} {tuple(value.shape)} is no part of the network {by_config}")
    if (wrong := non_finite(tensors)) is not None:
        raise ValueError(f"{wrong} has values that are not finite")
    network = network_class(config)
    network.load_state_dict({name: tensors[name].detach().to(torch.float32) for name in expected})
    return network.requires_grad_(False).eval()


def renamed(
    tensors: Tensors, rows: Iterable[Row], change: Callable[[str, Tensor, str], Tensor], whose: str, ignored: str = ""
) -> dict[str, Tensor]:
    """A file's tensors by our names: for each row, `change(their name, their tensor, the row's third part)`.

    Raises ValueError, naming it, for a tensor that is missing, or one that is no part of `whose` network nor `ignored`.
    """
    found, known = {}, {ignored}
    for ours, theirs, how in rows:
        if theirs not in tensors:
            raise ValueError(f"lacks {theirs}")
        found[ours] = change(theirs, tensors[theirs], how)
        known.add(theirs)
    unknown = next((name for name in tensors if name not in known), None)
    if unknown is not None:
        raise ValueError(f"{ascii(unknown[:100])[1:-1]} {tuple(tensors[unknown].shape)} is no part of {whose} network")
    return found


def fields_of(
    options: Mapping[str, Any], fields: Mapping[str, str], fixed: Mapping[str, Any], ignored: Iterable[str]
) -> dict[str, Any]:
    """Fields of our config out of a file's options.

    fields: their name to ours. fixed: the value that every network here has. ignored: options of training or speed, and those
    that shapes repeat. Raises ValueError, naming it, for a fixed option of another value, or an unknown one.
    """
    found = {}
    for name, value in options.items():
        if name in fields:
            found[fields[name]] = value
        elif name in fixed and not agrees(value, fixed[name]):
            raise ValueError(f"its option {name} is not {fixed[name]}, as all networks here have it")
        elif name not in fixed and name not in ignored:
            raise ValueError(f"its option {ascii(name)[:60]} is not known here")
    return found


def numbers(names: Iterable[str], pattern: str) -> list[int]:
    """The distinct numbers that a pattern's first group matches in whole names, in order."""
    return sorted({int(match[1]) for name in names if (match := re.fullmatch(pattern, name))})


def without_filters(tensors: Tensors, filters: Mapping[str, float]) -> dict[str, Tensor]:
    """The tensors without resampling filters.

    filters: a regular expression for the names of filters -> their sum. Raises ValueError for a filter other than [1, 3, 3, 1].
    """
    kept = {}
    for name, value in tensors.items():
        gain = next((gain for pattern, gain in filters.items() if re.fullmatch(pattern, name)), None)
        if gain is None:
            kept[name] = value
        elif value.shape != FILTER.shape or not torch.allclose(value.float(), gain * FILTER, rtol=1e-3, atol=0):
            raise ValueError(f"{name[:100]} {tuple(value.shape)} is another filter than [1, 3, 3, 1]")
    return kept


def agrees(option: Any, expected: Any) -> bool:
    """Whether an option in a file, which may be any plain data, equals the value that every network here has."""
    if isinstance(expected, list):
        return type(option) in (list, tuple) and len(option) == len(expected) and all(map(agrees, option, expected))
    return type(option) in (str, int, float, bool) and option == expected


def _checked(known: Mapping[str, Any]) -> dict[str, Any]:
    fields = dict(known)
    for name, value in known.items():
        if name == "architecture":
            if type(value) is not str or value not in get_args(Architecture):
                raise ValueError(f"its architecture is not one of {', '.join(get_args(Architecture))}")
        elif name == "conv_clamp":
            if value is not None and not (type(value) in (int, float) and 0 < value <= _LARGEST):
                raise ValueError("its conv_clamp is neither None nor a positive number")
            fields[name] = None if value is None else float(value)
        elif type(value) is not int or not 0 <= value <= _LARGEST:
            raise ValueError(f"its {name} is no whole number from 0 to {_LARGEST}")
    return fields


def _resolutions(tensors: Tensors, prefix: str) -> list[int]:
    found = numbers(tensors, re.escape(prefix) + r"b(\d{1,4})\..*")
    if found != [2**i for i in range(2, 2 + len(found))] or len(found) < 2:
        raise ValueError(f"has blocks of resolution {found}, expected 4, 8 and so on; no StyleGAN2 network")
    return found


def _shape(tensors: Tensors, name: str, ndim: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"lacks {name}")
    if tensors[name].ndim != ndim:
        raise ValueError(f"{name} is {tuple(tensors[name].shape)}, expected {ndim} dimensions")
    return tuple(tensors[name].shape)


def _architecture(tensors: Tensors, of_skip: str, of_resnet: str) -> Architecture:
    """Inferred from tensors that only one design has."""
    return "skip" if of_skip in tensors else "resnet" if of_resnet in tensors else "orig"


def _widths(channels: Mapping[int, int]) -> tuple[int, int]:
    """channel_base and channel_max of the feature maps at each resolution."""
    base, most = max(r * n for r, n in channels.items()), max(channels.values())
    if any(min(base // r, most) != n for r, n in channels.items()):
        maps = dict(sorted(channels.items()))
        raise ValueError(f"has feature maps {maps}, expected min(channel_base / resolution, channel_max) of each")
    return base, most
