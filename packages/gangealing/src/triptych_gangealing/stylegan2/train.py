"""Train a StyleGAN2."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from triptych_common import randomness
from triptych_common.cli import echo
from triptych_common.cost import StepCost, state_bytes
from triptych_common.data import DATASETS, write_unusable
from triptych_common.parallel import Ranks, process_group
from triptych_common.storage.run import RunDirectory
from triptych_common.throughput import keep_freed_memory
from triptych_common.training import Batch, TrainState, open_run, summary, training_steps

from triptych_gangealing.stylegan2.augment import adapted_p
from triptych_gangealing.stylegan2.data import TrainingImages, open_images
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.layers import Conv2d
from triptych_gangealing.stylegan2.objective import Objective
from triptych_gangealing.stylegan2.snapshots import make_snapshots
from triptych_gangealing.stylegan2.train_config import GanTrainConfig
from triptych_gangealing.stylegan2.weights import (
    DISCRIMINATOR_FILE,
    DISCRIMINATOR_PART,
    GENERATOR_FILE,
    facts_of,
    write_network,
)

WORKSPACE = 1.4  # memory of a step over that of its tensors: what convolutions take besides, as 1,024 images showed
W_AVG_DECAY, PATH_LENGTH_DECAY = 0.995, 0.99


def train_gan(config: GanTrainConfig) -> dict[str, Any]:
    """Train to the end, or resume; returns where the networks are and the last metrics.

    Raises ValueError for a config that does not fit data, run directory or ranks, Interrupted after a signal.
    """
    keep_freed_memory()
    out = None if config.strict else config.out
    images = open_images(config.data, config.resolution, conditional=config.conditional, x_flip=config.x_flip, out=out)
    with process_group(config.device) as ranks:
        config.check_groups(ranks.world_size)
        state = make_state(config, ranks, images)
        generator, discriminator, _ = parts_of(state)
        objective = Objective(config, images, generator, discriminator)
        step_cost(state, objective).check(config, ranks)
        # Opened last: a command refused above must not leave a folder that then refuses the corrected one.
        # Where pictures have moved, or their folder has another name, it is enough that they are the same.
        contents = dict.fromkeys(("data", "images"), images.contents) if images.contents else None
        with open_run(config, ranks, {"images": images.fingerprint()}, contents=contents) as run:
            state.describe = lambda: {
                part: facts_of(network, facts_about(config, run, state)) for part, network in networks_of(state).items()
            }
            if ranks.is_main:
                write_unusable(images.unusable, run.path)
            snapshot = make_snapshots(config, run, images, ranks)
            for batch in training_steps(config, state, run, on_step=snapshot):
                adversarial_step(state, objective, batch)
            save_networks(config, run, state)
            files = {"generator": str(run.path / GENERATOR_FILE), "discriminator": str(run.path / DISCRIMINATOR_FILE)}
            return files | summary(run, "loss/generator")


def preview(config: GanTrainConfig) -> dict[str, Any]:
    """What --dry-run prints: the settings, the pictures, and what a step takes in memory and the whole run in time.

    Raises ValueError or OSError for data that cannot be used, or networks that do not fit.
    """
    found = config.resolved()
    named = config.data.partition(":")[0] in ("digits32", "hub", *DATASETS)
    if not named and not Path(config.data).exists():
        return found | {"data": f"{config.data}: not there yet"}
    out = None if config.strict else config.out
    images = open_images(config.data, config.resolution, conditional=config.conditional, x_flip=config.x_flip, out=out)
    found["data"] = {"examples": len(images), "classes": images.num_classes}
    with process_group(config.device) as ranks:
        config.check_groups(ranks.world_size)
        state = make_state(config, ranks, images)
        objective = Objective(config, images, *parts_of(state)[:2])
        return found | {"estimate": step_cost(state, objective).estimate(config, ranks)}


def step_cost(state: TrainState, objective: Objective) -> StepCost:
    """What a step takes, measured on two and four images, augmented."""
    config, passes = objective.config, []
    for play in passes_of(state, objective, images_seen=0, p=0.5).values():

        def run(counters: range, play: Pass = play) -> None:
            _pass(state, Batch(0, len(counters), counters), play, None)
            state.model.zero_grad(set_to_none=True)

        if play.weight > 0:
            passes.append((run, play.every))
    found = StepCost.of(passes, state_bytes(state), few=2, multiple=min(config.mbstd_group_size, config.batch_size))
    return replace(found, each=WORKSPACE * found.each)


class Statistics(nn.Module):
    """Running statistics of the batches seen, over all ranks; buffers, so that checkpoints have them."""

    augment_p: Tensor  # probability of the augmentations
    path_length: Tensor  # running mean
    signs: Tensor  # of D(real), summed since the last adjustment of augment_p
    steps: Tensor  # since then
    r1: Tensor  # the latest value, since most steps have none
    path_length_penalty: Tensor  # the latest value

    def __init__(self, p: float) -> None:
        super().__init__()
        for name in ("augment_p", "path_length", "signs", "steps", "r1", "path_length_penalty"):
            self.register_buffer(name, torch.tensor(p if name == "augment_p" else 0.0, dtype=torch.float64))


def parts_of(state: TrainState) -> tuple[Generator, Discriminator, Statistics]:
    """Both networks that are being trained, and the statistics."""
    parts: Any = state.model
    return parts["generator"], parts["discriminator"], parts["statistics"]


class Pass(NamedTuple):
    """One of a step's up to four passes: a loss times `weight`, for one player's weights, every `every` steps.

    loss: of some counters, the mean over them and another such mean to be observed. stride: it takes every `stride`-th counter.
    """

    player: str
    every: int
    weight: float
    loss: Callable[[Sequence[int]], tuple[Tensor, Tensor]]
    stride: int = 1


def passes_of(state: TrainState, objective: Objective, images_seen: int, p: float) -> dict[str, Pass]:
    """The passes of a step, with augmentations of probability p."""
    config, statistics = objective.config, parts_of(state)[2]
    path_mean = statistics.path_length.to(objective.dtype)
    # Lazy regularisation: what is computed every 16th step weighs 16 times as much.
    return {
        "generator": Pass("generator", 1, 1.0, partial(objective.generator_loss, p=p)),
        "path_length": Pass(  # of half a batch
            "generator", config.path_length_every, config.path_length_weight * config.path_length_every,
            partial(objective.path_length_penalty, mean=path_mean), stride=2,
        ),
        "discriminator": Pass("discriminator", 1, 1.0, partial(objective.discriminator_loss, p=p)),
        "r1": Pass(
            "discriminator", config.r1_every, config.gamma(images_seen) / 2 * config.r1_every,
            lambda counters: (objective.r1_penalty(counters, p), torch.zeros(())),
        ),
    }  # fmt: skip


def adversarial_step(state: TrainState, objective: Objective, batch: Batch) -> None:
    """Generator, its path lengths, discriminator, its gradient penalty: an optimiser step each.  [Karras et al. 2020]"""
    config, ranks = objective.config, state.ranks
    generator, _, statistics = parts_of(state)
    passes = passes_of(state, objective, batch.step * batch.size, float(statistics.augment_p))
    losses, observed, finite = {}, {}, True
    for name, play in passes.items():
        if batch.step % play.every == 0 and play.weight > 0:
            losses[name], observed[name] = _pass(state, batch, play, config.micro_batch)
            finite &= state.optimise()[1]
    # Means over all ranks, so that their number does not change what is learned. After a non-finite gradient they are discarded.
    seen = {name: ranks.sum(value) / ranks.world_size for name, value in observed.items()}
    if finite:
        generator.mapping.w_avg.lerp_(seen["generator"], 1 - W_AVG_DECAY)
        if "path_length" in seen:
            statistics.path_length.lerp_(seen["path_length"].double(), 1 - PATH_LENGTH_DECAY)
            statistics.path_length_penalty.copy_(ranks.sum(losses["path_length"]) / ranks.world_size)
        if "r1" in losses:
            statistics.r1.copy_(ranks.sum(losses["r1"]) / ranks.world_size)
        _adapt(statistics, seen["discriminator"], config, batch)
    metered = {f"loss/{player}": losses[player] for player in ("generator", "discriminator")}
    metered |= {n: getattr(statistics, n) for n in ("r1", "path_length", "path_length_penalty", "augment_p")}
    state.count(batch, metered | {"sign_real": seen["discriminator"]}, finite)


def _pass(state: TrainState, batch: Batch, play: Pass, micro_batch: int | None) -> tuple[Tensor, Tensor]:
    networks: Any = state.model
    other = networks["discriminator" if play.player == "generator" else "generator"]
    parts = []
    # Every `stride`-th sample of the batch of all ranks, wherever its parts begin.
    first, samples = batch.step * batch.size, -(-batch.size // play.stride)
    with _frozen(other):
        for part, _ in batch.micro_batches(micro_batch):
            counters = part[(first - part.start) % play.stride :: play.stride]
            share = len(counters) / samples * (batch.size / len(batch.counters))
            # Without a counter of its own it takes one at weight 0: all ranks must have the same gradients.
            loss, observed = play.loss(counters or part[:1])
            (loss * (play.weight * share)).backward()
            parts.append((loss.detach() * share, observed * share))
    losses, observations = zip(*parts, strict=True)
    return sum(losses), sum(observations)


def _adapt(statistics: Statistics, sign: Tensor, config: GanTrainConfig, batch: Batch) -> None:
    if config.augment == "none" or config.augment_p is not None:
        return
    statistics.signs += sign.double() * batch.size
    statistics.steps += 1
    if statistics.steps >= config.ada_every:
        mean_sign = float(statistics.signs) / (float(statistics.steps) * batch.size)
        share = batch.size * config.ada_every / config.ada_images
        statistics.augment_p.fill_(adapted_p(float(statistics.augment_p), mean_sign, config.ada_target, share))
        statistics.signs.zero_()
        statistics.steps.zero_()


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Gradients flow through it, but not to its weights."""
    trained = nn.ParameterList(p for p in network.parameters() if p.requires_grad).requires_grad_(False)
    try:
        yield
    finally:
        trained.requires_grad_(True)


def make_state(config: GanTrainConfig, ranks: Ranks, images: TrainingImages) -> TrainState:
    """Both networks, freshly initialised or taken over, the generator's average, and one Adam with a group for each."""
    generator, discriminator = make_networks(config, images)
    model = nn.ModuleDict({"generator": generator, "discriminator": discriminator}).to(config.dtype)
    model["statistics"] = Statistics(config.augment_p or 0.0)  # float64, whatever the networks' type
    model.to(memory_format=torch.channels_last)

    # Two groups of one Adam: a pass leaves the other network's gradients None, so that its group does not move.
    def optimizer(_: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [_group(generator, config.lr, config.path_length_every)]
        groups += [_group(discriminator, config.discriminator_lr or config.lr, config.r1_every)]
        return torch.optim.Adam(groups, fused=True)

    return TrainState(
        model, optimizer, ranks, ema_half_life=config.ema_half_life_images, ema_rampup=config.ema_rampup, grad_clip=None,
        averaged_part="generator", several_passes=True,
    )  # fmt: skip


def _group(network: nn.Module, lr: float, every: int) -> dict[str, Any]:
    """Adam's settings, corrected for the optimiser steps that regularisation adds.  [Karras et al. 2020, appendix B]"""
    # With c = k / (k + 1): lr c and beta^c, so that k + 1 optimiser steps do what k did.
    ratio = every / (every + 1)
    trained = [p for p in network.parameters() if p.requires_grad]
    return {"params": trained, "lr": lr * ratio, "betas": (0.0, 0.99**ratio), "eps": 1e-8}


def make_networks(config: GanTrainConfig, images: TrainingImages) -> tuple[Generator, Discriminator]:
    """Generator and discriminator of a run. Raises ValueError where those to start from do not fit its config."""
    shapes = config.networks(c_dim=images.num_classes if config.conditional else 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.generator(config.seed, "init").initial_seed())
        generator, discriminator = Generator(shapes[0]), Discriminator(shapes[1])
    if config.init_from is not None:
        from triptych_gangealing.stylegan2.weights import take_over

        take_over(config.init_from, generator, discriminator)
    # FreezeD counts convolutions from the image inwards, without those at 4x4.
    blocks = [getattr(discriminator, f"b{r}") for r in discriminator.config.resolutions[:0:-1]]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, Conv2d)]
    if config.freeze_d > len(layers):
        raise ValueError(f"freeze_d {config.freeze_d}: expected at most {len(layers)}, which the discriminator has")
    for layer in layers[: config.freeze_d]:
        layer.requires_grad_(False)
    for network in (generator.synthesis, discriminator):
        network.bf16_resolutions = config.bf16_resolutions
    return generator, discriminator


def save_networks(config: GanTrainConfig, run: RunDirectory, state: TrainState) -> None:
    """Write the averaged generator, and the discriminator for fine-tuning."""
    if not state.ranks.is_main:
        return
    for network, name in zip(networks_of(state).values(), (GENERATOR_FILE, DISCRIMINATOR_FILE), strict=True):
        write_network(run.path / name, network, facts_about(config, run, state))
    echo(f"generator: {run.path / GENERATOR_FILE}")


def networks_of(state: TrainState) -> dict[str, Generator | Discriminator]:
    """The averaged generator and the discriminator, by their place in a checkpoint."""
    return {"ema": cast(Generator, state.ema), DISCRIMINATOR_PART: parts_of(state)[1]}


def facts_about(config: GanTrainConfig, run: RunDirectory, state: TrainState) -> dict[str, Any]:
    """The facts in a network's file: what it was trained on."""
    facts: dict[str, Any] = {"data": config.data, "images": run.identity["images"]}
    return facts | {"seed": config.seed, "images_seen": state.samples_seen}
