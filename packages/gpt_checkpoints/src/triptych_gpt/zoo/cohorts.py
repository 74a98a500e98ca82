"""Cohorts of runs, their splits, and the work on one: training, scoring, writing."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from triptych_gpt.tasks.stack import OneByOneWarning
from triptych_gpt.tasks.task import Cohort, Task, Trajectories
from triptych_gpt.zoo.source import TaskSpec, json_digest, one_line
from triptych_gpt.zoo.store import CohortData, ShardRecord, shard_name, unsound, write_shard

# Columns of the index that describe a run, besides the task's own settings.
SETTINGS = ("split", "cohort", "seed", "initialiser", "shared_batches")
_SCORED_AT_ONCE = 4000  # checkpoints on the device


@lru_cache(maxsize=1)
def _opened(spec: TaskSpec, recipe: str) -> Task:
    """The task, opened once in this process. Raises ValueError if it is not the one of the zoo."""
    task = spec.open()
    if json_digest(task.recipe()) != recipe:
        remedy = "make its data and settings the same in every process (seed what is random)"
        raise ValueError(f"task {task.name}: another recipe each time it is opened, or changed meanwhile; {remedy}")
    return task


@dataclass(frozen=True)
class Work:
    """A cohort to collect, and how: all that a process on any machine that sees `folder` needs, and small when pickled."""

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
    """Split of a cohort: of `every` consecutive ones the second is for testing, the third for validation."""
    # So a cohort's split never changes as its zoo grows, and three cohorts suffice for all three.
    return {1: "test", 2: "validation"}.get(cohort % every, "train")


def cohorts(first: int, stop: int, cohort_runs: int) -> Iterator[tuple[int, range]]:
    """Numbers of the cohorts of runs first .. stop-1, and those of each one's runs."""
    for number in range(first // cohort_runs, -(-stop // cohort_runs)):
        start = number * cohort_runs
        yield number, range(max(first, start), min(stop, start + cohort_runs))


def collect_cohort(work: Work, device: str) -> ShardRecord:
    """Train, score and write a cohort; returns the record for the manifest.

    Raises OSError if the files cannot be written, ValueError for a cohort that the task cannot train.
    """
    task, on, cohort, runs = _opened(work.task, work.recipe), torch.device(device), work.cohort, work.cohort.runs
    with one_line(f"task {task.name}, runs {runs[0]}..{runs[-1]}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", OneByOneWarning)  # reported by whoever gives out the work, not by every process
        trained = task.train_cohort(cohort, on, work.networks_at_once)
        _check(trained, work, task)
        if work.dtype == "bfloat16":  # scored as they are stored
            for run in trained.theta:
                run.copy_(run.bfloat16())
        problems = [unsound(run) for run in trained.theta]
        sound = torch.tensor([problem is None for problem in problems])
        dropped = {run: problem for run, problem in zip(runs, problems, strict=True) if problem is not None}
        theta, places = _compacted(trained.theta, sound), sound.nonzero().flatten()
        metrics = {name: values[places] for name, values in trained.metrics.items()}
        metrics = {**_scored(task, theta, on, [m.name for m in task.metrics if m.name not in metrics]), **metrics}
    finite = torch.stack([values.isfinite().all(1) for values in metrics.values()]).all(0)
    dropped |= {runs[i]: "metrics that are not finite" for i in places[~finite].tolist()}
    theta, places = _compacted(theta, finite), places[finite]
    own = (work.split, cohort.number, cohort.seed, cohort.initialiser, cohort.shared_batches)
    data = CohortData(
        runs=[runs[i] for i in places.tolist()],
        theta=theta,
        steps=trained.steps[places],
        metrics={name: values[finite] for name, values in metrics.items()},
        settings={**task.settings(), **dict(zip(SETTINGS, own, strict=True))},
        dropped=dropped,
    )
    return write_shard(work.folder, work.shard, data, work.dtype)


def _check(trained: Trajectories, work: Work, task: Task) -> None:
    """Raises ValueError for trajectories of another shape than requested."""
    rows = (len(work.cohort.runs), work.cohort.checkpoints)
    for name, values in {"theta": trained.theta, "steps": trained.steps, **trained.metrics}.items():
        shape, expected = tuple(values.shape), (*rows, task.layout.size) if name == "theta" else rows
        if shape != expected:
            raise ValueError(f"task {task.name}: train_cohort gave {name} {shape}, expected {expected}")


def _compacted(theta: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The rows to keep, moved up in place: a copy would double the memory of a cohort."""
    places = keep.nonzero().flatten().tolist()
    for new, old in enumerate(places):
        if new != old:
            theta[new] = theta[old]
    return theta[: len(places)]


def _scored(task: Task, theta: torch.Tensor, device: torch.device, names: list[str]) -> dict[str, torch.Tensor]:
    """These metrics of every checkpoint, each [runs, checkpoints]."""
    if not names or not len(theta):
        return {name: torch.empty(theta.shape[:2]) for name in names}
    parts = [task.evaluate(part.to(device)) for part in theta.flatten(0, 1).split(_SCORED_AT_ONCE)]
    return {name: torch.cat([part[name] for part in parts]).cpu().float().view(theta.shape[:2]) for name in names}
