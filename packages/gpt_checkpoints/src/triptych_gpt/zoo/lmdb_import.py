"""Import of the released G.pt checkpoint data: its LMDB environments become an ordinary zoo.

DATA/RUN/ (or DATA/RUN_RUN_RUN/, fused) is an LMDB environment with a runs.json and, once complete, a DONE.txt.
runs.json lists the checkpoints of a run (of each run by its name, where fused) with their metrics under keys
RUN/epEEE_itIIIII.pt: `it` iterations into epoch `ep`. Each key's value is theta, raw float32; with "_arch" appended to the
key, the sizes of the parameters, also raw float32. Values are read as numbers of a known length and as nothing else.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from triptych_common.cli import echo
from triptych_common.progress import Progress
from triptych_common.storage.provenance import provenance
from triptych_common.storage.run import RunDirectory

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.settings import ImportConfig
from triptych_gpt.tasks.registry import open_task
from triptych_gpt.zoo.store import MANIFEST, CohortData, Manifest, shard_name, to_repair, unsound, write_shard

_CHOSEN = ("task", "num_test_runs", "checkpoints", "cohort_runs", "dtype")  # options that decide what the zoo is
ORIGIN = "released G.pt data"
_KEY = re.compile(r".*/ep(\d{1,9})_it(\d{1,9})\.pt", re.DOTALL)
_AGAIN = "fetch this folder again, or move it away"


class Source(NamedTuple):
    """Where a metric of ours stands in runs.json, what to multiply it by, and which is better."""

    key: str
    scale: float
    better: Literal["lower", "higher"]


SUPERVISED = {
    "test_loss": Source("avg_test_loss", 1.0, "lower"),
    "test_error": Source("avg_test_err", 0.01, "lower"),  # released in percent
    "minibatch_loss": Source("avg_train_loss", 1.0, "lower"),  # of that step's minibatch, not of the training set
    "minibatch_error": Source("avg_train_err", 0.01, "lower"),
}


def preview(config: ImportConfig) -> dict[str, Any]:
    """What --dry-run prints."""
    runs, skipped = find_runs(config.lmdb)
    return {"config": asdict(config), "runs": len(runs), "unfinished_folders": skipped}


def import_command(config: ImportConfig) -> dict[str, Any]:
    """`import_lmdb` for networks of the task that the settings name."""
    return import_lmdb(config, open_task(config.task).layout)


def import_lmdb(
    config: ImportConfig, layout: ParameterLayout, metrics: Mapping[str, Source] = SUPERVISED
) -> dict[str, Any]:
    """Write the zoo, or the rest of it; returns counts.

    Runs are numbered as the released code orders them, folders by name; the last `num_test_runs` are the test split.
    layout: of the task's network. Raises ValueError for data of another layout or network, a damaged or a foreign folder;
    ImportError without the package lmdb; OSError when the disk refuses, all shards written before intact.
    """
    require_lmdb()
    runs, skipped = find_runs(config.lmdb)
    if len(runs) <= config.num_test_runs:
        raise ValueError(
            f"num_test_runs {config.num_test_runs}: expected less than the {len(runs):,} runs in {config.lmdb}"
        )
    names = xxhash.xxh3_128("/".join(name for name, _ in runs).encode()).hexdigest()
    settings = {"origin": ORIGIN, "runs": len(runs), "run_names": names}
    identity = {**settings, **{name: getattr(config, name) for name in _CHOSEN}}
    with RunDirectory(config.out, identity):
        manifest = _manifest(config, layout, metrics, identity)
        again = {damage.shard for damage in to_repair(manifest, repair=config.repair)}
        with Progress("import", len(runs), "runs") as progress:
            progress.at(0)
            for split, cohort in _cohorts(len(runs), config):
                name = shard_name(cohort)
                if name not in manifest.names or name in again:
                    data = _read_cohort(cohort, runs, split, config.checkpoints, layout, metrics)
                    record = write_shard(config.out, name, data, config.dtype)
                    manifest.commit(record, replace=name in again)
                progress.advance(len(cohort))
    return _summary(config, manifest, skipped)


def _manifest(
    config: ImportConfig, layout: ParameterLayout, metrics: Mapping[str, Source], recipe: Mapping[str, Any]
) -> Manifest:
    if (config.out / MANIFEST).exists():
        manifest = Manifest.read(config.out)
        if manifest.layout != layout:
            raise ValueError(f"{config.out}: a zoo of another version of {config.task}; use another --out")
        return manifest
    options = " ".join(f"--{name.replace('_', '-')} {getattr(config, name)}" for name in _CHOSEN)
    facts = {
        "task": config.task,
        "layout": layout.to_json(),
        "checkpoints": config.checkpoints,
        "dtype": config.dtype,
        "metrics": {name: source.better for name, source in metrics.items()},
        "recipe": dict(recipe),
        "repair": f"triptych-gpt import --repair --lmdb {shlex.quote(str(config.lmdb))} {options}",
        "provenance": provenance(),
    }
    return Manifest.create(config.out, facts)


def _cohorts(runs: int, config: ImportConfig) -> Iterator[tuple[str, range]]:
    """Splits and the consecutive runs of each shard, none in two splits."""
    first_test = runs - config.num_test_runs
    for split, numbers in (("train", range(first_test)), ("test", range(first_test, runs))):
        for start in range(0, len(numbers), config.cohort_runs):
            yield split, numbers[start : start + config.cohort_runs]


def _read_cohort(
    cohort: range,
    runs: Sequence[tuple[str, Path]],
    split: str,
    checkpoints: int,
    layout: ParameterLayout,
    metrics: Mapping[str, Source],
) -> CohortData:
    theta = np.empty((len(cohort), checkpoints, layout.size), dtype=np.float32)
    steps = np.empty((len(cohort), checkpoints), dtype=np.int64)
    values = {name: np.empty((len(cohort), checkpoints), dtype=np.float32) for name in metrics}
    kept: list[int] = []
    dropped: dict[int, str] = {}
    for run in cohort:
        row = len(kept)
        reason = _read_run(*runs[run], layout, metrics, theta[row], steps[row], {n: v[row] for n, v in values.items()})
        if reason is None:
            kept.append(run)
        else:
            dropped[run] = reason
    used = slice(len(kept))
    return CohortData(
        runs=kept,
        theta=torch.from_numpy(theta[used]),
        steps=torch.from_numpy(steps[used]),
        metrics={name: torch.from_numpy(found[used]) for name, found in values.items()},
        settings={"split": split, "origin": ORIGIN, "name": np.array([runs[run][0] for run in kept])},
        dropped=dropped,
    )


def _read_run(
    name: str,
    folder: Path,
    layout: ParameterLayout,
    metrics: Mapping[str, Source],
    theta: np.ndarray,
    steps: np.ndarray,
    values: Mapping[str, np.ndarray],
) -> str | None:
    """Fill a run's theta [checkpoints, D], steps and values [checkpoints]; why it is dropped, if it is."""
    listed = checkpoints_of(name, folder)
    if len(listed) != len(steps):
        return f"{len(listed)} checkpoints"
    order = sorted(listed, key=lambda key: listed[key][0])
    steps[:] = [listed[key][0] for key in order]
    for metric, source in metrics.items():
        values[metric][:] = [read_metric(source, listed[key][1], folder, key) for key in order]
    read_theta(folder, order, layout, theta)
    if not all(np.isfinite(found).all() for found in values.values()):
        return "metrics that are not finite"
    return unsound(torch.from_numpy(theta))


def _summary(config: ImportConfig, manifest: Manifest, skipped: int) -> dict[str, Any]:
    kept = Counter(train=0, test=0)
    dropped: Counter[str] = Counter()
    for record in manifest.shards:
        kept[record.split] += len(record.runs)
        dropped.update(record.dropped.values())
    echo(
        f"wrote {config.out}: {kept['train']:,} training and {kept['test']:,} test runs; dropped {dropped.total():,}, "
        f"skipped {skipped:,} folders without DONE.txt"
    )
    if not kept.total():
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.most_common(3))
        raise ValueError(f"{config.lmdb}: no run could be used ({reasons}); see --checkpoints and --task")
    return {
        "out": str(config.out),
        "runs": dict(kept),
        "dropped": dict(dropped),
        "unfinished_folders": skipped,
        "shards": len(manifest.shards),
    }


def find_runs(folder: Path) -> tuple[list[tuple[str, Path]], int]:
    """Name and environment of every complete run, in the released order, and the number of folders without DONE.txt.

    Raises FileNotFoundError where there is no such folder, ValueError for one without complete runs.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the one that holds a folder for each run")
    found = sorted((path for path in folder.iterdir() if (path / "data.mdb").is_file()), key=str)
    done = [path for path in found if (path / "DONE.txt").exists()]
    if not done:
        raise ValueError(
            f"{folder}: no complete runs (folders with data.mdb, runs.json and DONE.txt; {len(found):,} have no DONE.txt)"
        )
    where = {run: path for path in done for run in path.name.split("_")}
    return list(where.items()), len(found) - len(done)


def checkpoints_of(name: str, folder: Path) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """Step and metrics of each checkpoint of a run, by its key."""
    path = folder / "runs.json"
    try:
        content = json.loads(path.read_text())
        listed = content.get(name, content)["checkpoints"]
        places = {key: (_KEY.fullmatch(key), metrics) for key, metrics in listed.items()}
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; {_AGAIN}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of checkpoints as the released data has them; {_AGAIN}") from error
    if wrong := [key for key, (place, _) in places.items() if place is None]:
        raise ValueError(f"{path}: checkpoint {wrong[0][:80]!r}, expected RUN/epEEE_itIIIII.pt; {_AGAIN}")
    epochs = {key: (int(place[1]), int(place[2])) for key, (place, _) in places.items() if place is not None}
    # the last checkpoint stands at the end of an epoch, so the largest `it` is an epoch's number of iterations
    length = max((iteration for _, iteration in epochs.values()), default=0)
    return {key: (epoch * length + iteration, listed[key]) for key, (epoch, iteration) in epochs.items()}


def read_metric(source: Source, metrics: Mapping[str, Any], folder: Path, key: str) -> float:
    """Ours of one checkpoint. Raises ValueError where it is no number."""
    try:
        return source.scale * float(metrics[source.key])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / 'runs.json'}: {key} has no number {source.key!r}; {_AGAIN}") from error


def read_theta(folder: Path, keys: Sequence[str], layout: ParameterLayout, out: np.ndarray) -> None:
    """Fill `out` [checkpoints, D]. Raises ValueError for a value that is no theta of this layout."""
    lmdb = require_lmdb()
    try:
        with lmdb.open(str(folder), readonly=True, lock=False, create=False, readahead=False) as environment:
            pages = environment.info()["last_pgno"] + 1
            if (folder / "data.mdb").stat().st_size < pages * environment.stat()["psize"]:  # reading on would be fatal
                raise ValueError(f"{folder / 'data.mdb'}: truncated; {_AGAIN}")
            with environment.begin(buffers=True) as transaction:
                _read_values(transaction, folder, keys, layout, out)
    except lmdb.Error as error:
        raise ValueError(f"{folder}: damaged or not an LMDB environment ({error}); {_AGAIN}") from error


def _read_values(transaction: Any, folder: Path, keys: Sequence[str], layout: ParameterLayout, out: np.ndarray) -> None:
    sizes = [span.stop - span.start for span in layout.spans.values()]
    arch = _floats(transaction.get(f"{keys[0]}_arch".encode()), len(sizes), folder, f"{keys[0]}_arch")
    if arch.tolist() != sizes:
        raise ValueError(
            f"{folder}: parameters of sizes {', '.join(f'{size:g}' for size in arch)}, expected "
            f"{', '.join(map(str, sizes))}; choose the --task whose network this is"
        )
    for row, key in zip(out, keys, strict=True):
        row[:] = _floats(transaction.get(key.encode()), layout.size, folder, key)


def _floats(value: memoryview | None, count: int, folder: Path, key: str) -> np.ndarray:
    if value is None:
        raise ValueError(f"{folder}: no value for {key}, which runs.json lists; {_AGAIN}")
    if len(value) != 4 * count:
        raise ValueError(
            f"{folder}: {key} has {len(value):,} bytes, expected {4 * count:,} ({count:,} float32); choose the --task "
            f"whose network this is, or {_AGAIN}"
        )
    return np.frombuffer(value, dtype="<f4")


def require_lmdb() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ImportError("reading LMDB needs a package: pip install 'triptych-gpt[lmdb]'") from error
    return lmdb
