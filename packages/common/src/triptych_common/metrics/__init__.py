"""Scores of generated images: distances between feature distributions, coverage, frozen instruments, the ADM suite."""

from triptych_common.metrics.adm import (
    AdmScores,
    FeatureSet,
    ImageFeatures,
    adm_scores,
    image_features,
    inception_score,
)
from triptych_common.metrics.bootstrap import Estimate, as_share, bootstrap, bootstrap_rate
from triptych_common.metrics.distances import (
    Gaussian,
    Moments,
    fit_gaussian,
    frechet_distance,
    frechet_influence,
    gaussian_frechet,
    kernel_distance,
)
from triptych_common.metrics.inception import Inception, load_inception
from triptych_common.metrics.instruments import Instrument, load_instrument
from triptych_common.metrics.neighbours import coverage, nearest_distances, precision_recall
from triptych_common.metrics.npz import NpzImages

__all__ = [
    "AdmScores",
    "Estimate",
    "FeatureSet",
    "Gaussian",
    "ImageFeatures",
    "Inception",
    "Instrument",
    "Moments",
    "NpzImages",
    "adm_scores",
    "as_share",
    "bootstrap",
    "bootstrap_rate",
    "coverage",
    "fit_gaussian",
    "frechet_distance",
    "frechet_influence",
    "gaussian_frechet",
    "image_features",
    "inception_score",
    "kernel_distance",
    "load_inception",
    "load_instrument",
    "nearest_distances",
    "precision_recall",
]
