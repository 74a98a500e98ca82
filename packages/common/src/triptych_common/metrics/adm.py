"""The ADM evaluation suite: FID, sFID, Inception score, precision and recall.  [Dhariwal & Nichol 2021]

Samples are scored against a reference, as the suite's `evaluator.py REFERENCE SAMPLES` does in TensorFlow:

- FID and sFID: Fréchet distances between Inception's pool_3 and between its spatial features. Statistics in a file
  (mu, sigma, mu_s, sigma_s) take precedence over those of its images.
- Inception score: the mean of exp(mean KL(p(y|x) | p(y))) over consecutive splits of 5,000 samples.
- Precision and recall: pool_3 of the files' images, with k = 3. The suite rounds distances to half precision, whose ties
  widen the balls a little: its scores exceed the exact ones computed here by about 0.001 and 0.003.

Published scores use 50,000 samples and a reference with 10,000 images and the statistics of the whole training set.
Check value: admnet_guided_upsampled_imagenet256.npz against VIRTUAL_imagenet256_labeled.npz gives
IS 215.84, FID 3.943, sFID 6.140, precision 0.8265, recall 0.5309. No test runs it, as both files need downloading.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from triptych_common.metrics.bootstrap import Estimate, bootstrap, bootstrap_rate
from triptych_common.metrics.distances import Gaussian, fit_gaussian, frechet_influence, gaussian_frechet
from triptych_common.metrics.inception import POOL_DIM, SPATIAL_DIM, Inception
from triptych_common.metrics.neighbours import precision_recall
from triptych_common.metrics.npz import Images

SPLIT_SIZE = 5000
NEIGHBOURS = 3
FEW = 10_000


@dataclass(frozen=True)
class FeatureSet:
    """One kind of features of a set of images: the vectors, and statistics if the set's file holds them."""

    vectors: Float[Tensor, "n dim"] | None
    statistics: Gaussian | None = None

    @property
    def count(self) -> int:
        """Number of images, 0 if there are statistics only."""
        return 0 if self.vectors is None else len(self.vectors)

    def gaussian(self, device: torch.device) -> Gaussian | None:
        """The set's statistics, else a Gaussian fitted to its vectors; None if it has neither."""
        if self.statistics is not None:
            return Gaussian(*(x.to(device) for x in self.statistics))
        return None if self.vectors is None else fit_gaussian(self.vectors, device=device)


@dataclass(frozen=True)
class ImageFeatures:
    """The features of a set of images: pool for FID, spatial for sFID."""

    pool: FeatureSet
    spatial: FeatureSet


@dataclass(frozen=True)
class AdmScores:
    """The suite's scores, the reason why each that is None is `unavailable`, and `notes` for interpreting them."""

    fid: Estimate | None
    sfid: Estimate | None
    inception_score: Estimate | None
    precision: Estimate | None
    recall: Estimate | None
    unavailable: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def estimates(self) -> dict[str, Estimate | None]:
        """The scores by name."""
        return {name: value for name, value in vars(self).items() if name not in ("unavailable", "notes")}


def image_features(
    source: Images, inception: Inception, *, batch_size: int = 64, progress: Callable[[int], None] = lambda n: None
) -> ImageFeatures:
    """Features of every image in a file, on the CPU: 16 KB per image.

    progress: called with the number of images of each finished batch.
    Raises ValueError for a damaged file, or features that are not finite.
    """
    if not source.count:
        return ImageFeatures(FeatureSet(None, source.pool), FeatureSet(None, source.spatial))
    pool, spatial = torch.empty(source.count, POOL_DIM), torch.empty(source.count, SPATIAL_DIM)
    device, done = next(inception.network.parameters()).device, 0
    for images in source.batches(batch_size):
        rows = slice(done, done + len(images))
        pool[rows], spatial[rows] = inception(images.to(device))
        if not bool(torch.isfinite(pool[rows]).all() and torch.isfinite(spatial[rows]).all()):
            raise ValueError(
                f"{source.path}: features of images {done}..{rows.stop - 1} hold NaN or infinity; check the weights"
            )
        done = rows.stop
        progress(len(images))
    return ImageFeatures(FeatureSet(pool, source.pool), FeatureSet(spatial, source.spatial))


def adm_scores(
    reference: ImageFeatures, samples: ImageFeatures, probabilities: Float[Tensor, "n classes"] | None, *,
    device: torch.device | str = "cpu", repeats: int = 100, seed: int = 0,
) -> AdmScores:  # fmt: skip
    """Every score that the two sets permit.

    probabilities: of the samples' classes, for the Inception score. device: on which distances and covariances are computed.
    repeats: of the bootstrap for 95% intervals, 0 for none. The intervals cover resampled samples with the reference fixed
        (for recall, resampled reference images with the samples fixed). Those of Fréchet distances resample first-order
        influences, see `frechet_influence`; samples that come with statistics have none.

    Raises ValueError for too few images, or features that are not finite.
    """
    device = torch.device("cpu" if torch.device(device).type == "mps" else device)  # MPS has no float64
    scores: dict[str, Estimate | None] = {}
    unavailable: dict[str, str] = {}
    for name, kind, names in (("fid", "pool", "mu and sigma"), ("sfid", "spatial", "mu_s and sigma_s")):
        real, fake = getattr(reference, kind), getattr(samples, kind)
        scores[name] = _frechet(real, fake, device, repeats, seed)
        if scores[name] is None:
            whose = "the reference holds" if real.vectors is None and real.statistics is None else "the samples hold"
            unavailable[name] = f"{whose} neither images nor {names}"

    inception = precision = recall = None
    if probabilities is None:
        unavailable["inception_score"] = "the samples hold no images"
    else:
        inception = inception_score(probabilities, repeats=repeats, seed=seed)

    real, fake = reference.pool.vectors, samples.pool.vectors
    if real is None or fake is None:
        missing = f"the {'reference holds' if real is None else 'samples hold'} no images"
        unavailable |= {"precision": missing, "recall": missing}
    else:
        hits = precision_recall(real.to(device), fake.to(device), k=NEIGHBOURS)
        precision, recall = (bootstrap_rate(x.cpu(), repeats=repeats, seed=seed) for x in hits)
    return AdmScores(
        scores["fid"], scores["sfid"], inception, precision, recall, unavailable, _notes(reference, samples)
    )


def inception_score(
    probabilities: Float[Tensor, "n classes"], *, split_size: int = SPLIT_SIZE, repeats: int = 0, seed: int = 0
) -> Estimate:
    """Inception score: mean over consecutive splits of exp(mean KL(p(y|x) | p(y))).  [Salimans et al. 2016]

    The last split may be shorter. Order matters: p(y) is computed per split, so samples sorted by class score too low.
    """
    parts = probabilities.split(4096)
    negative_entropy = torch.cat([torch.special.xlogy(p, p).sum(1) for p in (part.double() for part in parts)])

    def score(rows: Tensor) -> float:
        scores = []
        for split in rows.split(split_size):
            marginal = probabilities[split].mean(0, dtype=torch.float64)
            scores.append((negative_entropy[split].mean() - torch.special.xlogy(marginal, marginal).sum()).exp())
        return float(torch.stack(scores).mean())

    estimate = bootstrap(score, torch.arange(len(probabilities)), repeats=repeats, seed=seed)
    return estimate if estimate.low is None else estimate._replace(low=max(estimate.low, 1.0))


def _frechet(
    reference: FeatureSet, samples: FeatureSet, device: torch.device, repeats: int, seed: int
) -> Estimate | None:
    target, fitted = reference.gaussian(device), samples.gaussian(device)
    if target is None or fitted is None:
        return None
    if repeats == 0 or samples.vectors is None or samples.statistics is not None:
        return Estimate(gaussian_frechet(target, fitted))
    value, influence = frechet_influence(samples.vectors, fitted, target)
    mean, low, high = bootstrap(lambda rows: float(rows.mean()), influence, repeats=repeats, seed=seed)
    assert low is not None, "repeats give an interval"
    assert high is not None
    return Estimate(value, max(value + low - mean, 0.0), value + high - mean)


def _notes(reference: ImageFeatures, samples: ImageFeatures) -> tuple[str, ...]:
    notes = []
    named = {"reference images": reference, "samples": samples}
    few = [f"{x.pool.count:,} {name}" for name, x in named.items() if x.pool.statistics is None and x.pool.count < FEW]
    if few:
        notes.append(f"{' and '.join(few)}: below {FEW:,}, so FID and sFID are inflated; compare at equal counts only")
    for name, x in named.items():
        given = [title for title, kind in (("FID", x.pool), ("sFID", x.spatial)) if kind.statistics is not None]
        if x.pool.count and given:
            notes.append(f"{' and '.join(given)}: by the statistics that came with the {x.pool.count:,} {name}")
    if (rest := samples.pool.count % SPLIT_SIZE) and samples.pool.count > SPLIT_SIZE:
        samples_of = f"{rest:,} of {samples.pool.count:,} samples"
        notes.append(f"Inception score: the last split of {SPLIT_SIZE:,} holds {samples_of}")
    return tuple(notes)
