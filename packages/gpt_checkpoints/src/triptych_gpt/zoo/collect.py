"""`triptych-gpt collect`: training runs of a task, cohort by cohort, into a zoo."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from triptych_common.cli import CommonOptions, say
from triptych_common.progress import Progress
from triptych_common.run import RunDirectory, provenance

from triptych_gpt.tasks import Cohort, Speed, Task
from triptych_gpt.zoo.cohorts import TaskSpec, Work, cohorts, collect_cohort, split_of
from triptych_gpt.zoo.engines import ENGINES, devices
from triptych_gpt.zoo.manifest import MANIFEST, Manifest, damages
from triptych_gpt.zoo.store import DTYPES, ShardRecord

RECIPE_VERSION = 1  # raised whenever the same recipe would give other runs
_IDENTITY = ("seed", "checkpoints", "initialiser", "cohort_runs", "shared_batches", "dtype", "split_every")


@dataclass(frozen=True)
class CollectConfig(CommonOptions):
    """Train networks in many runs and keep their checkpoints. Repeating the command resumes; more --runs extend the zoo."""

    task: tyro.conf.Positional[str] = tyro.MISSING
    """mnist_mlp, mnist_mlp_14, cifar_cnn, or file.py:NAME for a task of your own"""
    runs: int = 1000
    """training runs the zoo shall have, those dropped included"""
    out: Path = Path("runs/zoo")
    """folder of the zoo"""
    data: str | None = None
    """data set in place of the task's own, such as mnist5k for mnist_mlp"""
    epochs: int | None = None
    """epochs in place of the task's own"""
    checkpoints: int = 200
    """of each run: before training, after random steps, and after the last"""
    initialiser: str = "default"
    """how networks are drawn: default, or xavier, kaiming, orthogonal with _uniform or _normal"""
    cohort_runs: int = 100
    """runs that share their minibatches (which makes them faster, and correlates them), a shard and a split; what an
    interruption costs at most"""
    shared_batches: bool = True
    """off: every run has minibatches of its own"""
    split_every: int = 10
    """of so many cohorts one is for testing and one for validation"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of stored parameters; bfloat16 takes half the bytes, and metrics are of what is stored"""
    engine: Literal["local", "ray", "here"] = "local"
    """processes of this machine, Ray (RAY_ADDRESS names a cluster), or this process alone"""
    workers: int | None = None
    """processes; default: one a core, or one a GPU"""
    networks_at_once: int | None = None
    """networks trained together, the cohort's at most; changes rounding only; default: measured when the zoo is begun"""
    repair: bool = False
    """verify every checksum first, and collect damaged cohorts again"""

    def __post_init__(self) -> None:
        least = {"runs": 1, "checkpoints": 2, "cohort_runs": 1, "split_every": 3}
        least |= {name: 1 for name in ("workers", "networks_at_once") if getattr(self, name) is not None}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least {smallest}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")

    @property
    def spec(self) -> TaskSpec:
        path, colon, name = self.task.rpartition(":")
        own = f"{Path(path).resolve()}:{name}" if colon and path.endswith(".py") else self.task
        return TaskSpec(own, self.data, self.epochs)

    def open(self) -> Task:
        """The task. Raises ValueError or OSError where this command could not collect it."""
        task = self.spec.open()
        task.symmetry  # noqa: B018 - a network that cannot be permuted is refused now
        if self.initialiser not in task.initialisers:
            raise ValueError(f"initialiser {self.initialiser!r}: expected one of {', '.join(task.initialisers)}")
        if self.checkpoints > task.steps + 1:
            raise ValueError(
                f"checkpoints {self.checkpoints}: a run of {task.name} takes {task.steps:,} steps, so expected 2 to "
                f"{task.steps + 1:,}"
            )
        return task

    def on(self) -> torch.device:
        return (
            torch.device("cuda" if torch.cuda.is_available() else "cpu")
            if self.device == "auto"
            else torch.device(self.device)
        )

    def processes(self) -> int:
        if self.engine == "here":
            return 1
        if self.workers is not None:
            return self.workers
        return torch.cuda.device_count() if self.on().type == "cuda" else _cores()

    def resolved(self) -> dict[str, Any]:
        task = self.open()
        speed = measured(task, self)
        seconds = speed.seconds_per_run + self.checkpoints * speed.seconds_per_score
        size = self.checkpoints * task.layout.size * DTYPES[self.dtype][1].itemsize
        return {
            "config": asdict(self),
            "recipe": task.recipe(),
            "runs": self.runs,
            "cohorts": -(-self.runs // self.cohort_runs),
            "runs_by_split": _by_split(self),
            "gigabytes": self.runs * size / 1e9,
            "megabytes_in_memory": self.cohort_runs * self.checkpoints * task.layout.size * 4 / 1e6 * self.processes(),
            "networks_at_once": speed.networks_at_once,
            "minutes": self.runs * seconds / self.processes() / 60,
        }


PRESETS = {  # thesis 3.3: the released data sets' numbers of runs
    "mnist": CollectConfig(task="mnist_mlp", runs=10_728),
    "cifar10": CollectConfig(task="cifar_cnn", runs=56_840),
    "laptop": CollectConfig(task="mnist_mlp_14", runs=1000),
}


def collect(config: CollectConfig) -> dict[str, Any]:
    """Make the zoo in `config.out`, or what is missing of it; returns where it is and what it holds.

    Raises ValueError for a request that does not fit the task or the zoo that is there, OSError when the disk refuses: all
    cohorts written before are kept.
    """
    task = config.open()
    identity = {"recipe_version": RECIPE_VERSION, "task": task.name, "recipe": task.recipe()}
    identity |= {name: getattr(config, name) for name in _IDENTITY}
    with RunDirectory(config.out, identity) as run:
        manifest = _manifest(task, config, run.identity)
        again = _damaged(manifest, config)
        missing = _missing(manifest, config)
        if missing or again:
            _collect(manifest, [*again, *missing], {damaged.shard for damaged in again}, config)
        else:
            say(f"{config.out} has its {config.runs:,} runs already")
    kept = dict.fromkeys(("train", "validation", "test"), 0)
    for record in manifest.shards:
        kept[record.split] += len(record.runs)
    dropped = sum(len(record.dropped) for record in manifest.shards)
    for split, cohort in (("test", 2), ("validation", 3)):
        if not kept[split]:
            say(
                f"no {split} runs: they would be the {cohort}. cohort of {config.cohort_runs}; raise --runs or lower --cohort-runs"
            )
    size = sum(file.bytes for record in manifest.shards for file in record.files().values())
    say(f"{sum(kept.values()):,} runs ({dropped:,} dropped), {size / 1e9:.2f} GB: {config.out}")
    return {"zoo": config.out, "manifest": config.out / MANIFEST, "runs": kept, "dropped": dropped, "bytes": size}


def measured(task: Task, config: CollectConfig) -> Speed:
    """A short measurement on one thread, as a worker has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return task.measure(config.on(), min(config.cohort_runs, config.runs), config.shared_batches)
    finally:
        torch.set_num_threads(threads)


def _manifest(task: Task, config: CollectConfig, identity: Mapping[str, Any]) -> Manifest:
    """The zoo's manifest, founded where there is none."""
    if (config.out / MANIFEST).exists():
        return Manifest.read(config.out)
    at_once = config.networks_at_once or measured(task, config).networks_at_once
    options = {"data": config.data, "epochs": config.epochs, **{name: getattr(config, name) for name in _IDENTITY}}
    defaults = {f.name: f.default for f in CollectConfig.__dataclass_fields__.values()}
    words = [
        config.task,
        *(w for name, value in options.items() if value != defaults[name] for w in _option(name, value)),
    ]
    facts = {
        "task": task.name,
        "layout": task.layout.to_json(),
        "checkpoints": config.checkpoints,
        "dtype": config.dtype,
        "metrics": {metric.name: metric.better for metric in task.metrics},
        "recipe": identity,
        "networks_at_once": at_once,
        "repair": f"triptych-gpt collect {shlex.join(words)} --repair",
        "provenance": provenance(),
    }
    return Manifest.create(config.out, facts)


def _option(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    return [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]


def _work(runs: range, manifest: Manifest, config: CollectConfig) -> Work:
    number = runs[0] // config.cohort_runs
    cohort = Cohort(config.seed, number, runs, config.checkpoints, config.initialiser, config.shared_batches)
    at_once = config.networks_at_once or manifest.facts["networks_at_once"]
    split = split_of(number, config.split_every)
    return Work(config.spec, config.out.resolve(), cohort, split, config.dtype, at_once)


def _missing(manifest: Manifest, config: CollectConfig) -> list[Work]:
    """Work for the runs asked for that no shard covers: all after the last, and any before it that a kill left out."""
    have = {run for record in manifest.shards for run in range(record.first, record.stop)}
    found = []
    for _, runs in cohorts(0, config.runs, config.cohort_runs):
        absent = [run for run in runs if run not in have]
        if absent:  # consecutive: a shard holds the first runs of a cohort, or all
            found.append(_work(range(absent[0], absent[-1] + 1), manifest, config))
    return found


def _damaged(manifest: Manifest, config: CollectConfig) -> list[Work]:
    """Work for the shards whose files are not as they were written. Without --repair sizes alone are compared.

    Raises ValueError for damage where --repair is not given.
    """
    found = {}
    for damage in damages(manifest, contents=config.repair):
        if not config.repair:
            raise ValueError(f"{damage}; run {manifest.remedy()}")
        say(f"{damage}; collecting it again")
        found[damage.shard] = next(record for record in manifest.shards if record.name == damage.shard)
    return [_work(range(record.first, record.stop), manifest, config) for record in found.values()]


def _collect(manifest: Manifest, units: Sequence[Work], again: set[str], config: CollectConfig) -> None:
    total = sum(len(unit.cohort.runs) for unit in units)
    workers = min(config.processes(), len(units))
    at_once = min(units[0].networks_at_once, config.cohort_runs)
    say(f"{total:,} runs in {_count(len(units), 'cohort')}, {at_once} networks at once in {_count(workers, 'process')}")
    results = ENGINES[config.engine](collect_cohort, units, devices(config.on(), workers))
    with Progress("collecting", total, "run") as progress:
        progress.at(0)
        try:
            for record in results:
                _commit(manifest, record, again)
                progress.advance(record.stop - record.first)
        finally:
            results.close()


def _commit(manifest: Manifest, record: ShardRecord, again: set[str]) -> None:
    manifest.commit(record, replace=record.name in again)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("s") else "s")


def _by_split(config: CollectConfig) -> dict[str, int]:
    counts = {"train": 0, "validation": 0, "test": 0}
    for number, runs in cohorts(0, config.runs, config.cohort_runs):
        counts[split_of(number, config.split_every)] += len(runs)
    return counts


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
