"""Settings of sampling and of every command but training and collecting. Imports no torch, so that --help is quick."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from triptych_common import sampler_settings
from triptych_common.cli import CommonOptions
from triptych_common.fields import Ge, Interval

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
    networks: Annotated[int, Ge(1)] = 32
    """networks of test runs, which the model never saw"""
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
    """Make a zoo of the released G.pt checkpoint data, or of stable-baselines3's policies. Repeating the command resumes it."""

    lmdb: Path = Path("checkpoint_datasets/mnist")
    """folder of the released data: an LMDB environment for each run, or for several runs"""
    sb3: Path | None = None
    """in place of --lmdb: a folder for each run, of stable-baselines3's checkpoints NAME_STEPS_steps.zip; scored by --task"""
    out: Path = Path("runs/zoo")
    """folder of the zoo"""
    task: str = "mnist_mlp"
    """the task whose networks these are"""
    num_test_runs: Annotated[int, Ge(0)] = 500
    """runs in the test split, the last ones by name; released: 500 for MNIST, 2050 for the others"""
    checkpoints: Annotated[int, Ge(2)] = 200
    """checkpoints of a run; runs with another number are dropped"""
    cohort_runs: Annotated[int, Ge(1)] = 50
    """runs in a shard"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: half the bytes, 8 bits of precision"""
    repair: bool = False
    """verify the existing shards, and import damaged ones again"""


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
    """which model it is: mnist_loss, mnist_error, cifar10_loss, cifar10_error or cartpole"""
    out: Path = Path("runs/released")
    """folder for model.safetensors"""

    def __post_init__(self) -> None:
        if self.released not in RELEASED:
            raise ValueError(f"released {self.released!r}: expected one of {', '.join(RELEASED)}")
