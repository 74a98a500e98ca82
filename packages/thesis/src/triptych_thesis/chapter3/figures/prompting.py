"""Figures of what prompting achieves: sweeps, recursion, sampling steps, and the training behind them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from triptych_thesis.chapter3.figures.style import (
    BLUE,
    GREY,
    MARKERS,
    ORANGE,
    PALE_BLUE,
    PALETTE,
    best_line,
    intervals,
    legend,
    measure,
    numbers,
    panels,
    thousands,
    words,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def sweep(
    data: Mapping[str, Any], *, also: Sequence[str] = (), beside: Mapping[str, Mapping[str, Any]] | None = None
) -> "Figure":
    """Achieved against prompted values, a curve for each network and their mean.  [Fig. 3.5]

    data: `Sweep.as_dict()`. also: further metrics of the task, each in a panel of its own against the same prompts. beside: sweeps
    of other updates by name, such as baselines, whose means are drawn.
    """
    metrics = (data["metric"], *also)
    figure, axes = panels(len(metrics), size=(5.2 if len(metrics) == 1 else 3.9 * len(metrics), 4.1))
    prompts = numbers(data["prompts"])
    for metric, one in zip(metrics, axes, strict=True):
        achieved = numbers(data["achieved"][metric])
        curves = one.plot(prompts.T, achieved.T, color=PALE_BLUE, linewidth=0.8, alpha=0.7)
        curves[0].set_label(f"one update each of {len(prompts)} networks")
        _mean_curve(one, prompts, achieved, BLUE, "o", "mean")
        for (name, other), color, marker in zip((beside or {}).items(), PALETTE[2:], MARKERS[2:], strict=False):
            _mean_curve(one, numbers(other["prompts"]), numbers(other["achieved"][metric]), color, marker, name)
        if metric == data["metric"]:
            ends = [prompts.min(), prompts.max()]
            one.plot(ends, ends, color=GREY, linestyle=":", linewidth=1.2, label="achieved as prompted")
        best_line(one, data["trained_best"].get(metric))
        one.set(xlabel=f"prompted {words(data['metric'])}", ylabel=f"achieved {words(metric)}")
        measure(one.xaxis, data["metric"])
        if data["better"] == "lower" and metric == data["metric"]:
            room = 1.5 * max(prompts.max(), numbers(data["start"][metric]).max())
            one.set_ylim(top=min(one.get_ylim()[1], room))  # a diverged network leaves the picture, not the scale
        measure(one.yaxis, metric)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = 2 if len(metrics) == 1 else 3
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=columns)
    return figure


def _mean_curve(axes: "Axes", prompts: np.ndarray, achieved: np.ndarray, color: str, marker: str, label: str) -> None:
    seen = ~np.isnan(achieved).all(axis=0)
    mean = np.nanmean(achieved[:, seen], axis=0)
    axes.plot(prompts.mean(axis=0)[seen], mean, marker=marker, color=color, markersize=3.5, linewidth=1.4, label=label)


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


def quality(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Prompt alignment, and what the best prompt achieves, against model evaluations, a curve for each sampler.

    rows: `Quality.as_dict()` of each.
    """
    figure, axes = panels(2, size=(8.4, 3.4))
    metric = rows[0]["alignment"]["metric"]
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    for sampler, color, marker in zip(samplers, PALETTE, MARKERS, strict=False):
        own = [row for row in rows if row["sampler"] == sampler]
        for one, key in zip(axes, ("r2", "achieved_at_best"), strict=True):
            points = [row["alignment"][key] for row in own]
            x, y = [row["model_evaluations"] for row in own], numbers([point["value"] for point in points])
            style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.2, "capsize": 2}
            one.errorbar(x, y, intervals(points, "value"), label=sampler, **style)
    for one in axes:
        one.set(xscale="log", xlabel="model evaluations for one update")
        one.xaxis.set_major_formatter(thousands)
    found = {
        key: [row["alignment"][key]["value"] for row in rows if row["alignment"][key]["value"] is not None]
        for key in ("r2", "achieved_at_best")
    }
    low, best = min(found["r2"], default=0), found["achieved_at_best"]
    axes[0].set(ylabel="prompt alignment (R²)", ylim=(max(low - 0.1, -3) if low < 0 else 0, 1.02))
    axes[1].set_ylabel(f"{words(metric)} at the best prompt")
    if best and min(best) > 0 and max(best) > 5 * min(best):
        axes[1].set_yscale("log")
    measure(axes[1].yaxis, metric)
    legend(axes[0], loc="lower right")
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
