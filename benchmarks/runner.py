"""The benchmark contract.

Every job is set up from a seed, warmed up, and timed many times; jobs of a suite take turns, so that a drifting machine
drifts under all of them alike. Reported are median and spread of each job, the memory it needs and, against each job it
names, the median and spread of the ratio of times for one item, taken turn by turn, whether it flatters us or not. Where two
jobs claim the same result, that is checked first. Every single time, hardware, versions, commit and seeds are in the same
strict JSON. A job that fails is recorded and fails the run; one that this machine cannot run is recorded with the reason.
"""

import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triptych_common.storage.provenance import provenance
from triptych_common.throughput import peak_flops


@dataclass(frozen=True)
class Job:
    """One thing to time. `prepare(seed)` returns the function that is timed; `items` of `unit` are done by one call."""

    name: str
    prepare: Callable[[int], Callable[[], Any]]
    items: int
    unit: str
    against: tuple[str, ...] = ()  # jobs to compare with
    same_as: str | None = None  # the job whose result this one's must equal, within 1e-4 of its largest value
    repeats: int | None = None  # at most so many timed calls; jobs that are compared need the same number
    flops: float | None = None  # of one item, bfloat16, for the share of the hardware's peak (MFU)
    gpu: bool = False  # works on the GPU
    skip: str | None = None  # why this machine cannot run it


@dataclass(frozen=True)
class Plan:
    """How often to run each job."""

    warmup: int = 3
    repeats: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 2 or self.warmup < 1:
            raise ValueError(f"repeats {self.repeats}, warmup {self.warmup}: expected at least 2 and 1")


TOLERANCE = 1e-4


def run_suite(
    name: str, jobs: Sequence[Job], plan: Plan, memory: Mapping[str, int | None] | None = None
) -> dict[str, Any]:
    """Time every job; the result is JSON-able, its "failed" lists jobs that raised, its "skipped" those with a reason to.

    memory: peak bytes of jobs, where they were measured before (`memory.peak_memory`); on a GPU they are measured here.
    """
    calls: dict[str, Callable[[], Any]] = {}
    results: dict[str, Any] = {}
    peaks, differences = dict(memory or {}), {}
    failed: dict[str, str] = {}
    skipped = {job.name: job.skip for job in jobs if job.skip is not None}
    running = [job for job in jobs if job.name not in skipped]
    for job in running:
        try:
            before = _start_counting_memory() if job.gpu else None
            calls[job.name] = job.prepare(plan.seed)
            results[job.name] = calls[job.name]()
            for _ in range(plan.warmup - 1):
                calls[job.name]()
            if before is not None:
                peaks[job.name] = torch.cuda.max_memory_allocated() - before
        except Exception:  # recorded below, and the run fails
            failed[job.name] = traceback.format_exc(limit=3)
    for job in running:
        if job.same_as in results and job.name in results:
            difference = differences[job.name] = _difference(results[job.name], results[job.same_as])
            if not difference <= TOLERANCE:
                failed[job.name] = f"the result differs from {job.same_as!r} by {difference:.1e} of its largest value"
    del results
    seconds: dict[str, list[float]] = {job.name: [] for job in running}
    for turn in range(plan.repeats):
        for job in running:
            if job.name in failed or turn >= (job.repeats or plan.repeats):
                continue
            try:
                seconds[job.name].append(_timed(calls[job.name]))
            except Exception:
                failed[job.name] = traceback.format_exc(limit=3)
    items = {job.name: job.items for job in running}
    rows = [_row(job, items, seconds, peaks, differences) for job in running if job.name not in failed]
    return {
        "suite": name, "plan": vars(plan), "jobs": rows, "failed": failed, "skipped": skipped, **provenance(),
    }  # fmt: skip


def _row(
    job: Job,
    items: dict[str, int],
    seconds: dict[str, list[float]],
    peaks: dict[str, int | None],
    differences: dict[str, float],
) -> dict[str, Any]:
    mine = seconds[job.name]
    rates = [job.items / s for s in mine]
    row = {
        "name": job.name,
        "items": job.items,
        "unit": job.unit,
        "seconds": spread(mine),
        "repeats": mine,
        f"{job.unit}_per_second": spread(rates),
        "peak_memory_bytes": peaks.get(job.name),
        "times_as_long": {
            other: spread([a / b * items[other] / job.items for a, b in zip(mine, seconds[other], strict=True)])
            for other in job.against
            if len(seconds.get(other, [])) == len(mine)
        },
    }
    if job.name in differences:
        row |= {"same_as": job.same_as, "difference": differences[job.name]}
    peak = peak_flops(torch.device("cuda"), "bf16") if job.gpu else None
    if job.flops is not None and peak is not None:
        row["mfu"] = spread([rate * job.flops / peak for rate in rates])
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


def _start_counting_memory() -> int:
    """Bytes of tensors on the GPU before a job, whose peak counts from here."""
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _difference(mine: torch.Tensor, other: torch.Tensor) -> float:
    return float((mine - other).abs().max() / other.abs().max())


def table(result: dict[str, Any]) -> str:
    """The result as text for people, wins and losses alike."""
    lines = [f"{'job':<34}{'ms, median [quartiles]':>32}{'a second':>16}{'peak MB':>9}  times as long as"]
    for row in result["jobs"]:
        s = {key: 1000 * value for key, value in row["seconds"].items()}
        rate = f"{row['unit'] + '_per_second'}"
        memory = "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:.0f}"
        line = f"{row['name']:<34}{s['median']:>12.2f} {'[{q1:.2f}, {q3:.2f}]'.format(**s):>19}"
        line += f"{row[rate]['median']:>16.2f}{memory:>9}"
        ratios = [
            f"{r['median']:.2f} [{r['q1']:.2f}, {r['q3']:.2f}] {name}" for name, r in row["times_as_long"].items()
        ]
        extra = [f"MFU {row['mfu']['median']:.1%}"] if "mfu" in row else []
        lines.append("  ".join([line, *extra, "; ".join(ratios)]).rstrip())
    lines += [f"{name:<34}SKIPPED: {why}" for name, why in result["skipped"].items()]
    lines += [f"{name:<34}FAILED: {text.strip().splitlines()[-1]}" for name, text in result["failed"].items()]
    return "\n".join(lines)
