"""Perceptual distances: how far apart two images are to a network that was trained for something else.

All have one form: features of several layers, scaled to unit length at each of their pixels, whose squared differences are
summed over channels, averaged over pixels and summed over layers.  [Zhang et al. 2018; thesis 4.3.1]
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from triptych_common.storage import checkpoint
from triptych_common.storage.files import open_ended
from triptych_common.storage.model_file import ModelFormat
from typing_extensions import TypedDict

from triptych_gangealing.config import EncoderConfig

ENCODER_FILE = "encoder.safetensors"


@open_ended
class _Facts(TypedDict):
    config: EncoderConfig


_FORMAT = ModelFormat(
    kinds=("image encoder",),
    file_name=ENCODER_FILE,
    expected="an image encoder",
    mismatch="holds no encoder",
    made=f"triptych-gangealing train-encoder --out FOLDER makes {ENCODER_FILE}",
    absent="no such file; train one with triptych-gangealing train-encoder --out {folder}",
    facts=_Facts,
)
VGG_FILE = "vgg16-397923af.pth"
VGG_URL = f"https://download.pytorch.org/models/{VGG_FILE}"
SSL_VGG_URL = "http://efrosgans.eecs.berkeley.edu/gangealing/pretrained/simclr_vgg_phase150.pt"
SSL_DIVISOR = 18.0  # sums without heads are about that much larger than LPIPS's  [the released GANgealing]
EPSILON = 1e-10

Images = Float[Tensor, "n 3 height width"]
Features = tuple[Float[Tensor, "n _channels _height _width"], ...]


class PerceptualDistance(nn.Module):
    """A frozen network's distance between images in [-1, 1], for each pair of them; differentiable in both.

    trunk: images to feature maps; its `least` is the smallest side. heads: weights of each map's channels; by default all 1.
    shift, scale: applied to colours before the trunk.
    """

    shift: Float[Tensor, "3 1 1"]
    scale: Float[Tensor, "3 1 1"]

    def __init__(
        self,
        trunk: nn.Module,
        *,
        heads: Sequence[Float[Tensor, " _channels"]] | None = None,
        divisor: float = 1.0,
        shift: Sequence[float] = (0.0, 0.0, 0.0),
        scale: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.trunk, self.divisor = trunk, divisor
        self.register_buffer("shift", torch.tensor(shift)[:, None, None])
        self.register_buffer("scale", torch.tensor(scale)[:, None, None])
        self.heads = None if heads is None else nn.ParameterList([head[:, None, None] for head in heads])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Always in evaluation mode, also as part of a module in training."""
        return super().train(False)

    def features(self, images: Tensor) -> Features:
        """Feature maps of images (n, 3, height, width), of length 1 at every pixel.

        Raises ValueError for images of another shape, or too small.
        """
        least = cast(int, self.trunk.least)
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < least:
            raise ValueError(f"images {tuple(images.shape)}: expected (n, 3, height, width), at least {least}x{least}")
        return tuple(unit_length(x) for x in self.trunk((images - self.shift) / self.scale))

    def between(self, a: Features, b: Features) -> Float[Tensor, " n"]:
        """Distance of each pair of images whose `features` these are."""
        total = torch.zeros((), dtype=a[0].dtype, device=a[0].device)
        for i, (here, there) in enumerate(zip(a, b, strict=True)):
            squares = (here - there).square()
            total = total + (squares if self.heads is None else squares * self.heads[i]).sum(1).mean((1, 2))
        return total / self.divisor

    def forward(self, a: Tensor, b: Tensor) -> Float[Tensor, " n"]:
        """Of images (n, 3, height, width) to as many others. Raises ValueError as `features`, and for images of two shapes."""
        if a.shape != b.shape:
            raise ValueError(f"images {tuple(a.shape)} and {tuple(b.shape)}: expected two of one shape")
        return self.between(self.features(a), self.features(b))


def unit_length(x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
    """Features over their length at each pixel."""
    # The epsilon is inside the root, unlike in LPIPS: added to the root, the gradient would be infinite where all features
    # vanish or underflow; a ReLU hides that only where they are exactly 0.
    return x * (x.square().sum(1, keepdim=True) + EPSILON).rsqrt()


def open_distance(name: str, *, weights: str | Path | None = None) -> PerceptualDistance:
    """A distance by name: "lpips", "ssl-vgg", or "simclr:PATH" with an encoder's file or its run folder.

    weights: file of VGG-16 as torchvision writes it; by default, for LPIPS only, the published one, in `$TRIPTYCH_DATA/vgg`.
    Raises ValueError for another name or a file that holds something else, FileNotFoundError for an absent one, ImportError where
    LPIPS lacks its package.
    """
    kind, _, path = name.partition(":")
    if kind == "simclr" and path:
        return PerceptualDistance(read_encoder(Path(path)).encoder, divisor=SSL_DIVISOR)
    if name == "lpips":
        heads = lpips_heads()
        return PerceptualDistance(read_vgg(Path(weights) if weights else published_vgg()), heads=heads, **_IMAGENET)
    if name != "ssl-vgg":
        raise ValueError(f"perceptual distance {name!r}: expected lpips, ssl-vgg, or simclr:PATH of an encoder")
    if weights is None:
        remedy = f"fetch {SSL_VGG_URL}, whose licence is its authors', and pass its path as weights"
        raise ValueError(f"ssl-vgg: has no weights; {remedy}")
    return PerceptualDistance(read_vgg(Path(weights)), divisor=SSL_DIVISOR, **_IMAGENET)


# --- VGG-16

_IMAGENET: dict[str, Any] = {"shift": (-0.030, -0.088, -0.188), "scale": (0.458, 0.448, 0.450)}  # as LPIPS rounds them
_BLOCKS = (2, 64), (2, 128), (3, 256), (3, 512), (3, 512)  # convolutions, channels


class Vgg16(nn.Sequential):
    """Images to relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3; parameters are named as in torchvision's `vgg16().features`."""

    least = 16

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        before = 3
        for convolutions, channels in _BLOCKS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(convolutions):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
                before = channels
        super().__init__(*layers)

    def forward(self, images: Images) -> Features:
        # Each level is taken before pooling, after its last ReLU, so that no later layer overwrites it in place.
        levels, x = [], images
        for layer in self:
            if isinstance(layer, nn.MaxPool2d):
                levels.append(x)
            x = layer(x)
        return (*levels, x)


def read_vgg(path: Path) -> Vgg16:
    """VGG-16's convolutions from torchvision's `vgg16` or its `features` alone.

    Raises FileNotFoundError for an absent file, ValueError for one that would run code or holds other weights.
    """
    from triptych_common.storage import foreign

    network = Vgg16()
    wanted = network.state_dict()
    tensors = foreign.state_dict(path, holds=wanted).tensors
    for name, value in wanted.items():
        shape = tuple(getattr(tensors.get(name), "shape", ()))
        if shape != tuple(value.shape):
            expected = f"expected {tuple(value.shape)}, as in torchvision's vgg16 or its features"
            raise ValueError(f"{path}: {name} is {shape or 'absent'}, {expected}")
    network.load_state_dict({name: tensors[name] for name in wanted})
    return network


def published_vgg() -> Path:
    """torchvision's file, from its own cache, from `$TRIPTYCH_DATA/vgg`, or downloaded there.

    Raises FileNotFoundError where it cannot be fetched, ValueError for another file in its place.
    """
    from triptych_common.data.datasets import data_root
    from triptych_common.data.files import fetch

    theirs, ours = Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE, data_root() / "vgg" / VGG_FILE
    path = theirs if theirs.exists() and not ours.exists() else ours
    remedy = "put the file there, pass its path as weights, or train an encoder of your own"
    fetch("VGG-16 for LPIPS", VGG_URL, path, remedy)
    found = checkpoint.file_digest(path)
    if not VGG_FILE.removeprefix("vgg16-").startswith(found[:8]):  # torchvision names files by their hash
        raise ValueError(f"{path}: SHA-256 {found[:8]} is not that of its name; delete the file and repeat the command")
    return path


def lpips_heads() -> list[Tensor]:
    """LPIPS's weights of VGG's channels, version 0.1, from the package `lpips`. Raises ImportError where that is missing."""
    from triptych_common.storage import foreign

    package = find_spec("lpips")
    if package is None or package.origin is None:
        remedy = "pip install 'triptych-gangealing[lpips]'; or use ssl-vgg or simclr:PATH"
        raise ImportError(f"LPIPS needs a package: {remedy}")
    tensors = foreign.read(Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth")
    return [tensors[f"lin{i}.model.1.weight"].flatten() for i in range(len(_BLOCKS))]


# --- our own encoder


class Encoder(nn.Module):
    """Images in [-1, 1] to feature maps of the last stages; `simclr` trains it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config, self.least = config, 2 ** (len(config.widths) - 1)
        stages, before = [], 3
        for i, width in enumerate(config.widths):
            layers: list[nn.Module] = [nn.AvgPool2d(2)] if i else []
            for _ in range(2 if i else 1):  # one convolution at full resolution costs as much as four at half
                layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Images) -> Features:
        levels, x = [], images
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return tuple(levels[-self.config.compared :])


class ReadEncoder(NamedTuple):
    """An encoder from a file, for evaluation, and facts about its training."""

    encoder: Encoder
    facts: dict[str, Any]


def write_encoder(path: Path, encoder: Encoder, facts: Mapping[str, Any]) -> None:
    """Write an encoder, atomically. Raises OSError when the disk refuses."""
    _FORMAT.write(path, encoder.state_dict(), asdict(encoder.config), facts)


def facts_of(encoder: Encoder) -> dict[str, Any]:
    """Everything but the weights of an encoder's file, for checkpoints of a training run."""
    return _FORMAT.facts_of(asdict(encoder.config), {})


def read_encoder(path: Path) -> ReadEncoder:
    """An encoder from its file, run folder or a run's checkpoint, on the CPU.

    Raises FileNotFoundError where there is none, ValueError for a file of another kind.
    """
    return _FORMAT.read(path, _build_encoder, part="model")  # whose average is not used


def _build_encoder(tensors: dict[str, Tensor], facts: dict[str, Any]) -> ReadEncoder:
    encoder = Encoder(EncoderConfig.from_json(facts["config"]))
    encoder.load_state_dict(tensors)
    rest = {name: value for name, value in facts.items() if name not in ("kind", "config")}
    return ReadEncoder(encoder.requires_grad_(False).eval(), rest)
