"""Figures of networks themselves: the landscape about samples, and first-layer filters."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from triptych_thesis.chapter3.figures.style import INK, ORANGE, measure, numbers, panels, shown, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def landscape(data: Sequence[Mapping[str, Any]]) -> "Figure":
    """Contours of the metric over a plane with the samples on it, a panel for each start.  [Fig. 3.8]

    data: `Landscape.as_dict()` of each. Filled dots are samples whose projection scores as they do, hollow ones the others.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = panels(len(data), size=(4.4 * len(data) + 0.6, 3.9))
    metric = data[0]["metric"]
    values = [numbers(one["values"]) for one in data]
    levels = MaxNLocator(20).tick_values(min(np.nanmin(v) for v in values), max(np.nanmax(v) for v in values))
    best_bright = "viridis_r" if data[0]["better"] == "lower" else "viridis"
    for number, (one, grid, panel) in enumerate(zip(data, values, axes, strict=True), start=1):
        filled = panel.contourf(one["x"], one["y"], grid, levels=levels, cmap=best_bright)
        panel.contour(one["x"], one["y"], grid, levels=levels[::2], colors="white", linewidths=0.4, alpha=0.6)
        samples, accurate = numbers(one["samples"]), np.array(one["accurate"], dtype=bool)
        for which, face, label in ((accurate, ORANGE, "scores alike"), (~accurate, "none", "scores otherwise")):
            style = {
                "s": 28,
                "linewidths": 1,
                "edgecolors": INK,
                "zorder": 3,
                "label": f"sample whose projection {label}",
            }
            if which.any():
                panel.scatter(*samples[which].T, facecolors=face, **style)
        axis_names = [f"component {i}, {share:.0%} of variance" for i, share in enumerate(one["explained"], start=1)]
        panel.set(xlabel=axis_names[0], ylabel=axis_names[1])
        panel.set_title(f"start {number}, prompted for {shown(metric, one['prompt'])}", fontsize=9)
        panel.grid(False)
    bar = figure.colorbar(filled, ax=axes, label=words(metric), shrink=0.9)
    measure(bar.ax.yaxis, metric)
    named = {label: dot for one in axes for dot, label in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def filters(data: Mapping[str, Any]) -> "Figure":
    """Weights of each hidden unit as an image, one network above and its update below, in one symmetric range of colours.

    data: {"metric", "prompt", "before": {"filters": [units][side][side], "metric": value}, "after": the same}, as
    `filters_before_and_after` gives it.
    """
    rows = [data["before"], data["after"]]
    images = [numbers(row["filters"]) for row in rows]
    units, largest = len(images[0]), np.nanmax(np.abs(images))
    figure, axes = panels(units, 2, size=(0.82 * units + 1.0, 2.3))
    for i, panel in enumerate(axes):
        image = images[i // units][i % units]
        drawn = panel.imshow(image, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
        panel.grid(False)
        panel.set(xticks=[], yticks=[])
        for side in panel.spines.values():
            side.set_visible(False)
    for panel, name, row in zip(axes[::units], ("before", "after"), rows, strict=True):
        panel.set_ylabel(
            f"{name}\n{shown(data['metric'], row['metric'])}", fontsize=9, rotation=0, ha="right", va="center"
        )
    figure.suptitle(f"{words(data['metric'])}, prompted for {shown(data['metric'], data['prompt'])}", fontsize=9)
    figure.colorbar(drawn, ax=axes, label="weight", shrink=0.9)
    return figure
