"""Two results of a suite side by side: what got faster, what slower, and what the noise hides."""

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triptych_common.randomness import generator

RESAMPLES = 2000


class Change(NamedTuple):
    """A job's time in B over its time in A, with a 95% interval and what follows from it."""

    name: str
    measured: str  # "seconds", or "times" the job that took turns with it
    ratio: float
    low: float
    high: float
    verdict: str  # faster, slower, same or unclear


def read_result(path: Path) -> dict[str, Any]:
    """A suite's result.

    Raises OSError where there is none, ValueError for another file.
    """
    try:
        result = json.loads(path.read_text())
        result["suite"], result["hardware"], result["versions"], result["failed"]
        [(row["name"], row["repeats"], row["times_as_long"]) for row in result["jobs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a result of python -m benchmarks ({type(error).__name__}: {error})") from error
    return result


def compare(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> list[Change]:
    """Every job that both results have.

    A job that was measured against others in both is compared by its time over that of the first of them, turn by turn,
    which takes out how fast the machine was that day; other jobs by seconds. "slower" and "faster" mean that the whole
    interval is beyond the tolerance, "same" that it is within, "unclear" that it is neither.
    """
    rows_a, rows_b = ({row["name"]: row for row in result["jobs"]} for result in (a, b))
    changes = []
    for name in rows_a.keys() & rows_b.keys():
        shared = [other for other in rows_a[name]["times_as_long"] if other in rows_b[name]["times_as_long"]]
        reference = next((other for other in shared if other in rows_a and other in rows_b), None)
        times = [_times(rows, name, reference) for rows in (rows_a, rows_b)]
        ratio, low, high = _ratio_of_medians(*times)
        measured = "seconds" if reference is None else f"times {reference}"
        changes.append(Change(name, measured, ratio, low, high, _verdict(low, high, tolerance)))
    order = list(rows_a)
    return sorted(changes, key=lambda change: order.index(change.name))


def _times(rows: dict[str, Any], name: str, reference: str | None) -> list[float]:
    mine = rows[name]["repeats"]
    return mine if reference is None else [m / r for m, r in zip(mine, rows[reference]["repeats"], strict=True)]


def _ratio_of_medians(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median of b over median of a, with the middle 95% of the same after resampling both."""
    rng = generator(0, "compare")

    def medians(values: list[float]) -> torch.Tensor:
        drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=rng)
        return torch.tensor(values, dtype=torch.float64)[drawn].quantile(0.5, dim=1)

    low, high = (medians(b) / medians(a)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return statistics.median(b) / statistics.median(a), low, high


def _verdict(low: float, high: float, tolerance: float) -> str:
    if low > 1 + tolerance:
        return "slower"
    if high < 1 / (1 + tolerance):
        return "faster"
    return "same" if low >= 1 / (1 + tolerance) and high <= 1 + tolerance else "unclear"


def regressed(b: dict[str, Any], changes: list[Change]) -> bool:
    """Whether anything is clearly slower, or fails now."""
    return bool(b["failed"]) or any(change.verdict == "slower" for change in changes)


def report(a: dict[str, Any], b: dict[str, Any], changes: list[Change]) -> str:
    """The comparison as text, after what makes it doubtful."""
    lines = []
    if a["suite"] != b["suite"]:
        lines.append(f"different suites: {a['suite']}, {b['suite']}")
    for kind in ("hardware", "versions"):
        keys = sorted(a[kind].keys() | b[kind].keys())
        different = [f"{k} {a[kind].get(k)} -> {b[kind].get(k)}" for k in keys if a[kind].get(k) != b[kind].get(k)]
        if different:
            lines.append(f"different {kind}: {', '.join(different)}")
    lines.append(f"{'job':<34}{'B over A [95%]':>22}  {'verdict':<9}measured in")
    for name, measured, ratio, low, high, verdict in changes:
        lines.append(f"{name:<34}{ratio:>8.3f} {f'[{low:.3f}, {high:.3f}]'}  {verdict:<9}{measured}")
    names = {label: {row["name"] for row in result["jobs"]} for label, result in (("A", a), ("B", b))}
    for label, other, result in (("A", "B", b), ("B", "A", a)):
        for name in sorted(names[label] - names[other]):
            why = "failed" if name in result["failed"] else "skipped" if name in result.get("skipped", {}) else "absent"
            lines.append(f"{name:<34}only in {label}: {why} in {other}")
    return "\n".join(lines)
