"""What the chapter's figures share beside the library's own plots: curves that differ, and numbers in the metric's unit."""

from collections.abc import Iterator, Sequence
from itertools import cycle

from triptych_gpt.evaluation.plots import (
    BLUE,
    GREEN,
    GREY,
    INK,
    KINDS,
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

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "INK",
    "KINDS",
    "LINES",
    "MARKERS",
    "ORANGE",
    "PALETTE",
    "PALE_BLUE",
    "best_line",
    "distinct",
    "intervals",
    "legend",
    "measure",
    "numbers",
    "panels",
    "shown",
    "thousands",
    "words",
]

LINES = ("-", "--", ":", "-.")


def distinct(colors: Sequence[str] = PALETTE, lines: Sequence[str] = LINES) -> Iterator[dict[str, str]]:
    """Colour, marker and line style of one curve after another: once the colours are used up the line style changes."""
    markers = cycle(MARKERS)
    for line in cycle(lines):
        for color in colors:
            yield {"color": color, "marker": next(markers), "linestyle": line}


def shown(metric: str, value: float | int | None) -> str:
    """A value of a metric to three digits, in the unit of `words`; a dash where there is none."""
    if value is None:
        return "–"
    return f"{(100 if metric.endswith('error') else 1) * value:.3g}"
