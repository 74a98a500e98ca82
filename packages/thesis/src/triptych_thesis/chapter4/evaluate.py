"""How well digits are aligned: PCK on exact pairs, errors of known poses, sharpness of the average; ours beside baselines."""

from dataclasses import dataclass, fields
from typing import Any

from triptych_common.cli import echo
from triptych_common.metrics.bootstrap import Estimate
from triptych_gangealing.baselines.methods import Method
from triptych_gangealing.keypoints.evaluate import PckConfig, methods_of, pairs_of, score_pairs, write_scores
from triptych_gangealing.keypoints.pck import PckTable
from triptych_gangealing.keypoints.synthetic import Pairs, Posed, posed_digits

from triptych_thesis.chapter4.pose import PoseErrors, Sharpness, own_pose_errors, pose_errors, sharpness


@dataclass(frozen=True)
class AlignmentScoreConfig(PckConfig):
    """Score an aligner on held-out coloured digits whose correspondences and jitters are known, beside baselines."""

    images: int = 500
    """images for errors of pose and sharpness"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 1:
            raise ValueError(f"images {self.images}: expected at least 1")


@dataclass(frozen=True)
class Scores:
    """Of one method."""

    pck: PckTable
    pose: PoseErrors
    own_pose: PoseErrors | None  # beside each digit's own mode; without digits drawn several times there is none
    sharpness: Sharpness  # of the average of all images, whatever their cluster
    pairs_apart: int  # whose images fell into different clusters: their points are misses


def score(method: Method, several: Pairs, posed: Posed, seed: int = 0) -> Scores:
    """A method that warps images to alignment, on pairs and on posed digits.

    Errors of pose are beside each cluster's own mode, near which the pictures of a small one lie in any case.
    """
    table, apart = score_pairs(method, several, seed=seed)
    found = method(posed.images)
    across, own = (
        measure(posed.jitters, found.warp, found.cluster, seed=seed) for measure in (pose_errors, own_pose_errors)
    )
    return Scores(table, across, own, sharpness(posed.digits, posed.jitters, found.warp, seed=seed), apart)


def evaluate(config: AlignmentScoreConfig) -> dict[str, Any]:
    """Score and write pck.json. Raises ValueError or OSError for what is no aligner."""
    methods, options = methods_of(config)
    several = pairs_of(config)
    posed = posed_digits(config.images, config.seed + 1, config.digit, grey=config.grey, source=config.data)
    found = {name: score(method, several, posed, config.seed) for name, method in methods.items()}
    for name, scores in found.items():
        echo(f"{name}: {summary(scores)}" + f", {scores.pairs_apart} pairs apart" * (scores.pairs_apart > 0))
    return write_scores(config, options, {name: as_dict(scores) for name, scores in found.items()})


def summary(scores: Scores) -> str:
    """One line."""
    at = scores.pck["target box", "per point", 0.1]
    return (
        f"PCK@0.1 {at}, rotation {scores.pose.rotation_deg} degrees, log scale {scores.pose.log_scale}, "
        f"shift {scores.pose.shift_px} px, sharpness {scores.sharpness.ratio}"
    )


def as_dict(scores: Scores) -> dict[str, Any]:
    """For JSON."""

    def plain(errors: PoseErrors) -> dict[str, Any]:
        found = {field.name: getattr(errors, field.name) for field in fields(errors)}
        return {name: value._asdict() if isinstance(value, Estimate) else value for name, value in found.items()}

    sharp = scores.sharpness._asdict() | {"ratio": scores.sharpness.ratio._asdict()}
    own = None if scores.own_pose is None else plain(scores.own_pose)
    return {"pck": scores.pck.as_dict(), "pose": plain(scores.pose), "own_pose": own, "sharpness": sharp,
            "pairs apart": scores.pairs_apart}  # fmt: skip
