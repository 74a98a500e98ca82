"""The rows of Table 4.3: what an alignment loses without a part of its method."""

from dataclasses import replace

from triptych_gangealing.train_config import AlignTrainConfig

COMPLETE = "complete"
THESIS: dict[str, str] = {  # PCK@0.1 on SPair cats with the self-supervised distance
    COMPLETE: "67.2",
    "c fixed at the mean": "10.6",
    "no style mixing": "25.9",
    "no total variation": "59.0",
    "c unconstrained": "0.34",
    "cut-off one earlier": "60.5",
    "cut-off one later": "65.0",
}
FIRST = (COMPLETE, "c fixed at the mean", "no style mixing", "no total variation")


def ablation(name: str, config: AlignTrainConfig, *, num_ws: int, w_dim: int) -> AlignTrainConfig:
    """A row's settings, from those of the complete method. Raises ValueError for a row there is not.

    num_ws, w_dim: of the generator. LPIPS's rows are the complete method and no style mixing with `--distance lpips`, and a
    total-variation weight 0.4 times its own.
    """
    changes: dict[str, dict[str, float | int]] = {
        COMPLETE: {},
        "c fixed at the mean": {"components": 0},
        "no style mixing": {"cutoff": num_ws},
        "no total variation": {"tv_weight": 0.0},
        "c unconstrained": {"components": w_dim},
        "cut-off one earlier": {"cutoff": config.cutoff - 1},
        "cut-off one later": {"cutoff": config.cutoff + 1},
    }
    if name not in changes:
        raise ValueError(f"ablation {name!r}: expected one of {', '.join(changes)}")
    return replace(config, **changes[name])
