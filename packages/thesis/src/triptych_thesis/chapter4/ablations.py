"""The rows of Table 4.3: what an alignment loses without a part of its method."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from triptych_gangealing.train_config import AlignTrainConfig

COMPLETE, LEARNED = "complete", "c learned from the mean"
THESIS: dict[str, str] = {  # PCK@0.1 on SPair cats; with the self-supervised distance where LPIPS is not named
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
LPIPS = tuple(row for row in THESIS if row.startswith("LPIPS"))
FIRST = (COMPLETE, LEARNED, "c fixed at the mean", "no style mixing", "no total variation")
REST = tuple(row for row in THESIS if row not in (*FIRST, *LPIPS))
COLLAPSED = ("c fixed at the mean", "no style mixing", "c unconstrained")  # to less than half of the complete method
LPIPS_TV = 2.5  # its weight of total variation over that of the self-supervised distance: 2,500 over 1,000


def ablation(
    name: str, config: AlignTrainConfig, *, num_ws: int, w_dim: int, vgg: Path | None = None
) -> AlignTrainConfig:
    """A row's settings, from those of the complete method with a self-supervised distance.

    num_ws, w_dim: of the generator. vgg: file of LPIPS's VGG weights, for its rows. Raises ValueError for a row there is not.
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
    """Of a row's run."""
    return re.sub(r"\W+", "-", row)
