"""The figures of chapter 3, each drawn from results as JSON holds them, so that a report can be drawn again without the model.

Every function returns a matplotlib Figure, made without pyplot; `triptych_common.images.figure_png` turns it into a PNG file.
Figure numbers are the thesis's.
"""

from triptych_gpt.evaluation.plots import audit, quality, sweep

from triptych_thesis.chapter3.figures.comparisons import (
    nearest_neighbours,
    one_step,
    optimisation_curves,
    scaling,
)
from triptych_thesis.chapter3.figures.networks import filters, landscape
from triptych_thesis.chapter3.figures.prompting import recursion, training_curves

__all__ = [
    "audit",
    "filters",
    "landscape",
    "nearest_neighbours",
    "one_step",
    "optimisation_curves",
    "quality",
    "recursion",
    "scaling",
    "sweep",
    "training_curves",
]
