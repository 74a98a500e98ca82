"""PCK of an aligner on pairs of images whose correspondences are known, beside baselines: `triptych-gangealing pck`."""

from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from triptych_common.cli import echo
from triptych_common.storage.files import write_json

from triptych_gangealing.aligner import open_aligner
from triptych_gangealing.baselines.methods import OURS, Method, baselines, learned
from triptych_gangealing.correspondence import between
from triptych_gangealing.keypoints.pck import BOX, IMAGE, PER_POINT, PckTable, box_size, pck
from triptych_gangealing.keypoints.synthetic import Pairs, pairs, posed_digits
from triptych_gangealing.settings import DigitPairsConfig, PckConfig

DIGITS = ("mnist5k", "mnist")
PAIRS = 300  # of digits
FITTED = 400  # training images that classical Congealing is fitted to


class PairScores(NamedTuple):
    """Scores of one method on pairs."""

    pck: PckTable
    pairs_apart: int  # whose images fell into different clusters: their points are misses


def score_pairs(method: Method, several: Pairs, *, seed: int = 0) -> PairScores:
    """PCK of points that a method transfers from source to target images, in every variant.  [thesis 4.4.2]

    method: uint8 images to their `Alignment`. Points of a pair in two clusters cannot be transferred, and count as misses.
    """
    source, target = method(several.source), method(several.target)
    size = (several.source.shape[-1],) * 2
    predicted = between(source.warp, target.warp, several.source_points, size, size).points
    apart = source.cluster != target.cluster
    predicted = predicted.masked_fill(apart[:, None, None], torch.nan)
    sizes = {BOX: box_size(several.target_boxes), IMAGE: torch.full((len(several),), float(size[0]))}
    digits = several.source_jitters.digit  # pairs of one digit are not independent
    table = pck(predicted, several.target_points, several.valid, sizes, seed=seed, groups=digits)
    return PairScores(table, int(apart.sum()))


def methods_of(config: DigitPairsConfig) -> tuple[dict[str, Method], dict[str, Any]]:
    """The methods to score, by name, and the options with which the aligner looks at images.

    Raises ValueError or OSError for a file that is no aligner.
    """
    methods: dict[str, Method] = {}
    options: dict[str, Any] = {}
    if config.aligner is not None:
        aligner, options = open_aligner(config.aligner, config.device, config.iterations, config.flips)
        methods[OURS] = learned(aligner, **options)
    if config.baselines == "all":
        training = posed_digits(FITTED, config.seed, config.digit, grey=config.grey, split="train", source=config.data)
        methods = baselines(training.images) | methods
    return methods, options


def pairs_of(config: DigitPairsConfig) -> Pairs:
    """The pairs to score on."""
    return pairs(
        config.pairs or PAIRS,
        config.seed,
        config.digit,
        elastic_px=config.elastic_px,
        grey=config.grey,
        source=config.data,
    )


def write_scores(config: DigitPairsConfig, options: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """Write scores and settings to pck.json; returns what the command reports."""
    file = config.out / "pck.json"
    settings = {**asdict(config), **options, "out": str(config.out), "aligner": str(config.aligner)}
    write_json(file, {"config": settings, "scores": scores})
    echo(f"scores: {file}")
    return {"scores": scores, "file": str(file)}


def evaluate(config: PckConfig) -> dict[str, Any]:
    """Score every method and write pck.json. Raises ValueError or OSError for a file that is no aligner."""
    if config.data not in DIGITS:
        from triptych_gangealing.keypoints.benchmarked import evaluate_benchmark  # readers of many layouts

        return evaluate_benchmark(config)
    methods, options = methods_of(config)
    several, scores = pairs_of(config), {}
    for name, method in methods.items():
        table, apart = score_pairs(method, several, seed=config.seed)
        echo(f"{name}: PCK@0.1 {table[BOX, PER_POINT, 0.1]}" + f", {apart} pairs apart" * (apart > 0))
        scores[name] = {"pck": table.as_dict(), "pairs apart": apart}
    return write_scores(config, options, scores)
