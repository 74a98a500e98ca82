"""How the figures of chapter 3 name and label the metrics of networks; the style itself is that of every chapter."""

from typing import TYPE_CHECKING, Any

from triptych_thesis.study.plots import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LINES,
    MARKERS,
    ORANGE,
    PALE_BLUE,
    PALETTE,
    PINK,
    SKY,
    YELLOW,
    distinct,
    intervals,
    legend,
    numbers,
    panels,
    thousands,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "BLUE", "GREEN", "GREY", "INK", "LINES", "MARKERS", "ORANGE", "PALETTE", "PALE_BLUE", "PINK", "SKY", "YELLOW", "best_line",
    "distinct", "intervals", "legend", "measure", "numbers", "panels", "shown", "thousands", "words",
]  # fmt: skip


def words(metric: str) -> str:
    """A metric as an axis calls it, with its unit: losses are in nats, errors in per cent."""
    unit = " (nats)" if metric.endswith("loss") else " (%)" if metric.endswith("error") else ""
    return metric.replace("_", " ") + unit


def shown(metric: str, value: float | int | None) -> str:
    """A value of a metric to three digits, in the unit of `words`; a dash where there is none."""
    if value is None:
        return "–"
    return f"{(100 if metric.endswith('error') else 1) * value:.3g}"


def measure(axis: Any, metric: str) -> None:
    """Label ticks of a matplotlib axis in the metric's unit, without powers of ten."""
    factor = 100 if metric.endswith("error") else 1
    axis.set_major_formatter(lambda value, _: f"{factor * value:.4g}")
    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        if high / max(low, 1e-300) < 30:  # few or no powers of ten in sight: 2 and 5 are labelled, too

            def some(value: float, _: Any) -> str:
                return f"{factor * value:.4g}" if f"{value:.0e}"[0] in "25" else ""

            axis.set_minor_formatter(some)
        else:
            axis.set_minor_formatter("")


def best_line(axes: "Axes", value: float | int | None) -> None:
    """The best training checkpoint as a dashed line, where known."""
    if value is not None:
        axes.axhline(value, color=INK, linestyle="--", linewidth=1.2, label="best training checkpoint")
