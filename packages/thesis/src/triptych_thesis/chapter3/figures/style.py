"""What the figures share: colours that colour-blind readers can tell apart, axes without clutter, words for metrics."""

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, GREY = PALETTE = (
    "#27548a", "#c2571a", "#0b8a6b", "#b8548f", "#c99a12", "#58a0d0", "#6b6b73",
)  # fmt: skip
PALE_BLUE = "#9db4cf"
INK = "#1c1c1e"
MARKERS = "os^DvPX"
LINES = ("-", "--", ":", "-.")


def panels(columns: int = 1, rows: int = 1, *, size: tuple[float, float] = (7.2, 3.4)) -> tuple["Figure", list["Axes"]]:
    """A figure and its axes, row by row, with a light grid and open to the top and right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for one in axes:
        one.grid(alpha=0.25, which="both", linewidth=0.5)
        one.set_axisbelow(True)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    return figure, axes


def distinct(colors: Sequence[str] = PALETTE, lines: Sequence[str] = LINES) -> Iterator[dict[str, str]]:
    """Colour, marker and line style of one curve after another: once the colours are used up the line style changes."""
    markers = cycle(MARKERS)
    for line in cycle(lines):
        for color in colors:
            yield {"color": color, "marker": next(markers), "linestyle": line}


def legend(axes: "Axes", **options: Any) -> None:
    axes.legend(**{"frameon": False, "fontsize": 8, **options})


def numbers(values: Sequence[Any]) -> Float[np.ndarray, "*shape"]:
    """Values read from JSON, NaN for None."""
    return np.array(values, dtype=np.float64)


def intervals(rows: Sequence[dict[str, Any]], value: str) -> Float[np.ndarray, "2 n"]:
    """Distances from each row's value down to its "low" and up to its "high", 0 where it has none: matplotlib's error bars."""

    def bound(row: dict[str, Any], key: str) -> float:
        return abs(row[key] - row[value]) if row.get(key) is not None and row[value] is not None else 0.0

    return np.array([[bound(row, key) for row in rows] for key in ("low", "high")])


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


def thousands(value: float | int, _: Any = None) -> str:
    """1500 as 1.5k, 2000000 as 2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
