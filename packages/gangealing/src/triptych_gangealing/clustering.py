"""Several modes at once: where they start, and the classifier that tells real images' clusters.  [thesis 4.3.2]"""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from triptych_common import checkpoint, randomness
from triptych_common.parallel import Ranks
from triptych_common.progress import Progress
from triptych_common.run import RunDirectory
from triptych_common.training import TrainState, steps

from triptych_gangealing.latents import Directions, Mode
from triptych_gangealing.objective import Objective
from triptych_gangealing.perceptual import Features
from triptych_gangealing.spatial_transformer import ClusterClassifier, SpatialTransformer, reduced

AT_ONCE = 256


@torch.no_grad()
def starting_modes(objective: Objective, directions: Directions) -> Float[Tensor, "modes N"]:
    """Coefficients of the modes to start from: one at the mean; several by k-means++ over images of styles drawn.

    The first is drawn evenly, each other with a probability in proportion to its distance from the nearest so far. Perceptual
    distances are sums of squares, so they stand for the squares of k-means++.  [Arthur and Vassilvitskii 2007]
    """
    config, count = objective.config, len(directions.components)
    if config.clusters == 1:
        return torch.zeros(1, count)
    draws = randomness.uniform(config.seed, "k-means++", range(config.clusters)).double()
    n = config.init_images
    chosen, nearest = [], torch.ones(n, dtype=torch.float64)
    for draw in draws:
        share = nearest.cumsum(0) / nearest.sum()
        item = int(torch.searchsorted(share, draw.clamp(max=1 - 1e-12), right=True).clamp(max=n - 1))
        chosen.append(item)
        centre = _features(objective, range(item, item + 1))
        found = [_distance(objective, range(i, min(i + AT_ONCE, n)), centre).cpu() for i in range(0, n, AT_ONCE)]
        distance = torch.cat(found).double()
        nearest = distance if len(chosen) == 1 else torch.minimum(nearest, distance)
        nearest[chosen] = 0.0
    w = torch.cat([objective.samples(range(item, item + 1), "k-means++")[0] for item in chosen])
    return directions.coefficients(w.cpu().float())


def _features(objective: Objective, items: range) -> Features:
    images = objective.samples(items, "k-means++")[1]
    return objective.distance.features(reduced(images, objective.config.input_size))


def _distance(objective: Objective, items: range, centre: Features) -> Float[Tensor, " items"]:
    found = _features(objective, items)
    repeated = tuple(there.expand_as(here) for here, there in zip(found, centre, strict=True))
    return objective.distance.between(found, repeated)


def train_classifier(
    objective: Objective, transformer: SpatialTransformer, mode: Mode, out: Path, among: Ranks
) -> ClusterClassifier:
    """A classifier of the clusters that generated images are nearest to, from a copy of the transformer's trunk.

    It goes on where the run in `out` was interrupted. Raises ValueError for a transformer without a similarity network.
    """
    config = objective.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.generator(config.seed, "classifier/init").initial_seed())
        classifier = ClusterClassifier.from_transformer(transformer)
    state = TrainState(
        classifier,
        torch.optim.Adam(classifier.parameters(), lr=config.lr, betas=(0.9, 0.999), fused=True),
        among,
        ema_half_life=config.ema_half_life_images,
        several_passes=True,
    )
    identity = config.identity() | {
        "transformer": checkpoint.digest(transformer.state_dict()),
        "mode": checkpoint.digest(mode.state_dict()),
    }
    with RunDirectory(out, identity, is_main=among.is_main) as run:
        plan = steps(
            state, run, total_samples=config.classifier_images, batch_size=config.batch_size,
            checkpoint_every=config.checkpoint_every, log_every=config.log_every,
        )  # fmt: skip
        with Progress("training the classifier", config.classifier_images, "img", enabled=among.is_main) as progress:
            for batch in plan:
                w, images = objective.samples(batch.counters, "classifier")
                choice = objective.choose(transformer, mode, w, images, 0.0, batch.counters, "classifier")
                logits = classifier(images)
                loss = F.cross_entropy(logits, choice.cluster)
                loss.backward()
                _, finite = state.optimise()
                right = (logits.argmax(1) == choice.cluster).to(loss.dtype).mean()
                state.count(batch, {"loss": loss, "accuracy": right}, finite)
                progress.at(state.samples_seen)
    return state.ema


def purity(clusters: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Share of items that belong to the commonest label of their cluster."""
    counts = torch.zeros(int(clusters.max()) + 1, int(labels.max()) + 1, dtype=torch.long)
    counts.index_put_((clusters, labels), torch.ones_like(labels), accumulate=True)
    return float(counts.amax(1).sum() / len(labels))
