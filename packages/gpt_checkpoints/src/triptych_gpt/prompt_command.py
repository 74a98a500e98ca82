"""`triptych-gpt prompt`: a network file in, networks that achieve a prompt out."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor
from triptych_common.cli import CommonOptions, echo
from triptych_common.fields import Ge
from triptych_common.parallel import process_group
from triptych_common.progress import Progress
from triptych_common.storage import checkpoint, foreign
from triptych_common.storage.atomic import write_json
from triptych_common.storage.provenance import provenance

from triptych_gpt.evaluation.records import plain
from triptych_gpt.prompting import Answer, parse_target, prompt
from triptych_gpt.trained import SamplerSettings, load


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


def prompt_command(config: PromptConfig) -> dict[str, Any]:
    """Make the networks; returns what was asked and achieved, and where they are.

    Raises what `prompt` and `load` raise, ValueError without a target, OSError when the disk refuses.
    """
    if not config.target:
        raise ValueError("no target: say what to achieve, such as --target test_loss=0.3")
    trained = load(config.model)
    if config.task is not None:
        trained.spec = replace(trained.spec, task=config.task)
    with process_group(config.device) as ranks:
        trained.to(ranks.device)
    network = config.checkpoint or _random(trained, config)
    with Progress("denoising", config.recursive * config.num_inference_steps, "step") as progress:
        answers = prompt(
            trained, network, recursive=config.recursive, samples=config.samples, seed=config.seed,
            settings=config.settings, progress=progress.advance, **parse_target(config.target),
        )  # fmt: skip
    files = [_write(config, trained.spec.task, number, answer) for number, answer in enumerate(answers)]
    _tell(answers, files)
    result = {
        "metric": answers[0].metric,
        "asked": answers[0].asked,
        "start": answers[0].path[0],
        "networks": [
            {"file": str(file), "path": list(answer.path), "achieved": answer.achieved, "rejected": answer.rejected}
            for file, answer in zip(files, answers, strict=True)
        ],
        "sampler": asdict(config.settings),
        "model": str(config.model),
        "checkpoint": config.checkpoint and str(config.checkpoint),
        "seed": config.seed,
    }
    write_json(config.out / "prompt.json", {**plain(result), **provenance()})
    echo(f"wrote {len(files)} networks and prompt.json to {config.out}")
    return plain(result)


def _random(trained: Any, config: PromptConfig) -> dict[str, Tensor]:
    task = trained.task
    initialiser = config.initialiser or task.initialisers[0]
    if initialiser not in task.initialisers:
        raise ValueError(f"initialiser {initialiser!r}: expected one of {', '.join(task.initialisers)}")
    echo(f"no --checkpoint: a random network of {task.name}, {initialiser}, seed {config.seed}")
    return task.layout.unflatten(task.initial(config.seed, [0], initialiser)[0])


def _write(config: PromptConfig, task: str, number: int, answer: Answer) -> Path:
    path = config.out / f"net-{number:03d}{'.pt' if config.pickle else '.safetensors'}"
    if config.pickle:
        foreign.write(path, answer.state_dict)
    else:
        facts = {
            "kind": "state dict",
            "task": task,
            "asked": {answer.metric: answer.asked},
            "achieved": answer.achieved,
        }
        checkpoint.write(path, answer.state_dict, plain(facts))
    return path


def _tell(answers: list[Answer], files: list[Path]) -> None:
    metric, width = answers[0].metric, max(len(file.name) for file in files)
    others = [name for name in answers[0].achieved if name != metric]
    echo(f"start {metric} {answers[0].path[0]:.4g}, asked for {answers[0].asked:.4g}; achieved:")
    for file, answer in zip(files, answers, strict=True):
        path = " -> ".join(f"{value:.4g}" for value in answer.path[1:])
        rest = "".join(f"   {name} {answer.achieved[name]:.4g}" for name in others)
        echo(f"  {file.name:<{width}}  {metric} {path}{rest}")
