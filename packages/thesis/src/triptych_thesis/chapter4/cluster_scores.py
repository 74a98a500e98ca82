"""How well clusters found without labels agree with the true digits, beside k-means on pixels; `triptych score-clusters`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from triptych_common.cli import echo
from triptych_common.images import from_uint8
from triptych_common.metrics.bootstrap import Estimate, bootstrap
from triptych_common.storage.files import write_json
from triptych_gangealing.aligner import Aligner, open_aligner
from triptych_gangealing.baselines.moments import ink, moments
from triptych_gangealing.clustering import purity
from triptych_gangealing.encoders.descriptor import Groups
from triptych_gangealing.keypoints.synthetic import Posed, posed_digits
from triptych_gangealing.settings import Data
from triptych_gangealing.warp import Warp

from triptych_thesis.chapter4.options import ClustersConfig

CLUSTERS = "GANgealing's clusters: k-means on a contrastive descriptor"  # the alignment itself has no part in them
K_MEANS = "k-means, moments-aligned pixels"
RESTARTS = 10
TRAINING = 4  # times as many digits for k-means on pixels to learn from


@dataclass(frozen=True)
class ClusterScores:
    """Scores of one assignment of n images to clusters; 95% intervals resample digits."""

    n: int
    purity: Estimate  # share of images whose label is the most frequent one of their cluster
    nmi: Estimate  # normalised mutual information of clusters and labels
    largest: float  # the largest cluster's share of the images

    def as_dict(self) -> dict[str, Any]:
        """The scores as JSON holds them."""
        return {**vars(self), "purity": self.purity._asdict(), "nmi": self.nmi._asdict()}


def cluster_scores(
    clusters: Int[Tensor, " n"],
    labels: Int[Tensor, " n"],
    *,
    repeats: int = 100,
    seed: int = 0,
    groups: Int[Tensor, " n"] | None = None,
) -> ClusterScores:
    """Score an assignment of images to clusters against their labels.

    Compare equal numbers of clusters: one for each image would be pure. groups: images of one object, resampled together.
    """
    from sklearn.metrics import normalized_mutual_info_score

    both = torch.stack([clusters, labels], dim=1)

    def mutual(rows: Int[Tensor, "n 2"]) -> float:
        return float(normalized_mutual_info_score(rows[:, 1].numpy(), rows[:, 0].numpy()))

    def estimate(score: Callable[[Tensor], float]) -> Estimate:
        return bootstrap(score, both, repeats=repeats, seed=seed, groups=groups)

    pure, shared = estimate(lambda rows: purity(rows[:, 0], rows[:, 1])), estimate(mutual)
    return ClusterScores(len(labels), pure, shared, float(torch.bincount(clusters).max() / len(clusters)))


def compare_clusters(aligner: Aligner, images: int, seed: int = 0, source: Data = "mnist5k") -> dict[str, Any]:
    """Scores of an aligner's clusters of held-out digits of all classes, and of as many clusters by k-means on pixels.

    Returns the number of clusters, and scores by method. Raises ValueError for an aligner of one cluster.
    """
    heads = aligner.config.heads
    if heads == 1:
        raise ValueError("clusters: the aligner has one; pass --aligner of a training with --clusters")
    training = posed_digits(TRAINING * images, seed, None, split="train", source=source)
    held_out = posed_digits(images, seed + 1, None, source=source)
    assigned = {
        CLUSTERS if isinstance(aligner.classifier, Groups) else "GANgealing's clusters": _assigned(aligner, held_out),
        K_MEANS: kmeans_clusters(training, held_out, heads, seed),
    }
    jitters = held_out.jitters
    scores = {
        name: cluster_scores(clusters, jitters.label, seed=seed, groups=jitters.digit).as_dict()
        for name, clusters in assigned.items()
    }
    return {"clusters": heads, **scores}


def score_clusters(config: ClustersConfig) -> dict[str, Any]:
    """Score and write clusters.json. Raises ValueError or OSError for a file that is no aligner, or an aligner of one cluster."""
    aligner, _ = open_aligner(config.aligner, config.device)
    scores = compare_clusters(aligner, config.images, config.seed, config.data)
    for name, each in scores.items():
        if isinstance(each, dict):
            echo(f"{name}: purity {Estimate(**each['purity'])}, mutual information {Estimate(**each['nmi'])}")
    file = config.out / "clusters.json"
    settings = {**asdict(config), "out": str(config.out), "aligner": str(config.aligner)}
    write_json(file, {"config": settings, "scores": scores})
    echo(f"scores: {file}")
    return {"scores": scores, "file": str(file)}


@torch.inference_mode()
def _assigned(aligner: Aligner, posed: Posed, at_once: int = 64) -> Int[Tensor, " n"]:
    device = next(aligner.parameters()).device
    return torch.cat([aligner.clusters(from_uint8(part.to(device))).cpu() for part in posed.images.split(at_once)])


def kmeans_clusters(training: Posed, held_out: Posed, clusters: int, seed: int = 0) -> Int[Tensor, " n"]:
    """Clusters of held-out images by k-means on the ink of training images, all brought upright by their moments."""
    from sklearn.cluster import KMeans

    model = KMeans(clusters, n_init=RESTARTS, random_state=seed).fit(_pixels(training).numpy())
    return torch.from_numpy(model.predict(_pixels(held_out).numpy())).long()


def _pixels(posed: Posed) -> Float[Tensor, "n pixels"]:
    warp: Warp = moments(posed.images, resolve="upright")
    return warp.sample(ink(posed.images), padding="zeros").flatten(1)
