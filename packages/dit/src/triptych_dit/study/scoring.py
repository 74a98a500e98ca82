"""Five metrics of a set of digits, each with bootstrap replicates that pair with those of other sets."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from triptych_common import data, randomness
from triptych_common.images import from_uint8
from triptych_common.metrics import frechet_distance, inception_score, precision_recall
from triptych_common.metrics.digits import NEIGHBOURS, DigitScorer
from triptych_common.run import write_json

from triptych_dit.samples_file import read_npz
from triptych_dit.study.digits import without_margin
from triptych_dit.study.statistics import Score

METRICS = {  # of the thesis, and what stands for each here
    "frechet": ("FID", "Fréchet distance in 64 features of the frozen digit network"),
    "spatial_frechet": ("sFID", "Fréchet distance of that network's last 4x4 maps, first 7 of 64 channels"),
    "digit_score": (
        "IS",
        "exp of the mean KL divergence from all samples' classes to one's, by the frozen classifier (1 to 10)",
    ),
    "precision": ("precision", "samples within the k = 3 manifold of real digits, in the same 64 features"),
    "recall": ("recall", "real digits within the k = 3 manifold of samples"),
}
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
    """Scores files of samples, 32 x 32 with a margin, against held-out digits of a named data set.

    repeats: bootstrap resamples; each draws sample numbers and real digits that follow from (seed, repeat) and the counts alone.
    Instruments and what they see of real digits are loaded once a process, for all equal scorers.
    """

    dataset: str
    seed: int
    repeats: int

    @property
    def digits(self) -> DigitScorer:
        return _digits(self.dataset, self.seed)

    @property
    def reference(self) -> Features:
        """Of all held-out digits, whatever the number of samples: sets of one size compare, and no others."""
        return _reference(self)

    def features(self, images: UInt8[Tensor, "n 1 28 28"]) -> Features:
        layers = self.digits.features.network
        with torch.inference_mode():
            maps = torch.cat([layers[:_SPATIAL_LAYERS](from_uint8(part)) for part in images.split(256)])
            pool = torch.cat([layers[_SPATIAL_LAYERS:](part) for part in maps.split(256)])
            spatial = maps[:, :SPATIAL_CHANNELS].flatten(1)
            return Features(pool, spatial, self.digits.classifier(images).softmax(1))

    def __call__(self, samples: Path) -> dict[str, Any]:
        """Scores of a samples file, JSON-able: {"n", "accuracy", and each of METRICS: {"value", "replicates"}}; kept beside it.

        Raises what reading the file raises.
        """
        kept = samples.with_name("scores.json")
        asked = {"dataset": self.dataset, "seed": self.seed, "repeats": self.repeats, "metrics": [*METRICS, "accuracy"]}
        if kept.exists() and (known := json.loads(kept.read_text()))["asked"] == asked:
            return known["scores"]
        images, labels = read_npz(samples)
        scores = self.score(without_margin(images), labels)
        write_json(kept, {"asked": asked, "scores": scores})
        return scores

    def score(self, images: UInt8[Tensor, "n 1 28 28"], labels: Int[Tensor, " n"]) -> dict[str, Any]:
        found, real = self.features(images), self.reference
        precise, recalled = precision_recall(real.pool, found.pool, k=NEIGHBOURS)
        correct = (found.probabilities.argmax(1) == labels).float()

        def metrics(rows: Tensor, real_rows: Tensor) -> dict[str, float]:
            return {
                "frechet": frechet_distance(found.pool[rows], real.pool[real_rows]),
                "spatial_frechet": frechet_distance(found.spatial[rows], real.spatial[real_rows]),
                "digit_score": inception_score(found.probabilities[rows], split_size=len(rows)).value,
                "precision": float(precise[rows].mean()),
                "recall": float(recalled[real_rows].mean()),
                "accuracy": float(correct[rows].mean()),
            }

        n, m = len(found.pool), len(real.pool)
        values = metrics(torch.arange(n), torch.arange(m))
        resampled = [metrics(*self._rows(repeat, n, m)) for repeat in range(self.repeats)]
        return {"n": n} | {
            name: {"value": value, "replicates": [float(f"{one[name]:.8g}") for one in resampled]}
            for name, value in values.items()
        }

    def _rows(self, repeat: int, n: int, m: int) -> tuple[Tensor, Tensor]:
        drawn = randomness.generator(self.seed, "study/bootstrap", repeat)
        return torch.randint(n, (n,), generator=drawn), torch.randint(m, (m,), generator=drawn)


@lru_cache(maxsize=1)
def _digits(dataset: str, seed: int) -> DigitScorer:
    return DigitScorer(data.load(dataset, "train"), data.load(dataset, "held_out"), seed=seed)


@lru_cache(maxsize=1)
def _reference(scorer: StudyScorer) -> Features:
    return scorer.features(scorer.digits.held_out.images)


def score_of(scores: dict[str, Any], metric: str) -> Score:
    """One metric of what a scorer gave."""
    found = scores[metric]
    return Score(found["value"], tuple(found["replicates"]), found.get("deviation", 0.0))
