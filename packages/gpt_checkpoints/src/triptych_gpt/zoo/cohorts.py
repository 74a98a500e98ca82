"""Which runs form a cohort, which split it belongs to, and the work it takes: trained, scored, written."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from triptych_gpt.tasks import Cohort, Task, Trajectories, open_task
from triptych_gpt.zoo.store import CohortData, ShardRecord, shard_name, write_shard

MAX_WEIGHT = 10.0  # runs with a larger |theta| anywhere are dropped, as from the released data
_SCORED_AT_ONCE = 4000  # checkpoints on the device


@dataclass(frozen=True)
class TaskSpec:
    """A task as a process that has not opened it needs it: what `open_task` takes."""

    task: str
    data: str | None = None
    epochs: int | None = None

    def open(self) -> Task:
        return _opened(self)


@lru_cache(maxsize=1)
def _opened(spec: TaskSpec) -> Task:
    return open_task(spec.task, data=spec.data, epochs=spec.epochs)


@dataclass(frozen=True)
class Work:
    """A cohort to collect, and how. Small when pickled, whole without anything else: any process of any machine that sees
    `folder` can do it.
    """

    task: TaskSpec
    folder: Path
    cohort: Cohort
    split: str
    dtype: str
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
    task, on = work.task.open(), torch.device(device)
    trained = task.train_cohort(work.cohort, on, work.networks_at_once)
    if work.dtype == "bfloat16":  # what is scored is what is stored
        for run in trained.theta:
            run.copy_(run.bfloat16())
    kept, dropped = _sound(trained, work.cohort.runs)
    metrics = {name: values[kept] for name, values in trained.metrics.items()}
    theta = trained.theta if len(kept) == len(trained.theta) else trained.theta[kept]
    data = CohortData(
        runs=[work.cohort.runs[i] for i in kept.tolist()],
        theta=theta,
        steps=trained.steps[kept],
        metrics={**_scored(task, theta, on, [m.name for m in task.metrics if m.name not in metrics]), **metrics},
        settings=_settings(work, task),
        dropped=dropped,
    )
    return write_shard(work.folder, work.shard, data, work.dtype)


def _sound(trained: Trajectories, runs: range) -> tuple[torch.Tensor, dict[int, str]]:
    """Which trajectories to keep, and why the others are not."""
    dropped = {}
    for run, theta in zip(runs, trained.theta, strict=True):
        largest = theta.abs().max().item()
        if not largest < float("inf"):
            dropped[run] = "weights that are not finite"
        elif largest > MAX_WEIGHT:
            dropped[run] = f"weights beyond {MAX_WEIGHT:g}"
    return torch.tensor([i for i, run in enumerate(runs) if run not in dropped], dtype=torch.long), dropped


def _scored(task: Task, theta: torch.Tensor, device: torch.device, names: list[str]) -> dict[str, torch.Tensor]:
    """Metrics of every checkpoint, [runs, checkpoints]."""
    if not names or not len(theta):
        return {name: torch.empty(theta.shape[:2]) for name in names}
    parts = [task.evaluate(part.to(device)) for part in theta.flatten(0, 1).split(_SCORED_AT_ONCE)]
    return {name: torch.cat([part[name] for part in parts]).cpu().float().view(theta.shape[:2]) for name in names}


def _settings(work: Work, task: Task) -> dict[str, Any]:
    cohort = asdict(work.cohort)
    noted = {name: cohort[name] for name in ("seed", "initialiser", "shared_batches")}
    return {"split": work.split, "cohort": work.cohort.number, **noted, **task.settings()}
