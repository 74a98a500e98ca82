"""Checkpoints of rosinality/stylegan2-pytorch, both ways: other names, and a few more dimensions of length one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triptych_common import randomness
from triptych_common.storage import foreign

from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.shapes import FILTER, Row, Tensors, numbers, renamed, without_filters

MEAN_OF = 10_000  # latents whose mean w replaces an average that a file lacks
# The networks compute the same, except that the small constant of the demodulation is elsewhere: outputs differ by a millionth.
# Dimensions of length 1 that theirs have in front of ours, and behind.
_ONES = {"same": (0, 0), "batch": (1, 0), "map": (2, 0), "image": (1, 2)}
# Filters that follow an insertion of zeros between pixels sum to 4, to keep the brightness.
_GENERATOR_FILTERS = {r"convs\.\d+\.conv\.blur\.kernel": 4.0, r"to_rgbs\.\d+\.upsample\.kernel": 4.0}
_DISCRIMINATOR_FILTERS = {r"convs\.\d+\.(conv2|skip)\.0\.kernel": 1.0}


def generator_state(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Their state dict of a checkpoint's generator, the average rather than the one in training; a bare one is one too."""
    state = foreign.network_in(content, holds=["input.input"]).tensors
    return state if "input.input" in state else None


def discriminator_state(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Their state dict of a checkpoint's discriminator, if it has one."""
    state = foreign.network_in(content, holds=["final_linear.0.weight"]).tensors
    return state if "final_linear.0.weight" in state else None


def generator_tensors(state: Mapping[str, Any], latent_avg: Tensor | None) -> dict[str, Tensor]:
    """A generator's tensors by NVIDIA's names. Without `latent_avg` there is no "mapping.w_avg" either: see `mean_style`.

    Raises ValueError, naming the tensor, for one that is missing, oddly shaped or unknown, or another filter than [1, 3, 3, 1].
    """
    state = without_filters(state, _GENERATOR_FILTERS)
    layers = len(numbers(state, r"style\.(\d+)\.weight"))
    blocks = len(numbers(state, r"to_rgbs\.(\d+)\.conv\.weight"))
    tensors = _to_ours(state, _generator_rows(layers, blocks))
    return tensors if latent_avg is None else {**tensors, "mapping.w_avg": latent_avg.flatten()}


def discriminator_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A discriminator's tensors by NVIDIA's names. Raises as `generator_tensors`."""
    state = without_filters(state, _DISCRIMINATOR_FILTERS)
    return _to_ours(state, _discriminator_rows(len(numbers(state, r"convs\.(\d+)\.skip\.1\.weight"))))


@torch.no_grad()
def mean_style(generator: Generator) -> Tensor:
    """The mean w over `MEAN_OF` fixed latents."""
    z = randomness.normal(0, "mean style", range(MEAN_OF), (generator.config.z_dim,))
    return generator.mapping(z).mean(0)


def to_rosinality(generator: Generator, discriminator: Discriminator | None = None) -> dict[str, Any]:
    """A checkpoint that their code loads: "g_ema", "latent_avg" and, where given, "d"; with filters, as strict loading needs.

    Raises ValueError for networks of a design that their code does not have.
    """
    config = generator.config
    _refuse_other(config, {"architecture": "skip", "c_dim": 0, "image_channels": 3, "z_dim": config.w_dim}, "generator")
    blocks = len(config.resolutions) - 1
    state = _to_theirs(generator.state_dict(), _generator_rows(config.mapping_layers, blocks))
    for k in range(blocks):
        state |= {f"convs.{2 * k}.conv.blur.kernel": 4 * FILTER, f"to_rgbs.{k}.upsample.kernel": 4 * FILTER}
    content: dict[str, Any] = {"g_ema": state, "latent_avg": generator.mapping.w_avg.detach().cpu().clone()}
    if discriminator is not None:
        content["d"] = _exported(discriminator)
    return content


def fixed_widths(config: GeneratorConfig) -> bool:
    """Whether their code can build this network as it is: 512 feature maps up to 32x32, halved from there or from 64x64."""
    widths = [{r: 512 if r <= 32 else 16384 * multiplier // r for r in config.resolutions} for multiplier in (1, 2)]
    return {r: config.channels_at(r) for r in config.resolutions} in widths


def _exported(discriminator: Discriminator) -> dict[str, Tensor]:
    config = discriminator.config
    expected = {"architecture": "resnet", "c_dim": 0, "image_channels": 3, "mbstd_group_size": 4, "mbstd_channels": 1}
    _refuse_other(config, expected, "discriminator")
    blocks = len(config.resolutions) - 1
    state = _to_theirs(discriminator.state_dict(), _discriminator_rows(blocks))
    for i in range(1, blocks + 1):
        state |= {f"convs.{i}.{name}.0.kernel": FILTER.clone() for name in ("conv2", "skip")}
    return state


def _refuse_other(config: GeneratorConfig | DiscriminatorConfig, expected: Mapping[str, Any], what: str) -> None:
    for name, value in expected.items():
        if getattr(config, name) != value:
            found = f"the {what} has {name} {getattr(config, name)}"
            raise ValueError(f"{found}: rosinality's code knows only {value}; use --format safetensors")


def _generator_rows(layers: int, blocks: int) -> Iterator[Row]:
    for i in range(layers):  # their layer 0 is the normalisation
        yield from _weight_and_bias(f"mapping.fc{i}", f"style.{i + 1}")
    yield "synthesis.b4.const", "input.input", "batch"
    resolutions = [2 ** (k + 3) for k in range(blocks)]
    convs = [("b4.conv1", "conv1")]
    convs += [(f"b{r}.conv{j}", f"convs.{2 * k + j}") for k, r in enumerate(resolutions) for j in (0, 1)]
    for i, (ours, theirs) in enumerate(convs):
        yield from _modulated(ours, theirs)
        yield f"synthesis.{ours}.bias", f"{theirs}.activate.bias", "same"
        yield f"synthesis.{ours}.noise_strength", f"{theirs}.noise.weight", "batch"
        yield f"synthesis.{ours}.noise_const", f"noises.noise_{i}", "map"
    to_rgb = [("b4.torgb", "to_rgb1"), *((f"b{r}.torgb", f"to_rgbs.{k}") for k, r in enumerate(resolutions))]
    for ours, theirs in to_rgb:
        yield from _modulated(ours, theirs)
        yield f"synthesis.{ours}.bias", f"{theirs}.bias", "image"


def _modulated(ours: str, theirs: str) -> Iterator[Row]:
    yield f"synthesis.{ours}.weight", f"{theirs}.conv.weight", "batch"
    yield from _weight_and_bias(f"synthesis.{ours}.affine", f"{theirs}.conv.modulation")


def _weight_and_bias(ours: str, weight: str, bias: str | None = None) -> Iterator[Row]:
    yield f"{ours}.weight", f"{weight}.weight", "same"
    yield f"{ours}.bias", f"{bias or weight}.bias", "same"


def _discriminator_rows(blocks: int) -> Iterator[Row]:
    yield from _weight_and_bias(f"b{2 ** (blocks + 2)}.fromrgb", "convs.0.0", "convs.0.1")
    for i in range(1, blocks + 1):
        ours, theirs = f"b{2 ** (blocks + 3 - i)}", f"convs.{i}"
        yield f"{ours}.skip.weight", f"{theirs}.skip.1.weight", "same"
        yield from _weight_and_bias(f"{ours}.conv0", f"{theirs}.conv1.0", f"{theirs}.conv1.1")
        yield from _weight_and_bias(f"{ours}.conv1", f"{theirs}.conv2.1", f"{theirs}.conv2.2")  # conv2.0 is the filter
    yield from _weight_and_bias("b4.conv", "final_conv.0", "final_conv.1")
    yield from _weight_and_bias("b4.fc", "final_linear.0")
    yield from _weight_and_bias("b4.out", "final_linear.1")


def _longer(shape: Sequence[Any], form: str) -> tuple[Any, ...]:
    """Their shape of a tensor of ours."""
    front, behind = _ONES[form]
    return (*(1,) * front, *shape, *(1,) * behind)


def _to_theirs(state: Tensors, rows: Iterator[Row]) -> dict[str, Tensor]:
    theirs = {}
    for ours, name, form in rows:
        value = state[ours].detach().cpu()
        theirs[name] = value.reshape(_longer(value.shape, form)).clone()
    return theirs


def _to_ours(state: Tensors, rows: Iterator[Row]) -> dict[str, Tensor]:
    def shortened(name: str, value: Tensor, form: str) -> Tensor:
        (front, behind), shape = _ONES[form], tuple(value.shape)
        ours = shape[front : len(shape) - behind]
        if _longer(ours, form) != shape:
            expected = _longer(("n",), form) if form == "image" else "ones in front"
            raise ValueError(f"{name} is {shape}, expected {expected}")
        return value.reshape(ours)

    return renamed(state, rows, shortened, "rosinality's")
