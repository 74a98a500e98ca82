"""How large a reproduction of chapter 4 is: sizes only, the code is the same."""

from dataclasses import dataclass, replace

from triptych_gangealing.encoders.simclr import EncoderTrainConfig
from triptych_gangealing.train_config import PRESETS, AlignTrainConfig

DIGIT = 3


@dataclass(frozen=True)
class Size:
    """An encoder, alignments of one digit and of all digits in clusters, and how they are scored.

    ablation_images: generated images that each row of Table 4.3 is trained on. iterations: looks at test time.
    """

    encoder: EncoderTrainConfig
    one: AlignTrainConfig
    clustered: AlignTrainConfig
    ablation_images: int
    pairs: int = 300
    images: int = 500
    cluster_images: int = 1_000
    shown: int = 200
    iterations: int = 1


_ENCODER = EncoderTrainConfig()
_SMOKE_ENCODER = replace(_ENCODER, pool_images=64, total_images=64, batch_size=16, widths=(8, 16), compared=1)

SIZES: dict[str, Size] = {
    "smoke": Size(
        _SMOKE_ENCODER,
        PRESETS["smoke"],
        replace(PRESETS["smoke"], clusters=3, assignment="descriptor", descriptor_images=64),
        ablation_images=16,
        pairs=8,
        images=12,
        cluster_images=40,
        shown=12,
    ),
    "laptop": Size(_ENCODER, PRESETS["digits32"], PRESETS["digits32-all"], ablation_images=8_000, iterations=3),
    "gpu": Size(
        replace(_ENCODER, pool_images=50_000, total_images=512_000, batch_size=512),
        replace(
            PRESETS["digits32"], channel_max=128, batch_size=256, total_images=2_000_000, psi_images=500_000,
            constant_images=1_000_000, restart_images=1_000_000, ema_half_life_images=20_000, pca_samples=1_000_000,
        ),
        replace(
            PRESETS["digits32-all"], channel_max=128, batch_size=256, total_images=2_000_000, psi_images=500_000,
            constant_images=1_000_000, restart_images=1_000_000, ema_half_life_images=20_000, pca_samples=1_000_000,
            init_images=20_000, descriptor_images=1_000_000,
        ),
        ablation_images=500_000,
        pairs=1_000,
        images=2_000,
        cluster_images=5_000,
        shown=1_000,
    ),
}  # fmt: skip
