"""Settings of sampling and of every command but training: what a person types, checked. Imports no torch, so --help is quick."""

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from triptych_common import sampler_settings
from triptych_common.cli import CommonOptions
from triptych_common.fields import Ge, Interval

if TYPE_CHECKING:
    from triptych_gpt.tasks.task import Task

PICKLE_SUFFIXES = (".pt", ".pth")


@dataclass(frozen=True)
class SamplerSettings(sampler_settings.SamplerSettings):
    """How an update is sampled."""

    num_inference_steps: int = 100
    """denoising steps, evenly spaced over the 1000 that the thesis takes"""
    networks_at_once: Annotated[int, Ge(1)] = 512
    """networks in a batch"""


@dataclass(frozen=True)
class TaskSpec:
    """A task as a process that has not opened it needs it: what `open_task` takes."""

    task: str
    data: str | None = None
    epochs: int | None = None

    def open(self) -> "Task":
        """The task, its networks and data imported."""
        from triptych_gpt.tasks.registry import open_task  # imports every task's networks

        return open_task(self.task, data=self.data, epochs=self.epochs)

    def source(self) -> dict[str, str]:
        """A hash of the file that a task of the user's own stands in: its functions are only names in the recipe."""
        path, _, _ = self.task.rpartition(":")
        return {"task_file": hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]} if path.endswith(".py") else {}


@dataclass(frozen=True)
class PromptConfig(CommonOptions):
    """Prompt a network into being: give your own network and a metric to achieve; new networks are written."""

    checkpoint: Path | None = None
    """your network: a state dict of the task's architecture, .safetensors or .pt; default: a random one"""
    target: str = ""
    """what to achieve, METRIC=VALUE, such as test_loss=0.3"""
    model: Path = Path("runs/gpt")
    """the trained G.pt: a run folder, or a model file"""
    out: Path = Path("runs/prompted")
    """folder for the new networks and prompt.json"""
    recursive: Annotated[int, Ge(1)] = 1
    """updates in a row, each given what the one before made"""
    samples: Annotated[int, Ge(1)] = 1
    """networks to make, each from noise of its own"""
    sampler: str = "ddpm"
    """ddpm as in the thesis, ddim, or a scheduler of diffusers by name, such as unipc"""
    num_inference_steps: int = 100
    """denoising steps of an update, evenly spaced over the thesis's 1000"""
    task: str | None = None
    """the task that scores networks where the model cannot tell itself: a name, or file.py:NAME that has moved"""
    initialiser: str | None = None
    """without a checkpoint: how the random network is drawn; default: the task's own way"""
    pickle: bool = False
    """write .pt files for torch.load, not .safetensors"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint is not None and self.initialiser is not None:
            raise ValueError(
                f"initialiser {self.initialiser!r}: draws a random network, but --checkpoint gives one; leave out one of them"
            )
        if self.target:
            parse_target(self.target)
        self.settings  # noqa: B018 - checked at the door

    @property
    def settings(self) -> SamplerSettings:
        return SamplerSettings(self.sampler, self.num_inference_steps)

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


def parse_target(text: str) -> dict[str, float]:
    """ "test_loss=0.3" as {"test_loss": 0.3}. Raises ValueError for anything else."""
    name, equals, value = text.partition("=")
    try:
        if not (name and equals):
            raise ValueError
        return {name.strip(): float(value)}
    except ValueError as error:
        raise ValueError(f"target {text!r}: expected METRIC=VALUE, such as test_loss=0.3") from error


@dataclass(frozen=True)
class EvaluateConfig(CommonOptions):
    """Evaluate a trained G.pt on networks it never saw: how closely what it makes follows the prompts, beside baselines.

    Repeating the command does what is missing.
    """

    model: Path = Path("runs/gpt")
    """the trained G.pt: a run folder, or a model file"""
    zoo: Path = Path("runs/zoo")
    """the zoo it was trained on"""
    out: Path = Path("runs/gpt-evaluation")
    """folder for alignment.json and alignment.png"""
    networks: Annotated[int, Ge(1)] = 32
    """unseen networks"""
    prompts: Annotated[int, Ge(2)] = 20
    """prompts for each, from the best to a random network's metric"""
    sampler_steps: Annotated[tuple[int, ...], Interval(ge=1, le=1000)] = ()
    """also compare samplers at these numbers of denoising steps, on validation networks; such as 2 5 10 25 50 100"""
    sampler: str = "ddpm"
    """ddpm as in the thesis, ddim, or a scheduler of diffusers by name, such as unipc"""
    num_inference_steps: int = 50
    """denoising steps of an update, evenly spaced over the thesis's 1000"""
    networks_at_once: int = 512
    """networks in a batch"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings  # noqa: B018 - checked at the door

    @property
    def settings(self) -> SamplerSettings:
        return SamplerSettings(self.sampler, self.num_inference_steps, self.networks_at_once)

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


@dataclass(frozen=True)
class AuditConfig(CommonOptions):
    """Audit a trained G.pt for memorisation: its networks, their nearest training networks, and trivial ways to make either."""

    model: Path = Path("runs/gpt")
    """the trained G.pt: a run folder, or a model file"""
    zoo: Path = Path("runs/zoo")
    """the zoo it was trained on"""
    out: Path = Path("runs/gpt-audit")
    """folder for audit.json and audit.png"""
    samples: Annotated[int, Ge(1)] = 100
    """networks to make, each from another unseen one"""
    target: float | None = None
    """what to ask for; default: what does best on validation runs"""
    every: Annotated[int, Ge(1)] = 1
    """search every so many checkpoints of the training runs; 1: all"""
    sampler: str = "ddpm"
    """ddpm as in the thesis, ddim, or a scheduler of diffusers by name, such as unipc"""
    num_inference_steps: int = 50
    """denoising steps of an update, evenly spaced over the thesis's 1000"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None and not math.isfinite(self.target):
            raise ValueError(f"target {self.target}: expected a finite number")
        self.settings  # noqa: B018 - checked at the door

    @property
    def settings(self) -> SamplerSettings:
        return SamplerSettings(self.sampler, self.num_inference_steps)

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


@dataclass(frozen=True)
class InfoConfig(CommonOptions):
    """Tell what a zoo holds: runs by split, checkpoints, bytes, and the range of its metrics."""

    zoo: Path = Path("runs/zoo")
    """folder of the zoo, finished or growing"""

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


@dataclass(frozen=True)
class VerifyConfig(CommonOptions):
    """Read every file of a zoo and compare it with its checksum."""

    zoo: Path = Path("runs/zoo")
    """folder of the zoo, finished or growing"""

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


@dataclass(frozen=True)
class ExportConfig(CommonOptions):
    """Write one checkpoint of a zoo as a plain state dict that load_state_dict takes."""

    zoo: Path = Path("runs/zoo")
    """folder of the zoo"""
    run: int = 0
    """number of the run"""
    checkpoint: str = "-1"
    """0 .. checkpoints-1, or from the end (-1: the last), or best:METRIC, such as best:test_loss"""
    out: Path = Path("runs/checkpoint.safetensors")
    """file to write: .safetensors, which also tells task, run, step and metrics, or .pt/.pth for torch.load"""

    def __post_init__(self) -> None:
        if self.out.suffix not in (".safetensors", *PICKLE_SUFFIXES):
            raise ValueError(f"out {self.out}: expected a file ending in .safetensors, .pt or .pth")

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


@dataclass(frozen=True)
class ImportConfig(CommonOptions):
    """Make a zoo of the released G.pt checkpoint data; repeat the command to go on after an interruption."""

    lmdb: Path = Path("checkpoint_datasets/mnist")
    """folder of the released data: one LMDB environment a run, or for several runs"""
    out: Path = Path("runs/zoo")
    """folder of the zoo"""
    task: str = "mnist_mlp"
    """task whose network the checkpoints are of"""
    num_test_runs: Annotated[int, Ge(0)] = 500
    """runs in the test split, the last ones by name; released: 500 for MNIST, 2050 for the others"""
    checkpoints: Annotated[int, Ge(2)] = 200
    """checkpoints of a run; runs with another number are dropped"""
    cohort_runs: Annotated[int, Ge(1)] = 50
    """runs in a shard"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: half the bytes, 8 bits of precision"""
    repair: bool = False
    """verify the shards that are there, and import damaged ones again"""


class Released(NamedTuple):
    """What a released model's file does not say. scale: parameters are multiplied by it to be normalised; task: by name."""

    scale: float
    metric: str
    better: Literal["lower", "higher"]
    task: str


RELEASED = {
    "mnist_loss": Released(4.185, "test_loss", "lower", "mnist_mlp"),
    "mnist_error": Released(4.185, "test_error", "lower", "mnist_mlp"),
    "cifar10_loss": Released(1.646, "test_loss", "lower", "cifar_cnn"),
    "cifar10_error": Released(1.646, "test_error", "lower", "cifar_cnn"),
    "cartpole": Released(2.06, "train_return", "higher", "cartpole"),
}


@dataclass(frozen=True)
class ConvertConfig(CommonOptions):
    """Convert a checkpoint of wpeebles/G.pt to a model file that prompt, evaluate and audit take."""

    checkpoint: Path | None = None
    """the released file, such as best.pt; read without running a line of it"""
    released: str = "mnist_loss"
    """which model it is: mnist_loss, mnist_error, cifar10_loss, cifar10_error or cartpole"""
    out: Path = Path("runs/released")
    """folder for model.safetensors"""

    def __post_init__(self) -> None:
        if self.released not in RELEASED:
            raise ValueError(f"released {self.released!r}: expected one of {', '.join(RELEASED)}")

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}
