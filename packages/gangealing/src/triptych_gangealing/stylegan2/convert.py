"""`triptych-gangealing convert`: StyleGAN2 networks and aligners from any known file to ours or to others', checked by outputs."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from triptych_common import randomness
from triptych_common.cli import echo
from triptych_common.storage import checkpoint, foreign

from triptych_gangealing import released
from triptych_gangealing.aligner import FILE, load_aligner, write_aligner
from triptych_gangealing.settings import ConvertConfig
from triptych_gangealing.stylegan2 import rosinality
from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Classes, Generator, Images, Latents
from triptych_gangealing.stylegan2.shapes import FILTER, build, discriminator_config, generator_config
from triptych_gangealing.stylegan2.weights import (
    DISCRIMINATOR_FILE,
    GENERATOR_FILE,
    Source,
    load_generator,
    open_networks,
    write_network,
)

_TOLERANCE = 1e-4  # of the outputs' range, or of one where that is smaller
_IMAGES = 2
_ROSINALITY_FILE, _GANGEALING_FILE = "stylegan2.pt", "gangealing.pt"
Network = Generator | Discriminator
Built = dict[str, tuple[Network, Mapping[str, Tensor]]]  # and the source's tensors


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Read networks, check their outputs, and write them; returns their shapes, the files and the largest difference of outputs.

    Raises ValueError for a file that would run code, is damaged or contradicts itself, for outputs that differ, and where --out
    is something other than a conversion; OSError when the disk refuses.
    """
    if config.checkpoint is None:
        raise ValueError("no checkpoint: give the file to convert, --checkpoint network.pkl")
    if config.format == "gangealing":
        return _export_aligner(config)
    source = open_networks(config.checkpoint)
    built = _built(source, config)
    found = {name: _describe(network) for name, (network, _) in built.items()}
    for name, about in found.items():
        echo(f"{source.format}, {name}: {_sentence(about)}")
    facts = {
        **source.facts,
        "converted_from": config.checkpoint.name,
        "source_format": source.format,
        "source_sha256": None if config.checkpoint.is_dir() else checkpoint.file_digest(config.checkpoint),
    }
    write = _write_rosinality if config.format == "rosinality" else _write_own
    differences, written = write(built, facts, config)
    if config.format == "safetensors" and config.out.suffix != ".safetensors":
        written += _convert_aligner(config, facts)
    for name, value in differences.items():
        echo(f"{name}: outputs differ from a plain forward pass of the source's tensors by {value:.2g} at most")
    echo(f"wrote {', '.join(written)}")
    return {"found": found, "format": source.format, "difference": differences, "written": written, "facts": facts}


def _convert_aligner(config: ConvertConfig, facts: dict[str, Any]) -> list[str]:
    """Write the aligner of a released GANgealing checkpoint; returns its file, nothing where the source has none."""
    assert config.checkpoint is not None
    if config.checkpoint.suffix not in (".pt", ".pth") or not released.holds_aligner(foreign.read(config.checkpoint)):
        return []
    aligner, path = load_aligner(config.checkpoint), config.out / FILE
    write_aligner(path, aligner, {**aligner.facts, **facts})
    echo(f"aligner: {aligner.config.heads} clusters, {', '.join(aligner.config.transforms)}")
    return [str(path)]


def _export_aligner(config: ConvertConfig) -> dict[str, Any]:
    assert config.checkpoint is not None
    assert config.generator is not None
    aligner, generator = load_aligner(config.checkpoint), load_generator(config.generator)
    if generator.config.w_dim != aligner.mode.origins.shape[1]:
        sizes = f"{generator.config.w_dim} dimensions, the aligner's modes {aligner.mode.origins.shape[1]}"
        raise ValueError(f"--generator {config.generator}: its W has {sizes}; give the one that it was trained on")
    path = config.out if config.out.suffix == ".pt" else config.out / _GANGEALING_FILE
    _refuse_to_replace(path)
    facts = {"converted_from": config.checkpoint.name, "source_format": "triptych"}
    shape = aligner.config
    theirs = released.to_released(shape, aligner.state_dict(), aligner.facts, classifier=aligner.classifier is not None)
    foreign.write(path, {**rosinality.to_rosinality(generator), **theirs, **facts})
    if (shape.input_size, shape.channel_max) != (128, 512) or not rosinality.fixed_widths(generator.config):
        echo("the released code has fixed sizes, 128 pixels and 512 feature maps: edit `channels` in it before loading")
    echo(f"wrote {path}")
    return {"written": [str(path)], "format": config.format, "facts": facts}


def _built(source: Source, config: ConvertConfig) -> Built:
    built: Built = {}
    if source.generator is not None:
        built["generator"] = source.generator()
    if source.discriminator is not None and not config.generator_only and config.out.suffix != ".safetensors":
        try:
            built["discriminator"] = source.discriminator()
        except ValueError as error:
            raise ValueError(f"{error}; --generator-only leaves the discriminator out") from error
    if not built or ("generator" not in built and (config.generator_only or config.format == "rosinality")):
        raise ValueError(f"{source.path}: holds no generator")
    return built


def _write_own(built: Built, facts: dict[str, Any], config: ConvertConfig) -> tuple[dict[str, float], list[str]]:
    differences = {name: difference(*pair) for name, pair in built.items()}
    paths = {"generator": config.out / GENERATOR_FILE, "discriminator": config.out / DISCRIMINATOR_FILE}
    if config.out.suffix == ".safetensors":
        paths = {"generator": config.out}
    for path in paths.values():
        _refuse_to_replace(path)
    for name, (network, _) in built.items():
        write_network(paths[name], network, {**facts, "difference": differences[name]})
    for name in paths.keys() - built.keys():  # of an earlier conversion: not of this source
        paths[name].unlink(missing_ok=True)
    return differences, [str(paths[name]) for name in built]


def _write_rosinality(built: Built, facts: dict[str, Any], config: ConvertConfig) -> tuple[dict[str, float], list[str]]:
    path = config.out if config.out.suffix == ".pt" else config.out / _ROSINALITY_FILE
    generator: Any = built["generator"][0]
    discriminator: Any = built["discriminator"][0] if "discriminator" in built else None
    content = rosinality.to_rosinality(generator, discriminator)
    # Read back from their names, so that the check covers both directions.
    tensors = rosinality.generator_tensors(content["g_ema"], content["latent_avg"])
    again: dict[str, Network] = {"generator": build(generator_config(tensors), tensors)}
    if "d" in content:
        tensors = rosinality.discriminator_tensors(content["d"])
        again["discriminator"] = build(discriminator_config(tensors), tensors)
    differences = {name: difference(again[name], theirs, network.config) for name, (network, theirs) in built.items()}
    if not rosinality.fixed_widths(generator.config):
        echo("their code has other, fixed numbers of feature maps: edit `channels` in its model.py before loading")
    _refuse_to_replace(path)
    foreign.write(path, {**content, **facts})
    return differences, [str(path)]


def _refuse_to_replace(path: Path) -> None:
    """Raises ValueError for an existing file that no conversion made."""
    if not path.exists():
        return
    try:
        facts = foreign.read(path) if path.suffix == ".pt" else checkpoint.read(path)[1]
    except (ValueError, OSError):
        facts = {}
    if not isinstance(facts, dict) or "converted_from" not in facts:
        raise ValueError(f"{path}: already there, and no conversion made it; choose another --out or move it away")


def _describe(network: Network) -> dict[str, Any]:
    config = network.config
    about = {
        "class": type(network).__name__,
        "parameters": sum(p.numel() for p in network.parameters()),
        "feature_maps": {r: config.channels_at(r) for r in config.resolutions},
        **asdict(config),
    }
    return about | ({"num_ws": network.num_ws} if isinstance(network, Generator) else {})


def _sentence(about: Mapping[str, Any]) -> str:
    size, maps = about["resolution"], list(about["feature_maps"].values())
    styles = f"{about['num_ws']} w's, " if "num_ws" in about else ""
    classes = f"{about['c_dim']} classes" if about["c_dim"] else "unconditional"
    return (
        f"{about['image_channels']}x{size}x{size}, {about['architecture']} design, {maps[0]} to {maps[-1]} feature maps, "
        f"{about['parameters']:,} parameters, {styles}{classes}"
    )


# --- Both networks once more, written as in the papers, to check a converted network's outputs.
# Upsampling inserts zeros and then filters, every image has its own modulated weights, and no code is shared with `layers`.


@torch.no_grad()
def difference(
    network: Network, tensors: Mapping[str, Tensor], config: GeneratorConfig | DiscriminatorConfig | None = None
) -> float:
    """Largest difference, on fixed inputs, between a network's outputs and those of `tensors` by the plain forward pass.

    config: the source's, where the network has lost part of it. Raises ValueError where the difference is more than rounding.
    """
    config = config or network.config
    tensors = {name: value.to(torch.float32) for name, value in tensors.items()}
    c = torch.eye(config.c_dim)[torch.arange(_IMAGES) % config.c_dim] if config.c_dim else None
    if isinstance(config, GeneratorConfig):
        z = randomness.normal(0, "verify/z", range(_IMAGES), (config.z_dim,))
        ours, theirs = network(z, c), images(config, tensors, z, c)
    else:
        size = (config.image_channels, config.resolution, config.resolution)
        x = randomness.normal(0, "verify/images", range(_IMAGES), size)
        ours, theirs = network(x, c), logits(config, tensors, x, c)
    largest = (ours - theirs).abs().max().item()
    limit = _TOLERANCE * max(1.0, theirs.abs().max().item())
    if not largest <= limit:  # true of NaN too
        found = f"outputs of the converted network differ from the source's by {largest:.3g}"
        raise ValueError(f"{found}, more than rounding ({limit:.3g}); nothing was written")
    return largest


def images(config: GeneratorConfig, tensors: Mapping[str, Tensor], z: Latents, c: Classes = None) -> Images:
    """A generator's images, with its constant noise.  [Karras et al. 2020, figure 2 and appendix B]"""
    w = _mapping(tensors, config.mapping_layers, z, c)
    x = tensors["synthesis.b4.const"].expand(len(z), -1, -1, -1)
    image, root = x.new_zeros(len(z), config.image_channels, 2, 2), math.sqrt(0.5)
    for resolution in config.resolutions:
        block = _part(tensors, f"synthesis.b{resolution}.")
        residual = config.architecture == "resnet" and resolution > 4
        # Both branches of a residual block times sqrt(1/2), so that the sum has unit variance.
        skip = _up(x, _scaled(block["skip.weight"])) * root if residual else 0
        if resolution > 4:
            x = _styled(block, "conv0.", x, w, config.conv_clamp, up=True)
        x = skip + _styled(block, "conv1.", x, w, config.conv_clamp) * (root if residual else 1)
        image = _up(image)
        if "torgb.weight" in block:
            style = _linear(block, "torgb.affine.", w)
            rgb = _per_image(x, style, _scaled(block["torgb.weight"])) + block["torgb.bias"].view(1, -1, 1, 1)
            image = image + _clamped(rgb, config.conv_clamp)
    return image


def logits(
    config: DiscriminatorConfig, tensors: Mapping[str, Tensor], x: Images, c: Classes = None
) -> Float[Tensor, " batch"]:
    """A discriminator's logits.  [as above; Karras et al. 2018, section 3]"""
    image, root = x, math.sqrt(0.5)
    maps: Any = 0.0
    for resolution in reversed(config.resolutions[1:]):
        block = _part(tensors, f"b{resolution}.")
        if "fromrgb.weight" in block:
            maps, image = maps + _conv(block, "fromrgb.", image, config.conv_clamp), _down(image)
        y = _conv(block, "conv1.", _conv(block, "conv0.", maps, config.conv_clamp), config.conv_clamp, down=True)
        residual = config.architecture == "resnet"
        maps = (y + _down(maps, _scaled(block["skip.weight"]))) * root if residual else y
    block, x = _part(tensors, "b4."), maps
    if "fromrgb.weight" in block:
        x = x + _conv(block, "fromrgb.", image, None)
    for spread in _spreads(x, config):
        x = torch.cat([x, spread], dim=1)
    x = _conv(block, "conv.", x, config.conv_clamp).flatten(1)
    x = _linear(block, "out.", _activated(_linear(block, "fc.", x)))
    if c is None:
        return x[:, 0]
    return (x * _mapping(tensors, config.mapping_layers, None, c)).sum(1) / math.sqrt(x.shape[1])


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _mapping(tensors: Mapping[str, Tensor], layers: int, z: Tensor | None, c: Tensor | None) -> Tensor:
    inputs = ([] if z is None else [z]) + ([] if c is None else [_linear(tensors, "mapping.embed.", c)])
    x = torch.cat([y / (y.square().mean(1, keepdim=True) + 1e-8).sqrt() for y in inputs], dim=1)
    for i in range(layers):
        x = _activated(_linear(tensors, f"mapping.fc{i}.", x, rate=0.01))
    return x


def _linear(tensors: Mapping[str, Tensor], prefix: str, x: Tensor, rate: float = 1.0) -> Tensor:
    weight, bias = tensors[f"{prefix}weight"], tensors[f"{prefix}bias"]
    return rate * (x @ weight.T / math.sqrt(weight.shape[1]) + bias)


def _activated(x: Tensor, clamp: float | None = None) -> Tensor:
    return _clamped(math.sqrt(2) * torch.where(x > 0, x, 0.2 * x), clamp)


def _clamped(x: Tensor, clamp: float | None) -> Tensor:
    return x if clamp is None else x.clamp(-clamp, clamp)


def _scaled(weight: Tensor) -> Tensor:
    return weight / math.sqrt(weight[0].numel())


def _styled(
    block: Mapping[str, Tensor], name: str, x: Tensor, w: Tensor, clamp: float | None, *, up: bool = False
) -> Tensor:
    weight, style = block[f"{name}weight"], _linear(block, f"{name}affine.", w)
    norms = (weight * style[:, None, :, None, None]).square().sum((2, 3, 4)) + 1e-8
    x = _per_image(x, style, weight, up=up) / norms.sqrt()[:, :, None, None]
    x = x + block[f"{name}noise_strength"] * block[f"{name}noise_const"] + block[f"{name}bias"].view(1, -1, 1, 1)
    return _activated(x, clamp)


def _per_image(x: Tensor, style: Tensor, weight: Tensor, *, up: bool = False) -> Tensor:
    weights = weight * style[:, None, :, None, None]
    pad = weight.shape[-1] // 2
    rows = (_up(y, w) if up else F.conv2d(y, w, padding=pad) for y, w in zip(x.split(1), weights, strict=True))
    return torch.cat(list(rows))


def _conv(block: Mapping[str, Tensor], name: str, x: Tensor, clamp: float | None, *, down: bool = False) -> Tensor:
    weight = _scaled(block[f"{name}weight"])
    x = _down(x, weight) if down else F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    return _activated(x + block[f"{name}bias"].view(1, -1, 1, 1), clamp)


def _filtered(x: Tensor, gain: float = 1.0) -> Tensor:
    n, channels, height, width = x.shape
    return F.conv2d(x.reshape(-1, 1, height, width), gain * FILTER[None, None]).view(n, channels, height - 3, width - 3)


def _up(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Zeros between pixels, the filter, then a convolution proper (the kernel turned by 180 degrees)."""
    n, channels, height, width = x.shape
    spread = x.new_zeros(n, channels, 2 * height, 2 * width)
    spread[:, :, ::2, ::2] = x
    edge = 0 if weight is None else weight.shape[-1] // 2
    x = _filtered(F.pad(spread, (2 + edge, 1 + edge) * 2), gain=4.0)
    return x if weight is None else F.conv2d(x, weight.flip(2, 3))


def _down(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """The filter, then a convolution at every second pixel."""
    edge = 0 if weight is None else weight.shape[-1] // 2
    x = _filtered(F.pad(x, (1 + edge,) * 4))
    return x[:, :, ::2, ::2] if weight is None else F.conv2d(x, weight, stride=2)


def _spreads(x: Tensor, config: DiscriminatorConfig) -> list[Tensor]:
    """Standard deviations over the images of a group, averaged over each of `mbstd_channels` parts of the channels."""
    size = min(config.mbstd_group_size, len(x))
    apart = len(x) // size  # image i is in group i mod apart
    spreads = []
    for part in x.chunk(config.mbstd_channels, dim=1) if config.mbstd_channels else []:
        values = [(group.var(0, correction=0) + 1e-8).sqrt().mean() for group in (part[i::apart] for i in range(apart))]
        spreads.append(torch.stack(values * size).view(-1, 1, 1, 1).expand(-1, -1, 4, 4))
    return spreads
