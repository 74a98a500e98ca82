"""Figures that compare: with hand-designed optimisers, across scales, and with the training set."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from triptych_thesis.chapter3.figures.style import (
    BLUE,
    GREY,
    INK,
    KINDS,
    LINES,
    ORANGE,
    PALETTE,
    best_line,
    distinct,
    intervals,
    legend,
    measure,
    numbers,
    panels,
    thousands,
    words,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = {"model": "G.pt", "optimiser": "hand-designed optimisers", "baseline": "baselines", "real": "real networks"}


def one_step(data: Mapping[str, Any]) -> "Figure":
    """What one update gives, a bar for each method.  [Fig. 3.3]

    data: {"metric", "start": mean before the update or None, "trained_best": or None, "methods": [{"name", "kind": "model" |
    "optimiser" | "baseline", "mean", "low", "high"}]}; low and high are the ends of the error bar and may be None. Bars are in the
    order given, from the top.
    """
    methods, metric = list(data["methods"]), data["metric"]
    figure, (axes,) = panels(size=(7.2, 0.9 + 0.3 * len(methods)))
    values = numbers([method["mean"] for method in methods])
    positions = np.arange(len(methods))
    for kind in dict.fromkeys(method["kind"] for method in methods):
        own = [method["kind"] == kind for method in methods]
        axes.barh(positions[own], values[own], height=0.62, color=KINDS[kind], label=WORDS[kind])
    axes.errorbar(values, positions, xerr=intervals(methods, "mean"), fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    finite = values[np.isfinite(values)]
    spread = finite.size and finite.min() > 0 and finite.max() > 30 * finite.min()
    if spread:
        axes.set_xscale("log")
    measure(axes.xaxis, metric)
    axes.set_yticks(positions, [method["name"] for method in methods])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    if data.get("start") is not None:
        axes.axvline(data["start"], color=GREY, linestyle=":", linewidth=1.2, label="before the update")
    if data.get("trained_best") is not None:
        axes.axvline(data["trained_best"], color=INK, linestyle="--", linewidth=1.2, label="best training checkpoint")
    axes.set_xlabel(f"{words(metric)} after one update")
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=5, columnspacing=1.2)
    return figure


def optimisation_curves(data: Mapping[str, Any]) -> "Figure":
    """Optimisers over many steps, with the level that one update of the model reaches.  [Fig. 3.4]

    data: {"metric", "start": mean before any step, "one_step": {"mean", "low", "high"}, "trained_best": or None, "curves": [of each
    optimiser `hand_designed.Curve.as_dict()`, and "caught_up": the step at which it reaches the model's level, or None]}. Drawn is
    the mean at the grid point that is best at each step, with its standard error.
    """
    figure, (axes,) = panels()
    metric, level, lowest = data["metric"], data["one_step"], data["start"]
    for curve, look in zip(data["curves"], distinct(PALETTE[1:]), strict=False):
        steps, caught = numbers([0, *curve["steps"]]), curve.get("caught_up")
        mean = numbers([data["start"], *curve["envelope"]["mean"]])
        error = np.nan_to_num(numbers([None, *curve["envelope"]["standard_error"]]))
        label = curve["optimizer"] + (f" (caught up after {caught:,})" if caught is not None else "")
        axes.plot(steps, mean, markersize=3, linewidth=1.2, label=label, **look)
        axes.fill_between(steps, mean - error, mean + error, color=look["color"], alpha=0.15, linewidth=0)
        lowest = min(lowest, np.nanmin(mean))
    if level["mean"] is not None:
        axes.axhline(level["mean"], color=BLUE, linewidth=2, label="one update of G.pt")
    if level.get("low") is not None:
        axes.axhspan(level["low"], level["high"], color=BLUE, alpha=0.15, linewidth=0)
    best_line(axes, data.get("trained_best"))
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    if 0 < lowest < data["start"] / 5:
        axes.set_yscale("log")
    axes.set(xlabel="optimiser steps", ylabel=words(metric), xlim=(0, None))
    axes.xaxis.set_major_formatter(thousands)
    measure(axes.yaxis, metric)
    legend(axes, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def scaling(data: Sequence[Mapping[str, Any]]) -> "Figure":
    """Prompt alignment against scale, a panel for each thing scaled.  [Fig. 3.7]

    data: [{"label": what is scaled, such as "parameters of G.pt" or "training runs", "points": [{"x", "r2", "low", "high"}],
    "train": the same on training runs, optional}], points in order of x.
    """
    figure, axes = panels(len(data), size=(4.2 * len(data), 3.3))
    for one, panel in zip(data, axes, strict=True):
        for key, name, style in (
            ("points", "unseen networks", {"color": BLUE, "marker": "o", "linestyle": "-"}),
            ("train", "training networks", {"color": ORANGE, "marker": "s", "linestyle": "--"}),
        ):
            points = [point for point in one.get(key) or [] if point["r2"] is not None]
            if points:
                x, y = ([point[axis] for point in points] for axis in ("x", "r2"))
                bars = intervals(points, "r2")
                panel.errorbar(x, y, bars, label=name, capsize=2, markersize=4, linewidth=1.2, **style)
        panel.set(xscale="log", xlabel=one["label"])
        panel.xaxis.set_major_formatter(thousands)
        panel.xaxis.set_minor_formatter("")
        if all(len(one.get("points") or []) <= 8 for one in data):
            panel.set_xticks([float(point["x"]) for point in one["points"]])
        bottom, _ = panel.get_ylim()
        panel.set(ylim=(max(min(bottom, 0), -3.2), 1.02))
    axes[0].set_ylabel("prompt alignment (R²)")
    if any(one.get("train") for one in data):
        legend(axes[0])
    return figure


def nearest_neighbours(data: Mapping[str, Any]) -> "Figure":
    """Share of unseen runs whose sample lies nearer to its own run than to the training set, against prompts.  [Fig. 3.9]

    data: {"metric", "prompts": [n], "scores": {name: {"value": [n], "low": [n] or None, "high": [n] or None}}, "baselines": the
    same, optional, drawn broken and thinner, over the others, which they may meet at 0 and 100%}; scores are fractions, such as
    those of raw distances, of matched ones, and of checkpoints near the prompt. Points that are None or not finite are left out.
    """
    baselines = data.get("baselines") or {}
    figure, (axes,) = panels(size=(7.2, max(3.4, 0.9 + 0.2 * (len(data["scores"]) + len(baselines)))))
    prompts = numbers(data["prompts"])
    like_scores = distinct(
        PALETTE[: max(4, len(data["scores"]))], LINES[1:]
    )  # as many of an update: in the scores' colours
    for curves, looks, width in ((data["scores"], distinct(), 1.6), (baselines, like_scores, 1.0)):
        for (name, one), look in zip(curves.items(), looks, strict=False):
            value = 100 * numbers(one["value"])
            seen = np.isfinite(prompts) & np.isfinite(value)
            axes.plot(prompts[seen], value[seen], **look, markersize=4, linewidth=width, label=name, clip_on=False)
            if one.get("low") is not None and one.get("high") is not None:
                low, high = (100 * numbers(one[end])[seen] for end in ("low", "high"))
                axes.fill_between(prompts[seen], low, high, color=look["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel=f"prompted {words(data['metric'])}", ylabel="nearest-neighbour score (%)", ylim=(0, 100))
    measure(axes.xaxis, data["metric"])
    legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
