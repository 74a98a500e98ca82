"""Prompt a network into being: one's own network and a wished-for metric in, networks that achieve it out."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from triptych_common.cli import echo
from triptych_common.parallel import process_group
from triptych_common.progress import Progress
from triptych_common.storage import checkpoint, foreign
from triptych_common.storage.atomic import write_json
from triptych_common.storage.provenance import provenance

from triptych_gpt.evaluation.prompted import advanced, measured
from triptych_gpt.evaluation.records import plain
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.settings import PromptConfig, SamplerSettings, parse_target
from triptych_gpt.trained import TrainedGpt, load

_UPDATES = 1 << 20  # that a sample may go through, so that none shares noise with the next
_ENTRIES = ("state_dict", "model_state_dict", "model")  # where training scripts put the network beside other things
Network = nn.Module | Mapping[str, Tensor] | Path | str


@dataclass(frozen=True)
class Answer:
    """A network made by one or more updates.

    theta: its parameters, flat; asked: the prompt; achieved: every metric of the task; path: the prompted metric before the first
    update and after each. rejected: updates that gave a network that is not finite, or scores nothing finite; it stays as it was
    before such an update, and goes on from there.
    """

    theta: Float[Tensor, " D"]
    layout: ParameterLayout
    metric: str
    asked: float
    achieved: dict[str, float]
    path: tuple[float, ...]
    rejected: int = 0

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """What load_state_dict takes."""
        return {name: value.clone() for name, value in self.layout.unflatten(self.theta).items()}


class OutsideTrainedRange(UserWarning):
    """A prompt that no training checkpoint scored, or none that is known: extrapolation is limited.  [thesis 3.4.2]"""


class UpdatesRejected(UserWarning):
    """Updates that gave networks that are not finite, or score nothing finite, which are not used."""


def prompt(
    trained: TrainedGpt,
    network: Network,
    *,
    recursive: int = 1,
    samples: int = 1,
    seed: int = 0,
    settings: SamplerSettings | None = None,
    progress: Callable[[], None] = lambda: None,
    **target: float,
) -> list[Answer]:
    """Networks that a G.pt makes of `network` when asked for a metric, say test_loss=0.3; `samples` of them, by `recursive`
    updates each: every update's output is scored and given back with the same prompt.  [thesis 3.2.2, 3.4.1, 3.4.3]

    network: a module, a state dict or a file of one (safetensors, or torch.save's without objects). Sample i's noise follows from
    (seed, i). Warns of a prompt outside the trained range, and of rejected updates. Raises ValueError for a metric the model was
    not trained for, a network of another architecture, or one that is not finite or scores nothing finite; FileNotFoundError for
    an absent file.
    """
    asked, settings = _asked(trained, target), settings or SamplerSettings()
    update = trained.update(settings, seed, progress)
    for name, value in (("recursive", recursive), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name} {value}: expected at least 1")
    theta = theta_of(network, trained.model.config.symmetry.layout)
    scores = {name: values.repeat(samples) for name, values in measured(trained.task, theta[None]).items()}
    if scores[trained.metric].isnan().any():
        raise ValueError(
            f"the network's {trained.metric} is not finite, though its weights are; give one whose weights are not so large"
        )
    thetas, paths, rejected = theta.repeat(samples, 1), [scores[trained.metric]], torch.zeros(samples, dtype=torch.long)
    for step in range(recursive):
        indices = [i * _UPDATES + step for i in range(samples)]
        updated = advanced(
            update,
            trained.task,
            thetas,
            scores,
            trained.metric,
            asked,
            indices,
            networks_at_once=settings.networks_at_once,
        )
        thetas, scores, usable = updated.theta, dict(updated.metrics), updated.usable
        paths.append(scores[trained.metric])
        rejected += ~usable
    if rejected.any():
        warnings.warn(
            f"{int(rejected.sum()):,} of {recursive * samples:,} updates gave networks that are not finite, or score "
            "nothing finite, and were rejected: each network stays as it was before",
            UpdatesRejected,
            stacklevel=2,
        )
    return [
        Answer(
            theta=thetas[i],
            layout=trained.model.config.symmetry.layout,
            metric=trained.metric,
            asked=asked,
            achieved={name: float(values[i]) for name, values in scores.items()},
            path=tuple(float(values[i]) for values in paths),
            rejected=int(rejected[i]),
        )
        for i in range(samples)
    ]


def theta_of(network: Network, layout: ParameterLayout) -> Float[Tensor, " D"]:
    """The parameters of a network as one float32 vector on the CPU. A state dict among other things, as training scripts save
    it, is found, and a warning says where.

    Raises ValueError naming the first tensor that differs from the layout, or is not finite; FileNotFoundError for an absent file.
    """
    where = ""
    if isinstance(network, str | Path):
        where, content = f"{network}: ", _read(Path(network))
    else:
        content = network.state_dict() if isinstance(network, nn.Module) else network
    state, entry = _state_dict(content, where)
    for name, value in state.items():
        _check_values(value, f"{where}{name}", weights=name in layout.shapes)
    try:
        theta = layout.flatten(state)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    if theta.ndim != 1:
        raise ValueError(f"{where}several networks stacked ({tuple(theta.shape)}); give one")
    if entry is not None:
        warnings.warn(f"{where}the network is its entry {entry!r}, which is taken", UserWarning, stacklevel=3)
    return theta.detach().float().cpu()


def _read(path: Path) -> Any:
    expected = (
        "expected one network's state dict, .safetensors or .pt: torch.save(network.state_dict(), PATH) writes one, and "
        "triptych-gpt export one of a zoo's"
    )
    if path.is_dir():
        raise ValueError(f"{path}: a folder; {expected}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; {expected}")
    return foreign.read(path)


def _state_dict(content: Any, where: str) -> tuple[Mapping[str, Tensor], str | None]:
    """The state dict in a file's content, and the entry that it is where it is not all of it."""
    if isinstance(content, Mapping):
        if _holds_tensors(content):
            return content, None
        inner = [name for name, value in content.items() if isinstance(value, Mapping) and _holds_tensors(value)]
        named = [name for name in _ENTRIES if name in inner] or inner
        if named and (len(named) == 1 or named[0] in _ENTRIES):
            return content[named[0]], named[0]
        if named:
            raise ValueError(
                f"{where}holds several state dicts ({', '.join(map(str, named))}); save the one that is meant alone"
            )
    raise ValueError(
        f"{where}not a state dict (a mapping of names to tensors), nor has it an entry of one, such as 'state_dict'; save one "
        "with torch.save(network.state_dict(), PATH)"
    )


def _holds_tensors(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(name, str) and isinstance(x, Tensor) for name, x in content.items())


def _check_values(value: Tensor, where: str, *, weights: bool) -> None:
    if value.is_complex() or (weights and not value.is_floating_point()):
        kind = str(value.dtype).removeprefix("torch.")
        raise ValueError(
            f"{where}: entries are {kind}; give a network of real floating-point weights, such as network.float()'s"
        )
    if bad := int((~value.float().isfinite()).sum()):  # as float32 they are what is prompted
        raise ValueError(
            f"{where}: {bad:,} of {value.numel():,} entries are not finite; give a network of finite weights"
        )


def _asked(trained: TrainedGpt, target: Mapping[str, float]) -> float:
    """The prompt. Raises ValueError for another metric than the trained one, warns outside its range."""
    if list(target) != [trained.metric]:
        given = ", ".join(target) or "nothing"
        raise ValueError(
            f"target {given}: this model was trained for {trained.metric}; ask for {trained.metric}=VALUE, or train another "
            "with triptych-gpt train --metric"
        )
    asked = float(target[trained.metric])
    if not math.isfinite(asked):
        raise ValueError(f"target {trained.metric}={asked}: expected a finite number")
    if trained.trained_range is None:
        warnings.warn(
            f"target {trained.metric}={asked:g}: the range that the model was trained on is not known (converted models do not "
            "say); going on, but it may lie outside",
            OutsideTrainedRange,
            stacklevel=3,
        )
        return asked
    low, high = trained.trained_range
    if not low <= asked <= high:
        warnings.warn(
            f"target {trained.metric}={asked:g}: outside {low:.4g}..{high:.4g}, what training checkpoints scored; going on, but "
            "expect no better than that",
            OutsideTrainedRange,
            stacklevel=3,
        )
    return asked


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
