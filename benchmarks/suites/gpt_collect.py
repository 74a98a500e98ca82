"""Collecting checkpoints: networks trained and scored by us, one after another in eager PyTorch, and by `torch.func.vmap`.

mnist_mlp on mnist5k, and cifar_cnn on noise of CIFAR's shape, which takes as long as pictures and needs no download.
"training": an epoch from the start, all networks on the same minibatches or each on its own; loading and augmenting are counted.
"scoring": the three metrics of some networks. "whole": what one process of `collect` does but for writing files.

"whole" runs are shortened so that a step bears the share of recording and scoring that it does in a whole one: of mnist_mlp 2
epochs and 16 checkpoints for 25 and 200, so that 775 steps are a run; of cifar_cnn 8 steps and 2 checkpoints scored on 430
items for 19,500, 200 and 10,500, so that 19,500 steps are a run. Either way a run is 200 checkpoints.

Eager PyTorch trains fewer networks, rates being per network. Results are compared for these, and early in training: rounding
grows from step to step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triptych_common import randomness
from triptych_gpt.tasks import TASKS, Cohort, Items, SupervisedTask
from triptych_gpt.tasks.mnist_mlp import Digits

from benchmarks.runner import Job
from benchmarks.suites.gpt_rivals import (
    Score,
    Train,
    one_by_one,
    ours,
    score_one_by_one,
    score_ours,
    score_vmapped,
    vmapped,
)

MNIST, CIFAR = "mnist_mlp", "cifar_cnn"
STEPS, ITEMS, TRAIN_ITEMS = 8, 410, 20  # of a run of cifar_cnn here, and what it is scored on
OWN_BATCHES = 16  # networks that are trained together, each on minibatches of its own: more leave the cache


@lru_cache(maxsize=4)
def digits(epochs: int) -> SupervisedTask:
    """mnist_mlp on mnist5k, loaded."""
    task = replace(TASKS[MNIST], data=Digits("mnist5k"), epochs=epochs)
    assert task.items
    return task


@lru_cache(maxsize=4)
def noise(epochs: int) -> SupervisedTask:
    """cifar_cnn on noise."""
    return replace(TASKS[CIFAR], data=_noise().__getitem__, epochs=epochs, scored_train_items=TRAIN_ITEMS)


def _noise() -> dict[str, Items]:
    """Just enough for the steps of an epoch and for scoring."""
    counts = {"train": STEPS * TASKS[CIFAR].batch_size, "test": ITEMS}
    rng = randomness.generator(0, "noise")
    return {
        part: Items(torch.randn(n, 3, 32, 32, generator=rng), torch.randint(10, (n,), generator=rng))
        for part, n in counts.items()
    }


@dataclass(frozen=True)
class Size:
    """How much of a task one call does.

    networks: trained and scored together, `few` of them one after another. at_once: how many of them we train together, as
    `collect` finds by measuring on one core. epochs, checkpoints: of a shortened run. vmap_items: scored at a time by vmap, the
    fastest of 100, 250, 500 and 1,000.
    """

    task: Callable[[int], SupervisedTask]
    networks: int
    few: int
    at_once: int
    epochs: int
    checkpoints: int
    vmap_items: int
    device: str = "cpu"
    repeats: int = 5


SIZES = {
    MNIST: Size(digits, networks=100, few=5, at_once=100, epochs=2, checkpoints=16, vmap_items=1000),
    CIFAR: Size(noise, networks=8, few=2, at_once=8, epochs=1, checkpoints=2, vmap_items=100),
}


class Contender(NamedTuple):
    """Someone who trains and scores, and how many networks in one call."""

    name: str
    train: Train
    score: Score
    networks: int


Prepare = Callable[[int], Callable[[], Tensor]]


def training(size: Size, who: Contender, shared: bool) -> Prepare:
    """Prepare an epoch of training; what is timed returns how the first few networks end."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        task, cohort = size.task(1), Cohort(seed, 0, range(who.networks), 2, shared_batches=shared)
        return lambda: who.train(task, cohort, torch.device(size.device))[: size.few, -1]

    return prepare


def scoring(size: Size, who: Contender) -> Prepare:
    """Prepare scoring of networks that have been trained for an epoch."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        task, cohort = size.task(1), Cohort(seed, 0, range(who.networks), 2)
        theta = ours(size.at_once)(task, cohort, torch.device(size.device))[:, -1].to(size.device)
        return lambda: who.score(task, theta)[:, : size.few].cpu()

    return prepare


def whole(size: Size, who: Contender) -> Prepare:
    """Prepare training, recording and scoring; what is timed returns losses of the first runs' first checkpoints."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        task, cohort = size.task(size.epochs), Cohort(seed, 0, range(who.networks), size.checkpoints)

        def once() -> Tensor:
            theta = who.train(task, cohort, torch.device(size.device))
            parts = [who.score(task, part.to(size.device)).cpu() for part in theta.flatten(0, 1).split(4000)]
            metrics = torch.cat(parts, 1).unflatten(1, theta.shape[:2])
            return metrics[::2, : size.few, :5]  # losses: where two classes nearly tie, an error is one item off

        return once

    return prepare


def jobs_of(name: str, size: Size) -> Iterator[Job]:
    """Every kind of work, done by each contender."""
    contenders = (
        Contender("eager", one_by_one, score_one_by_one, size.few),
        Contender("vmap", vmapped, score_vmapped(size.vmap_items), size.networks),
        Contender("ours", ours(size.at_once), score_ours, size.networks),
    )

    def own(who: Contender) -> Contender:
        return who._replace(networks=min(who.networks, OWN_BATCHES))

    epoch, run = (size.task(epochs).steps for epochs in (1, size.epochs))
    kinds: dict[str, tuple[Callable[[Contender], Prepare], Callable[[Contender], int], str]] = {
        "training": (lambda who: training(size, who, True), lambda who: who.networks * epoch, "network_steps"),
        "own batches": (
            lambda who: training(size, own(who), False),
            lambda who: own(who).networks * epoch,
            "network_steps",
        ),
        "scoring": (lambda who: scoring(size, who), lambda who: who.networks, "checkpoints"),
        "whole": (lambda who: whole(size, who), lambda who: who.networks * run, "network_steps"),
    }
    for kind, (prepare, items, unit) in kinds.items():
        done: list[str] = []
        for who in contenders:
            job = f"{name}, {kind}: {who.name}"
            same_as = done[0] if done else None
            yield Job(job, prepare(who), items(who), unit, tuple(done), same_as, size.repeats)
            done.append(job)


def jobs() -> Sequence[Job]:
    return [job for name, size in SIZES.items() for job in jobs_of(name, size)]
