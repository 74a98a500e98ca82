"""Scores of generated images: distances between feature distributions, coverage, and frozen instruments."""

from triptych_common.metrics.bootstrap import Estimate, bootstrap
from triptych_common.metrics.distances import frechet_distance, kernel_distance
from triptych_common.metrics.instruments import Instrument, load_instrument
from triptych_common.metrics.neighbours import nearest_distances, precision_recall

__all__ = [
    "Estimate",
    "Instrument",
    "bootstrap",
    "frechet_distance",
    "kernel_distance",
    "load_instrument",
    "nearest_distances",
    "precision_recall",
]
