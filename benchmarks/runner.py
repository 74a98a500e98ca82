"""The benchmark contract.

Every job is set up from a seed, warmed up, and timed many times; jobs of a suite take turns, so that a drifting machine
drifts under all of them alike. Reported are median and spread of each job and, against the job it names, the median and
spread of the ratio taken turn by turn, whether it flatters us or not. Hardware, versions, commit and seeds stand in the
same strict JSON. A job that fails is recorded and fails the run.
"""

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triptych_common.run import provenance


@dataclass(frozen=True)
class Job:
    """One thing to time. `prepare(seed)` returns the function that is timed; `items` of `unit` are done by one call."""

    name: str
    prepare: Callable[[int], Callable[[], Any]]
    items: int
    unit: str
    against: str | None = None


@dataclass(frozen=True)
class Plan:
    """How often to run each job."""

    warmup: int = 3
    repeats: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 2 or self.warmup < 0:
            raise ValueError(f"repeats {self.repeats}, warmup {self.warmup}: expected at least 2 and 0")


def run_suite(name: str, jobs: Sequence[Job], plan: Plan) -> dict[str, Any]:
    """Time every job; the result is JSON-able and its "failed" lists jobs that raised."""
    calls: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for job in jobs:
        try:
            calls[job.name] = job.prepare(plan.seed)
            for _ in range(plan.warmup):
                _timed(calls[job.name])
        except Exception:  # recorded below, and the run fails
            failed[job.name] = traceback.format_exc(limit=3)
    seconds: dict[str, list[float]] = {job.name: [] for job in jobs}
    for _ in range(plan.repeats):
        for job in jobs:
            if job.name in failed:
                continue
            try:
                seconds[job.name].append(_timed(calls[job.name]))
            except Exception:
                failed[job.name] = traceback.format_exc(limit=3)
    rows = [_row(job, seconds) for job in jobs if job.name not in failed]
    return {"suite": name, "plan": vars(plan), "jobs": rows, "failed": failed, **provenance()}


def _row(job: Job, seconds: dict[str, list[float]]) -> dict[str, Any]:
    mine = seconds[job.name]
    row = {
        "name": job.name,
        "seconds": spread(mine),
        f"{job.unit}_per_second": spread([job.items / s for s in mine]),
    }
    other = seconds.get(job.against or "", [])
    if len(other) == len(mine):
        row["against"] = job.against
        row["times_as_long"] = spread([a / b for a, b in zip(mine, other, strict=True)])
    return row


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high, "min": min(values), "max": max(values)}


def _timed(call: Callable[[], Any]) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(result: dict[str, Any]) -> str:
    """The result as text for people, wins and losses alike."""
    lines = [f"{'job':<34}{'ms, median [quartiles]':>30}   against"]
    for row in result["jobs"]:
        s = {key: 1000 * value for key, value in row["seconds"].items()}
        line = f"{row['name']:<34}{s['median']:>12.2f} [{s['q1']:.2f}, {s['q3']:.2f}]".ljust(66)
        if "against" in row:
            r = row["times_as_long"]
            line += f" {r['median']:.2f} [{r['q1']:.2f}, {r['q3']:.2f}] times {row['against']}"
        lines.append(line)
    lines += [f"{name:<34}FAILED: {text.strip().splitlines()[-1]}" for name, text in result["failed"].items()]
    return "\n".join(lines)
