"""Network files: one safetensors file with a generator's or discriminator's weights, its config and where it comes from."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triptych_common.storage.model_file import ModelFormat

from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator

GENERATOR_FILE, DISCRIMINATOR_FILE = "generator.safetensors", "discriminator.safetensors"
EMBEDDED, GENERATORS = Path(__file__).parent.parent / "weights", ("digits32", "digits32-3")
_GENERATOR, _DISCRIMINATOR = "StyleGAN2 generator", "StyleGAN2 discriminator"
_FORMAT = ModelFormat(
    kinds=(_GENERATOR, _DISCRIMINATOR),
    file_name=GENERATOR_FILE,
    expected="a StyleGAN2 network",
    mismatch="neither a generator nor a discriminator",
    made=f"triptych-gangealing train-gan --out FOLDER makes {GENERATOR_FILE}",
    absent="no finished generator; train one with triptych-gangealing train-gan --out {folder}",
)


def locate(name: str | Path) -> Path:
    """The file of an embedded generator ("digits32", or "digits32-3" of one digit), or the path that `name` is.

    Raises FileNotFoundError where there is neither.
    """
    if name in GENERATORS and (EMBEDDED / f"{name}.safetensors").is_file():
        return EMBEDDED / f"{name}.safetensors"
    if not Path(name).exists():
        raise FileNotFoundError(f"{name}: no such file or folder, nor an embedded generator ({', '.join(GENERATORS)})")
    return Path(name)


class Loaded(NamedTuple):
    """A network read from a file, and the facts of its making."""

    network: Generator | Discriminator
    facts: dict[str, Any]


def write_network(path: Path, network: Generator | Discriminator, facts: Mapping[str, Any]) -> None:
    """Write a network. Raises OSError when the disk refuses."""
    kind = _GENERATOR if isinstance(network, Generator) else _DISCRIMINATOR
    _FORMAT.write(path, network.state_dict(), asdict(network.config), facts, kind=kind)


def read_network(path: Path) -> Loaded:
    """A network from its file, or a run's generator, on the CPU, in float32, for evaluation.

    Raises FileNotFoundError where there is none, ValueError for a file of another kind.
    """
    return _FORMAT.read(path, _build)


def _build(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Loaded:
    if facts["kind"] == _GENERATOR:
        network: Generator | Discriminator = Generator(GeneratorConfig(**facts["config"]))
    else:
        network = Discriminator(DiscriminatorConfig(**facts["config"]))
    network.load_state_dict({name: value.to(torch.float32) for name, value in tensors.items()})
    return Loaded(network.requires_grad_(False).eval(), facts)
