"""Settings of `triptych-gpt collect`, checked before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from triptych_common.cli import CommonOptions
from triptych_common.fields import Ge

IDENTITY = ("seed", "checkpoints", "initialiser", "cohort_runs", "shared_batches", "dtype", "split_every")
NEW_ZOO_RUNS = 1000


@dataclass(frozen=True)
class CollectConfig(CommonOptions):
    """Train networks in many runs and save their checkpoints. Repeating the command resumes; more --runs extend the zoo."""

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK")] = tyro.MISSING
    """mnist_mlp, mnist_mlp_14, cifar_cnn, cartpole, cartpole_small, or file.py:NAME for a task of your own"""
    runs: Annotated[int | None, Ge(1)] = None
    """training runs of the finished zoo, including dropped ones; default: 1,000, or none more with --repair"""
    out: Path = Path("runs/zoo")
    """folder of the zoo"""
    data: str | None = None
    """data set in place of the task's own, such as mnist5k for mnist_mlp"""
    epochs: int | None = None
    """epochs in place of the task's own"""
    iterations: int | None = None
    """iterations of PPO in place of the task's own"""
    checkpoints: Annotated[int, Ge(2)] = 200
    """checkpoints per run: before training, after random steps, and after the last"""
    early: bool = False
    """sample half of those steps mostly from the beginning of a run (by 1 / step), where metrics change fast"""
    initialiser: str = "default"
    """how networks are initialised: default, or xavier, kaiming, orthogonal with _uniform or _normal"""
    cohort_runs: Annotated[int, Ge(1)] = 100
    """runs that share their minibatches (which makes them faster, and correlates them), a shard and a split; what an
    interruption costs each process at most"""
    shared_batches: bool = True
    """off: every run has its own minibatches"""
    split_every: Annotated[int, Ge(3)] = 10
    """one of this many cohorts is for testing and one for validation"""
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
        """Runs of the finished zoo, 0 if it is only to be repaired."""
        return self.runs if self.runs is not None else 0 if self.repair else NEW_ZOO_RUNS


PRESETS = {  # the released data sets' numbers of runs, thesis 3.3
    "mnist": CollectConfig(task="mnist_mlp", runs=10_728),
    "cifar10": CollectConfig(task="cifar_cnn", runs=56_840),
    "cartpole": CollectConfig(task="cartpole", runs=50_026),
    "cartpole_small": CollectConfig(task="cartpole_small", runs=1000, checkpoints=40, early=True),
    "laptop": CollectConfig(task="mnist_mlp_14", runs=6000, checkpoints=40, early=True, split_every=20),
}
