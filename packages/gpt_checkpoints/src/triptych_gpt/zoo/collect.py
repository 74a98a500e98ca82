"""`triptych-gpt collect`: training runs of a task, cohort by cohort, into a zoo."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from triptych_common import workers
from triptych_common.cli import echo
from triptych_common.progress import Progress
from triptych_common.storage.provenance import provenance
from triptych_common.storage.run import RunDirectory, differences

from triptych_gpt.tasks.task import Cohort, Task
from triptych_gpt.zoo import PRELOAD
from triptych_gpt.zoo.cohorts import Work, cohorts, collect_cohort, split_of
from triptych_gpt.zoo.collect_config import IDENTITY, CollectConfig, measured
from triptych_gpt.zoo.manifest import MANIFEST, Manifest, to_repair
from triptych_gpt.zoo.source import recipe_digest
from triptych_gpt.zoo.store import SHARDS


def collect(config: CollectConfig) -> dict[str, Any]:
    """Make the zoo in `config.out`, or what is missing of it; returns where it is and what it holds.

    Raises ValueError for a request that does not fit the task or the zoo that is there, OSError when the disk refuses: all
    cohorts written before are kept.
    """
    task, identity = config.open()
    _refuse_another(config.out, identity)
    with RunDirectory(config.out, identity):
        manifest = _manifest(task, config, identity)
        again, missing = _damaged(manifest, config), _missing(manifest, config)
        if missing or again:
            _collect(manifest, [*again, *missing], {work.shard for work in again}, config)
        else:
            echo(
                f"{config.out} has its {config.runs_asked:,} runs already"
                if config.runs_asked
                else "nothing is damaged"
            )
    return _told(manifest, config)


def _refuse_another(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raises ValueError for a zoo of another recipe, or shards that have lost their manifest."""
    if (folder / MANIFEST).exists():
        if changed := differences(Manifest.read(folder).facts.get("recipe"), json.loads(json.dumps(identity))):
            raise ValueError(f"{folder}: a zoo of another recipe, {changed}; repeat its settings, or use another --out")
    elif any((folder / SHARDS).glob("runs-*")):
        raise ValueError(f"{folder}: shards without their {MANIFEST}; put it back, or use another --out")


def _manifest(task: Task, config: CollectConfig, identity: Mapping[str, Any]) -> Manifest:
    """The zoo's manifest, founded where there is none."""
    if (config.out / MANIFEST).exists():
        return Manifest.read(config.out)
    at_once = config.networks_at_once or measured(task, config).networks_at_once
    facts = {
        "task": task.name,
        "layout": task.layout.to_json(),
        "checkpoints": config.checkpoints,
        "dtype": config.dtype,
        "metrics": {metric.name: metric.better for metric in task.metrics},
        "recipe": identity,
        "opened_by": asdict(config.spec),
        "networks_at_once": at_once,
        "repair": f"triptych-gpt collect {shlex.join(_words(config))} --repair",
        "provenance": provenance(),
    }
    return Manifest.create(config.out, facts)


def _words(config: CollectConfig) -> list[str]:
    """The command line that says what the zoo is."""
    words = [config.task]
    for name in ("data", "epochs", "early", *IDENTITY):
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
    recipe = recipe_digest(manifest.facts["recipe"]["recipe"])
    return Work(
        config.spec, recipe, config.out.resolve(), cohort, split_of(number, config.split_every), config.dtype, at_once
    )


def _missing(manifest: Manifest, config: CollectConfig) -> list[Work]:
    """Work for the runs asked for that no shard covers."""
    have = {run for record in manifest.shards for run in range(record.first, record.stop)}
    found = []
    for _, runs in cohorts(0, config.runs_asked, config.cohort_runs):
        absent = [run for run in runs if run not in have]
        if absent:  # consecutive: a shard holds the first runs of a cohort, or the rest
            found.append(_work(range(absent[0], absent[-1] + 1), manifest, config))
    return found


def _damaged(manifest: Manifest, config: CollectConfig) -> list[Work]:
    """Work for the shards whose files are not as they were written. Raises ValueError for them without --repair."""
    found = to_repair(manifest, repair=config.repair)
    for damage in found:
        echo(f"{damage}; collecting it again")
    names = {damage.shard for damage in found}
    records = [record for record in manifest.shards if record.name in names]
    return [_work(range(record.first, record.stop), manifest, config) for record in records]


def _collect(manifest: Manifest, units: Sequence[Work], again: set[str], config: CollectConfig) -> None:
    total = sum(len(unit.cohort.runs) for unit in units)
    processes = min(config.processes, len(units))
    at_once = min(units[0].networks_at_once, max(len(unit.cohort.runs) for unit in units))
    echo(
        f"{total:,} runs in {_count(len(units), 'cohort')}, {at_once} networks at once in each of {_count(processes, 'process')}"
    )
    results = workers.run(
        config.engine, collect_cohort, units, workers.devices(config.on, processes), preload=PRELOAD,
        remedy="use fewer --workers or a smaller --cohort-runs, and repeat", extra="triptych-gpt[ray]",
    )  # fmt: skip
    with Progress("collecting", total, "run") as progress:
        progress.at(0)
        try:
            for record in results:
                manifest.commit(record, replace=record.name in again)
                progress.advance(record.stop - record.first)
        finally:
            results.close()


def _told(manifest: Manifest, config: CollectConfig) -> dict[str, Any]:
    """Say what the zoo holds now. Raises ValueError where every run was dropped."""
    kept, dropped = Counter(train=0, validation=0, test=0), Counter()
    for record in manifest.shards:
        kept[record.split] += len(record.runs)
        dropped.update(record.dropped.values())
    if not kept.total():
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.most_common(3))
        raise ValueError(f"{config.out}: every run was dropped ({reasons}); train otherwise, into another --out")
    splits = {record.split for record in manifest.shards}
    for split, cohort in (("test", "second"), ("validation", "third")):
        if split not in splits:
            echo(f"no {split} runs: they would be the {cohort} cohort of {config.cohort_runs:,}; raise --runs")
    echo(f"{kept.total():,} runs ({dropped.total():,} dropped), {manifest.bytes / 1e9:,.3f} GB: {config.out}")
    return {
        "zoo": config.out,
        "manifest": config.out / MANIFEST,
        "runs": dict(kept),
        "dropped": dropped.total(),
        "bytes": manifest.bytes,
    }


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("s") else "s")
