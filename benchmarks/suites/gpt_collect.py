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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from triptych_common import randomness
from triptych_gpt.tasks import TASKS, Cohort, Items, SupervisedTask
from triptych_gpt.tasks.mnist_mlp import Digits

from benchmarks.runner import Job
from benchmarks.suites.gpt_rivals import (
    ScoreAll,
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


def training(size: Size, train: Train, networks: int, *, shared: bool) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare an epoch of training; what is timed returns how the first few networks end."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        task, cohort = size.task(1), Cohort(seed, 0, range(networks), 2, shared_batches=shared)
        return lambda: train(task, cohort, torch.device(size.device))[: size.few, -1]

    return prepare


def scoring(size: Size, score: ScoreAll, networks: int) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare scoring of networks that have been trained for an epoch."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        task, cohort = size.task(1), Cohort(seed, 0, range(networks), 2)
        theta = ours(size.at_once)(task, cohort, torch.device(size.device))[:, -1].to(size.device)
        return lambda: score(task, theta)[:, : size.few].cpu()

    return prepare


def whole(size: Size, train: Train, score: ScoreAll, runs: int) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare training, recording and scoring; what is timed returns losses of the first runs' first checkpoints."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        task, cohort = size.task(size.epochs), Cohort(seed, 0, range(runs), size.checkpoints)

        def once() -> Tensor:
            theta = train(task, cohort, torch.device(size.device))
            parts = [score(task, part.to(size.device)).cpu() for part in theta.flatten(0, 1).split(4000)]
            metrics = torch.cat(parts, 1).unflatten(1, theta.shape[:2])
            return metrics[::2, : size.few_runs, :5]  # losses: an error rate is off by 1/1000 where two classes tie

        return once

    return prepare


def jobs_of(name: str, size: Size) -> list[Job]:
    """Ours, one after another and by vmap, of every kind."""
    mine, steps, everyone = ours(size.at_once), size.task(1).steps, size.networks
    alone = min(everyone, 100)
    score_by_vmap = score_vmapped(size.vmap_items)
    per_run = 1 if size.unit == "runs" else size.task(size.epochs).steps
    kinds: dict[str, tuple[str, list[tuple[Callable[[int], Callable[[], Tensor]], int]]]] = {}
    for kind, shared in (("training", True), ("training, own batches", False)):
        contenders = ((one_by_one, size.few), (vmapped, everyone), (mine, everyone))
        kinds[kind] = (
            "network_steps",
            [(training(size, train, n, shared=shared), n * steps) for train, n in contenders],
        )
    scorers = ((score_one_by_one, alone), (score_by_vmap, everyone), (score_ours, everyone))
    kinds["scoring"] = ("checkpoints", [(scoring(size, score, n), n) for score, n in scorers])
    wholes = (
        (one_by_one, score_one_by_one, size.few_runs),
        (vmapped, score_by_vmap, size.vmap_runs),
        (mine, score_ours, size.runs),
    )
    kinds["whole"] = (size.unit, [(whole(size, train, score, n), n * per_run) for train, score, n in wholes])
    found = []
    for kind, (unit, contenders) in kinds.items():
        ...
    return found
