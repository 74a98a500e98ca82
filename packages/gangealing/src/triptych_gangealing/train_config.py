"""Settings of a spatial transformer's training, and their presets."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from triptych_common.fields import FREE, Ge, Gt
from triptych_common.training.settings import AccumulatingSettings, WeightPrecision

from triptych_gangealing.config import DESCRIPTOR_POOL, DESIGNS, SpatialTransformerConfig


@dataclass(frozen=True)
class AlignTrainConfig(AccumulatingSettings, WeightPrecision):
    """Train a spatial transformer and the mode it aligns images to, from a frozen generator. Repeating the command resumes it."""

    scaled: ClassVar[tuple[str, ...]] = ("psi_images", "constant_images", "restart_images")

    out: Path = Path("runs/align")
    """run directory"""
    generator: str = "digits32"
    """a run folder of train-gan, a network file, a foreign checkpoint, or the name of an embedded generator"""
    init_from: str | None = None
    """an aligner of the same shape to start from, transformer and modes: a run's folder, a checkpoint of one, or its file"""
    distance: str = "simclr:runs/encoder-digits32"
    """distance between aligned image and target: lpips, ssl-vgg, or simclr:PATH with an encoder of train-encoder"""
    distance_weights: Annotated[Path | None, FREE] = None  # free since a run records the weights' digest
    """file of the VGG weights of lpips and ssl-vgg"""
    transforms: Literal["similarity,flow", "similarity", "flow"] = "similarity,flow"
    """stages of the transformer"""
    input_size: int = 128
    """height and width at which the transformer reads images and writes them"""
    flow_size: int = 16
    """height and width of the flow before it is upsampled"""
    channel_multiplier: Annotated[float, Gt(0)] = 0.5
    """width of the transformer's layers"""
    channel_max: int = 512
    """maximum number of feature maps of a layer"""
    padding: Literal["border", "reflection", "zeros"] = "reflection"
    """how images are extended beyond their edges"""
    iterations: Annotated[int, Gt(0)] = 1
    """times the similarity stage is applied in training"""
    clusters: Annotated[int, Gt(0)] = 1
    """modes, each with its own head of the transformer; an image goes to the one that fits best"""
    assignment: Literal["whole", "similarity", "descriptor"] = "whole"
    """what decides an image's cluster: whole: distance after the whole warp, as published; similarity: after the similarity
    stage, faster; descriptor: a network blind to pose, trained first from simclr's encoder, for objects in any orientation"""
    descriptor_images: Annotated[int, Gt(0)] = 128_000
    """generated images to train the descriptor on, repeats counted"""
    balance: Annotated[float, Ge(0)] = 0.0
    """how fast clusters with more than an equal share of a batch become less attractive; 0: never, as published"""
    flips: bool = False
    """try each image mirrored too"""
    design: Literal["own", "released"] = "own"
    """details of the networks: ours, or those of the released code, to which such an aligner can be exported"""
    cutoff: Annotated[int, Ge(0)] = 5
    """the generator's first layers, which take the mode's style and with it its pose; the others keep the image's own style"""
    components: Annotated[int, Ge(0)] = 1
    """principal directions of W along which the mode is learned; 0: it stays at its origin"""
    origin: Literal["mean", "sample"] = "mean"
    """origin of those directions: the mean of W, as published, or typical samples. The mean is an unlikely image where, for
    example, light objects on dark ground are as frequent as dark on light"""
    pca_samples: Annotated[int, Gt(0)] = 1_000_000
    """styles of which the principal directions are computed"""
    psi_images: Annotated[int, Ge(0)] = 6_000_000
    """images over which targets move from the images' own poses to the mode's, along a cosine"""
    total_images: Annotated[int, Gt(0), FREE] = 52_500_000
    """generated images to train on; the default ends where the learning rate reaches zero"""
    batch_size: int = 40
    """images per step, over all ranks"""
    lr: float = 1e-3
    """Adam's learning rate, of the transformer"""
    mode_lr: Annotated[float, Gt(0)] = 1e-2
    """Adam's learning rate for the modes' coefficients"""
    constant_images: Annotated[int, Ge(0)] = 6_000_000
    """images before the learning rates start to fall"""
    restart_images: Annotated[int, Gt(0)] = 1_500_000
    """first period of the cosine they then follow; each period is twice the one before and starts at 0.9 of its rate"""
    tv_weight: Annotated[float, Ge(0)] = 1000.0
    """weight of the flow's total variation"""
    identity_weight: Annotated[float, Ge(0)] = 1.0
    """weight of the flow's mean square"""
    ema_half_life_images: Annotated[int, Gt(0)] = 12_500
    """half-life of the moving average of transformer and modes"""
    init_images: Annotated[int, Gt(0)] = 50_000
    """samples from which starting points of modes are chosen, by k-means++ or as the most typical"""
    classifier_images: Annotated[int, Gt(0)] = 1_000_000
    """generated images to train the classifier of clusters on, after the transformer"""
    precision: Literal["float32", "float64"] = "float32"
    """arithmetic of the networks"""
    log_every: int = 100
    checkpoint_every: int = 1_000
    snapshot_every: Annotated[int, Gt(0), FREE] = 200_000
    """images between pictures of aligned samples"""

    def __post_init__(self) -> None:
        super().__post_init__()
        several, similarity = self.clusters > 1, "similarity" in self.transforms
        clusters, transforms = f"clusters {self.clusters}", f"transforms {self.transforms}"
        if several and self.components == 0 and self.origin == "mean":
            raise ValueError(f"{clusters}, components 0: every mode would be the mean; pass --origin sample")
        if several and not similarity:
            raise ValueError(f"{clusters}, {transforms}: the classifier starts from the similarity network")
        if self.iterations > 1 and not similarity:
            only = "only the similarity network looks repeatedly; pass --iterations 1"
            raise ValueError(f"iterations {self.iterations}, {transforms}: {only}")
        descriptor = self.assignment == "descriptor"
        if descriptor and self.clusters > max(1, min(DESCRIPTOR_POOL, self.descriptor_images)):
            remedy = f"pass --descriptor-images {self.clusters} or more, or fewer --clusters"
            found = f"{clusters}, descriptor_images {self.descriptor_images}"
            raise ValueError(f"{found}: groups are formed of that many images, at most {DESCRIPTOR_POOL}; {remedy}")
        if descriptor and not self.distance.startswith("simclr:"):
            start = "the descriptor starts from an encoder; pass --distance simclr:PATH"
            raise ValueError(f"assignment descriptor, distance {self.distance}: {start}")
        if self.design == "released" and several and not self.flips:
            raise ValueError(f"design released, {clusters}: its classifier tells sides apart; pass --flips too")
        if descriptor and self.flips:
            raise ValueError("assignment descriptor, flips: the descriptor does not see mirroring; pass one of them")
        if self.clusters > self.init_images:
            raise ValueError(f"init_images {self.init_images}: expected at least as many as clusters, {self.clusters}")
        self.transformer()

    def rate(self, images: int) -> float:
        """The transformer's learning rate after some images: constant, then cosines with warm restarts."""
        images, period, peak = images - self.constant_images, self.restart_images, self.lr
        if images < 0:
            return self.lr
        while images >= period:
            images, period, peak = images - period, period * 2, peak * 0.9
        return peak * (1 + math.cos(math.pi * images / period)) / 2

    def transformer(self) -> SpatialTransformerConfig:
        """Shape of the transformer."""
        names = ("input_size", "channel_max", "channel_multiplier", "flow_size", "padding")
        shape: dict[str, Any] = {name: getattr(self, name) for name in names}
        shape |= {"heads": self.clusters, "transforms": tuple(self.transforms.split(","))}
        finer = max(1, self.input_size // self.flow_size)
        design: dict[str, Any] = {
            name: float(finer) if name == "flow_unit_factor" else x for name, x in DESIGNS[self.design].items()
        }
        return SpatialTransformerConfig(**shape, flow_upsampling=finer, **design)

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints."""
        import torch

        from triptych_gangealing.spatial_transformer import SpatialTransformer

        with torch.device("meta"):
            network = SpatialTransformer(self.transformer())
        return super().resolved() | {"parameters": sum(p.numel() for p in network.parameters())}


# Settings of the released scripts for the thesis's data sets; for cats, see also cat-ssl.  [thesis 4.4, Table 4.1]
_LPIPS = AlignTrainConfig(distance="lpips", tv_weight=2500.0)
_BORDER = replace(_LPIPS, padding="border")

# For two cores. The mode is fixed at a typical sample: the mean of W lies between light and dark digits.
_DIGITS = AlignTrainConfig(
    out=Path("runs/align-digits32"), generator="digits32-3", input_size=32, flow_size=8, channel_max=32,
    channel_multiplier=2.0, padding="border", iterations=2, components=0, origin="sample", pca_samples=50_000,
    psi_images=8_000, total_images=48_000, batch_size=16, lr=2e-3, constant_images=24_000, restart_images=24_000,
    ema_half_life_images=2_000, init_images=1_000, classifier_images=4_000, checkpoint_every=500, snapshot_every=10_000,
)  # fmt: skip

PRESETS: dict[str, AlignTrainConfig] = {
    "digits32": _DIGITS,
    "bicycle": replace(_LPIPS, out=Path("runs/align-bicycle"), generator="bicycle.pkl"),
    "cat": replace(_BORDER, out=Path("runs/align-cat"), generator="cat.pkl"),
    "dog": replace(_BORDER, out=Path("runs/align-dog"), generator="dog.pkl"),
    "tv": replace(_LPIPS, out=Path("runs/align-tv"), generator="tv.pkl"),
    "celeba": replace(_BORDER, out=Path("runs/align-celeba"), generator="celeba.pkl", cutoff=6, components=512),
    "cub": replace(_BORDER, out=Path("runs/align-cub"), generator="cub.pkl"),
    "car": replace(
        _LPIPS, out=Path("runs/align-car"), generator="car.pkl", cutoff=6, components=5, clusters=4, flips=True,
    ),
    "horse": replace(_LPIPS, out=Path("runs/align-horse"), generator="horse.pkl", clusters=4, flips=True),
    "cat-ssl": replace(  # the ablations start from it  [thesis Table 4.3]
        _BORDER, out=Path("runs/align-cat-ssl"), generator="cat.pkl", distance="ssl-vgg", tv_weight=1000.0,
    ),
    "digits32-all": replace(
        _DIGITS, out=Path("runs/align-digits32-all"), generator="digits32", clusters=10, iterations=1,
        assignment="descriptor", psi_images=6_000, total_images=24_000, constant_images=12_000, restart_images=12_000,
    ),
    "smoke": replace(
        _DIGITS, out=Path("runs/align-smoke"), channel_max=8, pca_samples=200, psi_images=32, total_images=64, batch_size=8,
        constant_images=32, restart_images=32, init_images=40, classifier_images=32, log_every=2, checkpoint_every=4,
        snapshot_every=64,
    ),
}  # fmt: skip
