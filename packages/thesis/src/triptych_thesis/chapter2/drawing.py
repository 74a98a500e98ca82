"""Figures of the study, drawn from what the experiments wrote."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from triptych_common.images import figure_png

from triptych_thesis.chapter2.scoring import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#27548a", "#c2571a", "#3f7d4e", "#7a4a8c", "#8a6d1f", "#4c4c55", "#b03a5b", "#2a8c8c")
Rows = Sequence[Mapping[str, Any]]
FRECHET = "Fréchet distance"


def drawn(name: str, result: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files of an experiment by title; none for an experiment that has no such figure."""
    return {title: draw(result) for title, draw in _FIGURES.get(name, {}).items()}


def _lines(axes: "Axes", rows: Rows, x: str, y: str = "frechet", by: str = "model", scale: float = 1.0) -> None:
    """A line a model with the 95% interval of every point."""
    for index, key in enumerate(dict.fromkeys(row[by] for row in rows)):
        mine = sorted((row for row in rows if row[by] == key), key=lambda row: row[x])
        values = [row[y]["value"] for row in mine]
        below = [max(v - max(row[y]["low"], v * 0.05), 0) for v, row in zip(values, mine, strict=True)]
        above = [max(row[y]["high"] - v, 0) for v, row in zip(values, mine, strict=True)]
        axes.errorbar(
            [row[x] * scale for row in mine], values, yerr=[below, above], label=str(key), color=COLORS[index % len(COLORS)],
            marker="os^Dvx"[index // len(COLORS) % 6], markersize=4, linewidth=1.2, elinewidth=0.8, capsize=2,
        )  # fmt: skip


def _figure(width: float = 7.2, columns: int = 1, height: float = 3.6) -> tuple[Any, Sequence["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.grid(alpha=0.25, which="both", linewidth=0.5)
        for side in ("top", "right"):
            each.spines[side].set_visible(False)
    return figure, axes


def _plain_ticks(axes: "Axes") -> None:
    """1, 2 and 5 of every decade of logarithmic axes, as numbers; over many decades 1 alone, so that they have room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
        if scale == "log":
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
            axis.set_tick_params(labelsize=7)


def _done(figure: Any, axes: "Axes", **labels: Any) -> bytes:
    axes.set(**labels)
    _plain_ticks(axes)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure_png(figure)


def _over_training(result: Mapping[str, Any]) -> bytes:
    figure, (axes,) = _figure()
    _lines(axes, result["rows"], "images")
    return _done(figure, axes, xlabel="training images seen", ylabel=FRECHET, yscale="log")


def _panels(result: Mapping[str, Any]) -> bytes:
    """Figure 2.6: above each patch the sizes, above each size the patches."""
    rows = [
        {**row, "size": row["model"].split("/")[0], "patch": f"patch {row['model'].split('/')[1]}"}
        for row in result["rows"]
    ]
    sizes, patches = (list(dict.fromkeys(row[key] for row in rows)) for key in ("size", "patch"))
    chosen = [("patch", p, "size") for p in patches] + [("size", s, "patch") for s in sizes]
    chosen = [(k, v, by) for k, v, by in chosen if len({row[by] for row in rows if row[k] == v}) > 1]
    figure, axes = _figure(2.6 * len(chosen), len(chosen), 3.2)
    for each, (key, value, by) in zip(axes, chosen, strict=True):
        _lines(each, [row for row in rows if row[key] == value], "images", by=by)
        each.set(title=value, xlabel="images", yscale="log")
        _plain_ticks(each)
        each.legend(frameon=False, fontsize=7)
    axes[0].set_ylabel(FRECHET)
    return figure_png(figure)


def _against_gflops(result: Mapping[str, Any]) -> bytes:
    """Figures 2.2 (left), 2.8 and 2.9 (right): every metric at the last stage."""
    last = max(row["images"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["images"] == last]
    figure, axes = _figure(2.5 * len(METRICS), len(METRICS), 2.9)
    for each, metric in zip(axes, METRICS, strict=True):
        for index, width in enumerate(dict.fromkeys(row["model"].split("/")[0] for row in rows)):
            mine = [{**row, "width": width} for row in rows if row["model"].split("/")[0] == width]
            values = [row[metric]["value"] for row in mine]
            margins = [(row[metric]["high"] - row[metric]["low"]) / 2 for row in mine]
            margins = [min(m, 0.95 * v) if "frechet" in metric else m for m, v in zip(margins, values, strict=True)]
            each.errorbar([row["gflops"] for row in mine], values, yerr=margins, fmt="os^Dv"[index % 5], markersize=5,
                          color=COLORS[index % len(COLORS)], label=width, elinewidth=0.8, capsize=2)  # fmt: skip
        r = result["correlations"][metric]
        interval = "" if r["low"] is None else f" [{r['low']:.2f}, {r['high']:.2f}]"
        each.set(
            title=f"r = {r['value']:.2f}{interval}", xlabel="GFLOPs", xscale="log", ylabel=metric.replace("_", " ")
        )
        each.title.set_fontsize(9)
        if "frechet" in metric:
            each.set_yscale("log")
        _plain_ticks(each)
    axes[0].legend(frameon=False, fontsize=8)
    return figure_png(figure)


def _against_training_compute(result: Mapping[str, Any]) -> bytes:
    figure, (axes,) = _figure(height=4.2)
    _lines(axes, result["rows"], "training_gflops")
    return _done(
        figure, axes, xlabel="training compute: GFLOPs x images x 3", ylabel=FRECHET, xscale="log", yscale="log"
    )


def _sampling_compute(result: Mapping[str, Any]) -> bytes:
    figure, (axes,) = _figure()
    _lines(axes, result["rows"], "sampling_gflops")
    return _done(figure, axes, xlabel="GFLOPs to sample one image", ylabel=FRECHET, xscale="log", yscale="log")


def _guidance(result: Mapping[str, Any]) -> bytes:
    """Fréchet distance over scales, and precision against recall."""
    total = result["channels"]
    rows = [{**row, "on": "all channels" if row["channels"] == "all" else f"{row['channels']} of {total} channels"}
            for row in result["rows"]]  # fmt: skip
    figure, (left, right) = _figure(columns=2)
    _lines(left, rows, "guidance", by="on")
    left.set(xlabel="guidance scale", ylabel=FRECHET)
    for index, on in enumerate(dict.fromkeys(row["on"] for row in rows)):
        mine = [row for row in rows if row["on"] == on]
        right.plot([r["recall"]["value"] for r in mine], [r["precision"]["value"] for r in mine], "o-", markersize=4,
                   linewidth=1, color=COLORS[index], label=on)  # fmt: skip
        for row in mine:
            at = (row["recall"]["value"], row["precision"]["value"])
            right.annotate(f"{row['guidance']:g}", at, fontsize=7, xytext=(3, 3), textcoords="offset points")
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="recall", ylabel="precision")
    return figure_png(figure)


def _samplers(result: Mapping[str, Any]) -> bytes:
    figure, (axes,) = _figure()
    _lines(axes, result["rows"], "steps", by="sampler")
    return _done(figure, axes, xlabel="denoising steps", ylabel=FRECHET, xscale="log", yscale="log")


_FIGURES: Mapping[str, Mapping[str, Callable[[Mapping[str, Any]], bytes]]] = {
    "block-designs": {"block-designs": _over_training},
    "scaling": {
        "scaling-over-training": _panels,
        "scaling-gflops": _against_gflops,
        "scaling-training-compute": _against_training_compute,
    },
    "compute": {"sampling-compute": _sampling_compute},
    "guidance": {"guidance": _guidance},
    "unet": {"unet": _over_training},
    "samplers": {"samplers": _samplers},
}
