"""Network files: one safetensors file with a generator's or discriminator's weights, its config and where it comes from."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triptych_common.storage import checkpoint

from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator

GENERATOR_FILE, DISCRIMINATOR_FILE = "generator.safetensors", "discriminator.safetensors"
EMBEDDED, GENERATORS = Path(__file__).parent.parent / "weights", ("digits32", "digits32-3")
_KINDS = {
    "StyleGAN2 generator": (Generator, GeneratorConfig),
    "StyleGAN2 discriminator": (Discriminator, DiscriminatorConfig),
}


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
    kind = "StyleGAN2 generator" if isinstance(network, Generator) else "StyleGAN2 discriminator"
    checkpoint.write(path, network.state_dict(), {"kind": kind, "config": asdict(network.config), **facts})


def read_network(path: Path) -> Loaded:
    """A network from its file, on the CPU, in float32, for evaluation.

    Raises FileNotFoundError where there is none, ValueError for a file of another kind.
    """
    tensors, facts = checkpoint.read(path)
    if facts.get("kind") not in _KINDS:
        raise ValueError(
            f"{path}: neither a generator nor a discriminator; expected {GENERATOR_FILE} of a train-gan run"
        )
    network_class, config_class = _KINDS[facts["kind"]]
    try:
        network = network_class(config_class(**facts["config"]))
        network.load_state_dict({name: value.to(torch.float32) for name, value in tensors.items()})
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path}: made by another version of triptych ({' '.join(str(error).split())[:200]})"
        ) from error
    return Loaded(network.requires_grad_(False).eval(), facts)
