"""Networks of NVIDIA's TensorFlow code (StyleGAN2, StyleGAN2-ADA) by the names of their PyTorch files.

Kernels are height, width, in, out there, and those that upsample are turned by 180 degrees; matrices are in, out; what a style
multiplies by is one plus the output of its layer.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from triptych_gangealing.stylegan2.pickles import PickledNetwork
from triptych_gangealing.stylegan2.shapes import agrees

Row = tuple[str, str, str]  # our name, theirs, and what to do to it

_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda x: x,
    "kernel": lambda x: x.permute(3, 2, 0, 1),
    "turned": lambda x: x.flip(0, 1).permute(3, 2, 0, 1),
    "matrix": lambda x: x.permute(1, 0),
    "style": lambda x: x + 1,
    "first": lambda x: x[0],
    "map": lambda x: x[0, 0],
}
# Options of training, of speed, or that follow from the tensors' shapes
_IGNORED = {
    *("truncation_psi", "truncation_cutoff", "style_mixing_prob", "structure", "num_fp16_res", "w_avg_beta"),
    *("freeze_layers", "label_fmaps", "mapping_fmaps"),
}
_FIXED: dict[str, Any] = {
    "resample_kernel": [1, 3, 3, 1],
    "nonlinearity": "lrelu",
    "mapping_nonlinearity": "lrelu",
    "mapping_lrmul": 0.01,
    "use_noise": True,
}
_FIELDS = {
    "resolution": "resolution",
    "num_channels": "image_channels",
    "label_size": "c_dim",
    "architecture": "architecture",
    "conv_clamp": "conv_clamp",
    "fmap_max": "channel_max",
}
_GENERATOR_FIELDS = {
    **_FIELDS, "latent_size": "z_dim", "dlatent_size": "w_dim", "mapping_layers": "mapping_layers"
}  # fmt: skip
_DISCRIMINATOR_FIELDS = {**_FIELDS, "mbstd_group_size": "mbstd_group_size", "mbstd_num_features": "mbstd_channels"}


def generator(network: PickledNetwork) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A generator's tensors by NVIDIA's PyTorch names, and the fields of its config that its options give.

    Raises ValueError, naming it, for an option that networks here have not, and for a tensor that is missing or unknown.
    """
    fields = _fields(network.kwargs, _GENERATOR_FIELDS)
    return _renamed(network.tensors, _generator_rows(network.tensors)), fields


def discriminator(network: PickledNetwork) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same of a discriminator. A conditional one learns its classes at another rate than those here, and is refused."""
    if any(name.startswith("LabelEmbed") for name in network.tensors):
        raise ValueError("a conditional discriminator of the TensorFlow era cannot be read; its generator can")
    fields = _fields(network.kwargs, _DISCRIMINATOR_FIELDS)
    return _renamed(network.tensors, _discriminator_rows(network.tensors)), fields


def _fields(kwargs: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name, value in kwargs.items():
        if value is None and name != "mbstd_group_size":  # as if absent; None is the whole batch there
            continue
        if name in fields:
            found[fields[name]] = value
        elif name == "fmap_base" and type(value) is int:
            found["channel_base"] = 2 * value
        elif name in _FIXED and not agrees(value, _FIXED[name]):
            raise ValueError(f"its option {name} is not {_FIXED[name]}, as all networks here have it")
        elif name not in _IGNORED and name not in _FIXED:
            raise ValueError(f"its option {ascii(name)[:60]} is not known here")
    return found


def _generator_rows(names: Mapping[str, Tensor]) -> Iterator[Row]:
    yield "mapping.w_avg", "dlatent_avg", "same"
    if "mapping/LabelEmbed/weight" in names:
        yield from _dense("mapping.embed", "mapping/LabelEmbed")
    for i in range(_count(names, r"mapping/Dense(\d+)/weight")):
        yield from _dense(f"mapping.fc{i}", f"mapping/Dense{i}")
    yield "synthesis.b4.const", "synthesis/4x4/Const/const", "first"
    noise = 0
    for resolution in _resolutions(names, "synthesis/"):
        ours, theirs = f"synthesis.b{resolution}", f"synthesis/{resolution}x{resolution}"
        up = [] if resolution == 4 else [("conv0", "Conv0_up", "turned")]
        for name, their_name, change in [*up, ("conv1", "Conv" if resolution == 4 else "Conv1", "kernel")]:
            yield from _modulated(f"{ours}.{name}", f"{theirs}/{their_name}", change)
            yield f"{ours}.{name}.noise_strength", f"{theirs}/{their_name}/noise_strength", "same"
            yield f"{ours}.{name}.noise_const", f"synthesis/noise{noise}", "map"
            noise += 1
        if f"{theirs}/ToRGB/weight" in names:
            yield from _modulated(f"{ours}.torgb", f"{theirs}/ToRGB", "kernel")
        if f"{theirs}/Skip/weight" in names:
            yield f"{ours}.skip.weight", f"{theirs}/Skip/weight", "turned"


def _discriminator_rows(names: Mapping[str, Tensor]) -> Iterator[Row]:
    for resolution in _resolutions(names, ""):
        ours, theirs = f"b{resolution}", f"{resolution}x{resolution}"
        if f"{theirs}/FromRGB/weight" in names:
            yield from _conv(f"{ours}.fromrgb", f"{theirs}/FromRGB")
        if resolution > 4:
            yield from _conv(f"{ours}.conv0", f"{theirs}/Conv0")
            yield from _conv(f"{ours}.conv1", f"{theirs}/Conv1_down")
        if f"{theirs}/Skip/weight" in names:
            yield f"{ours}.skip.weight", f"{theirs}/Skip/weight", "kernel"
    yield from _conv("b4.conv", "4x4/Conv")
    yield from _dense("b4.fc", "4x4/Dense0")
    yield from _dense("b4.out", "Output")


def _modulated(ours: str, theirs: str, change: str) -> Iterator[Row]:
    yield f"{ours}.weight", f"{theirs}/weight", change
    yield f"{ours}.bias", f"{theirs}/bias", "same"
    yield f"{ours}.affine.weight", f"{theirs}/mod_weight", "matrix"
    yield f"{ours}.affine.bias", f"{theirs}/mod_bias", "style"


def _conv(ours: str, theirs: str) -> Iterator[Row]:
    yield f"{ours}.weight", f"{theirs}/weight", "kernel"
    yield f"{ours}.bias", f"{theirs}/bias", "same"


def _dense(ours: str, theirs: str) -> Iterator[Row]:
    yield f"{ours}.weight", f"{theirs}/weight", "matrix"
    yield f"{ours}.bias", f"{theirs}/bias", "same"


def _renamed(tensors: Mapping[str, Tensor], rows: Iterator[Row]) -> dict[str, Tensor]:
    found, known = {}, {"lod"}  # of progressive growing, which StyleGAN2 has no more
    for ours, theirs, change in rows:
        if theirs not in tensors:
            raise ValueError(f"lacks {theirs}")
        try:
            found[ours] = _CHANGES[change](tensors[theirs])
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{theirs} is {tuple(tensors[theirs].shape)}, another number of dimensions than expected"
            ) from error
        known.add(theirs)
    unknown = next((name for name in tensors if name not in known), None)
    if unknown is not None:
        raise ValueError(f"{ascii(unknown)[1:-1]} {tuple(tensors[unknown].shape)} is no part of a StyleGAN2 network")
    return found


def _resolutions(names: Mapping[str, Tensor], prefix: str) -> list[int]:
    matches = (re.match(rf"{prefix}(\d{{1,4}})x\1/", name) for name in names)
    return sorted({int(match[1]) for match in matches if match})


def _count(names: Mapping[str, Tensor], pattern: str) -> int:
    return sum(1 for name in names if re.fullmatch(pattern, name))
