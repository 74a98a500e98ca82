"""Five metrics of a set of digits, each with bootstrap replicates that pair with those of other sets.

Replicates resample samples and real digits both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from triptych_common import data, randomness
from triptych_common.images import from_uint8
from triptych_common.metrics import coverage, fit_gaussian, frechet_influence, inception_score, precision_recall
from triptych_common.metrics.digits import NEIGHBOURS, DigitScorer
from triptych_common.storage.files import read_json, write_json
from triptych_dit.sample import read_npz
from typing_extensions import TypedDict

from triptych_thesis.chapter2.comparisons import Score
from triptych_thesis.chapter2.digits import without_margin

_DIVERGENCE = "exp of the mean KL divergence from all samples' classes to one's"
METRICS = {  # of the thesis, and what stands for each here
    "frechet": ("FID", "Fréchet distance in 64 features of the frozen digit network"),
    "spatial_frechet": ("sFID", "Fréchet distance of that network's last 4x4 maps, first 7 of 64 channels"),
    "digit_score": ("IS", f"{_DIVERGENCE}, by the frozen classifier (1 to 10)"),
    "precision": ("precision", "samples within the k = 3 manifold of real digits, in the same 64 features"),
    "recall": ("recall", "real digits within the k = 3 manifold of samples"),
}
VERSION = 2  # of how replicates are made
RATES = ("precision", "recall", "accuracy")
SPATIAL_CHANNELS = 7  # as sFID
_SPATIAL_LAYERS = 12  # of the feature network, before its maps are flattened


@dataclass(frozen=True)
class Features:
    """What the instruments see of a set of digits."""

    pool: Float[Tensor, "n dim"]
    spatial: Float[Tensor, "n spatial"]
    probabilities: Float[Tensor, "n classes"]


@dataclass(frozen=True)
class StudyScorer:
    """Scores files of samples, 32 x 32 with a margin, against held-out digits of a named data set."""

    dataset: str
    seed: int
    repeats: int  # bootstrap resamples; each follows from (seed, repeat) and the counts alone

    @property
    def digits(self) -> DigitScorer:
        return _digits(self.dataset, self.seed)

    def features(self, images: UInt8[Tensor, "n 1 28 28"]) -> Features:
        layers: Any = self.digits.features.network
        with torch.inference_mode():
            maps = torch.cat([layers[:_SPATIAL_LAYERS](from_uint8(part)) for part in images.split(256)])
            pool = torch.cat([layers[_SPATIAL_LAYERS:](part) for part in maps.split(256)])
            spatial = maps[:, :SPATIAL_CHANNELS].flatten(1)
            return Features(pool, spatial, self.digits.classifier(images).softmax(1))

    def __call__(self, samples: Path) -> dict[str, Any]:
        """Scores of a samples file, JSON-able: {"n", "accuracy", and each of METRICS: {"value", "replicates"}}; saved beside it."""
        settings = {"version": VERSION, "dataset": self.dataset, "seed": self.seed, "repeats": self.repeats,
                    "metrics": [*METRICS, "accuracy"]}  # fmt: skip

        def scores() -> dict[str, Any]:
            images, labels = read_npz(samples)
            if labels is None:
                raise ValueError(f"{samples}: holds no labels, expected samples of classes of digits")
            return self.score(without_margin(images), labels)

        return saved_scores(samples, settings, scores)

    def score(self, images: UInt8[Tensor, "n 1 28 28"], labels: Int[Tensor, " n"]) -> dict[str, Any]:
        """Every metric of labelled digits with its replicates, as `__call__` returns them."""
        # All held-out digits, whatever the number of samples: sets of one size compare, and no others.
        ours, real = self.features(images), _reference(self)
        n = len(ours.pool)
        rows, real_rows = self._rows(n, len(real.pool))
        precise, recalled = precision_recall(real.pool, ours.pool, k=NEIGHBOURS)
        correct = (ours.probabilities.argmax(1) == labels).float()
        scored = {
            "frechet": _frechet(ours.pool, real.pool, rows, real_rows),
            "spatial_frechet": _frechet(ours.spatial, real.spatial, rows, real_rows),
            "digit_score": (_digit_score(ours.probabilities), [_digit_score(ours.probabilities[r]) for r in rows]),
            "precision": (float(precise.mean()), _shares(ours.pool, real.pool, rows, real_rows)),
            "recall": (float(recalled.mean()), _shares(real.pool, ours.pool, real_rows, rows)),
            "accuracy": (float(correct.mean()), correct[rows].mean(1).tolist()),
        }
        # Eight digits of a replicate are more than float32 holds, and keep the file small.
        return {"n": n} | {
            name: {"value": value, "replicates": [float(f"{one:.8g}") for one in replicates]}
            | ({"trials": n} if name in RATES else {})
            for name, (value, replicates) in scored.items()
        }

    def _rows(self, n: int, m: int) -> tuple[Int[Tensor, "repeats n"], Int[Tensor, "repeats m"]]:
        """Of every resample, numbers of samples and of real digits."""
        drawn = [randomness.generator(self.seed, "study/bootstrap", repeat) for repeat in range(self.repeats)]
        pairs = [(torch.randint(n, (n,), generator=g), torch.randint(m, (m,), generator=g)) for g in drawn]
        return torch.stack([rows for rows, _ in pairs]), torch.stack([real for _, real in pairs])


def _frechet(
    features: Float[Tensor, "n dim"],
    real: Float[Tensor, "m dim"],
    rows: Int[Tensor, "repeats n"],
    real_rows: Int[Tensor, "repeats m"],
) -> tuple[float, list[float]]:
    """Distance and replicates.

    Replicates are of first order, by the vectors' influences: resampled sets hold duplicates, which deflate covariances, so that
    distances of them spread up to twice too far.
    """
    ours, theirs = fit_gaussian(features), fit_gaussian(real)
    value, sway = frechet_influence(features, ours, theirs)
    _, real_sway = frechet_influence(real, theirs, ours)
    # Resampling moves the distance by the mean influence of what was drawn, less that of the whole set.
    moved = (sway - sway.mean())[rows].mean(1) + (real_sway - real_sway.mean())[real_rows].mean(1)
    return value, (value + moved).tolist()


def _digit_score(probabilities: Float[Tensor, "n classes"]) -> float:
    return inception_score(probabilities, split_size=len(probabilities)).value


def _shares(
    points: Float[Tensor, "n dim"],
    by: Float[Tensor, "m dim"],
    rows: Int[Tensor, "repeats n"],
    by_rows: Int[Tensor, "repeats m"],
) -> list[float]:
    """Replicates of the share of points in the manifold of `by`, which keeps its radii and leaves out what was not drawn."""
    drawn = torch.zeros(len(by_rows), len(by)).scatter_(1, by_rows, 1.0)  # repeats m: 1 where `by` was drawn
    covered = coverage(points, by, k=NEIGHBOURS).float() @ drawn.T > 0  # n repeats
    return covered.float().gather(0, rows.T).mean(0).tolist()


# Instruments and what they see of real digits are loaded once a process, for all equal scorers.
@lru_cache(maxsize=1)
def _digits(dataset: str, seed: int) -> DigitScorer:
    return DigitScorer(data.load(dataset, "train"), data.load(dataset, "held_out"), seed=seed)


@lru_cache(maxsize=1)
def _reference(scorer: StudyScorer) -> Features:
    return scorer.features(scorer.digits.held_out.images)


def score_of(scores: dict[str, Any], metric: str) -> Score:
    """One metric of a scorer's result."""
    score = scores[metric]
    return Score(score["value"], tuple(score["replicates"]), score.get("deviation", 0.0), score.get("trials", 0))


class _Saved(TypedDict):
    asked: dict[str, Any]
    scores: dict[str, Any]


def saved_scores(samples: Path, settings: dict[str, Any], score: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The scores beside a samples file, made where they are missing or of other settings. ValueError for a damaged file."""
    path = samples.with_name("scores.json")
    if path.exists():
        known = read_json(path, _Saved, remedy="delete it, and it is made again")
        if known["asked"] == settings:
            return known["scores"]
    scores = score()
    write_json(path, {"asked": settings, "scores": scores})  # the settings' name in files of earlier versions
    return scores
