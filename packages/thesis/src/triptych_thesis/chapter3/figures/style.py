"""How the figures of chapter 3 name and label the metrics of networks; the style itself is that of every chapter."""

from triptych_gpt.evaluation.plots import KINDS, best_line, measure, words

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

__all__ = [
    "BLUE", "GREEN", "GREY", "INK", "KINDS", "LINES", "MARKERS", "ORANGE", "PALETTE", "PALE_BLUE", "PINK", "SKY", "YELLOW",
    "best_line", "distinct", "intervals", "legend", "measure", "numbers", "panels", "shown", "thousands", "words",
]  # fmt: skip


def shown(metric: str, value: float | int | None) -> str:
    """A value of a metric to three digits, in the unit of `words`; a dash where there is none."""
    if value is None:
        return "–"
    return f"{(100 if metric.endswith('error') else 1) * value:.3g}"
