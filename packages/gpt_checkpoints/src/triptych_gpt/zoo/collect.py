"""`triptych-gpt collect`: training runs of a task, cohort by cohort, into a zoo."""

import json
import os
import shlex
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from triptych_common import workers
from triptych_common.cli import echo
from triptych_common.parallel import process_group
from triptych_common.progress import Progress
from triptych_common.storage.provenance import provenance
from triptych_common.storage.run import RunDirectory, differences
from triptych_common.throughput import keep_freed_memory

from triptych_gpt.tasks.supervised import SupervisedTask
from triptych_gpt.tasks.task import Cohort, Speed, Task
from triptych_gpt.zoo import PRELOAD
from triptych_gpt.zoo.cohorts import SETTINGS, Work, cohorts, collect_cohort, split_of
from triptych_gpt.zoo.collect_config import IDENTITY, CollectConfig
from triptych_gpt.zoo.source import TaskSpec, json_digest, one_line
from triptych_gpt.zoo.store import DTYPES, MANIFEST, OWN_COLUMNS, Manifest, refuse_damaged, to_repair

RECIPE_VERSION = 1  # raised whenever the same recipe gives other runs


def collect(config: CollectConfig) -> dict[str, Any]:
    """Make the zoo in `config.out`, or what is missing of it; returns where it is and what it holds.

    Raises ValueError for a request that does not fit the task or the existing zoo, OSError if files cannot be written.
    """
    task, identity = request(config)
    _refuse_another(config.out, identity)
    with RunDirectory(config.out, identity):
        manifest = _manifest(task, config, identity)
        again, missing = _damaged(manifest, config), _missing(manifest, config)
        if missing or again:
            _collect(manifest, [*again, *missing], {work.shard for work in again}, config)
        elif config.runs_asked:
            echo(f"{config.out} has its {config.runs_asked:,} runs already")
        else:
            echo("nothing is damaged")
    return _summary(manifest, config)


def spec_of(config: CollectConfig) -> TaskSpec:
    """The task as workers open it, with the absolute path of a user's file."""
    path, colon, name = config.task.rpartition(":")
    own = f"{Path(path).resolve()}:{name}" if colon and path.endswith(".py") else config.task
    return TaskSpec(own, config.data, config.epochs, config.iterations)


def request(config: CollectConfig) -> tuple[Task, dict[str, Any]]:
    """The task to collect, and all that decides what its zoo is. Raises ValueError or OSError if it cannot be collected."""
    spec = spec_of(config)
    task = spec.open()
    with one_line(f"task {task.name}"):
        task.symmetry  # noqa: B018 - a network that cannot be permuted is refused now
        identity: dict[str, Any] = {"recipe_version": RECIPE_VERSION, "task": task.name, "recipe": task.recipe()}
        identity |= spec.source()
        json_digest(identity["recipe"])  # refuses one that is not JSON-able
        _check(config, task)
        if isinstance(task, SupervisedTask):
            task.check_symmetry()
            task.stack.probe(
                task.items["train"].inputs[:2]
            )  # so that a slow way of running is reported before it begins
    early = {"early": True} if config.early else {}  # left out otherwise, as in zoos that are older than the option
    return task, identity | {name: getattr(config, name) for name in IDENTITY} | early


def _check(config: CollectConfig, task: Task) -> None:
    if config.initialiser not in task.initialisers:
        raise ValueError(f"initialiser {config.initialiser!r}: expected one of {', '.join(task.initialisers)}")
    if config.checkpoints > task.steps + 1:
        steps = f"a run of {task.name} takes {task.steps:,} steps"
        raise ValueError(f"checkpoints {config.checkpoints}: {steps}, so expected 2 to {task.steps + 1:,}")
    names = [*OWN_COLUMNS, *SETTINGS, "minibatch_loss", *(metric.name for metric in task.metrics), *task.settings()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problem = f"{twice[0]!r} would name two columns of the index; rename its metric or setting"
        raise ValueError(f"task {task.name}: {problem}")
    _device(config.device)


@cache
def _device(name: str) -> torch.device:
    """The device to collect on. Raises ValueError for one that is not available."""
    with process_group(name) as ranks:  # of "cuda", the first GPU; here it means all of them
        return torch.device("cuda") if name in ("auto", "cuda") and ranks.device.type == "cuda" else ranks.device


def _processes(config: CollectConfig) -> int:
    if config.engine == "here":
        return 1
    if config.workers is not None:
        return config.workers
    if _device(config.device).type == "cuda":
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def preview(config: CollectConfig) -> dict[str, Any]:
    """What --dry-run prints: the cost of the requested runs, as if the zoo had none yet."""
    (task, identity), runs, processes = request(config), config.runs_asked, _processes(config)
    speed = _measured(task, config)
    seconds = speed.seconds_per_run + config.checkpoints * speed.seconds_per_score
    of_run = config.checkpoints * task.layout.size
    by_split = dict.fromkeys(("train", "validation", "test"), 0)
    for number, some in cohorts(0, runs, config.cohort_runs):
        by_split[split_of(number, config.split_every)] += len(some)
    return {
        "config": asdict(config),
        "recipe": identity["recipe"],
        "runs": runs,
        "cohorts": -(-runs // config.cohort_runs),
        "runs_by_split": by_split,
        "bytes": runs * of_run * DTYPES[config.dtype][1].itemsize,
        "bytes_of_checkpoints_in_memory": min(runs, config.cohort_runs) * of_run * 4 * processes,
        "processes": processes,
        "networks_at_once": speed.networks_at_once,
        "minutes": runs * seconds / processes / 60,
    }


def _measured(task: Task, config: CollectConfig) -> Speed:
    """A short measurement on one thread, as in a worker, which keeps the memory it frees."""
    keep_freed_memory()
    device, threads = _device(config.device), torch.get_num_threads()
    torch.set_num_threads(1)
    most = 4096 if device.type == "cuda" else 256  # more was never faster
    try:
        with one_line(f"task {task.name}"):
            return task.measure(device, min(config.cohort_runs, most), config.shared_batches)
    finally:
        torch.set_num_threads(threads)


def _refuse_another(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raises ValueError for a zoo of another recipe, or shards that nothing lists."""
    found = Manifest.recover(folder)
    if found and (changed := differences(found.facts.get("recipe"), json.loads(json.dumps(identity)))):
        raise ValueError(f"{folder}: a zoo of another recipe, {changed}; repeat its settings, or use another --out")


def _manifest(task: Task, config: CollectConfig, identity: Mapping[str, Any]) -> Manifest:
    """The zoo's manifest, made again if it was lost, created if there is none."""
    if found := Manifest.recover(config.out):
        found.save()
        return found
    # Measured only now, and saved: with another number, rounding would make the rest of the zoo differ.
    at_once = config.networks_at_once or _measured(task, config).networks_at_once
    facts = {
        "task": task.name,
        "layout": task.layout.to_json(),
        "checkpoints": config.checkpoints,
        "dtype": config.dtype,
        "metrics": {metric.name: metric.better for metric in task.metrics},
        "recipe": identity,
        "opened_by": asdict(spec_of(config)),
        "networks_at_once": at_once,
        "repair": f"triptych-gpt collect {shlex.join(_words(config))} --repair",
        "provenance": provenance(),
    }
    return Manifest.create(config.out, facts)


def _words(config: CollectConfig) -> list[str]:
    """The command line with every setting that decides what the zoo is."""
    words = [config.task]
    for name in ("data", "epochs", "iterations", "early", *IDENTITY):
        value, flag = getattr(config, name), name.replace("_", "-")
        if value != CollectConfig.__dataclass_fields__[name].default:
            words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def _work(runs: range, manifest: Manifest, config: CollectConfig) -> Work:
    number = runs[0] // config.cohort_runs
    cohort = Cohort(
        config.seed, number, runs, config.checkpoints, config.initialiser, config.shared_batches, config.early
    )
    at_once = config.networks_at_once or manifest.facts["networks_at_once"]
    recipe = json_digest(manifest.facts["recipe"]["recipe"])
    split = split_of(number, config.split_every)
    return Work(spec_of(config), recipe, config.out.resolve(), cohort, split, config.dtype, at_once)


def _missing(manifest: Manifest, config: CollectConfig) -> list[Work]:
    """Work for the requested runs that no shard covers."""
    have = {run for record in manifest.shards for run in range(record.first, record.stop)}
    units = []
    for _, runs in cohorts(0, config.runs_asked, config.cohort_runs):
        absent = [run for run in runs if run not in have]
        if absent:  # consecutive, since a shard holds the first runs of a cohort, or the rest
            units.append(_work(range(absent[0], absent[-1] + 1), manifest, config))
    return units


def _damaged(manifest: Manifest, config: CollectConfig) -> list[Work]:
    """Work for the shards whose files are not as they were written. Raises ValueError for any without --repair."""
    damaged = to_repair(manifest, repair=config.repair)
    for damage in damaged:
        echo(f"{damage}; collecting it again")
    names = {damage.shard for damage in damaged}
    records = [record for record in manifest.shards if record.name in names]
    return [_work(range(record.first, record.stop), manifest, config) for record in records]


def _collect(manifest: Manifest, units: Sequence[Work], again: set[str], config: CollectConfig) -> None:
    total = sum(len(unit.cohort.runs) for unit in units)
    processes = min(_processes(config), len(units))
    at_once = min(units[0].networks_at_once, max(len(unit.cohort.runs) for unit in units))
    each = f"{at_once} networks at once in each of {_count(processes, 'process')}"
    echo(f"{total:,} runs in {_count(len(units), 'cohort')}, {each}")
    results = workers.run(
        config.engine, collect_cohort, units, workers.devices(_device(config.device), processes), preload=PRELOAD,
        remedy="use fewer --workers or a smaller --cohort-runs, and repeat", extra="triptych-gpt[ray]",
    )  # fmt: skip
    with Progress("collecting", total, "run") as progress:
        progress.at(0)
        try:
            for record in results:
                manifest.commit(record, replace=record.name in again)
                progress.advance(record.stop - record.first)
        finally:
            if isinstance(results, Generator):
                results.close()  # ends the workers when interrupted


def _summary(manifest: Manifest, config: CollectConfig) -> dict[str, Any]:
    """Print and return what the zoo holds now. Raises ValueError if every run was dropped, or a file has vanished meanwhile."""
    refuse_damaged(manifest, contents=False)
    counts, dropped = manifest.counts()
    kept = {"train": 0, "validation": 0, "test": 0, **counts}
    if not sum(kept.values()):
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.most_common(3))
        raise ValueError(f"{config.out}: every run was dropped ({reasons}); train otherwise, into another --out")
    splits = {record.split for record in manifest.shards}
    for split, cohort in (("test", "second"), ("validation", "third")):
        if split not in splits:
            echo(f"no {split} runs: they would be the {cohort} cohort of {config.cohort_runs:,}; raise --runs")
    echo(f"{sum(kept.values()):,} runs ({dropped.total():,} dropped), {manifest.bytes / 1e9:,.3f} GB: {config.out}")
    held = {"runs": kept, "dropped": dropped.total(), "bytes": manifest.bytes}
    return {"zoo": config.out, "manifest": config.out / MANIFEST, **held}


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("s") else "s")
