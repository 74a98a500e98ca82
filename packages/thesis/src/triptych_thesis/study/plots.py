"""Curves with intervals, and axes in the style of `triptych_common.plots`."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from triptych_common.plots import MARKERS, PALETTE, intervals, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = ("-", "--", ":", "-.")


def distinct(colors: Sequence[str] = PALETTE, lines: Sequence[str] = LINES) -> Iterator[dict[str, Any]]:
    """Colour, marker and line style of one curve after another: once the colours are used up the line style changes."""
    markers = cycle(MARKERS)
    for line in cycle(lines):
        for color in colors:
            yield {"color": color, "marker": next(markers), "linestyle": line}


def interval_lines(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], x: str, y: str, *, by: str, floor: float = 0.0, line: bool = True
) -> None:
    """One line for each value of `by`, through the estimates `row[y]` at `row[x]` with their 95% intervals.

    floor: the lowest bound drawn, as a share of the value: above 0 on a logarithmic axis, which has no place for 0.
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
