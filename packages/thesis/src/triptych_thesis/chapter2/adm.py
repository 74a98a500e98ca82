"""The study's scorer for photographs: the ADM suite in place of the frozen digit instruments, behind the same call."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from triptych_common.metrics import Estimate, Inception, NpzImages, adm_scores, image_features, load_inception
from triptych_common.metrics.adm import ImageFeatures
from triptych_common.parallel import process_group
from triptych_common.storage.atomic import write_json

from triptych_thesis.chapter2.scoring import read_scores

NAMES = {"frechet": "fid", "spatial_frechet": "sfid", "digit_score": "inception_score"}  # the others have one name


@dataclass(frozen=True)
class _Loaded:
    inception: Inception
    reference: ImageFeatures


class AdmScorer:
    """Scores files of samples against an ADM reference file; intervals by the suite's own bootstrap, not paired.

    Precision and recall take the reference's images: 10,000 of the published file at 256 x 256, 1,000 at 512 x 512.
    """

    def __init__(self, reference: Path, device: str, seed: int, repeats: int) -> None:
        self.path, self.device, self.seed, self.repeats = reference, device, seed, repeats

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the reference file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def _loaded(self) -> _Loaded:
        with process_group(self.device) as ranks:
            inception = load_inception(None, device=ranks.device)
        return _Loaded(inception, image_features(NpzImages(self.path), inception))

    def __call__(self, samples: Path) -> dict[str, Any]:
        """As `StudyScorer`, {"n", metric: {"value", "replicates": [], "deviation"}}; kept beside the samples.

        Raises OSError for no reference or no Inception weights, ValueError for files that cannot be scored.
        """
        kept = samples.with_name("scores.json")
        asked = {"reference": self.digest, "seed": self.seed, "repeats": self.repeats}
        if kept.exists() and (known := read_scores(kept))["asked"] == asked:
            return known["scores"]
        inception, source = self._loaded.inception, NpzImages(samples)
        found = image_features(source, inception)
        assert found.pool.vectors is not None  # features of images, not of a file's statistics
        probabilities = inception.probabilities(found.pool.vectors)
        suite = adm_scores(
            self._loaded.reference, found, probabilities, device=self.device_of(inception), repeats=self.repeats,
            seed=self.seed,
        ).estimates()  # fmt: skip
        scores: dict[str, Any] = {"n": source.count}
        for name in ("frechet", "spatial_frechet", "digit_score", "precision", "recall"):
            scores[name] = _as_score(self.path, NAMES.get(name, name), suite[NAMES.get(name, name)])
        write_json(kept, {"asked": asked, "scores": scores})
        return scores

    @staticmethod
    def device_of(inception: Inception) -> Any:
        return next(inception.network.parameters()).device


def _as_score(reference: Path, name: str, estimate: Estimate | None) -> dict[str, Any]:
    if estimate is None:
        raise ValueError(
            f"{reference}: holds neither images nor statistics enough for {name}; use the ADM reference file"
        )
    deviation = 0.0 if estimate.high is None else (estimate.high - estimate.value) / 1.96
    return {"value": estimate.value, "replicates": [], "deviation": deviation}
