"""How large a reproduction of chapter 4 is, and the rows of Table 4.3: settings only, the code is the same."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from triptych_gangealing.encoders.simclr import EncoderTrainConfig
from triptych_gangealing.train_config import PRESETS, AlignTrainConfig

DIGIT = 3  # the one that is aligned alone


@dataclass(frozen=True)
class Size:
    """What one size trains and how it scores that."""

    encoder: EncoderTrainConfig  # of the encoder that images are compared by
    one: AlignTrainConfig  # the alignment of one digit
    clustered: AlignTrainConfig  # the alignment of all digits, in clusters
    ablation_images: int  # generated images that each row of Table 4.3 is trained on
    pairs: int = 300  # of images, for PCK
    images: int = 500  # for errors of pose and sharpness
    cluster_images: int = 1_000  # whose clusters are scored
    shown: int = 200  # images that averages and clusters are drawn from
    iterations: int = 1  # passes of the similarity network at test time


_ENCODER = EncoderTrainConfig()
_SMOKE_ENCODER = replace(_ENCODER, pool_images=64, total_images=64, batch_size=16, widths=(8, 16), compared=1)
_GPU: dict[str, Any] = {
    "channel_max": 128, "batch_size": 256, "total_images": 2_000_000, "psi_images": 500_000, "constant_images": 1_000_000,
    "restart_images": 1_000_000, "ema_half_life_images": 20_000, "pca_samples": 1_000_000,
}  # fmt: skip

SIZES: dict[str, Size] = {
    "smoke": Size(
        _SMOKE_ENCODER,
        PRESETS["smoke"],
        replace(PRESETS["smoke"], clusters=3, assignment="descriptor", descriptor_images=64),
        ablation_images=16, pairs=8, images=12, cluster_images=40, shown=12,
    ),
    "laptop": Size(_ENCODER, PRESETS["digits32"], PRESETS["digits32-all"], ablation_images=8_000, iterations=3),
    "gpu": Size(
        replace(_ENCODER, pool_images=50_000, total_images=512_000, batch_size=512),
        replace(PRESETS["digits32"], **_GPU),
        replace(PRESETS["digits32-all"], **_GPU, init_images=20_000, descriptor_images=1_000_000),
        ablation_images=500_000, pairs=1_000, images=2_000, cluster_images=5_000, shown=1_000,
    ),
}  # fmt: skip

# Table 4.3: what an alignment loses without a part of its method

COMPLETE, LEARNED = "complete", "c learned from the mean"
TABLE_4_3: dict[str, str] = {  # PCK@0.1 on SPair cats; with the self-supervised distance where LPIPS is not named
    COMPLETE: "67.2",
    LEARNED: "",  # the complete row itself, where that is the thesis's; digits start from a typical sample instead
    "c fixed at the mean": "10.6",
    "no style mixing": "25.9",
    "no total variation": "59.0",
    "c unconstrained": "0.34",
    "cut-off one earlier": "60.5",
    "cut-off one later": "65.0",
    "LPIPS, complete": "67.0",
    "LPIPS, lower total variation": "66.7",
    "LPIPS, no style mixing": "7.74",
}
FIRST_ROWS = (COMPLETE, LEARNED, "c fixed at the mean", "no style mixing", "no total variation")
LPIPS_ROWS = tuple(row for row in TABLE_4_3 if row.startswith("LPIPS"))
REMAINING_ROWS = tuple(row for row in TABLE_4_3 if row not in (*FIRST_ROWS, *LPIPS_ROWS))
LPIPS_TV = 2.5  # its weight of total variation over that of the self-supervised distance: 2,500 over 1,000


def ablation(name: str, config: AlignTrainConfig, num_ws: int, w_dim: int, vgg: Path | None = None) -> AlignTrainConfig:
    """A row of Table 4.3, from the settings of the complete method with a self-supervised distance.

    num_ws, w_dim: number and dimension of the generator's latent vectors. vgg: LPIPS's weights. ValueError for an unknown row.
    """
    lpips: dict[str, Any] = {"distance": "lpips", "distance_weights": vgg}
    changes: dict[str, dict[str, Any]] = {
        COMPLETE: {},
        LEARNED: {"components": 1, "origin": "mean"},
        "c fixed at the mean": {"components": 0, "origin": "mean"},
        "no style mixing": {"cutoff": num_ws},
        "no total variation": {"tv_weight": 0.0},
        "c unconstrained": {"components": w_dim, "origin": "mean"},
        "cut-off one earlier": {"cutoff": config.cutoff - 1},
        "cut-off one later": {"cutoff": config.cutoff + 1},
        "LPIPS, complete": {**lpips, "tv_weight": LPIPS_TV * config.tv_weight},
        "LPIPS, lower total variation": lpips,
        "LPIPS, no style mixing": {**lpips, "cutoff": num_ws},
    }
    if name not in changes:
        raise ValueError(f"ablation {name!r}: expected one of {'; '.join(changes)}")
    return replace(config, **changes[name])


def folder_name(row: str) -> str:
    """A row as the name of its folder."""
    return re.sub(r"\W+", "-", row)
