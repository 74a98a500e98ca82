"""Which runs form a cohort, which split it belongs to, and the work it takes: trained, scored, written."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from triptych_gpt.tasks.task import Cohort, Task, Trajectories
from triptych_gpt.zoo.source import TaskSpec, one_line, recipe_digest
from triptych_gpt.zoo.store import CohortData, ShardRecord, shard_name, unsound, write_shard

SETTINGS = ("split", "cohort", "seed", "initialiser", "shared_batches")
"""columns of the index that say what a run was, beside the task's own settings"""
_SCORED_AT_ONCE = 4000  # checkpoints on the device


@lru_cache(maxsize=1)
def _opened(spec: TaskSpec, recipe: str) -> Task:
    """The task in this process, once. Raises ValueError where it is not the one whose zoo this is."""
    task = spec.open()
    if recipe_digest(task.recipe()) != recipe:
        raise ValueError(
            f"task {task.name}: another recipe each time it is opened, or changed meanwhile; make its data and settings "
            "the same in every process (seed what is drawn)"
        )
    return task


@dataclass(frozen=True)
class Work:
    """A cohort to collect, and how. Small when pickled, whole without anything else: any process of any machine that sees
    `folder` can do it.
    """

    task: TaskSpec
    recipe: str  # its digest
    folder: Path
    cohort: Cohort
    split: str
    dtype: Literal["float32", "bfloat16"]
    networks_at_once: int

    @property
    def shard(self) -> str:
        return shard_name(self.cohort.runs)


def split_of(cohort: int, every: int) -> str:
    """Split of a cohort: of `every` consecutive ones the second is for testing, the third for validation.

    A cohort's split never changes as its zoo grows, and three cohorts suffice for all three.
    """
    return {1: "test", 2: "validation"}.get(cohort % every, "train")


def cohorts(first: int, stop: int, cohort_runs: int) -> Iterator[tuple[int, range]]:
    """Numbers of the cohorts that runs first .. stop-1 belong to, and which of their runs these are."""
    for number in range(first // cohort_runs, -(-stop // cohort_runs)):
        start = number * cohort_runs
        yield number, range(max(first, start), min(stop, start + cohort_runs))


def collect_cohort(work: Work, device: str) -> ShardRecord:
    """Train, score and write a cohort; returns the record for the manifest.

    Raises OSError when the disk refuses, ValueError for a cohort that the task cannot train.
    """
    task, on, runs = _opened(work.task, work.recipe), torch.device(device), work.cohort.runs
    with one_line(f"task {task.name}, runs {runs[0]}..{runs[-1]}"):
        trained = task.train_cohort(work.cohort, on, work.networks_at_once)
        _check(trained, work, task)
        if work.dtype == "bfloat16":  # what is scored is what is stored
            for run in trained.theta:
                run.copy_(run.bfloat16())
        theta, kept, dropped = _sound(trained.theta, runs)
        metrics = {name: values[kept] for name, values in trained.metrics.items()}
        metrics = {**_scored(task, theta, on, [m.name for m in task.metrics if m.name not in metrics]), **metrics}
    finite = torch.stack([values.isfinite().all(1) for values in metrics.values()]).all(0)
    dropped |= {runs[i]: "metrics that are not finite" for i in kept[~finite].tolist()}
    theta, kept = _compacted(theta, finite), kept[finite]
    data = CohortData(
        runs=[runs[i] for i in kept.tolist()],
        theta=theta,
        steps=trained.steps[kept],
        metrics={name: values[finite] for name, values in metrics.items()},
        settings=_settings(work, task),
        dropped=dropped,
    )
    return write_shard(work.folder, work.shard, data, work.dtype)


def _check(trained: Trajectories, work: Work, task: Task) -> None:
    """Raises ValueError for trajectories of another shape than requested."""
    rows = (len(work.cohort.runs), work.cohort.checkpoints)
    shapes = {"theta": tuple(trained.theta.shape), "steps": tuple(trained.steps.shape)}
    wanted = {"theta": (*rows, task.layout.size), "steps": rows}
    for name, shape in {**shapes, **{name: tuple(values.shape) for name, values in trained.metrics.items()}}.items():
        if shape != wanted.get(name, rows):
            raise ValueError(f"task {task.name}: train_cohort gave {name} {shape}, expected {wanted.get(name, rows)}")


def _sound(theta: torch.Tensor, runs: range) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
    """The trajectories to keep, their places, and why the others are not."""
    reasons = [unsound(run) for run in theta]
    keep = torch.tensor([reason is None for reason in reasons])
    dropped = {run: reason for run, reason in zip(runs, reasons, strict=True) if reason is not None}
    return _compacted(theta, keep), keep.nonzero().flatten(), dropped


def _compacted(theta: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The rows to keep, moved up in place: a second copy would double the memory of a cohort."""
    places = keep.nonzero().flatten().tolist()
    for new, old in enumerate(places):
        if new != old:
            theta[new] = theta[old]
    return theta[: len(places)]


def _scored(task: Task, theta: torch.Tensor, device: torch.device, names: list[str]) -> dict[str, torch.Tensor]:
    """Metrics of every checkpoint, [runs, checkpoints]."""
    if not names or not len(theta):
        return {name: torch.empty(theta.shape[:2]) for name in names}
    parts = [task.evaluate(part.to(device)) for part in theta.flatten(0, 1).split(_SCORED_AT_ONCE)]
    return {name: torch.cat([part[name] for part in parts]).cpu().float().view(theta.shape[:2]) for name in names}


def _settings(work: Work, task: Task) -> dict[str, Any]:
    cohort = work.cohort
    values = (work.split, cohort.number, cohort.seed, cohort.initialiser, cohort.shared_batches)
    return {**task.settings(), **dict(zip(SETTINGS, values, strict=True))}
