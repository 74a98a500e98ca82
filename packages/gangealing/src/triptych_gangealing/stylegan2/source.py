"""What a file with StyleGAN2's networks gives, whoever wrote it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator


@dataclass(frozen=True)
class Source:
    """A file with networks in it.

    generator, discriminator: build them, in float32 on the CPU for evaluation, beside their tensors by NVIDIA's names as the
    file has them; None where it has none. Building raises ValueError, one line, for what cannot be represented.
    """

    path: Path
    format: str
    generator: Callable[[], tuple[Generator, dict[str, Tensor]]] | None = None
    discriminator: Callable[[], tuple[Discriminator, dict[str, Tensor]]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
