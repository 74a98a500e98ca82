"""Train a spatial transformer and the modes it aligns to, from a frozen generator: GANgealing.  [thesis 4.3]"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from triptych_common import randomness
from triptych_common.cli import echo
from triptych_common.parallel import Ranks, process_group
from triptych_common.storage import checkpoint
from triptych_common.throughput import keep_freed_memory
from triptych_common.training import Batch, TrainState, is_due, open_run, summary, training_steps

from triptych_gangealing.encoders.perceptual import Encoder, open_distance
from triptych_gangealing.modes import Directions, Mode, pca
from triptych_gangealing.objective import Objective
from triptych_gangealing.spatial_transformer import SpatialTransformer, reduced
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.train_config import AlignTrainConfig

if TYPE_CHECKING:
    from triptych_common.cost import StepCost

SHOWN = 10  # images in a snapshot


def train(config: AlignTrainConfig) -> dict[str, Any]:
    """Train to the end, or resume; returns where the aligner is and the last metrics.

    Raises ValueError for a config that does not fit generator, run directory or ranks, Interrupted after a signal.
    """
    # Imported here: the steps in between need none of it.
    from triptych_gangealing.aligner import FILE, Aligner, facts_of, write_aligner
    from triptych_gangealing.stylegan2.weights import load_generator

    keep_freed_memory()
    generator = load_generator(config.generator)
    distance = open_distance(config.distance, weights=config.distance_weights)
    with process_group(config.device) as ranks:
        generator, distance = generator.to(ranks.device, config.dtype), distance.to(ranks.device, config.dtype)
        objective = Objective(config, generator, distance)
        step_cost(objective).check(config, ranks)
        facts = {"generator": digest_of(generator), "distance": digest_of(distance)}
        with open_run(config, ranks, facts) as run:
            state = make_state(objective, ranks, run.path)
            state.describe = lambda: {"ema": facts_of(parts_of(state.ema)[0], facts_about(config, facts))}
            for batch in training_steps(config, state, run, on_step=make_snapshots(objective, run.path)):
                step(objective, state, batch)
            metrics = summary(run)
        transformer, mode = parts_of(state.ema)
        classifier: nn.Module | None = objective.groups
        if config.clusters > 1 and classifier is None:
            from triptych_gangealing.clustering import train_classifier

            # The folder's name has the length of training: after a longer one, clusters differ.
            folder = config.out / "classifier" / f"images-{state.samples_seen:09d}"
            classifier = train_classifier(objective, transformer, mode, folder, ranks)
        path = config.out / FILE
        if ranks.is_main:
            write_aligner(path, Aligner(transformer, mode, classifier), facts_about(config, facts))
    echo(f"aligner: {path}")
    return {"aligner": str(path), **metrics}


def preview(config: AlignTrainConfig) -> dict[str, Any]:
    """What --dry-run prints: the settings; and, where generator and distance are there, memory of a step and time of the run.

    Raises ValueError or OSError for those that cannot be used.
    """
    from triptych_gangealing.stylegan2.weights import load_generator

    found = config.resolved()
    try:
        generator = load_generator(config.generator)
        distance = open_distance(config.distance, weights=config.distance_weights)
    except FileNotFoundError as error:
        return found | {"estimate": f"not yet: {error}"}
    with process_group(config.device) as ranks:
        generator, distance = generator.to(ranks.device, config.dtype), distance.to(ranks.device, config.dtype)
        return found | {"estimate": step_cost(Objective(config, generator, distance)).estimate(config, ranks)}


def step_cost(objective: Objective) -> "StepCost":
    """What a step takes, measured on one and two images with a transformer and modes as they begin."""
    from triptych_common.cost import StepCost  # no part of a step

    config, w = objective.config, objective.generator.mapping.w_avg
    transformer = SpatialTransformer(config.transformer()).to(w)
    mode = Mode(Directions(w, w.new_zeros(config.components, len(w)), w.new_ones(config.components)), config.clusters)
    trained = nn.ModuleList([transformer, mode.to(w)])

    def run(counters: range) -> None:
        objective.loss(transformer, mode, counters, images_seen=0)["loss"].backward()
        trained.zero_grad(set_to_none=True)

    frozen = nn.ModuleList([objective.generator, objective.distance])
    sizes = [times * tensor.nbytes for part, times in ((trained, 4), (frozen, 1)) for tensor in part.parameters()]
    return StepCost.of([(run, 1)], sum(sizes))


def step(objective: Objective, state: TrainState, batch: Batch) -> None:
    """One optimiser step of transformer and modes."""
    transformer, mode = parts_of(state.model)
    losses = partial(objective.loss, transformer, mode, images_seen=state.samples_seen)
    totals = state.accumulate(batch, objective.config.micro_batch, losses)
    shares = state.ranks.sum(totals.pop("cluster_shares")) / state.ranks.world_size
    mode.even_out(shares, objective.config.balance)
    totals["smallest_cluster"], totals["largest_cluster"] = shares.min(), shares.max()
    _, finite = state.optimise()
    state.count(batch, totals, finite)


def parts_of(model: nn.Module) -> tuple[SpatialTransformer, Mode]:
    """Transformer and modes of a model in training, or of its average."""
    parts = cast(nn.ModuleDict, model)
    return cast(SpatialTransformer, parts["transformer"]), cast(Mode, parts["mode"])


def make_state(objective: Objective, ranks: Ranks, folder: Path) -> TrainState:
    """Transformer and modes at their start, their average, and one Adam with a learning rate for each."""
    config, generator = objective.config, objective.generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.generator(config.seed, "init").initial_seed())
        transformer = SpatialTransformer(config.transformer())
    # The main process computes and caches the result, then all read the same file.
    if ranks.is_main:
        pca(generator, config.pca_samples, config.components, config.seed, folder=folder)
    ranks.barrier()
    directions = pca(generator, config.pca_samples, config.components, config.seed, folder=folder)
    if config.assignment == "descriptor" and config.clusters > 1:
        from triptych_gangealing.encoders.groups import open_groups  # only here is SimCLR needed

        objective.groups = open_groups(
            generator, cast(Encoder, objective.distance.trunk), clusters=config.clusters, images=config.descriptor_images,
            seed=config.seed, folder=folder, ranks=ranks,
        )  # fmt: skip
    from triptych_gangealing.clustering import start

    mode = Mode(directions, config.clusters)
    mode.begin(**start(objective, directions, ranks, folder))
    if config.init_from is not None:
        from triptych_gangealing.aligner import take_over

        take_over(config.init_from, transformer, mode)
    model = nn.ModuleDict({"transformer": transformer, "mode": mode}).to(ranks.device, config.dtype)
    groups = [
        {"params": list(transformer.parameters()), "lr": config.lr},
        {"params": list(mode.parameters()), "lr": config.mode_lr, "lr_factor": config.mode_lr / config.lr},
    ]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.999), fused=True)
    # Several passes: the loss calls parts of the model by themselves, which DDP's wrapper would not see.
    return TrainState(
        model, adam, ranks, ema_half_life=config.ema_half_life_images, ema_rampup=None, grad_clip=None,
        learning_rate=config.rate, several_passes=True,
    )  # fmt: skip


def make_snapshots(objective: Objective, folder: Path) -> Callable[[TrainState], None]:
    """A callback that writes samples, above their warped images, above their targets, by the averaged weights."""
    from triptych_common.images import image_grid, to_uint8, write_png

    config = objective.config

    @torch.inference_mode()
    def snapshot(state: TrainState) -> None:
        sizes = {"batch_size": config.batch_size, "total_samples": config.total_images}
        if not state.ranks.is_main or not is_due(state.samples_seen, every=config.snapshot_every, **sizes):
            return
        transformer, mode = parts_of(state.ema)
        samples = objective.samples(range(SHOWN), "shown")
        choice = objective.choose(transformer, mode, samples, 0.0)
        turned = choice.turned(samples.images)
        size = (config.input_size, config.input_size)
        warp = transformer(turned, iterations=config.iterations, head=choice.cluster).warp
        rows = [
            reduced(samples.images, config.input_size),
            warp.sample(turned, size, padding=config.padding),
            objective.targets(samples, mode(choice.cluster), 0.0),
        ]
        grid = image_grid(to_uint8(torch.cat(rows)).cpu(), columns=SHOWN)
        write_png(folder / "samples" / f"images-{state.samples_seen:09d}.png", grid, scale=max(1, 64 // size[0]))

    return snapshot


def digest_of(network: Generator | nn.Module) -> str:
    """Digest of its weights."""
    return checkpoint.digest(network.state_dict())


def facts_about(config: AlignTrainConfig, digests: dict[str, str]) -> dict[str, Any]:
    """Facts about its training that an aligner's file carries."""
    facts = {**digests, "seed": config.seed, "trained_on": config.generator}
    return facts | {name: getattr(config, name) for name in ("padding", "iterations", "flips", "total_images")}
