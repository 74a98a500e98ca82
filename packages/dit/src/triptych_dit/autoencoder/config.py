"""Settings of training an autoencoder, with their presets, and of encoding images with one."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from triptych_common.cli import CommonOptions
from triptych_common.fields import FREE, Ge, Gt
from triptych_common.training.settings import AdamWSettings


@dataclass(frozen=True)
class AutoencoderTrainConfig(AdamWSettings):
    """Train an autoencoder on pictures, for latents. Repeating the command resumes it."""

    out: Path = Path("runs/autoencoder")
    """run directory; the autoencoder itself goes to OUT/vae"""
    data: str = "mnist5k"
    """a named data set (mnist5k is embedded), a folder of images, or hub:OWNER/NAME; channels are those of the images"""
    image_size: int | None = None
    """side that pictures of a folder are cropped to; by default the largest that most of them have, at most 64. Pictures of any
    size can be encoded later"""
    strict: Annotated[bool, FREE] = False
    """stop at the first picture that is damaged or too small, rather than list such pictures and leave them out"""
    block_out_channels: tuple[int, ...] = (16, 32, 64)
    """channels at each resolution; each one after the first halves the sides"""
    layers_per_block: Annotated[int, Gt(0)] = 1
    """residual blocks at each resolution of the encoder; the decoder has one more"""
    latent_channels: Annotated[int, Gt(0)] = 4
    """channels of the latents"""
    norm_num_groups: Annotated[int, Gt(0)] = 8
    """groups of the group norms"""
    mid_block_attention: bool = False
    """self-attention at the lowest resolution, as Stable Diffusion's has"""
    kl_weight: Annotated[float, Ge(0)] = 1e-3
    """weight of the KL divergence per latent value (nats) against the reconstruction's error per pixel"""
    total_images: Annotated[int, Gt(0)] = 40_000
    """images to train on, repeats counted"""
    lr: float = 3e-3
    """AdamW's peak learning rate; decays to zero along a cosine"""
    warmup_images: int = 2_000
    """images over which the learning rate rises from zero"""
    adam_beta2: float = 0.99
    grad_clip: float | None = 1.0
    ema_half_life_images: Annotated[int, Gt(0)] = 2_000
    """half-life of the weights' moving average"""
    ema_rampup: float | None = 0.1
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        channels = self.block_out_channels
        if not channels or any(c < 1 or c % self.norm_num_groups for c in channels):
            groups = self.norm_num_groups
            raise ValueError(f"block_out_channels {channels}: expected multiples of norm_num_groups {groups}")

    @property
    def downsampling(self) -> int:
        """Pixels along a side for each latent along it."""
        return 2 ** (len(self.block_out_channels) - 1)

    def learning_rate(self, samples_seen: int) -> float:
        """Learning rate of the step that starts after `samples_seen` images: linear warmup times half a cosine."""
        decay = 0.5 * (1 + math.cos(math.pi * min(samples_seen / self.total_images, 1.0)))
        return super().learning_rate(samples_seen) * decay

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints."""
        return super().resolved() | {"downsampling": self.downsampling}


_DIGITS = AutoencoderTrainConfig(total_images=12_000, batch_size=16, warmup_images=800)

AUTOENCODER_PRESETS: dict[str, AutoencoderTrainConfig] = {
    "digits": _DIGITS,
    "digits-smoke": replace(
        _DIGITS, block_out_channels=(8, 8, 16), total_images=2_048, warmup_images=256, ema_half_life_images=256,
        log_every=8, checkpoint_every=16,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class EncodeConfig(CommonOptions):
    """Encode images to a latent cache, under torchrun on any number of ranks. Repeating the command resumes it, checks
    the existing shards and encodes damaged ones again."""

    out: Path = Path("runs/latents")
    """folder of the cache"""
    source: str = "mnist5k"
    """named data set, folder of images with one subfolder a class, hub:OWNER/NAME, or what its save_to_disk wrote"""
    split: str = "train"
    """part of the source"""
    unconditional: bool = False
    """make one class of everything"""
    image_column: str = "auto"
    """column of a Hugging Face data set"""
    label_column: str = "auto"
    """column of a Hugging Face data set"""
    vae: str = "stabilityai/sd-vae-ft-ema"
    """AutoencoderKL: hub id or folder"""
    image_size: int | tuple[int, int] = 256
    """side, or height and width, that images are cropped to: the centre, box-halved and bicubic as ADM does"""
    allow_upscale: bool = False
    """enlarge smaller images rather than list them as skipped"""
    flips: bool = True
    """encode mirror images too: the mirrored latent is not the latent of the mirror image; never for digits"""
    dtype: Literal["float16", "float32"] = "float16"
    """of the stored moments; float16 is off by at most 2^-11 of a value, bfloat16 would be by 2^-8: not offered"""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """of the autoencoder's arithmetic"""
    batch_size: Annotated[int, Ge(1)] = 64
    """images at once on each rank; changes rounding only"""
    shard_size: Annotated[int, Ge(1)] = 4096
    """images a shard; at most so many are lost when a rank is killed"""
    workers: Annotated[int | None, Ge(0)] = None
    """processes on each rank that read images; 0: none but the rank itself, default: one a core, 8 at most"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.size) < 1:
            raise ValueError(f"image_size {self.image_size}: expected at least 1")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


@dataclass(frozen=True)
class ImportConfig(CommonOptions):
    """Make a latent cache of latents that others computed, one sample for each image. Repeating the command resumes it."""

    out: Path = Path("runs/latents")
    """folder of the cache"""
    features: Path = Path("features")
    """fast-DiT's folder of NAME_features/*.npy and NAME_labels/*.npy; a .npy, .npz or .safetensors file of latents (n, channels,
    height, width) and labels; or a folder of such .safetensors files"""
    labels: Path | None = None
    """.npy file of labels, for a file of latents alone; without it there is one class"""
    class_names: Path | None = None
    """JSON list of names by label"""
    vae: str | None = None
    """their autoencoder, a folder or a hub name; by default, for fast-DiT's folders, that of the released models"""
    scale_factor: Annotated[float | None, Gt(0)] = None
    """what latents were multiplied by, if the autoencoder is not at hand"""
    latents_mean: tuple[float, ...] = ()
    """mean of each channel that was subtracted before, likewise"""
    latents_std: Annotated[tuple[float, ...], Gt(0, "numbers above 0")] = ()
    """standard deviation of each channel that was divided by, likewise"""
    raw: bool = False
    """latents are the autoencoder's, not yet scaled"""
    dtype: Literal["float16", "float32"] = "float32"
    """of the stored latents"""
    shard_size: Annotated[int, Ge(1)] = 4096
    """latents a shard"""
