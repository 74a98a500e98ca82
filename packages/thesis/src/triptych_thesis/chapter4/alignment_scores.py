"""How well digits are aligned: PCK on exact pairs, errors of known poses, sharpness of the average; `triptych score-alignment`."""

from dataclasses import dataclass
from typing import Any

from triptych_common.cli import echo
from triptych_gangealing.baselines.methods import Method
from triptych_gangealing.keypoints.evaluate import methods_of, pairs_of, score_pairs, write_scores
from triptych_gangealing.keypoints.pck import BOX, PER_POINT, PckTable
from triptych_gangealing.keypoints.synthetic import Pairs, Posed, posed_digits

from triptych_thesis.chapter4.options import AlignmentScoreConfig
from triptych_thesis.chapter4.pose import PoseErrors, Sharpness, own_pose_errors, pose_errors, sharpness

AT = f"{BOX}, {PER_POINT}, 0.1"  # key of PCK@0.1 in a table of scores


@dataclass(frozen=True)
class Scores:
    """Scores of one method."""

    pck: PckTable  # on pairs of images
    pose: PoseErrors  # beside the pose that all images of a cluster share
    own_pose: PoseErrors | None  # beside the pose that each digit's images share; None where every digit was drawn once
    sharpness: Sharpness  # of the average of all images, whatever their cluster
    pairs_apart: int  # pairs whose images fell into different clusters; their points are misses

    @property
    def summary(self) -> str:
        """The scores on one line."""
        apart = f", {self.pairs_apart} pairs apart" if self.pairs_apart else ""
        return (
            f"PCK@0.1 {self.pck[BOX, PER_POINT, 0.1]}, rotation {self.pose.rotation_deg} degrees, "
            f"log scale {self.pose.log_scale}, shift {self.pose.shift_px} px, sharpness {self.sharpness.ratio}{apart}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The scores as JSON holds them."""
        return {
            "pck": self.pck.as_dict(),
            "pose": self.pose.as_dict(),
            "own_pose": self.own_pose and self.own_pose.as_dict(),
            "sharpness": {**self.sharpness._asdict(), "ratio": self.sharpness.ratio._asdict()},
            "pairs apart": self.pairs_apart,
        }


def score(method: Method, several: Pairs, posed: Posed, seed: int = 0) -> Scores:
    """Score a method that aligns images, on pairs and on posed digits."""
    # Errors of pose are beside each cluster's own mode, near which the images of a small cluster lie in any case.
    table, apart = score_pairs(method, several, seed=seed)
    aligned, jitters = method(posed.images), posed.jitters
    shared = pose_errors(jitters, aligned.warp, aligned.cluster, seed=seed)
    own = own_pose_errors(jitters, aligned.warp, aligned.cluster, seed=seed)
    return Scores(table, shared, own, sharpness(posed.digits, jitters, aligned.warp, seed=seed), apart)


def score_alignment(config: AlignmentScoreConfig) -> dict[str, Any]:
    """Score every method and write pck.json. Raises ValueError or OSError for a file that is no aligner."""
    methods, options = methods_of(config)
    several = pairs_of(config)
    posed = posed_digits(config.images, config.seed + 1, config.digit, grey=config.grey, source=config.data)
    scores = {name: score(method, several, posed, config.seed) for name, method in methods.items()}
    for name, each in scores.items():
        echo(f"{name}: {each.summary}")
    return write_scores(config, options, {name: each.as_dict() for name, each in scores.items()})
