"""The plots of every chapter in one style: colours that colour-blind readers can tell apart, axes without clutter.

Figures are made without pyplot; `triptych_common.images.figure_png` turns one into a PNG file.
"""

from collections.abc import Iterator, Mapping, Sequence
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
    """A figure and its axes, row by row, with a light grid and open to the top and right. `size` is in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for one in axes:
        one.grid(alpha=0.25, which="both", linewidth=0.5)
        one.set_axisbelow(True)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    return figure, axes


def distinct(colors: Sequence[str] = PALETTE, lines: Sequence[str] = LINES) -> Iterator[dict[str, Any]]:
    """Colour, marker and line style of one curve after another: once the colours are used up the line style changes."""
    markers = cycle(MARKERS)
    for line in cycle(lines):
        for color in colors:
            yield {"color": color, "marker": next(markers), "linestyle": line}


def legend(axes: "Axes", **options: Any) -> None:
    """A legend without a frame, in small type."""
    axes.legend(**{"frameon": False, "fontsize": 8, **options})


def numbers(values: Sequence[Any]) -> Float[np.ndarray, "*shape"]:
    """Values read from JSON, NaN for None."""
    return np.array(values, dtype=np.float64)


def intervals(rows: Sequence[Mapping[str, Any]], value: str = "value") -> Float[np.ndarray, "2 n"]:
    """Matplotlib's error bars: distances from each row's value to its "low" and "high", 0 where it has none."""

    def bound(row: Mapping[str, Any], key: str) -> float:
        return abs(row[key] - row[value]) if row.get(key) is not None and row[value] is not None else 0.0

    return np.array([[bound(row, key) for row in rows] for key in ("low", "high")])


def interval_lines(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], x: str, y: str, *, by: str, floor: float = 0.0, line: bool = True
) -> None:
    """One line for each value of `by`, through the estimates `row[y]` at `row[x]` with their 95% intervals.

    Args:
        floor: the lowest bound drawn, as a share of the value: above 0 on a logarithmic axis, which has no place for 0.
        line: whether the points are joined.
    """
    for key, style in zip(dict.fromkeys(row[by] for row in rows), distinct(), strict=False):
        points = sorted((row for row in rows if row[by] == key), key=lambda row: row[x])
        values = numbers([row[y]["value"] for row in points])
        below, above = intervals([row[y] for row in points])
        if floor:
            below = np.minimum(below, (1 - floor) * np.abs(values))
        drawn = style if line else {**style, "linestyle": "none"}
        axes.errorbar(
            [row[x] for row in points], values, yerr=[below, above], label=str(key), markersize=4, linewidth=1.2,
            elinewidth=0.8, capsize=2, **drawn,
        )  # fmt: skip


def plain_ticks(axes: "Axes") -> None:
    """Label 1, 2 and 5 of every decade of logarithmic axes as plain numbers; only 1 where there are many decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
        if scale == "log":
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
            axis.set_tick_params(labelsize=7)


def thousands(value: float, _: Any = None) -> str:
    """1500 as 1.5k, 2000000 as 2M; also a formatter of ticks, `axis.set_major_formatter(thousands)`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
