"""Import of the released G.pt checkpoint data: its LMDB environments become an ordinary zoo.

DATA/RUN/ (or DATA/RUN_RUN_RUN/, several runs in one) is an LMDB environment with a runs.json and, once complete, a DONE.txt.
runs.json lists the checkpoints of a run (of each run by name, if there are several) with their metrics under keys
RUN/epEEE_itIIIII.pt, `it` iterations into epoch `ep`; those of policies are RUN/itIIIII.pt. Each key's value is theta, raw float32;
with "_arch" appended to the key, the sizes of the parameters, also raw float32. Values are read as numbers of a known length and as
nothing else.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from triptych_common.cli import echo
from triptych_common.progress import Progress
from triptych_common.storage.files import changed_ns, read_json
from triptych_common.storage.provenance import provenance
from triptych_common.storage.run import RunDirectory

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.settings import ImportConfig
from triptych_gpt.tasks.registry import open_task
from triptych_gpt.tasks.reinforcement.task import ReinforcementTask
from triptych_gpt.zoo import lmdb_reader
from triptych_gpt.zoo.lmdb_reader import AGAIN
from triptych_gpt.zoo.store import (
    CohortData,
    Manifest,
    shard_name,
    theta_record,
    to_repair,
    unsound,
    write_shard,
    written_ns,
)

ORIGIN = "released G.pt data"
_KEY = re.compile(r".*/(?:ep(\d{1,9})_)?it(\d{1,9})\.pt", re.DOTALL)


class Source(NamedTuple):
    """A metric's key in runs.json, the factor that makes it ours, and which way is better."""

    key: str
    scale: float
    better: Literal["lower", "higher"] = "lower"


SUPERVISED = {
    "test_loss": Source("avg_test_loss", 1.0),
    "test_error": Source("avg_test_err", 0.01),  # released in per cent
    "minibatch_loss": Source("avg_train_loss", 1.0),  # of that step's minibatch, not of the training set
    "minibatch_error": Source("avg_train_err", 0.01),
}
REINFORCEMENT = {"train_return": Source("train_ret", 1.0, "higher")}


def preview_lmdb(config: ImportConfig) -> dict[str, Any]:
    """What --dry-run prints."""
    assert config.lmdb is not None
    runs, skipped = find_runs(config.lmdb)
    return {"config": asdict(config), "runs": len(runs), "unfinished_folders": skipped}


def import_lmdb(config: ImportConfig, layout: ParameterLayout | None = None) -> dict[str, Any]:
    """Write the zoo, or the rest of it; returns counts.

    layout: of the networks, by default those of the task. Raises ValueError for data of another layout or network, a damaged or a
    foreign folder; ImportError without the package lmdb; OSError if writing fails, with all earlier shards intact.
    """
    lmdb_reader.require_lmdb()
    assert config.lmdb is not None
    task = open_task(config.task or "mnist_mlp") if layout is None else None
    layout = layout or task.layout  # type: ignore[union-attr]
    sources = REINFORCEMENT if isinstance(task, ReinforcementTask) else SUPERVISED
    # Runs are numbered in the released code's order, folders by name, since its test split is the last ones.
    runs, skipped = find_runs(config.lmdb)
    better = {name: source.better for name, source in sources.items()}
    checkpoints = config.checkpoints or 200

    def read(split: str, cohort: range) -> CohortData:
        return _read_cohort(cohort, runs, split, checkpoints, layout, sources)

    found = Found(
        config.lmdb, runs, skipped, ORIGIN, checkpoints, 500 if config.num_test_runs is None else config.num_test_runs
    )
    facts = {"task": config.task or "mnist_mlp", "metrics": better}
    return import_runs(config, found, layout, facts, read)


class Found(NamedTuple):
    """Runs to import: where from, their names and folders, how many folders are unfinished, how many checkpoints a run has and how
    many runs are for testing.
    """

    folder: Path
    runs: Sequence[tuple[str, Path]]
    skipped: int
    origin: str
    checkpoints: int
    test: int


def import_runs(
    config: ImportConfig, found: Found, layout: ParameterLayout, facts: Mapping[str, Any],
    read: Callable[[str, range], CohortData],
) -> dict[str, Any]:  # fmt: skip
    """Write the zoo, or the rest of it, cohort by cohort as `read` reads them; returns counts.

    facts: "task" and "metrics" of the manifest, and others.
    """
    runs, test = found.runs, found.test
    if found.checkpoints < 2:
        raise ValueError(f"checkpoints {found.checkpoints}: expected 2 or more; save more of each run")
    validation = max(0, min(16, (len(runs) - test) // 10)) if config.validation_runs is None else config.validation_runs
    splits = Splits.of(len(runs), validation, test, f"the {len(runs):,} runs in {found.folder}")
    names = xxhash.xxh3_128("/".join(name for name, _ in runs).encode()).hexdigest()
    settings = {"origin": found.origin, "runs": len(runs), "run_names": names}
    # Options that decide what the zoo is; without a validation split, as before there was one.
    chosen: dict[str, Any] = {
        "task": config.task or facts["task"],
        "num_test_runs": test,
        "checkpoints": found.checkpoints,
    }
    chosen |= {"cohort_runs": config.cohort_runs, "dtype": config.dtype}
    chosen |= {"validation_runs": validation} if validation else {}
    identity = {**settings, **chosen}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
    kind = "lmdb" if config.sb3 is None else "sb3"
    manifest_facts = {
        "layout": layout.to_json(),
        "checkpoints": found.checkpoints,
        "dtype": config.dtype,
        "recipe": identity,
        "repair": f"triptych-gpt import --repair --{kind} {shlex.quote(str(found.folder))} {options}",
        **facts,
    }
    with RunDirectory(config.out, identity):
        manifest = write_zoo(
            config, manifest_facts, splits.cohorts(config.cohort_runs), read,
            lambda cohort: changed_ns(runs[run][1] for run in cohort),
        )  # fmt: skip
    left_out = f"skipped {found.skipped:,} folders without DONE.txt"
    return {**summary(config, manifest, left_out), "unfinished_folders": found.skipped}


def refuse_unreadable_names(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError for the name of a run that is no text, since an index holds them as text."""
    for name in names:
        if not name.isascii() and os.fsencode(name).decode(errors="ignore") != name:
            raise ValueError(f"{folder}: the name of run {os.fsencode(name)!r} is not UTF-8; rename it")


class Splits(NamedTuple):
    """Consecutive runs for training, validation and testing."""

    train: range
    validation: range
    test: range

    @classmethod
    def of(cls, runs: int, validation: int, test: int, held: str) -> "Splits":
        """The last `test` runs are for testing, those before them for validation. Raises ValueError if none are left to train."""
        if validation + test >= runs:
            names = f"num_test_runs {test}" + (f" and validation_runs {validation}" if validation else "")
            raise ValueError(f"{names}: expected less than {held}")
        return cls(
            range(runs - test - validation), range(runs - test - validation, runs - test), range(runs - test, runs)
        )

    def cohorts(self, cohort_runs: int) -> Iterator[tuple[str, range]]:
        """Split and consecutive runs of each shard."""
        for split, numbers in self._asdict().items():
            for start in range(0, len(numbers), cohort_runs):
                yield split, numbers[start : start + cohort_runs]


def write_zoo(
    config: ImportConfig,
    facts: Mapping[str, Any],
    cohorts: Iterator[tuple[str, range]],
    read: Callable[[str, range], CohortData],
    changed: Callable[[range], int],
) -> Manifest:
    """Write those shards of a zoo that it lacks, or that are to be repaired; returns its manifest.

    changed: when the files of some runs were changed last: those that are newer than their shard are compared with it.
    Raises ValueError for weights that are not those that a shard has, or had.
    """
    if found := Manifest.recover(config.out):
        if found.layout.to_json() != facts["layout"]:
            raise ValueError(f"{config.out}: a zoo of another version of {facts['task']}; use another --out")
        found.save()
    manifest = found or Manifest.create(config.out, {**facts, "provenance": provenance()})
    done = {record.name: record for record in manifest.shards}
    again = {damage.shard for damage in to_repair(manifest, repair=config.repair)}
    wanted = {shard_name(cohort): (split, cohort) for split, cohort in cohorts}
    # Those that are there first: nothing is written beside shards of other runs.
    order = sorted(wanted, key=lambda name: name not in done or name in again)
    with Progress("import", sum(len(cohort) for _, cohort in wanted.values()), "runs") as progress:
        progress.at(0)
        for name in order:
            split, cohort = wanted[name]
            whole = name in done and name not in again
            if not whole or changed(cohort) > written_ns(manifest, done[name]):
                data = read(split, cohort)
                if name in done and theta_record(data, config.dtype) != done[name].theta:
                    source = config.folder or config.lmdb or config.sb3
                    problem = f"runs {cohort.start}..{cohort.stop - 1} are not those that were imported"
                    raise ValueError(f"{source}: {problem}; put them back, or use another --out")
                if not whole:
                    manifest.commit(write_shard(config.out, name, data, config.dtype), replace=name in again)
            progress.advance(len(cohort))
    return manifest


def _read_cohort(
    cohort: range, runs: Sequence[tuple[str, Path]], split: str, checkpoints: int, layout: ParameterLayout,
    sources: Mapping[str, Source],
) -> CohortData:  # fmt: skip
    shape = (len(cohort), checkpoints)
    theta, steps = np.empty((*shape, layout.size), dtype=np.float32), np.empty(shape, dtype=np.int64)
    values = {name: np.empty(shape, dtype=np.float32) for name in sources}
    complete: list[int] = []
    dropped: dict[int, str] = {}
    for run in cohort:
        row = len(complete)  # of a dropped run, the next one overwrites it
        each = {name: v[row] for name, v in values.items()}
        reason = _read_run(*runs[run], layout, theta[row], steps[row], each, sources)
        if reason is None:
            complete.append(run)
        else:
            dropped[run] = reason
    used = slice(len(complete))
    return CohortData(
        runs=complete,
        theta=torch.from_numpy(theta[used]),
        steps=torch.from_numpy(steps[used]),
        metrics={name: torch.from_numpy(all_values[used]) for name, all_values in values.items()},
        settings={"split": split, "origin": ORIGIN, "name": np.array([runs[run][0] for run in complete])},
        dropped=dropped,
    )


def _read_run(
    name: str,
    folder: Path,
    layout: ParameterLayout,
    theta: np.ndarray,
    steps: np.ndarray,
    values: Mapping[str, np.ndarray],
    sources: Mapping[str, Source],
) -> str | None:
    """Fill a run's theta [checkpoints, D], steps and values [checkpoints]; why it is dropped, if it is."""
    listed = checkpoints_of(name, folder)
    if len(listed) != len(steps):
        return f"{len(listed)} checkpoints"
    order = sorted(listed, key=lambda key: listed[key][0])
    steps[:] = [listed[key][0] for key in order]
    for metric, source in sources.items():
        values[metric][:] = [read_metric(source, listed[key][1], folder, key) for key in order]
    sizes = [span.stop - span.start for span in layout.spans.values()]
    theta[:] = lmdb_reader.read_apart(folder, order, sizes)
    if not all(np.isfinite(each).all() for each in values.values()):
        return "metrics that are not finite"
    return unsound(torch.from_numpy(theta))


def summary(config: ImportConfig, manifest: Manifest, left_out: str = "") -> dict[str, Any]:
    """Print and return what the zoo holds. Raises ValueError if every run was dropped."""
    counts, dropped = manifest.counts()
    runs = {"train": 0, "test": 0, **counts}
    held = ", ".join(f"{count:,} {split}" for split, count in runs.items())
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.most_common(3))
    why = f"dropped {dropped.total():,}{f' ({reasons})' if reasons else ''}"
    echo(f"wrote {config.out}: runs {held}; {'; '.join(filter(None, (why, left_out)))}")
    if not sum(runs.values()):
        source = config.folder or config.lmdb or config.sb3
        raise ValueError(f"{source}: no run could be used ({reasons}); see --checkpoints and --task")
    return {"out": str(config.out), "runs": runs, "dropped": dict(dropped), "shards": len(manifest.shards)}


def find_runs(folder: Path) -> tuple[list[tuple[str, Path]], int]:
    """Name and environment of every complete run, in the released order, and the number of folders without DONE.txt.

    Raises FileNotFoundError for an absent folder, ValueError for one without complete runs.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the one that holds a folder for each run")
    folders = sorted((path for path in folder.iterdir() if (path / "data.mdb").is_file()), key=str)
    done = [path for path in folders if (path / "DONE.txt").exists()]
    if not done:
        expected = f"folders with data.mdb, runs.json and DONE.txt; {len(folders):,} have no DONE.txt"
        raise ValueError(f"{folder}: no complete runs ({expected})")
    where = {run: path for path in done for run in path.name.split("_")}
    refuse_unreadable_names(folder, where)
    return list(where.items()), len(folders) - len(done)


def checkpoints_of(name: str, folder: Path) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """Step and metrics of each checkpoint of a run, by its key."""
    path = folder / "runs.json"
    try:
        content = read_json(path, remedy=AGAIN, finite=False)  # metrics of diverged runs are NaN; such runs are dropped
        listed = content.get(name, content)["checkpoints"]
        places = {key: (_KEY.fullmatch(key), metrics) for key, metrics in listed.items()}
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; {AGAIN}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of checkpoints as the released data has them; {AGAIN}") from error
    if wrong := [key for key, (place, _) in places.items() if place is None]:
        raise ValueError(
            f"{path}: checkpoint {wrong[0][:80]!r}, expected RUN/epEEE_itIIIII.pt or RUN/itIIIII.pt; {AGAIN}"
        )
    epochs = {key: (int(place[1] or 0), int(place[2])) for key, (place, _) in places.items() if place is not None}
    # The last checkpoint is at the end of an epoch, so the largest `it` is the number of iterations of an epoch.
    length = max((iteration for _, iteration in epochs.values()), default=0)
    return {key: (epoch * length + iteration, listed[key]) for key, (epoch, iteration) in epochs.items()}


def read_metric(source: Source, metrics: Mapping[str, Any], folder: Path, key: str) -> float:
    """Our value of one checkpoint's metric. Raises ValueError if it is no number."""
    try:
        return source.scale * float(metrics[source.key])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / 'runs.json'}: {key} has no number {source.key!r}; {AGAIN}") from error
