"""Options of `triptych score-alignment` and `triptych score-clusters`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from triptych_common.cli import CommonOptions
from triptych_common.fields import Ge
from triptych_gangealing.settings import Data, DigitPairsConfig


@dataclass(frozen=True)
class AlignmentScoreConfig(DigitPairsConfig):
    """Score an aligner on held-out coloured digits whose correspondences and jitters are known, beside baselines."""

    images: Annotated[int, Ge(1)] = 500
    """images for errors of pose and sharpness"""


@dataclass(frozen=True)
class ClustersConfig(CommonOptions):
    """Score an aligner's clusters of held-out coloured digits against the true digits, beside k-means on aligned pixels."""

    out: Path = Path("runs/clusters")
    """where to write clusters.json"""
    aligner: Path = Path("runs/align-digits32-all")
    """run folder of triptych-gangealing train, or its aligner.safetensors, of several clusters"""
    data: Data = "mnist5k"
    """whose held-out digits: mnist5k's, which need no download, or mnist's test split"""
    images: Annotated[int, Ge(2)] = 1_000
    """images to score; k-means on pixels learns from four times as many of the training split"""
