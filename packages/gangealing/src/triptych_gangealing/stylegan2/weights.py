"""Files of StyleGAN2 networks: our own, with weights, config and origin; other people's are opened by `interop`."""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from triptych_common.cli import echo
from triptych_common.storage import checkpoint
from triptych_common.storage.files import regular
from triptych_common.storage.model_file import ModelFormat

from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator

GENERATOR_FILE, DISCRIMINATOR_FILE = "generator.safetensors", "discriminator.safetensors"
DISCRIMINATOR_PART = "model.discriminator"  # of a training checkpoint
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
# How torch.save's files began before they were zip archives.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True)
class Source:
    """A file with networks in it.

    generator, discriminator: functions that build them, in float32 on the CPU for evaluation, and return them with the file's
    tensors by NVIDIA's names; None for an absent one. They raise ValueError for a network that cannot be represented.
    """

    path: Path
    format: str
    generator: Callable[[], tuple[Generator, dict[str, Tensor]]] | None = None
    discriminator: Callable[[], tuple[Discriminator, dict[str, Tensor]]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def load_generator(path: str | Path) -> Generator:
    """The generator of a file, the averaged one where it has several, or one that ships ("digits32", "digits32-3").

    Raises FileNotFoundError for an absent file; ValueError for one that is damaged, would run code, holds no generator, or one
    that contradicts its own settings.
    """
    source = open_networks(path)
    if source.generator is None:
        raise ValueError(f"{path}: holds no generator")
    return source.generator()[0]


def load_discriminator(path: str | Path) -> Discriminator:
    """The discriminator in the same files as `load_generator` reads, on the CPU, for evaluation.

    Raises ValueError if the file holds none, and what `load_generator` raises.
    """
    source = open_networks(path)
    if source.discriminator is None:
        raise ValueError(f"{path}: holds no discriminator")
    return source.discriminator()[0]


def open_networks(path: str | Path) -> Source:
    """The networks of a file, whose format is recognised by its content, or of a run folder. Raises as `load_generator`."""
    # Readers of foreign files are imported on use: a file of ours needs none of them.
    path = locate(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return _own(path)
    with regular(path).open("rb") as file:
        start = file.read(len(_LEGACY_TORCH))
    if zipfile.is_zipfile(path) or start == _LEGACY_TORCH:
        from triptych_gangealing.stylegan2.interop import read_rosinality as read_foreign
    else:
        from triptych_gangealing.stylegan2.interop import read_pickle as read_foreign
    return Source(path, **read_foreign(path))


def take_over(source: str, generator: Generator, discriminator: Discriminator) -> None:
    """Replace the weights of both networks by those of `source`: a run folder, a file of ours, or a foreign checkpoint.

    Without a discriminator in the source, this one stays freshly initialised, which is reported.
    Raises ValueError naming the first tensor that does not fit, FileNotFoundError for an absent source.
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
            remedy = "pass its own resolution, channels, z_dim, classes and architecture"
            raise ValueError(f"{where}: {kind} has {name} {has}, this config wants {wants}; {remedy}")
    target.load_state_dict(theirs)


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
    """A network from a file, and facts about its training."""

    network: Generator | Discriminator
    facts: dict[str, Any]


def write_network(path: Path, network: Generator | Discriminator, facts: Mapping[str, Any]) -> None:
    """Write a network. Raises OSError when the disk refuses."""
    kind = _GENERATOR if isinstance(network, Generator) else _DISCRIMINATOR
    _FORMAT.write(path, network.state_dict(), asdict(network.config), facts, kind=kind)


def facts_of(network: Generator | Discriminator, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the weights of a network's file, for checkpoints of a training run."""
    kind = _GENERATOR if isinstance(network, Generator) else _DISCRIMINATOR
    return _FORMAT.facts_of(asdict(network.config), facts, kind=kind)


def read_network(path: Path, *, part: str = "ema") -> Loaded:
    """A network from its file, or a run's generator, on the CPU, in float32, for evaluation.

    part: of a run's checkpoint. Raises FileNotFoundError where there is none, ValueError for a file of another kind.
    """
    return _FORMAT.read(path, _build, part=part)


def _build(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Loaded:
    if facts["kind"] == _GENERATOR:
        network: Generator | Discriminator = Generator(GeneratorConfig(**facts["config"]))
    else:
        network = Discriminator(DiscriminatorConfig(**facts["config"]))
    network.load_state_dict({name: value.to(torch.float32) for name, value in tensors.items()})
    return Loaded(network.requires_grad_(False).eval(), facts)


def _own(path: Path) -> Source:
    files = [path / name for name in (GENERATOR_FILE, DISCRIMINATOR_FILE)] if path.is_dir() else [path]
    if any(file.exists() for file in files) and not checkpoint.steps_in(path.parent):
        loaded = [read_network(file) for file in files if file.exists()]
    else:  # a run that is not finished, or one of its checkpoints
        loaded = [read_network(path, part=part) for part in ("ema", DISCRIMINATOR_PART)]
    parts: dict[str, Any] = {"facts": {k: v for k, v in loaded[0].facts.items() if k not in ("kind", "config")}}
    for network, _ in loaded:
        name = "generator" if isinstance(network, Generator) else "discriminator"
        parts[name] = lambda network=network: (network, network.state_dict())
    return Source(path, "triptych", **parts)
