"""Frozen instruments for digits: a feature network and an independent classifier.

Both were trained once, on the 4,000 training digits of `mnist5k` alone, and ship as safetensors; `instruments.json` beside
them records SHA-256, held-out accuracy, command, seed and commit.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import TypedDict

from triptych_common.images import from_uint8
from triptych_common.storage.files import open_ended, read_json

FOLDER = Path(__file__).parent / "weights"


def feature_network() -> nn.Sequential:
    """A network from 28x28 digits to 64 features, then to 10 logits; without its last two layers it gives the features."""
    layers: list[nn.Module] = []
    for channels_in, channels_out, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 2)):
        convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(channels_out), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.SiLU(), nn.Linear(64, 10))


def classifier() -> nn.Sequential:
    """A network from 28x28 digits to 10 logits, of another architecture than `feature_network` so that errors differ."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(48 * 4 * 4, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10),
    )  # fmt: skip


ARCHITECTURES = {"mnist_features": feature_network, "mnist_classifier": classifier}


@dataclass(frozen=True)
class Instrument:
    """A frozen network, with the hash of its weights and the record of its training, which every score must record."""

    name: str
    network: nn.Module
    sha256: str
    record: dict

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Float[Tensor, "n outputs"]:
        """Features (n, 64) or logits (n, 10) of uint8 images (n, 1, 28, 28), depending on the instrument.

        Raises ValueError for images of another shape or type.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (1, 28, 28):
            raise ValueError(
                f"instrument {self.name}: images are {images.dtype} {tuple(images.shape)}, expected uint8 (n, 1, 28, 28)"
            )
        return torch.cat([self.network(from_uint8(part)) for part in images.split(256)])


def load_instrument(name: str, folder: Path = FOLDER) -> Instrument:
    """A frozen instrument, "mnist_features" or "mnist_classifier", checked against its recorded hash.

    Raises ValueError for an unknown name or a file whose hash differs.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"instrument {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    network, sha256, record = load_frozen(name, ARCHITECTURES[name](), folder)
    return Instrument(name, network[:-2] if name == "mnist_features" else network, sha256, record)


@open_ended
class _Record(TypedDict):
    sha256: str


def load_frozen(name: str, network: nn.Sequential, folder: Path) -> tuple[nn.Sequential, str, dict]:
    """Load weights from `folder` into a network and freeze it; returns it, the weights' SHA-256 and the record of its training.

    Raises ValueError if the hash differs from that in the folder's instruments.json.
    """
    from safetensors.torch import load

    records = read_json(folder / "instruments.json", dict[str, _Record], remedy="reinstall the package")
    if (record := records.get(name)) is None:
        raise ValueError(f"{folder / 'instruments.json'}: has no {name}; reinstall the package")
    content = (folder / f"{name}.safetensors").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != record["sha256"]:
        raise ValueError(
            f"{folder / name}.safetensors: SHA-256 {sha256[:12]} differs from the recorded "
            f"{record['sha256'][:12]}; reinstall the package"
        )
    network.load_state_dict(load(content))
    return network.requires_grad_(False).eval(), sha256, record
