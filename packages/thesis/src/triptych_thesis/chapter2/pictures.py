"""Pictures of a training run: the curve, grids by class, the grid over training, one sample's denoising."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from triptych_common.images import figure_png, image_grid, png_bytes, to_uint8
from triptych_common.storage.atomic import write_bytes
from triptych_common.storage.provenance import command_line, git_commit
from triptych_dit.sampling import SamplerSettings, decoded, trajectory
from triptych_dit.weights import TrainedModel

STRIP_LENGTH = 10  # as many as classes, so that grids and strips line up


@dataclass(frozen=True)
class Pictures:
    """PNG files, as bytes; each but the curve carries the command, seed and commit that made it."""

    overview: bytes  # the guided grid above the strip
    guided: bytes
    unguided: bytes
    over_training: bytes
    strip: bytes
    curve: bytes


def draw_pictures(
    *,
    folder: Path,
    guided: UInt8[Tensor, "n channels height width"],
    unguided: UInt8[Tensor, "n channels height width"],
    over_training: Float[Tensor, "n channels height width"],
    counts: Sequence[int],
    metrics: Sequence[dict[str, Any]],
    snapshot_losses: dict[str, list[float]],
    trained: TrainedModel,
    settings: SamplerSettings,
    seed: int,
    vae: str | None = None,
) -> Pictures:
    """Draw everything and write it to `folder` as PNG files too; grids have a column for each class."""
    made_by = {"command": command_line(), "seed": str(seed), "commit": git_commit()}
    strip = denoising_strip(trained, settings, seed=seed, vae=vae)

    def png(images: Tensor) -> bytes:
        return png_bytes(image_grid(images, columns=STRIP_LENGTH), scale=2, text=made_by)

    pictures = Pictures(
        overview=png(torch.cat([guided, strip])),
        guided=png(guided),
        unguided=png(unguided),
        over_training=png(to_uint8(over_training)),
        strip=png(strip),
        curve=training_curve(metrics, counts, snapshot_losses),
    )
    for name, content in vars(pictures).items():
        write_bytes(folder / f"{name.replace('_', '-')}.png", content)
    return pictures


@torch.inference_mode()
def denoising_strip(
    trained: TrainedModel, settings: SamplerSettings, *, label: int = 3, seed: int = 0, vae: str | None = None
) -> UInt8[Tensor, "n channels height width"]:
    """One sample's way from noise to digit: a row of x_t, then a row of the clean digit the model sees in each."""
    steps = list(trajectory(trained, torch.tensor([label]), [0], settings, seed=seed))
    shown = torch.linspace(0, len(steps) - 1, STRIP_LENGTH).round().int().tolist()
    rows = [steps[i].x for i in shown] + [steps[i].x_0 for i in shown]
    return to_uint8(decoded(trained, torch.cat(rows), vae=vae))


def training_curve(
    metrics: Sequence[dict[str, Any]], counts: Sequence[int], snapshot_losses: dict[str, list[float]]
) -> bytes:
    """Noise-prediction error over training, and that of the averaged weights on training and held-out digits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4))
    axes = figure.add_subplot()
    rows = [row for row in metrics if "mse" in row]
    axes.plot(
        [r["images"] for r in rows], [r["mse"] for r in rows], color="#9db4cf", linewidth=1, label="training batches"
    )
    for (name, values), color, style in zip(
        snapshot_losses.items(), ("#27548a", "#c2571a"), ("o-", "s--"), strict=True
    ):
        axes.plot(
            counts, values, style, color=color, markersize=4, linewidth=1.2, label=f"averaged weights, {name} digits"
        )
    axes.set(xlabel="training images seen", ylabel="error of the predicted noise (MSE)", yscale="log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,.0f}k" if x else "0")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure_png(figure)
