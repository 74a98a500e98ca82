"""What `triptych-gpt collect` is asked for, checked before anything is written."""

import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from triptych_common.cli import CommonOptions
from triptych_common.fields import Ge
from triptych_common.parallel import process_group

from triptych_gpt.tasks.supervised import SupervisedTask
from triptych_gpt.tasks.task import Speed, Task
from triptych_gpt.zoo.cohorts import SETTINGS, cohorts, split_of
from triptych_gpt.zoo.source import TaskSpec, one_line, recipe_digest
from triptych_gpt.zoo.store import DTYPES, OWN_COLUMNS

RECIPE_VERSION = 1  # raised whenever the same recipe would give other runs
IDENTITY = ("seed", "checkpoints", "initialiser", "cohort_runs", "shared_batches", "dtype", "split_every")
NEW_ZOO_RUNS = 1000


@dataclass(frozen=True)
class CollectConfig(CommonOptions):
    """Train networks in many runs and keep their checkpoints. Repeating the command resumes; more --runs extend the zoo."""

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK")] = tyro.MISSING
    """mnist_mlp, mnist_mlp_14, cifar_cnn, or file.py:NAME for a task of your own"""
    runs: Annotated[int | None, Ge(1)] = None
    """training runs the zoo shall have, those dropped included; default: 1,000, or none more with --repair"""
    out: Path = Path("runs/zoo")
    """folder of the zoo"""
    data: str | None = None
    """data set in place of the task's own, such as mnist5k for mnist_mlp"""
    epochs: int | None = None
    """epochs in place of the task's own"""
    checkpoints: Annotated[int, Ge(2)] = 200
    """of each run: before training, after random steps, and after the last"""
    early: bool = False
    """draw half of those steps mostly from the beginning of a run (by 1 / step), where metrics change fast"""
    initialiser: str = "default"
    """how networks are drawn: default, or xavier, kaiming, orthogonal with _uniform or _normal"""
    cohort_runs: Annotated[int, Ge(1)] = 100
    """runs that share their minibatches (which makes them faster, and correlates them), a shard and a split; what an
    interruption costs each process at most"""
    shared_batches: bool = True
    """off: every run has minibatches of its own"""
    split_every: Annotated[int, Ge(3)] = 10
    """of so many cohorts one is for testing and one for validation"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of stored parameters; bfloat16 takes half the bytes, and metrics are of what is stored"""
    engine: Literal["local", "ray", "here"] = "local"
    """processes of this machine, Ray (RAY_ADDRESS names a cluster), or this process alone"""
    workers: Annotated[int | None, Ge(1)] = None
    """processes; default: one a core, or one a GPU"""
    networks_at_once: Annotated[int | None, Ge(1)] = None
    """networks trained together, the cohort's at most; changes rounding only; default: measured when the zoo is begun"""
    repair: bool = False
    """verify every checksum first, and collect damaged cohorts again"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: expected a number of 64 bits")

    @property
    def runs_asked(self) -> int:
        """Runs the zoo shall have, 0 where it shall only be repaired."""
        return self.runs if self.runs is not None else 0 if self.repair else NEW_ZOO_RUNS

    @property
    def spec(self) -> TaskSpec:
        path, colon, name = self.task.rpartition(":")
        own = f"{Path(path).resolve()}:{name}" if colon and path.endswith(".py") else self.task
        return TaskSpec(own, self.data, self.epochs)

    @cached_property
    def on(self) -> torch.device:
        """The device. Raises ValueError for one that is not here."""
        with process_group(self.device) as ranks:
            return (
                torch.device("cuda")
                if self.device in ("auto", "cuda") and ranks.device.type == "cuda"
                else ranks.device
            )

    @property
    def processes(self) -> int:
        if self.engine == "here":
            return 1
        if self.workers is not None:
            return self.workers
        return torch.cuda.device_count() if self.on.type == "cuda" else _cores()

    def open(self) -> tuple[Task, dict[str, Any]]:
        """The task, and everything that decides what its zoo is.

        Raises ValueError or OSError where this command could not collect it.
        """
        task = self.spec.open()
        with one_line(f"task {task.name}"):
            task.symmetry  # noqa: B018 - a network that cannot be permuted is refused now
            identity = {
                "recipe_version": RECIPE_VERSION,
                "task": task.name,
                "recipe": task.recipe(),
                **self.spec.source(),
            }
            recipe_digest(identity["recipe"])  # JSON, that is
            self._check(task)
            if isinstance(task, SupervisedTask):
                task.check_symmetry()
        early = {"early": True} if self.early else {}  # left out otherwise: older zoos know nothing of it
        return task, identity | {name: getattr(self, name) for name in IDENTITY} | early

    def _check(self, task: Task) -> None:
        if self.initialiser not in task.initialisers:
            raise ValueError(f"initialiser {self.initialiser!r}: expected one of {', '.join(task.initialisers)}")
        if self.checkpoints > task.steps + 1:
            raise ValueError(
                f"checkpoints {self.checkpoints}: a run of {task.name} takes {task.steps:,} steps, so expected 2 to "
                f"{task.steps + 1:,}"
            )
        names = [*OWN_COLUMNS, *SETTINGS, "minibatch_loss", *(metric.name for metric in task.metrics), *task.settings()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"task {task.name}: {twice[0]!r} would name two columns of the index; rename its metric or setting"
            )
        self.on  # noqa: B018

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints: of the runs asked for, as if there were none yet."""
        (task, identity), runs = self.open(), self.runs_asked
        speed = measured(task, self)
        seconds = speed.seconds_per_run + self.checkpoints * speed.seconds_per_score
        of_run = self.checkpoints * task.layout.size
        by_split = dict.fromkeys(("train", "validation", "test"), 0)
        for number, some in cohorts(0, runs, self.cohort_runs):
            by_split[split_of(number, self.split_every)] += len(some)
        return {
            "config": asdict(self),
            "recipe": identity["recipe"],
            "runs": runs,
            "cohorts": -(-runs // self.cohort_runs),
            "runs_by_split": by_split,
            "bytes": runs * of_run * DTYPES[self.dtype][1].itemsize,
            "bytes_of_checkpoints_in_memory": min(runs, self.cohort_runs) * of_run * 4 * self.processes,
            "processes": self.processes,
            "networks_at_once": speed.networks_at_once,
            "minutes": runs * seconds / self.processes / 60,
        }


PRESETS = {  # thesis 3.3: the released data sets' numbers of runs
    "mnist": CollectConfig(task="mnist_mlp", runs=10_728),
    "cifar10": CollectConfig(task="cifar_cnn", runs=56_840),
    "laptop": CollectConfig(task="mnist_mlp_14", runs=6000, checkpoints=40, early=True, split_every=20),
}


def measured(task: Task, config: CollectConfig) -> Speed:
    """A short measurement on one thread, as a worker has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    most = 4096 if config.on.type == "cuda" else 256  # more was never faster
    try:
        with one_line(f"task {task.name}"):
            return task.measure(config.on, min(config.cohort_runs, most), config.shared_batches)
    finally:
        torch.set_num_threads(threads)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
