"""Several modes at once: where they start, the classifier of real images, and the purity of clusters.  [thesis 4.3.2]"""

from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from triptych_common import randomness
from triptych_common.parallel import Ranks
from triptych_common.storage import checkpoint
from triptych_common.training import TrainState, open_run, training_steps

from triptych_gangealing.encoders.perceptual import Features
from triptych_gangealing.modes import Directions, Mode
from triptych_gangealing.objective import Objective
from triptych_gangealing.spatial_transformer import ClusterClassifier, SpatialTransformer, reduced

AT_ONCE = 256
START, STREAM = "start.safetensors", "k-means++"


def start(objective: Objective, directions: Directions, ranks: Ranks, folder: Path) -> dict[str, Tensor]:
    """Where modes start ("origins", "alpha"): computed once in a run, and stored in its folder."""
    path = folder / START
    if ranks.is_main and not checkpoint.is_whole(path):
        checkpoint.write(path, starting_modes(objective, directions), {"kind": "starting modes"})
    ranks.barrier()
    return checkpoint.read(path)[0]


@torch.no_grad()
def starting_modes(objective: Objective, directions: Directions) -> dict[str, Tensor]:
    """Modes to start from: "origins" (modes, w), "alpha" (modes, N).

    A single mode starts at the mean of W; several at the styles that k-means++ chooses, projected onto the points that their
    directions reach from the mean. With `origin` "sample" they start at typical styles.
    """
    config, count = objective.config, len(directions.components)
    zeros = torch.zeros(config.clusters, count)
    mean = directions.mean.repeat(config.clusters, 1)
    if config.clusters == 1 and config.origin == "mean":
        return {"origins": mean, "alpha": zeros}
    typical = config.origin == "sample" or objective.groups is not None
    chosen = _typical(objective) if typical else _spread(objective)
    w = torch.cat([objective.samples(range(item, item + 1), STREAM).w for item in chosen]).cpu().float()
    if config.origin == "sample":
        return {"origins": w, "alpha": zeros}
    return {"origins": mean, "alpha": directions.coefficients(w)}


def _spread(objective: Objective) -> list[int]:
    """One sample for each cluster, far apart from one another, by k-means++.  [Arthur and Vassilvitskii 2007]"""
    # The first is sampled uniformly, every other in proportion to its squared distance from the nearest so far. Perceptual
    # distances are sums of squares already.
    config = objective.config
    draws = randomness.uniform(config.seed, STREAM, range(config.clusters)).double()
    n = config.init_images
    chosen, nearest = [], torch.ones(n, dtype=torch.float64)
    for draw in draws:
        share = nearest.cumsum(0) / nearest.sum()
        item = int(torch.searchsorted(share, draw.clamp(max=1 - 1e-12), right=True).clamp(max=n - 1))
        chosen.append(item)
        distance = _distances(objective, _features(objective, range(item, item + 1)))
        nearest = distance if len(chosen) == 1 else torch.minimum(nearest, distance)
        nearest[chosen] = 0.0
    return chosen


def _typical(objective: Objective) -> list[int]:
    """The sample nearest to the mean feature of each part of the samples.

    Parts are the clusters of k-means on the same features, or, with `assignment` "descriptor", the half of each of its groups
    that is nearer to the centre.
    """
    config = objective.config
    features = torch.cat([_flat(_features(objective, items)) for items in _portions(config.init_images)])
    if objective.groups is None:
        from sklearn.cluster import KMeans  # takes a second to import

        model = KMeans(config.clusters, n_init=10, random_state=config.seed).fit(features.numpy())
        return torch.from_numpy(model.transform(features.numpy())).argmin(0).tolist()
    images = (objective.samples(items, STREAM).images.float() for items in _portions(config.init_images))
    logits = torch.cat([objective.groups(part).cpu() for part in images])
    cluster, chosen = logits.argmax(1), []
    # Groups hold all poses, so the sample nearest to the mean of one has a pose in the middle of all.
    for k in range(config.clusters):
        here = (cluster == k).nonzero()[:, 0]
        here = here if len(here) else logits[:, k].argmax()[None]
        here = here[logits[here, k].argsort(descending=True)[: -(-len(here) // 2)]]
        chosen.append(int(here[(features[here] - features[here].mean(0)).square().sum(1).argmin()]))
    return chosen


def _flat(features: Features) -> Float[Tensor, "n values"]:
    """Rows whose squared distances are the perceptual ones, up to a factor: means over pixels, summed over maps."""
    return torch.cat([level.flatten(1) / level[0, 0].numel() ** 0.5 for level in features], 1).double().cpu()


def _portions(n: int) -> list[range]:
    return [range(i, min(i + AT_ONCE, n)) for i in range(0, n, AT_ONCE)]


def _features(objective: Objective, items: range) -> Features:
    images = objective.samples(items, STREAM).images
    return objective.distance.features(reduced(images, objective.config.input_size))


def _distances(objective: Objective, centre: Features) -> Float[Tensor, " samples"]:
    """Distances of all samples to a centre."""
    distances = []
    for items in _portions(objective.config.init_images):
        here = _features(objective, items)
        there = tuple(level.expand_as(like) for level, like in zip(centre, here, strict=True))
        distances.append(objective.distance.between(here, there).cpu().double())
    return torch.cat(distances)


def train_classifier(
    objective: Objective, transformer: SpatialTransformer, mode: Mode, out: Path, ranks: Ranks
) -> ClusterClassifier:
    """A classifier of the clusters that generated images are nearest to, from a copy of the transformer's trunk.

    Resumes the run in `out`. Raises ValueError for a transformer without a similarity network.
    """
    config = objective.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.generator(config.seed, "classifier/init").initial_seed())
        classifier = ClusterClassifier.from_transformer(transformer)
    adam = torch.optim.Adam(classifier.parameters(), lr=config.lr, betas=(0.9, 0.999), fused=True)
    state = TrainState(classifier, adam, ranks, ema_half_life=config.ema_half_life_images, several_passes=True)

    def losses(counters: range) -> dict[str, Tensor]:
        samples = objective.samples(counters, "classifier")
        choice = objective.choose(transformer, mode, samples, 0.0)
        sides = classifier.config.classifier == "sides"
        label = choice.cluster + choice.flipped * config.clusters if sides else choice.cluster
        logits = classifier(samples.images)  # never mirrored, as real images come
        right = (logits.argmax(1) == label).to(logits.dtype).mean()
        return {"loss": F.cross_entropy(logits, label), "accuracy": right}

    facts = {"transformer": checkpoint.digest(transformer.state_dict()), "mode": checkpoint.digest(mode.state_dict())}
    with open_run(config, ranks, facts, out=out) as run:
        total, title = config.classifier_images, "training the classifier"
        for batch in training_steps(config, state, run, total_samples=total, title=title):
            means = state.accumulate(batch, config.micro_batch, losses)
            _, finite = state.optimise()
            state.count(batch, means, finite)
    return cast(ClusterClassifier, state.ema)


def purity(clusters: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Share of items that belong to the commonest label of their cluster."""
    counts = F.one_hot(clusters).T @ F.one_hot(labels)  # clusters labels
    return float(counts.amax(1).sum() / len(labels))
