"""Import of a folder of checkpoints, whoever saved them, with metrics from a table or from the task's own scoring."""

import csv
import io
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from triptych_common.cli import echo
from triptych_common.randomness import permutation
from triptych_common.storage.files import changed_ns, read_bytes, read_json
from triptych_common.storage.run import RunDirectory
from triptych_common.storage.tables import parquet

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.settings import ImportConfig
from triptych_gpt.tasks.task import Task
from triptych_gpt.zoo.checkpoint_files import find, layout_of, read_state, theta_of
from triptych_gpt.zoo.lmdb_import import Splits, refuse_unreadable_names, summary, write_zoo
from triptych_gpt.zoo.source import NO_TASK, TaskSpec
from triptych_gpt.zoo.store import OWN_COLUMNS, CohortData, unsound

ORIGIN = "folder of checkpoints"
_COHORT_FLOATS = 1 << 28  # of a shard, which is in memory as a whole
_LARGEST_STEP = (1 << 63) - 1
_REMEDY = "a table has columns run, step, and one for each metric"


@dataclass(frozen=True)
class _Source:
    """What is to be imported, decided before anything is written."""

    runs: dict[str, list[tuple[int, Path]]]  # checkpoints by step, in the order of the zoo
    dropped: dict[str, str]
    layout: ParameterLayout
    task: Task | None
    whose: str  # network it is, in words
    table: dict[tuple[str, int], dict[str, float]]
    better: dict[str, str]  # by metric, those of the task first
    rescored: tuple[str, ...]
    checkpoints: int
    splits: Splits


def preview_folder(config: ImportConfig) -> dict[str, Any]:
    """What --dry-run prints."""
    source = _open(config)
    return {
        "config": asdict(config),
        "runs": {split: len(numbers) for split, numbers in source.splits._asdict().items()},
        "dropped": source.dropped,
        "checkpoints": source.checkpoints,
        "parameters": source.layout.size,
        "metrics": source.better,
        "bytes": len(source.runs) * source.checkpoints * source.layout.size * (4 if config.dtype == "float32" else 2),
    }


def import_folder(config: ImportConfig) -> dict[str, Any]:
    """Write the zoo, or the rest of it; returns counts.

    Raises ValueError for networks other than the task's (showing both), metrics that are missing or of unknown direction, or a
    damaged file, with all earlier shards intact; FileNotFoundError for an absent folder, OSError if writing fails.
    """
    source = _open(config)
    assert config.folder is not None
    of_run = source.checkpoints * source.layout.size
    cohort_runs = max(1, min(config.cohort_runs, _COHORT_FLOATS // of_run))
    spec = spec_of(config)
    listed = [[name, [step for step, _ in files]] for name, files in source.runs.items()]
    identity: dict[str, Any] = {
        "origin": ORIGIN,
        "runs": len(source.runs),
        "checkpoints": _digest(listed),
        "metrics": source.better,
        "rescored": list(source.rescored),
        "table": _digest([[*key, values] for key, values in sorted(source.table.items())]) if source.table else None,
        "splits": [len(numbers) for numbers in source.splits],
        "cohort_runs": cohort_runs,
        "dtype": config.dtype,
        **({} if spec is None else {"task": spec.task.rpartition("/")[2], **spec.source()}),
    }
    facts = {
        "task": NO_TASK if source.task is None else source.task.name,
        "layout": source.layout.to_json(),
        "checkpoints": source.checkpoints,
        "dtype": config.dtype,
        "metrics": source.better,
        "recipe": identity,
        "repair": f"triptych-gpt import {_words(config)} --repair",
        **({} if spec is None else {"opened_by": asdict(spec)}),
    }
    names = list(source.runs)
    with RunDirectory(config.out, identity):
        manifest = write_zoo(
            config, facts, source.splits.cohorts(cohort_runs),
            lambda split, cohort: _read_cohort(source, split, cohort, names, config.device),
            lambda cohort: changed_ns(path for run in cohort for _, path in source.runs[names[run]]),
        )  # fmt: skip
    result = summary(config, manifest)
    return {**result, "dropped": dict(Counter(result["dropped"]) + Counter(source.dropped.values()))}


def _open(config: ImportConfig) -> _Source:
    """Everything about the folder but its weights; says what is left out or chosen."""
    assert config.folder is not None
    found = find(config.folder, config.pattern)
    for reason, paths in found.left_out.items():
        some = ", ".join(str(path.relative_to(config.folder)) for path in paths[:3])
        echo(f"left out {len(paths):,} ({reason}): {some}{', ...' if len(paths) > 3 else ''}")
    refuse_unreadable_names(config.folder, found.runs)
    latest = [next(reversed(files.items())) for files in found.runs.values()]
    if beyond := [path for step, path in latest if step > _LARGEST_STEP]:
        raise ValueError(f"{beyond[0]}: a step above {_LARGEST_STEP:,}; rename it, or tell steps by --pattern")
    spec = spec_of(config)
    task = None if spec is None else spec.open()
    first = next(iter(next(iter(found.runs.values())).values()))
    if task is None:
        try:
            layout, whose = layout_of(read_state(first)), f"the one in {first}"
        except ValueError as error:
            raise ValueError(str(error) if str(first) in str(error) else f"{first}: {error}") from error
    else:
        layout, whose = task.layout, f"task {task.name}'s"
    theta_of(read_state(first, layout.shapes), layout, str(first), whose)  # refused before there is a folder
    table, columns = _read_table(config.metrics) if config.metrics is not None else ({}, ())
    better, rescored = _metrics(config, task, columns)
    count = config.checkpoints or _common_count(found.runs)
    runs, dropped = _chosen(found.runs, count)
    if not runs:
        longest = max(map(len, found.runs.values()))
        raise ValueError(f"{config.folder}: no run has the {count} checkpoints that are needed, at most {longest}")
    total = len(runs)
    tenth = max(1, total // 10) if total > 2 else 0
    test = tenth if config.num_test_runs is None else config.num_test_runs
    validation = tenth if config.validation_runs is None else config.validation_runs
    splits = Splits.of(total, validation, test, f"the {total:,} runs in {config.folder}")
    # Drawn, since names often tell settings, and the last ones would be those of the last setting.
    names, order = list(runs), permutation(config.seed, "import splits", 0, total).tolist()
    numbered = [names[i] for part in splits for i in sorted(order[part.start : part.stop])]
    ordered = {name: runs[name] for name in numbered}
    return _Source(ordered, dropped, layout, task, whose, table, better, rescored, count, splits)


def spec_of(config: ImportConfig) -> TaskSpec | None:
    """The task to open, with the absolute path of a user's file; None without one."""
    if config.task is None:
        return None
    path, colon, name = config.task.rpartition(":")
    return TaskSpec(f"{Path(path).resolve()}:{name}" if colon and path.endswith(".py") else config.task)


def _common_count(runs: Mapping[str, Mapping[int, Path]]) -> int:
    """The number of checkpoints that most runs have, the larger of equally frequent ones."""
    counts = Counter(map(len, runs.values()))
    return max(counts, key=lambda count: (counts[count], count))


def _chosen(
    runs: Mapping[str, Mapping[int, Path]], count: int
) -> tuple[dict[str, list[tuple[int, Path]]], dict[str, str]]:
    """`count` checkpoints of each run, evenly spaced from its first to its last; and why others are dropped."""
    if count < 2:
        raise ValueError(f"checkpoints {count}: most runs have no more, expected 2 or more; save more of each run")
    chosen: dict[str, list[tuple[int, Path]]] = {}
    dropped: dict[str, str] = {}
    thinned: list[str] = []
    for name, files in runs.items():
        steps = list(files.items())
        if len(steps) < count:
            dropped[name] = f"{len(steps)} checkpoints, {count} are needed"
            continue
        if len(steps) > count:
            thinned.append(name)
        chosen[name] = [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]
    if thinned:
        echo(
            f"{len(thinned):,} runs with more than {count} checkpoints ({_some(thinned)}): {count} evenly spaced ones of each"
        )
    if dropped:
        echo(
            f"dropped {len(dropped):,} runs with fewer than {count} checkpoints: {_some(dropped)}; --checkpoints decides"
        )
    return chosen, dropped


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _metrics(config: ImportConfig, task: Task | None, columns: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Which metrics the zoo has and which way is better, and which of them the task scores now."""
    given = dict(text.partition("=")[::2] for text in config.better)
    known: dict[str, str] = {} if task is None else {metric.name: metric.better for metric in task.metrics}
    for name, direction in given.items():
        if name not in columns:
            raise ValueError(
                f"better {name}: no such column; {config.metrics or 'no --metrics table'} has {', '.join(columns) or 'none'}"
            )
        if known.get(name, direction) != direction:
            raise ValueError(f"better {name}={direction}: of task {config.task} {known[name]} is better; leave it out")
    if config.rescore and task is None:
        raise ValueError("--rescore needs the task that scores networks; give --task, or metrics by --metrics")
    rescored = tuple(name for name in known if name not in columns) if config.rescore else ()
    better = {name: known[name] for name in known if name in columns or name in rescored}
    better |= {name: direction for name, direction in given.items() if name not in better}
    if unknown := [name for name in columns if name not in better]:
        echo(f"no metrics, since which way is better is not known: {', '.join(unknown)} (--better {unknown[0]}=lower)")
    if not better:
        where = (
            "--rescore, or --metrics TABLE and --better METRIC=lower"
            if config.metrics is None
            else "--better METRIC=lower"
        )
        raise ValueError(f"{config.folder}: no metric of its checkpoints is known; give {where}")
    if taken := sorted({*OWN_COLUMNS, "split", "origin", "name"} & better.keys()):
        raise ValueError(f"metric {taken[0]}: the index has a column of that name already; rename it")
    return better, rescored


def _read_table(path: Path) -> tuple[dict[tuple[str, int], dict[str, float]], tuple[str, ...]]:
    """Metrics by run and step, and the names of the columns that hold numbers."""
    rows = _rows(path)
    if not rows or not all(isinstance(row, Mapping) and "run" in row and "step" in row for row in rows):
        held = ", ".join(map(str, rows[0])) if rows and isinstance(rows[0], Mapping) else "no rows"
        raise ValueError(f"{path}: {held}; {_REMEDY}")
    table: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        try:
            key = str(row["run"]), int(float(row["step"]))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{path}: step {row['step']!r} of run {row['run']!r}: expected a number; {_REMEDY}"
            ) from error
        if key in table:
            raise ValueError(f"{path}: run {key[0]} has two rows of step {key[1]}; leave one")
        table[key] = {str(name): _number(value) for name, value in row.items() if name not in ("run", "step")}
    names = dict.fromkeys(name for values in table.values() for name in values)
    return table, tuple(n for n in names if any(np.isfinite(values.get(n, np.nan)) for values in table.values()))


def _rows(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        return parquet(path, remedy=_REMEDY, extra="triptych-gpt", name="run").to_pylist()
    if path.suffix == ".json":
        return read_json(path, list[dict[str, Any]], remedy=f"expected [{{...}}, ...]; {_REMEDY}")
    if path.suffix != ".csv":
        raise ValueError(f"metrics {path}: expected a table in .csv, .json or .parquet")
    try:
        return list(csv.DictReader(io.StringIO(read_bytes(path).decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file ({error}); {_REMEDY}") from error


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def _read_cohort(source: _Source, split: str, cohort: range, names: Sequence[str], device: str) -> CohortData:
    theta = torch.empty(len(cohort), source.checkpoints, source.layout.size)
    kept: list[int] = []
    dropped: dict[int, str] = {}
    for run in cohort:
        row = theta[len(kept)]
        for place, (_, path) in enumerate(source.runs[names[run]]):
            row[place] = theta_of(read_state(path, source.layout.shapes), source.layout, str(path), source.whose)
        problem = unsound(row) or _lacking(source, names[run])
        if problem is None:
            kept.append(run)
        else:
            dropped[run] = problem
    theta = theta[: len(kept)]
    values = {
        name: torch.tensor(
            [[source.table[names[run], step][name] for step, _ in source.runs[names[run]]] for run in kept]
        )
        for name in source.better
        if name not in source.rescored
    }
    if source.rescored and kept:
        values |= _scored(source, theta, device)
    shape = (len(kept), source.checkpoints)
    values = {name: values.get(name, torch.empty(0)).float().reshape(shape) for name in source.better}
    finite = torch.stack([value.isfinite().all(1) for value in values.values()]).all(0)
    dropped |= {kept[i]: "metrics that are not finite" for i in (~finite).nonzero().flatten().tolist()}
    runs = [run for run, good in zip(kept, finite.tolist(), strict=True) if good]
    steps = torch.tensor([[step for step, _ in source.runs[names[run]]] for run in runs], dtype=torch.int64)
    return CohortData(
        runs=runs,
        theta=theta[finite],
        steps=steps.reshape(len(runs), source.checkpoints),
        metrics={name: value[finite] for name, value in values.items()},
        settings={"split": split, "origin": ORIGIN, "name": np.array([names[run] for run in runs])},
        dropped=dropped,
    )


def _lacking(source: _Source, name: str) -> str | None:
    """Why a run is dropped if the table lacks one of its metrics."""
    for metric in source.better:
        if metric in source.rescored:
            continue
        if any(metric not in source.table.get((name, step), {}) for step, _ in source.runs[name]):
            return f"no {metric} of every checkpoint in the table"
    return None


def _scored(source: _Source, theta: torch.Tensor, device: str) -> dict[str, torch.Tensor]:
    """Metrics by the task's own scoring, [runs, checkpoints]."""
    from triptych_common.parallel import process_group

    assert source.task is not None
    with process_group(device) as ranks:
        parts = [source.task.evaluate(part.to(ranks.device)) for part in theta.flatten(0, 1).split(4000)]
    return {name: torch.cat([part[name] for part in parts]).cpu().view(theta.shape[:2]) for name in source.rescored}


def _digest(content: Any) -> str:
    return xxhash.xxh3_128(json.dumps(content).encode()).hexdigest()


def _words(config: ImportConfig) -> str:
    """The command line's options that decide what the zoo is."""
    words: list[str] = []
    names = (
        "folder",
        "task",
        "pattern",
        "metrics",
        "num_test_runs",
        "validation_runs",
        "checkpoints",
        "cohort_runs",
        "dtype",
        "seed",
    )
    for name in names:
        if getattr(config, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    words += ["--rescore"] if config.rescore else []
    words += ["--better", *config.better] if config.better else []
    return shlex.join(words)
