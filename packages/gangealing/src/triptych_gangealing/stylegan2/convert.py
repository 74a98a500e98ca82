"""`triptych-gangealing convert`: StyleGAN2 networks of anyone's file in ours, or in rosinality's."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from triptych_common.cli import CommonOptions, echo
from triptych_common.storage import checkpoint, foreign

from triptych_gangealing.stylegan2 import rosinality
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.interop import Source, open_networks
from triptych_gangealing.stylegan2.shapes import build, discriminator_config, generator_config
from triptych_gangealing.stylegan2.verify import difference
from triptych_gangealing.stylegan2.weights import DISCRIMINATOR_FILE, GENERATOR_FILE, write_network

_ROSINALITY_FILE = "stylegan2.pt"
Built = dict[str, tuple[Generator | Discriminator, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class ConvertConfig(CommonOptions):
    """Convert StyleGAN2 networks: from pickles of NVIDIA's code, rosinality's checkpoints or files of ours."""

    checkpoint: Path | None = None
    """file to read, without running a line of it"""
    format: Literal["safetensors", "rosinality"] = "safetensors"
    """what to write: files of ours, or a checkpoint that rosinality/stylegan2-pytorch loads"""
    generator_only: bool = False
    """leave the discriminator out"""
    out: Path = Path("runs/converted")
    """folder to write to, or a file: .safetensors for a generator alone, .pt for rosinality's"""

    def __post_init__(self) -> None:
        suffix = self.out.suffix
        if (suffix, self.format) in ((".pt", "safetensors"), (".safetensors", "rosinality")):
            raise ValueError(f"--out {self.out}: not a file of format {self.format}; choose another name or --format")

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Read, check by its outputs, and write; returns what was found, what was written and the largest difference of outputs.

    Raises ValueError, one line, for a file that would run code, is damaged or contradicts itself, for outputs that differ, and
    where something other than a conversion stands at --out; OSError when the disk refuses.
    """
    if config.checkpoint is None:
        raise ValueError("no checkpoint: give the file to convert, --checkpoint network.pkl")
    source = open_networks(config.checkpoint)
    built = _built(source, config)
    found = {name: _describe(network) for name, (network, _) in built.items()}
    for name, about in found.items():
        echo(f"{source.format}, {name}: {_sentence(about)}")
    facts = {
        **source.facts,
        "converted_from": config.checkpoint.name,
        "source_format": source.format,
        "source_sha256": _sha256(config.checkpoint),
    }
    write = _write_rosinality if config.format == "rosinality" else _write_own
    differences, written = write(built, facts, config)
    for name, value in differences.items():
        echo(f"{name}: outputs differ from a plain forward pass of the source's tensors by {value:.2g} at most")
    echo(f"wrote {', '.join(written)}")
    return {"found": found, "format": source.format, "difference": differences, "written": written, "facts": facts}


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
    if config.out.suffix == ".safetensors":
        paths = {"generator": config.out}
    else:
        paths = {"generator": config.out / GENERATOR_FILE, "discriminator": config.out / DISCRIMINATOR_FILE}
    for path in paths.values():
        _refuse_to_replace(path)
    for name, (network, _) in built.items():
        write_network(paths[name], network, {**facts, "difference": differences[name]})
    for name in paths.keys() - built.keys():  # of an earlier conversion: not of this source
        paths[name].unlink(missing_ok=True)
    return differences, [str(paths[name]) for name in built]


def _write_rosinality(built: Built, facts: dict[str, Any], config: ConvertConfig) -> tuple[dict[str, float], list[str]]:
    path = config.out if config.out.suffix == ".pt" else config.out / _ROSINALITY_FILE
    content = rosinality.to_rosinality(*(network for network, _ in built.values()))
    again = {"generator": rosinality.generator_tensors(content["g_ema"], content["latent_avg"])}
    if "d" in content:
        again["discriminator"] = rosinality.discriminator_tensors(content["d"])
    infer = {"generator": generator_config, "discriminator": discriminator_config}
    differences = {
        name: difference(build(infer[name](again[name]), again[name]), tensors, network.config)
        for name, (network, tensors) in built.items()
    }
    if not rosinality.fixed_widths(built["generator"][0].config):
        echo(
            "their code has fixed numbers of feature maps, other than these: edit `channels` in its model.py before loading"
        )
    _refuse_to_replace(path)
    foreign.write(path, {**content, **facts})
    return differences, [str(path)]


def _refuse_to_replace(path: Path) -> None:
    """Raises ValueError where a file stands that no conversion made."""
    if not path.exists():
        return
    try:
        facts = foreign.read(path) if path.suffix == ".pt" else checkpoint.read(path)[1]
    except (ValueError, OSError):
        facts = {}
    if not isinstance(facts, dict) or "converted_from" not in facts:
        raise ValueError(f"{path}: already there, and no conversion made it; choose another --out or move it away")


def _describe(network: Generator | Discriminator) -> dict[str, Any]:
    config = network.config
    about = {
        "class": type(network).__name__,
        "parameters": sum(p.numel() for p in network.parameters()),
        "feature_maps": {r: config.channels_at(r) for r in config.resolutions},
        **asdict(config),
    }
    return about | ({"num_ws": network.num_ws} if isinstance(network, Generator) else {})


def _sentence(about: Mapping[str, Any]) -> str:
    maps = list(about["feature_maps"].values())
    parts = [
        f"{about['image_channels']}x{about['resolution']}x{about['resolution']}",
        f"{about['architecture']} design",
        f"{maps[0]} to {maps[-1]} feature maps",
        f"{about['parameters']:,} parameters",
        *([f"{about['num_ws']} w's"] if "num_ws" in about else []),
        f"{about['c_dim']} classes" if about["c_dim"] else "unconditional",
    ]
    return ", ".join(parts)


def _sha256(path: Path) -> str | None:
    if path.is_dir():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
