"""Settings of an adversarial training run, and their presets."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from triptych_common.fields import FREE, Ge, Gt, Interval
from triptych_common.training.settings import AccumulatingSettings, WeightPrecision, to_length

from triptych_gangealing.stylegan2.config import Architecture, DiscriminatorConfig, GeneratorConfig


@dataclass(frozen=True)
class GanTrainConfig(AccumulatingSettings, WeightPrecision):
    """Train a StyleGAN2 on a named data set, a folder or a Hugging Face data set. Repeating the command resumes it."""

    scaled: ClassVar[tuple[str, ...]] = ("r1_gamma_switch",)

    out: Path = Path("runs/gan")
    """run directory"""
    data: str = "digits32"
    """digits32 (coloured jittered digits, no download), digits32:3 (one digit), a named data set, a folder, or hub:OWNER/NAME"""
    resolution: int = 32
    """height and width: images are cropped square and reduced to it"""
    conditional: bool = False
    """give both networks the images' classes"""
    strict: Annotated[bool, FREE] = False
    """stop at the first picture that is damaged or too small, rather than list such pictures and leave them out"""
    x_flip: bool = False
    """add mirrored images; not for digits"""
    # Free, since no schedule depends on it: a run may be prolonged.
    total_images: Annotated[int, Gt(0), FREE] = 25_000_000
    """real images to show the discriminator, repeats counted"""
    batch_size: int = 32
    """images per step, over all ranks"""
    channel_base: int = 16384
    """feature maps at resolution r: channel_base / r, at most channel_max"""
    channel_max: int = 512
    """maximum number of feature maps of a layer"""
    discriminator_channel_base: int | None = None
    """channel_base of the discriminator, where it differs"""
    z_dim: int = 512
    """dimensions of z, and of w"""
    mapping_layers: int = 8
    """layers from z to w"""
    generator_architecture: Architecture = "skip"
    """design of the generator's blocks"""
    discriminator_architecture: Architecture = "resnet"
    """design of the discriminator's blocks"""
    mbstd_group_size: int = 4
    """images over which the minibatch standard deviation is taken"""
    conv_clamp: float | None = None
    """bound on activations, 256 in mixed precision"""
    bf16_resolutions: Annotated[int, Ge(0)] = 0
    """how many of the highest resolutions run in bfloat16 (mixed precision); for GPUs"""
    lr: float = 0.0025
    """Adam's learning rate for both networks, before the correction for lazy regularisation"""
    discriminator_lr: Annotated[float | None, Gt(0)] = None
    """the discriminator's, where it differs"""
    r1_gamma: Annotated[float, Ge(0)] = 1.0
    """weight of the gradient penalty on real images"""
    r1_gamma_later: Annotated[float | None, Ge(0)] = None
    """its weight from `r1_gamma_switch` on: a weight that stabilises the start holds the discriminator back later"""
    r1_gamma_switch: Annotated[int, Ge(0)] = 0
    """real images after which `r1_gamma_later` applies"""
    r1_every: Annotated[int, Gt(0)] = 16
    """steps between gradient penalties, whose weight is multiplied by it"""
    path_length_weight: Annotated[float, Ge(0)] = 2.0
    """weight of the path length penalty; 0: none"""
    path_length_every: Annotated[int, Gt(0)] = 4
    """steps between path length penalties"""
    style_mixing: Annotated[float, Interval(ge=0, le=1)] = 0.9
    """share of generated images whose later layers have another latent's style"""
    noise: bool = True
    """feed noise to the generator's layers; without it, noise strengths stay zero (for images without texture)"""
    ema_half_life_images: Annotated[int, Gt(0)] = 10_000
    """half-life of the generator's moving average"""
    ema_rampup: Annotated[float | None, Gt(0)] = None
    """limit the half-life to this multiple of the images seen so far"""
    augment: Literal["none", "blit", "geom", "color", "bg", "bgc"] = "bgc"
    """augmentations in front of the discriminator (ADA)"""
    augment_p: Annotated[float | None, Interval(ge=0, le=1)] = None
    """their probability, fixed; by default adapted to ada_target"""
    ada_target: Annotated[float, Interval(ge=0, le=1)] = 0.6
    """target of the discriminator's mean sign on real images; above it the discriminator overfits"""
    ada_images: Annotated[int, Gt(0)] = 500_000
    """images in which the probability can change by one"""
    ada_every: Annotated[int, Gt(0)] = 4
    """steps between adaptations"""
    init_from: str | None = None
    """fine-tune: a run folder, generator.safetensors, or a foreign checkpoint that `convert` reads"""
    freeze_d: Annotated[int, Ge(0)] = 0
    """the discriminator's first layers that stay fixed (FreezeD); 0: none"""
    snapshot_every: Annotated[int, Gt(0), FREE] = 50_000
    """images between grids of samples, and scores"""
    scores: Annotated[Literal["none", "digits32", "inception"], FREE] = "none"
    """feature network whose Fréchet and kernel distances are logged with each snapshot"""
    score_images: Annotated[int, Gt(0), FREE] = 2_000
    """generated and real images of a score; published scores use 50,000"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze_d and self.init_from is None:
            raise ValueError("freeze_d is for fine-tuning: pass --init-from too")
        if self.augment == "none" and self.augment_p is not None:
            raise ValueError(f"augment_p {self.augment_p}: of no augmentation; pass --augment bgc too")
        self.networks(c_dim=0)
        self.check_groups(ranks=1)

    def check_groups(self, ranks: int) -> None:
        """Raises ValueError where ranks or micro-batches would cut groups of the minibatch standard deviation apart."""
        images = self.batch_size // ranks
        part = min(self.micro_batch or images, images)
        if part < 1 or self.batch_size % ranks or part % min(self.mbstd_group_size, self.batch_size) or images % part:
            found = f"batch_size {self.batch_size} on {ranks} ranks, {part} images at once"
            expected = f"whole groups of {self.mbstd_group_size} (mbstd_group_size)"
            raise ValueError(f"{found}: expected {expected}; change one of them, or micro_batch")

    def gamma(self, images: int) -> float:
        """Weight of the gradient penalty after so many real images."""
        if self.r1_gamma_later is not None and images >= self.r1_gamma_switch:
            return self.r1_gamma_later
        return self.r1_gamma

    def networks(self, c_dim: int) -> tuple[GeneratorConfig, DiscriminatorConfig]:
        """Shapes of both networks, for a number of classes (0: unconditional)."""
        names = ("resolution", "channel_max", "conv_clamp")
        shape: dict[str, Any] = {name: getattr(self, name) for name in names} | {"c_dim": c_dim}
        generator = GeneratorConfig(
            **shape, channel_base=self.channel_base, z_dim=self.z_dim, w_dim=self.z_dim, mapping_layers=self.mapping_layers,
            architecture=self.generator_architecture,
        )  # fmt: skip
        base = self.discriminator_channel_base or self.channel_base
        architecture, group_size = self.discriminator_architecture, self.mbstd_group_size
        discriminator = DiscriminatorConfig(
            **shape, channel_base=base, architecture=architecture, mbstd_group_size=group_size
        )
        return generator, discriminator

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints."""
        import torch

        from triptych_gangealing.stylegan2.discriminator import Discriminator
        from triptych_gangealing.stylegan2.generator import Generator

        generator, discriminator = self.networks(c_dim=0)
        with torch.device("meta"):
            networks = Generator(generator), Discriminator(discriminator)
        counts = [sum(p.numel() for p in network.parameters()) for network in networks]
        return super().resolved() | {"generator_parameters": counts[0], "discriminator_parameters": counts[1]}


def auto(resolution: int, ranks: int = 1) -> GanTrainConfig:
    """The published settings for data of no known kind, by resolution and number of GPUs.  [Karras et al. 2020, ADA; `auto`]"""
    batch = max(min(ranks * min(4096 // resolution, 32), 64), ranks)
    return GanTrainConfig(
        resolution=resolution, batch_size=batch, mbstd_group_size=min(batch // ranks, 4),
        channel_base=32768 if resolution >= 512 else 16384, mapping_layers=2, lr=0.002 if resolution >= 1024 else 0.0025,
        r1_gamma=0.0002 * resolution**2 / batch, ema_half_life_images=batch * 10_000 // 32, ema_rampup=0.05,
        conv_clamp=256.0, bf16_resolutions=4,
    )  # fmt: skip


def start(preset: GanTrainConfig, argv: Sequence[str]) -> GanTrainConfig:
    """Defaults for a command line: the preset at its length; "auto" depends on its resolution and on the number of ranks."""
    preset = _to_resolution(preset, argv)
    # Its smoke preset is far shorter than where the weight of R1 switches, which stays where it is.
    return to_length(preset, argv, scaled=() if preset.r1_gamma_switch > preset.total_images else preset.scaled)


def _to_resolution(preset: GanTrainConfig, argv: Sequence[str]) -> GanTrainConfig:
    if preset is not PRESETS["auto"]:
        return preset
    words, resolution = [part for word in argv for part in word.split("=", 1)], preset.resolution
    if "--resolution" in words:
        try:
            resolution = int(words[words.index("--resolution") + 1])
            GeneratorConfig(resolution=resolution)
        except (ValueError, IndexError):  # reported when the options are parsed
            return preset
    return auto(resolution, int(os.environ.get("WORLD_SIZE", 1)))


# Coloured jittered digits on two cores: 95 minutes on one.
_DIGITS = GanTrainConfig(
    out=Path("runs/gan-digits32"), total_images=480_000, batch_size=16, channel_base=512, channel_max=96, z_dim=96,
    mapping_layers=2, lr=0.006, r1_gamma=0.5, r1_gamma_later=0.05, r1_gamma_switch=80_000, path_length_weight=0.0,
    style_mixing=0.5, noise=False, ema_rampup=0.05, augment="none", log_every=100, checkpoint_every=1_000,
    snapshot_every=20_000, scores="digits32",
)  # fmt: skip

PRESETS: dict[str, GanTrainConfig] = {
    "auto": auto(256),
    "paper256": GanTrainConfig(
        resolution=256, batch_size=64, mbstd_group_size=8, ema_half_life_images=20_000, conv_clamp=256.0, bf16_resolutions=4,
    ),
    "cifar": GanTrainConfig(
        data="cifar10", total_images=100_000_000, batch_size=64, mbstd_group_size=32, channel_base=32768, mapping_layers=2,
        discriminator_architecture="orig", r1_gamma=0.01, ema_half_life_images=500_000, ema_rampup=0.05,
        path_length_weight=0.0, style_mixing=0.0, conv_clamp=256.0, bf16_resolutions=4,
    ),
    "digits32": _DIGITS,
    "digits32-3": replace(  # one digit, from the finished run of all
        _DIGITS, data="digits32:3", out=Path("runs/gan-digits32-3"), init_from="runs/gan-digits32", total_images=48_000,
        r1_gamma=0.05, r1_gamma_later=None,
    ),
    "smoke": replace(
        _DIGITS, out=Path("runs/gan-smoke"), total_images=512, channel_base=256, channel_max=16, z_dim=16, noise=True,
        path_length_weight=2.0, augment="bgc", ada_images=5_000, log_every=4, checkpoint_every=8, snapshot_every=256,
        score_images=64,
    ),
}  # fmt: skip
