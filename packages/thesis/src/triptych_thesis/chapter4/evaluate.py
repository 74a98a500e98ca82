"""How well digits are aligned: PCK on exact pairs, errors of known poses, sharpness of the average; ours beside baselines."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from triptych_common.cli import CommonOptions, echo
from triptych_common.images import from_uint8
from triptych_common.metrics.bootstrap import Estimate
from triptych_common.storage.atomic import write_json
from triptych_gangealing.align_config import Flips, open_aligner
from triptych_gangealing.baselines.classical import Congealing, moments
from triptych_gangealing.correspondence import between
from triptych_gangealing.digits32 import Digits32, Jitters, render
from triptych_gangealing.keypoints.pck import PckTable, box_size, pck
from triptych_gangealing.keypoints.synthetic import Pairs, pairs, white_on_black
from triptych_gangealing.warp import Warp

from triptych_thesis.chapter4.pose import PoseErrors, Sharpness, own_pose_errors, pose_errors, sharpness

FITTED = 400  # training images that classical Congealing is fitted to
Images = UInt8[Tensor, "n 3 size size"]
Data = Literal["mnist5k", "mnist"]


class Aligned(NamedTuple):
    """Warps of images to alignment, and the cluster with which each is aligned."""

    warp: Warp
    cluster: Int[Tensor, " n"]

    @classmethod
    def together(cls, warp: Warp) -> "Aligned":
        """All with one another."""
        return cls(warp, torch.zeros(len(warp), dtype=torch.long))


Method = Callable[[Images], Aligned]


@dataclass(frozen=True)
class PckConfig(CommonOptions):
    """Score an aligner on held-out coloured digits whose correspondences and jitters are known, beside baselines."""

    out: Path = Path("runs/pck")
    """where to write pck.json"""
    aligner: Path | None = Path("runs/align-digits32")
    """run folder of triptych-gangealing train, or its aligner.safetensors; None: the baselines alone"""
    digit: int | None = 3
    """digit to align; None: all"""
    data: Data = "mnist5k"
    """whose held-out digits: mnist5k's, which need no download, or mnist's test split"""
    pairs: int = 300
    """pairs of images for PCK"""
    images: int = 500
    """images for errors of pose and sharpness"""
    elastic_px: float = 2.5
    """largest displacement between the two images of a pair but for their jitters, in pixels of a 28-pixel digit"""
    grey: bool = False
    """plain white digits on black instead of coloured ones, where the baselines are strong"""
    iterations: int | None = None
    """times the aligner's similarity network looks; default: as in training"""
    flips: Flips = "trained"
    """mirror images whose flow is smoother then; trained: where the training did"""
    baselines: Literal["all", "none"] = "all"
    """score moments and classical Congealing too"""

    def __post_init__(self) -> None:
        for name in ("pairs", "images", "iterations"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.digit is not None and not 0 <= self.digit <= 9:
            raise ValueError(f"digit {self.digit}: expected 0 to 9, or None for all")


@dataclass(frozen=True)
class Scores:
    """Of one method."""

    pck: PckTable
    pose: PoseErrors
    own_pose: PoseErrors | None  # beside each digit's own mode; without digits drawn several times there is none
    sharpness: Sharpness  # of the average of all images, whatever their cluster
    pairs_apart: int  # whose images fell into different clusters: their points are misses


@dataclass(frozen=True)
class Posed:
    """Images of held-out digits, the jitters they were drawn with, and the digits themselves."""

    images: Images
    jitters: Jitters
    digits: UInt8[Tensor, "n 1 28 28"]


def score(method: Method, several: Pairs, posed: Posed, seed: int = 0) -> Scores:
    """A method that warps images to alignment, on pairs and on posed digits.

    Points of a pair in two clusters cannot be transferred, and count as misses. Errors of pose are beside each cluster's own mode,
    near which the pictures of a small one lie in any case.
    """
    source, target = method(several.source), method(several.target)
    size = (several.source.shape[-1],) * 2
    found = between(source.warp, target.warp, several.source_points, size, size).points
    apart = source.cluster != target.cluster
    found = found.masked_fill(apart[:, None, None], torch.nan)
    sizes = {"target box": box_size(several.target_boxes), "image": torch.full((len(several),), float(size[0]))}
    of_digit = several.source_jitters.digit
    table = pck(found, several.target_points, several.valid, sizes, seed=seed, groups=of_digit)
    warp, cluster = method(posed.images)
    across, own = (measure(posed.jitters, warp, cluster, seed=seed) for measure in (pose_errors, own_pose_errors))
    return Scores(table, across, own, sharpness(posed.digits, posed.jitters, warp, seed=seed), int(apart.sum()))


def posed_digits(
    n: int, seed: int, digit: int | None, *, grey: bool = False, split: str = "held_out", source: str = "mnist5k"
) -> Posed:
    """n digits of a split, each in another place; of all digits, the ten take turns.

    More are the same and others besides. Raises ValueError for a digit or split there is not.
    """
    order = _by_turns(Digits32(split, digit, source, copies=1).labels)
    items = Digits32(split, digit, source, copies=-(-n // len(order)), seed=seed)
    row = torch.arange(n)
    jitters = items.jitters(row - row % len(order) + order[row % len(order)])
    digits = items.digits[jitters.digit]
    drawn = render(digits, white_on_black(jitters) if grey else jitters)
    return Posed(drawn, jitters, digits)


def _by_turns(labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Rows in an order in which classes alternate: the data set has all its zeros first, and a part of it would be zeros."""
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        here = labels == label
        rank[here] = torch.arange(int(here.sum()))
    return (rank * (labels.max() + 1) + labels).argsort()


def baselines(config: PckConfig) -> dict[str, Method]:
    """What a learned alignment must beat. Congealing is fitted to training images of the same kind."""
    training = posed_digits(
        FITTED, config.seed, config.digit, grey=config.grey, split="train", source=config.data
    ).images
    congealing = Congealing.fit(training)
    return {
        "none": lambda images: Aligned.together(Warp.identity(len(images))),
        "moments": lambda images: Aligned.together(moments(images)),
        "moments, upright": lambda images: Aligned.together(moments(images, resolve="upright")),
        "Congealing": lambda images: Aligned.together(congealing.align(images)),
    }


def evaluate(config: PckConfig) -> dict[str, Any]:
    """Score and write pck.json. Raises ValueError or OSError for what is no aligner."""
    methods: dict[str, Method] = {}
    options: dict[str, Any] = {}
    if config.aligner is not None:
        aligner, options = open_aligner(config.aligner, config.device, config.iterations, config.flips)

        def ours(images: Images) -> Aligned:
            found = aligner.align(from_uint8(images), **options)
            return Aligned(found.warp, found.cluster)

        methods["GANgealing"] = ours
    if config.baselines == "all":
        methods = baselines(config) | methods
    several = pairs(
        config.pairs, config.seed, config.digit, elastic_px=config.elastic_px, grey=config.grey, source=config.data
    )
    posed = posed_digits(config.images, config.seed + 1, config.digit, grey=config.grey, source=config.data)
    found = {name: score(method, several, posed, config.seed) for name, method in methods.items()}
    for name, scores in found.items():
        echo(f"{name}: {summary(scores)}" + f", {scores.pairs_apart} pairs apart" * (scores.pairs_apart > 0))
    result = {name: as_dict(scores) for name, scores in found.items()}
    settings = {**asdict(config), **options, "out": str(config.out), "aligner": str(config.aligner)}
    write_json(config.out / "pck.json", {"config": settings, "scores": result})
    echo(f"scores: {config.out / 'pck.json'}")
    return {"scores": result, "file": str(config.out / "pck.json")}


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
