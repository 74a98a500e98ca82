"""How well clusters found without labels agree with the true digits, beside k-means on aligned pixels."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate, bootstrap

from triptych_gangealing.baselines import ink, moments
from triptych_gangealing.clustering import purity
from triptych_gangealing.evaluate import Posed
from triptych_gangealing.warp import Warp

RESTARTS = 10


@dataclass(frozen=True)
class ClusterScores:
    """Purity and normalised mutual information with the labels, 95% intervals over images; the largest cluster's share."""

    n: int
    purity: Estimate
    nmi: Estimate
    largest: float

    def as_dict(self) -> dict[str, Any]:
        return {"n": self.n, "purity": self.purity._asdict(), "nmi": self.nmi._asdict(), "largest": self.largest}


def cluster_scores(
    clusters: Int[Tensor, " n"], labels: Int[Tensor, " n"], *, repeats: int = 100, seed: int = 0
) -> ClusterScores:
    """Of an assignment. One cluster for each image would be pure: compare equal numbers of clusters only."""
    from sklearn.metrics import normalized_mutual_info_score

    both = torch.stack([clusters, labels], dim=1)

    def mutual(rows: Int[Tensor, "n 2"]) -> float:
        return float(normalized_mutual_info_score(rows[:, 1].numpy(), rows[:, 0].numpy()))

    return ClusterScores(
        len(labels),
        bootstrap(lambda rows: purity(rows[:, 0], rows[:, 1]), both, repeats=repeats, seed=seed),
        bootstrap(mutual, both, repeats=repeats, seed=seed),
        float(torch.bincount(clusters).max() / len(clusters)),
    )


def kmeans_clusters(training: Posed, held_out: Posed, clusters: int, seed: int = 0) -> Int[Tensor, " n"]:
    """Clusters of held-out images by k-means on the ink of training images, all brought upright by their moments."""
    from sklearn.cluster import KMeans

    model = KMeans(clusters, n_init=RESTARTS, random_state=seed).fit(_pixels(training).numpy())
    return torch.from_numpy(model.predict(_pixels(held_out).numpy())).long()


def _pixels(posed: Posed) -> Float[Tensor, "n pixels"]:
    warp: Warp = moments(posed.images, resolve="upright")
    return warp.sample(ink(posed.images), padding="zeros").flatten(1)
