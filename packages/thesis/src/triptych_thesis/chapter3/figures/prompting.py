"""Figures of what prompting achieves: sweeps, recursion, sampling steps, and the training behind them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from triptych_thesis.chapter3.figures.style import (
    BLUE,
    MARKERS,
    ORANGE,
    PALETTE,
    legend,
    measure,
    numbers,
    panels,
    thousands,
    words,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def recursion(data: Mapping[str, Any], *, metric: str | None = None) -> "Figure":
    """Mean and standard error over networks after each update, a curve for each initialiser.  [Fig. 3.6]

    data: `Recursion.as_dict()`. metric: another of the task's than the prompted one.
    """
    metric = metric or data["metric"]
    figure, (axes,) = panels()
    values = {name: numbers(curve["metrics"][metric]) for name, curve in data["curves"].items()}
    for (name, curve), color, marker in zip(values.items(), PALETTE, MARKERS, strict=False):
        mean, counts = curve.mean(axis=0), np.arange(curve.shape[1])
        error = curve.std(axis=0, ddof=1) / len(curve) ** 0.5 if len(curve) > 1 else np.zeros_like(mean)
        known = name == data["known"]
        label = f"{name.replace('_', ' ')}{' (the zoo’s own)' if known else ''}"
        style = {"color": color, "marker": marker, "linewidth": 2 if known else 1.2, "markersize": 4, "label": label}
        axes.errorbar(counts, mean, error, capsize=2, elinewidth=0.8, zorder=3 if known else 2, **style)
    if metric == data["metric"]:
        axes.axhline(
            data["one_update"],
            color=PALETTE[0],
            linestyle="--",
            linewidth=1,
            label="one update, the zoo’s own initialiser",
        )
    everything = np.concatenate([curve.mean(axis=0) for curve in values.values()])
    if everything.min() > 0 and everything.max() > 3 * everything.min():
        axes.set_yscale("log")
    axes.set(xlabel="updates", ylabel=words(metric))
    axes.xaxis.get_major_locator().set_params(integer=True)
    measure(axes.yaxis, metric)
    legend(axes, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def training_curves(
    rows: Sequence[Mapping[str, Any]],
    *,
    x: str = "pairs",
    loss: str = "loss",
    scores: Sequence[str] = ("validation/alignment",),
) -> "Figure":
    """Training loss, and prompt alignment on validation runs, over training.

    rows: those of metrics.jsonl; a row that lacks a key is not a point of that curve. x: the key of the pairs seen so far; scores:
    keys of alignments, each a curve.
    """
    figure, axes = panels(2, size=(8.4, 3.2))
    points = [row for row in rows if row.get(loss) is not None]
    axes[0].plot([row[x] for row in points], [row[loss] for row in points], color=BLUE, linewidth=1)
    axes[0].set(yscale="log", ylabel="training loss")
    measure(axes[0].yaxis, loss.replace("loss", ""))
    for key, color, marker in zip(scores, (ORANGE, *PALETTE[2:]), MARKERS, strict=False):
        points = [row for row in rows if row.get(key) is not None]
        style = {"color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.2, "label": key}
        axes[1].plot([row[x] for row in points], [row[key] for row in points], **style)
    bottom, _ = axes[1].get_ylim()
    axes[1].set(ylabel="prompt alignment (R²), validation runs", ylim=(max(bottom, -3), 1.02))
    if len(scores) > 1:
        legend(axes[1])
    for one in axes:
        one.set_xlabel("pairs of checkpoints seen")
        one.xaxis.set_major_formatter(thousands)
    return figure
