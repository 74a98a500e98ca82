"""The study's scorer for photographs: the ADM suite in place of the frozen digit instruments, behind the same call."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from triptych_common.metrics import Estimate, Inception, NpzImages, adm_scores, image_features, load_inception
from triptych_common.metrics.adm import ImageFeatures
from triptych_common.parallel import process_group

from triptych_thesis.chapter2.scoring import METRICS, saved_scores

NAMES = {"frechet": "fid", "spatial_frechet": "sfid", "digit_score": "inception_score"}  # the others have one name


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
    def _loaded(self) -> tuple[Inception, ImageFeatures]:
        """The network, and what it sees of the reference."""
        with process_group(self.device) as ranks:
            inception = load_inception(None, device=ranks.device)
        return inception, image_features(NpzImages(self.path), inception)

    def __call__(self, samples: Path) -> dict[str, Any]:
        """As `StudyScorer`, {"n", metric: {"value", "replicates": [], "deviation"}}; saved beside the samples.

        Raises OSError for no reference or no Inception weights, ValueError for files that cannot be scored.
        """
        settings = {"reference": self.digest, "seed": self.seed, "repeats": self.repeats}
        return saved_scores(samples, settings, lambda: self._scores(NpzImages(samples)))

    def _scores(self, source: NpzImages) -> dict[str, Any]:
        inception, reference = self._loaded
        features = image_features(source, inception)
        assert features.pool.vectors is not None  # of images, not of a file's statistics
        probabilities, device = (
            inception.probabilities(features.pool.vectors),
            next(inception.network.parameters()).device,
        )
        suite = adm_scores(
            reference, features, probabilities, device=device, repeats=self.repeats, seed=self.seed
        ).estimates()  # fmt: skip
        scores = {name: _as_score(self.path, NAMES.get(name, name), suite[NAMES.get(name, name)]) for name in METRICS}
        return {"n": source.count, **scores}


def _as_score(reference: Path, name: str, estimate: Estimate | None) -> dict[str, Any]:
    if estimate is None:
        lacking = f"holds neither images nor statistics enough for {name}"
        raise ValueError(f"{reference}: {lacking}; use the ADM reference file")
    deviation = 0.0 if estimate.high is None else (estimate.high - estimate.value) / 1.96
    return {"value": estimate.value, "replicates": [], "deviation": deviation}
