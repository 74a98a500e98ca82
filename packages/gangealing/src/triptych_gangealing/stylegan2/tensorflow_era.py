"""Networks of NVIDIA's TensorFlow code (StyleGAN2, StyleGAN2-ADA) by the names of their PyTorch files."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from triptych_gangealing.stylegan2.pickles import PickledNetwork
from triptych_gangealing.stylegan2.shapes import Row, fields_of, numbers, renamed

# TensorFlow's kernels are height width in out, and those that upsample are turned by 180 degrees; matrices are in out; a style
# multiplies by one plus the output of its layer.
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
_IGNORED = (
    *("truncation_psi", "truncation_cutoff", "style_mixing_prob", "structure", "num_fp16_res", "w_avg_beta"),
    *("freeze_layers", "label_fmaps", "mapping_fmaps"),
)
_FIXED: dict[str, Any] = {"resample_kernel": [1, 3, 3, 1], "nonlinearity": "lrelu", "mapping_nonlinearity": "lrelu"}
_FIXED |= {"mapping_lrmul": 0.01, "use_noise": True}
_FIELDS = {"architecture": "architecture", "conv_clamp": "conv_clamp", "fmap_max": "channel_max"}
_FIELDS |= {"resolution": "resolution", "num_channels": "image_channels", "label_size": "c_dim"}
_GENERATOR_FIELDS = _FIELDS | {"latent_size": "z_dim", "dlatent_size": "w_dim", "mapping_layers": "mapping_layers"}
_DISCRIMINATOR_FIELDS = _FIELDS | {"mbstd_group_size": "mbstd_group_size", "mbstd_num_features": "mbstd_channels"}


def generator(network: PickledNetwork) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A generator's tensors by NVIDIA's PyTorch names, and the fields of its config that its options give.

    Raises ValueError, naming it, for an option that networks here do not have, and for a tensor that is missing or unknown.
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
    # None is as if absent, except for mbstd_group_size, where it is the whole batch.
    options = {name: value for name, value in kwargs.items() if value is not None or name == "mbstd_group_size"}
    # Their fmap_base counts feature maps at half the resolution that our channel_base does.
    base = {"channel_base": 2 * options.pop("fmap_base")} if type(options.get("fmap_base")) is int else {}
    return base | fields_of(options, fields, _FIXED, _IGNORED)


def _generator_rows(names: Mapping[str, Tensor]) -> Iterator[Row]:
    yield "mapping.w_avg", "dlatent_avg", "same"
    if "mapping/LabelEmbed/weight" in names:
        yield from _layer("mapping.embed", "mapping/LabelEmbed")
    for i in range(len(numbers(names, r"mapping/Dense(\d+)/weight"))):
        yield from _layer(f"mapping.fc{i}", f"mapping/Dense{i}")
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
            yield from _layer(f"{ours}.fromrgb", f"{theirs}/FromRGB", "kernel")
        if resolution > 4:
            yield from _layer(f"{ours}.conv0", f"{theirs}/Conv0", "kernel")
            yield from _layer(f"{ours}.conv1", f"{theirs}/Conv1_down", "kernel")
        if f"{theirs}/Skip/weight" in names:
            yield f"{ours}.skip.weight", f"{theirs}/Skip/weight", "kernel"
    yield from _layer("b4.conv", "4x4/Conv", "kernel")
    yield from _layer("b4.fc", "4x4/Dense0")
    yield from _layer("b4.out", "Output")


def _modulated(ours: str, theirs: str, change: str) -> Iterator[Row]:
    yield from _layer(ours, theirs, change)
    yield f"{ours}.affine.weight", f"{theirs}/mod_weight", "matrix"
    yield f"{ours}.affine.bias", f"{theirs}/mod_bias", "style"


def _layer(ours: str, theirs: str, change: str = "matrix") -> Iterator[Row]:
    yield f"{ours}.weight", f"{theirs}/weight", change
    yield f"{ours}.bias", f"{theirs}/bias", "same"


def _changed(name: str, value: Tensor, change: str) -> Tensor:
    try:
        return _CHANGES[change](value)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{name} is {tuple(value.shape)}, another number of dimensions than expected") from error


def _renamed(tensors: Mapping[str, Tensor], rows: Iterator[Row]) -> dict[str, Tensor]:
    return renamed(tensors, rows, _changed, "a StyleGAN2", ignored="lod")  # of progressive growing, without effect here


def _resolutions(names: Mapping[str, Tensor], prefix: str) -> list[int]:
    return numbers(names, prefix + r"(\d{1,4})x\1/.*")
