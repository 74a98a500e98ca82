"""Figures of an evaluation, each drawn from its result as saved, so that it can be drawn again without the model.

Every function returns a matplotlib Figure, which `triptych_common.plots.figure_png` turns into a PNG file.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from triptych_common import plots as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"model": style.BLUE, "optimiser": style.GREY, "baseline": style.ORANGE, "real": style.GREEN}
AUDIT_KINDS = {"samples": "model", "held-out at the prompt's metric": "real", "held-out finals": "real"}


def sweep(
    data: Mapping[str, Any], *, also: Sequence[str] = (), beside: Mapping[str, Mapping[str, Any]] | None = None
) -> "Figure":
    """Achieved against prompted values, a curve for each network and their mean.  [Fig. 3.5]

    data: a saved `Sweep`. also: further metrics of the task, each in a panel of its own against the same prompts. beside: sweeps of
    other updates by name, such as baselines, whose means are drawn.
    """
    metrics = (data["metric"], *also)
    figure, axes = style.panels(len(metrics), size=(5.2 if len(metrics) == 1 else 3.9 * len(metrics), 4.1))
    prompts = style.numbers(data["prompts"])
    for metric, one in zip(metrics, axes, strict=True):
        achieved = style.numbers(data["achieved"][metric])
        curves = one.plot(prompts.T, achieved.T, color=style.PALE_BLUE, linewidth=0.8, alpha=0.7)
        curves[0].set_label(f"one update each of {len(prompts)} networks")
        _mean_curve(one, prompts, achieved, style.BLUE, "o", "mean")
        for (name, other), color, marker in zip(
            (beside or {}).items(), style.PALETTE[2:], style.MARKERS[2:], strict=False
        ):
            _mean_curve(
                one, style.numbers(other["prompts"]), style.numbers(other["achieved"][metric]), color, marker, name
            )
        if metric == data["metric"]:
            ends = [prompts.min(), prompts.max()]
            one.plot(ends, ends, color=style.GREY, linestyle=":", linewidth=1.2, label="achieved as prompted")
        best_line(one, data["trained_best"].get(metric))
        one.set(xlabel=f"prompted {words(data['metric'])}", ylabel=f"achieved {words(metric)}")
        measure(one.xaxis, data["metric"])
        if data["better"] == "lower" and metric == data["metric"]:
            room = 1.5 * max(prompts.max(), style.numbers(data["start"][metric]).max())
            one.set_ylim(top=min(one.get_ylim()[1], room))  # a diverged network does not set the scale
        measure(one.yaxis, metric)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = 2 if len(metrics) == 1 else 3
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=columns)
    return figure


def _mean_curve(axes: "Axes", prompts: np.ndarray, achieved: np.ndarray, color: str, marker: str, label: str) -> None:
    seen = ~np.isnan(achieved).all(axis=0)
    mean = np.nanmean(achieved[:, seen], axis=0)
    axes.plot(prompts.mean(axis=0)[seen], mean, marker=marker, color=color, markersize=3.5, linewidth=1.4, label=label)


def quality(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Prompt alignment and the value at the best prompt of saved `Quality` rows against model evaluations, by sampler."""
    figure, axes = style.panels(2, size=(8.4, 3.4))
    metric = rows[0]["alignment"]["metric"]
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    for sampler, color, marker in zip(samplers, style.PALETTE, style.MARKERS, strict=False):
        own = [row for row in rows if row["sampler"] == sampler]
        for one, key in zip(axes, ("r2", "achieved_at_best"), strict=True):
            points = [row["alignment"][key] for row in own]
            x, y = [row["model_evaluations"] for row in own], style.numbers([point["value"] for point in points])
            look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.2, "capsize": 2}
            one.errorbar(x, y, style.intervals(points, "value"), label=sampler, **look)
    for one in axes:
        one.set(xscale="log", xlabel="model evaluations for one update")
        one.xaxis.set_major_formatter(style.thousands)
    low = min((value for row in rows if (value := row["alignment"]["r2"]["value"]) is not None), default=0)
    best = [value for row in rows if (value := row["alignment"]["achieved_at_best"]["value"]) is not None]
    axes[0].set(ylabel="prompt alignment (R²)", ylim=(max(low - 0.1, -3) if low < 0 else 0, 1.02))
    axes[1].set_ylabel(f"{words(metric)} at the best prompt")
    if best and min(best) > 0 and max(best) > 5 * min(best):
        axes[1].set_yscale("log")
    measure(axes[1].yaxis, metric)
    style.legend(axes[0], loc="lower right")
    return figure


def alignment_figure(result: Mapping[str, Any], model: str = "G.pt") -> "Figure":
    """The sweep of the model, the baselines' means beside it; result: of `alignment_beside_baselines`."""
    sweeps = dict(result["sweeps"])
    own = sweeps.pop(model)
    also = [metric for metric in own["achieved"] if metric == "test_error" != own["metric"]]
    return sweep(own, also=also, beside=sweeps)


def memorization_figure(result: Mapping[str, Any]) -> "Figure":
    """Distances to the nearest training network: every network a dot, quartiles a bar, the median a line.

    result: `Audit.as_dict`; its groups are drawn from the top.
    """
    groups = result["groups"]
    figure, (axes,) = style.panels(size=(7.2, 0.9 + 0.5 * len(groups)))
    for row, group in enumerate(groups):
        color, values = KINDS[AUDIT_KINDS.get(group["name"], "baseline")], style.numbers(group["distances"])
        values = values[np.isfinite(values)]
        height = row + 0.26 * (np.arange(len(values)) * 0.618034 % 1 * 2 - 1)  # spread evenly, the same every time
        axes.plot(values, height, ".", color=color, markersize=3, alpha=0.45, markeredgewidth=0)
        if len(values):
            low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
            axes.plot([low, high], [row, row], color=color, linewidth=5, alpha=0.5, solid_capstyle="butt")
            axes.plot([median, median], [row - 0.32, row + 0.32], color=style.INK, linewidth=1.6)
            axes.annotate(f"{median:.3g}", (median, row - 0.34), ha="center", va="bottom", fontsize=7.5)
    axes.set_yticks(range(len(groups)), [group["name"] for group in groups])
    label = "distance to the nearest training network, units matched"
    axes.set(xlabel=label, xlim=(0, None), ylim=(len(groups) - 0.5, -0.75))
    axes.grid(False, axis="y")
    return figure


def words(metric: str) -> str:
    """A metric as an axis calls it, with its unit: losses are in nats, errors in per cent."""
    unit = " (nats)" if metric.endswith("loss") else " (%)" if metric.endswith("error") else ""
    return metric.replace("_", " ") + unit


def measure(axis: Any, metric: str) -> None:
    """Label ticks of a matplotlib axis in the metric's unit, without powers of ten."""
    factor = 100 if metric.endswith("error") else 1
    axis.set_major_formatter(lambda value, _: f"{factor * value:.4g}")
    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        if high / max(low, 1e-300) < 30:  # few or no powers of ten in sight, so 2 and 5 are labelled, too

            def some(value: float, _: Any) -> str:
                return f"{factor * value:.4g}" if f"{value:.0e}"[0] in "25" else ""

            axis.set_minor_formatter(some)
        else:
            axis.set_minor_formatter("")


def best_line(axes: "Axes", value: float | None) -> None:
    """The best training checkpoint as a dashed line, if known."""
    if value is not None:
        axes.axhline(value, color=style.INK, linestyle="--", linewidth=1.2, label="best training checkpoint")
