"""Settings of sampling and of every command but training and collecting. Imports no torch, so that --help is quick."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from triptych_common import sampler_settings
from triptych_common.cli import CommonOptions
from triptych_common.fields import Ge, Gt, Interval

PICKLE_SUFFIXES = (".pt", ".pth")


@dataclass(frozen=True)
class SamplerSettings(sampler_settings.SamplerSettings):
    """Sampler of an update: ddpm, ddim or a scheduler of diffusers; denoising steps (1 to 1000); networks per batch."""

    num_inference_steps: int = 100
    """denoising steps, evenly spaced over the 1000 of training"""
    networks_at_once: Annotated[int, Ge(1)] = 512
    """networks in a batch"""


@dataclass(frozen=True)
class Options(CommonOptions):
    """Options of a command whose --dry-run prints them."""

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


@dataclass(frozen=True)
class SamplingOptions(Options):
    """Options of commands that sample updates of a trained model."""

    model: Path = Path("runs/gpt")
    """the trained G.pt: a run folder, or a model file"""
    sampler: str = "ddpm"
    """ddpm as published, ddim, or a scheduler of diffusers by name, such as unipc"""
    num_inference_steps: int = 50
    """denoising steps of an update, evenly spaced over the 1000 of training"""
    task: str | None = None
    """the task that scores networks, if it is your own (file.py:NAME, which is run) or the model file does not name it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings  # noqa: B018 - SamplerSettings refuses what it does not know, before anything is loaded

    @property
    def settings(self) -> SamplerSettings:
        return SamplerSettings(self.sampler, self.num_inference_steps)


@dataclass(frozen=True)
class PromptConfig(SamplingOptions):
    """Generate networks that achieve a prompted metric, starting from your own network or a random one."""

    checkpoint: Path | None = None
    """your network: a state dict of the task's architecture, .safetensors or .pt; default: a randomly initialised one"""
    target: str = ""
    """the prompt, METRIC=VALUE, such as test_loss=0.3"""
    out: Path = Path("runs/prompted")
    """folder for the new networks and prompt.json"""
    recursive: Annotated[int, Ge(1)] = 1
    """consecutive updates, each starting from the network that the previous one generated"""
    samples: Annotated[int, Ge(1)] = 1
    """networks to generate, each from different noise"""
    num_inference_steps: int = 100
    """denoising steps of an update, evenly spaced over the 1000 of training"""
    initialiser: str | None = None
    """without a checkpoint: how the random network is initialised; default: as the task does"""
    pickle: bool = False
    """write .pt files for torch.load, not .safetensors"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint is not None and self.initialiser is not None:
            problem = "draws a random network, but --checkpoint gives one; leave out one of them"
            raise ValueError(f"initialiser {self.initialiser!r}: {problem}")
        if self.target:
            parse_target(self.target)


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
class EvaluateConfig(SamplingOptions):
    """Score how well a trained G.pt follows prompts on unseen networks, beside baselines. Repeating the command resumes it."""

    zoo: Path = Path("runs/zoo")
    """the zoo it was trained on"""
    out: Path = Path("runs/gpt-evaluation")
    """folder for alignment.json and alignment.png"""
    networks: Annotated[int | None, Ge(1)] = None
    """networks of test runs, which the model never saw; default: 32, or as many as the zoo has"""
    prompts: Annotated[int, Ge(2)] = 20
    """prompts for each network, from the best value to the network's own"""
    sampler_steps: Annotated[tuple[int, ...], Interval(ge=1, le=1000)] = ()
    """also compare samplers at these numbers of denoising steps, on validation networks; such as 2 5 10 25 50 100"""
    networks_at_once: int = 512
    """networks in a batch"""

    @property
    def settings(self) -> SamplerSettings:
        return SamplerSettings(self.sampler, self.num_inference_steps, self.networks_at_once)


@dataclass(frozen=True)
class AuditConfig(SamplingOptions):
    """Audit a trained G.pt for memorisation: how near generated networks are to training networks, beside baselines."""

    zoo: Path = Path("runs/zoo")
    """the zoo it was trained on"""
    out: Path = Path("runs/gpt-audit")
    """folder for audit.json and audit.png"""
    samples: Annotated[int, Ge(1)] = 100
    """networks to generate, each from a different unseen network"""
    target: Annotated[float | None, Interval(gt=-math.inf, lt=math.inf, wanted="a finite number")] = None
    """the prompt; default: the value that gives the best networks on validation runs"""
    every: Annotated[int, Ge(1)] = 1
    """search only every k-th checkpoint of the training runs; 1: all"""


@dataclass(frozen=True)
class InfoConfig(Options):
    """Describe what a zoo holds: runs by split, checkpoints, bytes, and the range of its metrics."""

    zoo: Path = Path("runs/zoo")
    """folder of the zoo, finished or growing"""


@dataclass(frozen=True)
class VerifyConfig(InfoConfig):
    """Read every file of a zoo and compare it with its checksum."""


@dataclass(frozen=True)
class ExportConfig(Options):
    """Write one checkpoint of a zoo as a plain state dict that load_state_dict takes."""

    zoo: Path = Path("runs/zoo")
    """folder of the zoo"""
    run: int = 0
    """number of the run"""
    checkpoint: str = "-1"
    """0 .. checkpoints-1, or from the end (-1: the last), or best:METRIC, such as best:test_loss"""
    out: Path = Path("runs/checkpoint.safetensors")
    """file to write: .safetensors, which also records task, run, step and metrics, or .pt/.pth for torch.load"""

    def __post_init__(self) -> None:
        if self.out.suffix not in (".safetensors", *PICKLE_SUFFIXES):
            raise ValueError(f"out {self.out}: expected a file ending in .safetensors, .pt or .pth")


@dataclass(frozen=True)
class ImportConfig(Options):
    """Make a zoo of checkpoints that others have saved, or of the released G.pt data. Repeating the command resumes it."""

    folder: Path | None = None
    """folder of checkpoints, a subfolder for each run: state dicts, Lightning's, safetensors, or checkpoint-N folders"""
    lmdb: Path | None = None
    """folder of the released data instead: an LMDB environment for each run, or for several runs"""
    sb3: Path | None = None
    """folder of stable-baselines3's checkpoints instead, a subfolder for each run of NAME_STEPS_steps.zip; scored by --task"""
    out: Path = Path("runs/zoo")
    """folder of the zoo"""
    task: str | None = None
    """the task whose networks these are, a name or file.py:NAME; default: of a folder none, of released data mnist_mlp"""
    pattern: str | None = None
    """where the folder's checkpoints are, such as {run}/step_{step}.pt (* is any text); default: a subfolder a run, files in
    the order of the number in their names"""
    metrics: Path | None = None
    """the folder's metrics: a CSV, JSON or Parquet table with columns run, step, and one for each metric"""
    rescore: bool = False
    """let the task score the folder's checkpoints, all or those of its metrics that the table lacks"""
    better: tuple[str, ...] = ()
    """which way a metric of the table is better if the task does not say, such as test_error=lower accuracy=higher"""
    num_test_runs: Annotated[int | None, Ge(0)] = None
    """runs in the test split; default: of a folder one in ten, drawn by --seed; of released data 500, the last ones by name
    (released: 2050 for all but MNIST)"""
    validation_runs: Annotated[int | None, Ge(0)] = None
    """runs in the validation split, by which training chooses its model; default: one in ten, of released data at most 16"""
    checkpoints: Annotated[int | None, Ge(2)] = None
    """checkpoints of a run; of a folder's runs with more, evenly spaced ones are taken, other runs are dropped; default: of a
    folder what most runs have, of released data 200"""
    cohort_runs: Annotated[int, Ge(1)] = 50
    """runs in a shard, fewer if they are large"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: half the bytes, 8 bits of precision"""
    repair: bool = False
    """verify the existing shards, and import damaged ones again"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder is not None and self.lmdb is not None:
            raise ValueError(f"folder {self.folder} and lmdb {self.lmdb}: give one of them")
        if self.folder is None and (self.pattern or self.metrics or self.rescore or self.better):
            raise ValueError(
                "--pattern, --metrics, --rescore and --better are about a --folder; give it, or leave them out"
            )
        if self.pattern is not None and not ("{run}" in self.pattern and "{step}" in self.pattern):
            raise ValueError(
                f"pattern {self.pattern!r}: expected {{run}} and {{step}} in it, such as {{run}}/step_{{step}}.pt"
            )
        for text in self.better:
            if text.partition("=")[2] not in ("lower", "higher"):
                raise ValueError(f"better {text!r}: expected METRIC=lower or METRIC=higher")


class Released(NamedTuple):
    """What a released model's file does not hold."""

    scale: float  # parameters are multiplied by it to be normalised
    metric: str
    better: Literal["lower", "higher"]
    task: str  # its name


RELEASED = {
    "mnist_loss": Released(4.185, "test_loss", "lower", "mnist_mlp"),
    "mnist_error": Released(4.185, "test_error", "lower", "mnist_mlp"),
    "cifar10_loss": Released(1.646, "test_loss", "lower", "cifar_cnn"),
    "cifar10_error": Released(1.646, "test_error", "lower", "cifar_cnn"),
    "cartpole": Released(2.06, "train_return", "higher", "cartpole"),
}


@dataclass(frozen=True)
class ConvertConfig(Options):
    """Convert a checkpoint of wpeebles/G.pt to a model file that prompt, evaluate and audit take."""

    checkpoint: Path | None = None
    """the released file, such as best.pt; read without executing code from it"""
    released: str = "mnist_loss"
    """which model it is, or was trained like: mnist_loss, mnist_error, cifar10_loss, cifar10_error or cartpole"""
    out: Path = Path("runs/released")
    """folder for model.safetensors"""
    num_heads: Annotated[int | None, Ge(1)] = None
    """attention heads, which the file does not tell; needed if width and depth are not the released model's"""
    task: str | None = None
    """the task whose networks it generates, if it is another: a name, or file.py:NAME; then --metric and --scale, too"""
    metric: str | None = None
    """what the model is prompted with, a metric of that task"""
    scale: Annotated[float | None, Gt(0)] = None
    """what parameters were multiplied by in training: in the released code 0.538 / their standard deviation"""
    metric_factor: Annotated[float | None, Gt(0)] = None
    """what our metric is multiplied by to be the one trained on: 100 for errors in per cent"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.released not in RELEASED:
            raise ValueError(f"released {self.released!r}: expected one of {', '.join(RELEASED)}")
        if self.task is not None and (self.metric is None or self.scale is None):
            problem = "a model of another task needs --metric and --scale, which its file does not hold"
            raise ValueError(f"task {self.task!r}: {problem}")
