"""Collecting checkpoints: networks trained and scored by us, one after another in eager PyTorch, and by `torch.func.vmap`.

mnist_mlp on mnist5k, and cifar_cnn on noise of CIFAR's shape, which takes as long as pictures and needs no download.
"training": an epoch from the start, all networks on the same minibatches or each on its own; loading and augmenting are counted.
"scoring": the three metrics of some networks. "whole": what one process of `collect` does but for writing files.

A whole run of mnist_mlp is all of it, 25 epochs and 200 checkpoints. One of cifar_cnn is 19,500 steps and 200 checkpoints, each
scored on 10,500 items; here it is 16 steps and 2 checkpoints scored on a twelfth of the items, so that a step bears the share of
scoring that it would, and 19,500 of the steps counted are a run.

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
STEPS, ITEMS, TRAIN_ITEMS = 16, 820, 41  # of a run of cifar_cnn here, and what it is scored on


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
    `collect` finds by measuring on one core. runs, few_runs, vmap_runs: whole runs of ours, one after another, by vmap, of so
    many epochs and checkpoints. vmap_items: scored at a time, the fastest of 100, 250, 500 and 1,000.
    """

    task: Callable[[int], SupervisedTask]
    networks: int
    few: int
    at_once: int
    runs: int
    few_runs: int
    vmap_runs: int
    epochs: int
    checkpoints: int
    unit: str
    vmap_items: int
    device: str = "cpu"
    repeats: int = 5


SIZES = {
    MNIST: Size(digits, 100, 5, 100, 50, 2, 10, 25, 200, "runs", 1000),
    CIFAR: Size(noise, 8, 2, 8, 8, 2, 8, 1, 2, "network_steps", 100),
}


class Contender(NamedTuple):
    """Someone who trains and scores, and how many networks and whole runs in one call."""

    name: str
    train: Train
    score: Score
    networks: int
    runs: int


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
        task, cohort = size.task(size.epochs), Cohort(seed, 0, range(who.runs), size.checkpoints)

        def once() -> Tensor:
            theta = who.train(task, cohort, torch.device(size.device))
            parts = [who.score(task, part.to(size.device)).cpu() for part in theta.flatten(0, 1).split(4000)]
            metrics = torch.cat(parts, 1).unflatten(1, theta.shape[:2])
            return metrics[::2, : size.few_runs, :5]  # losses: where two classes nearly tie, an error is one item off

        return once

    return prepare


def jobs_of(name: str, size: Size) -> Iterator[Job]:
    """Every kind of work, done by each contender."""
    contenders = (
        Contender("eager", one_by_one, score_one_by_one, size.few, size.few_runs),
        Contender("vmap", vmapped, score_vmapped(size.vmap_items), size.networks, size.vmap_runs),
        Contender("ours", ours(size.at_once), score_ours, size.networks, size.runs),
    )
    steps, per_run = size.task(1).steps, 1 if size.unit == "runs" else size.task(size.epochs).steps
    kinds: dict[str, tuple[Callable[[Contender], Prepare], Callable[[Contender], int], str]] = {
        "training": (lambda who: training(size, who, True), lambda who: who.networks * steps, "network_steps"),
        "own batches": (lambda who: training(size, who, False), lambda who: who.networks * steps, "network_steps"),
        "scoring": (lambda who: scoring(size, who), lambda who: who.networks, "checkpoints"),
        "whole": (lambda who: whole(size, who), lambda who: who.runs * per_run, size.unit),
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
