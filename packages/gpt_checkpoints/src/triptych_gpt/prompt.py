"""Prompt a network into being: one's own network and a wished-for metric in, networks that achieve it out."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from triptych_common import foreign

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.trained import SamplerSettings, TrainedGpt

_UPDATES = 1 << 20  # that a sample may go through, so that none shares noise with the next
Network = nn.Module | Mapping[str, Tensor] | Path | str


@dataclass(frozen=True)
class Answer:
    """A network made by one or more updates.

    theta: its parameters, flat; asked: the prompt; achieved: every metric of the task; path: the prompted metric before the first
    update and after each.
    """

    theta: Float[Tensor, " D"]
    layout: ParameterLayout
    metric: str
    asked: float
    achieved: dict[str, float]
    path: tuple[float, ...]

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """What load_state_dict takes."""
        return {name: value.clone() for name, value in self.layout.unflatten(self.theta).items()}


class OutsideTrainedRange(UserWarning):
    """A prompt that no training checkpoint scored: extrapolation is limited.  [thesis 3.4.2]"""


def prompt(
    trained: TrainedGpt,
    network: Network,
    *,
    recursive: int = 1,
    samples: int = 1,
    seed: int = 0,
    settings: SamplerSettings | None = None,
    progress: Callable[[], None] = lambda: None,
    **target: float | int,
) -> list[Answer]:
    """Networks that a G.pt makes of `network` when asked for a metric, say test_loss=0.3; `samples` of them, by `recursive`
    updates each: every update's output is scored and given back with the same prompt.  [thesis 3.2.2, 3.4.1, 3.4.3]

    network: a module, a state dict or a file of one (safetensors, or torch.save's without objects). Sample i's noise follows from
    (seed, i). Warns of a prompt outside the trained range. Raises ValueError for a metric the model was not trained for, a
    network of another architecture, or one that is not finite; FileNotFoundError for an absent file.
    """
    asked = _asked(trained, target)
    for name, value in (("recursive", recursive), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name} {value}: expected at least 1")
    theta = theta_of(network, trained.model.config.symmetry.layout)
    before = _score(trained, theta[None])[trained.metric]
    thetas, metric, paths = theta.repeat(samples, 1), before.repeat(samples), [before.repeat(samples)]
    for step in range(recursive):
        indices = [i * _UPDATES + step for i in range(samples)]
        thetas = trained.sample(
            thetas, metric, torch.full_like(metric, asked), settings=settings, seed=seed, indices=indices, progress=progress
        )  # fmt: skip
        scores = _score(trained, thetas)
        metric = scores[trained.metric]
        paths.append(metric)
    return [
        Answer(
            theta=thetas[i],
            layout=trained.model.config.symmetry.layout,
            metric=trained.metric,
            asked=asked,
            achieved={name: float(values[i]) for name, values in scores.items()},
            path=tuple(float(values[i]) for values in paths),
        )
        for i in range(samples)
    ]


def theta_of(network: Network, layout: ParameterLayout) -> Float[Tensor, " D"]:
    """The parameters of a network as one float32 vector on the CPU.

    Raises ValueError naming the first tensor that differs from the layout, or is not finite.
    """
    where = ""
    if isinstance(network, str | Path):
        where, content = f"{network}: ", foreign.read(Path(network))
    else:
        content = network.state_dict() if isinstance(network, nn.Module) else network
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{where}not a state dict (a mapping of names to tensors); save one with network.state_dict()")
    for name, value in content.items():
        if bad := int((~value.isfinite()).sum()):
            raise ValueError(
                f"{where}{name}: {bad:,} of {value.numel():,} entries are not finite; give a network of finite weights"
            )
    try:
        theta = layout.flatten(content)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    if theta.ndim != 1:
        raise ValueError(f"{where}several networks stacked ({tuple(theta.shape)}); give one")
    return theta.detach().float().cpu()


def _asked(trained: TrainedGpt, target: Mapping[str, float | int]) -> float:
    """The prompt. Raises ValueError for another metric than the trained one, warns outside its range."""
    if list(target) != [trained.metric]:
        given = ", ".join(target) or "nothing"
        raise ValueError(
            f"target {given}: this model was trained for {trained.metric}; ask for {trained.metric}=VALUE, or train another "
            "with triptych-gpt train --metric"
        )
    asked, (low, high) = float(target[trained.metric]), trained.trained_range or (-math.inf, math.inf)
    if not math.isfinite(asked):
        raise ValueError(f"target {trained.metric}={asked}: expected a finite number")
    if not low <= asked <= high:
        warnings.warn(
            f"target {trained.metric}={asked:g}: outside {low:.4g}..{high:.4g}, what training checkpoints scored; going on, but "
            "expect no better than that",
            OutsideTrainedRange,
            stacklevel=3,
        )
    return asked


def _score(trained: TrainedGpt, thetas: Float[Tensor, "n D"]) -> dict[str, Tensor]:
    return {name: values.float().cpu() for name, values in trained.task.evaluate(thetas).items()}


def parse_target(text: str) -> dict[str, float]:
    """ "test_loss=0.3" as {"test_loss": 0.3}. Raises ValueError for anything else."""
    name, equals, value = text.partition("=")
    try:
        if not (name and equals):
            raise ValueError
        return {name.strip(): float(value)}
    except ValueError as error:
        raise ValueError(f"target {text!r}: expected METRIC=VALUE, such as test_loss=0.3") from error
