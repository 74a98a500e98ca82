"""A trained G.pt: its file, and updates of networks towards a prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_common.diffusion import GaussianDiffusion
from triptych_common.randomness import SampleNoise
from triptych_common.samplers import final, sampling

from triptych_gpt.config import GptConfig
from triptych_gpt.evaluation.prompted import Update
from triptych_gpt.model import FORMAT, Gpt
from triptych_gpt.objective import make_diffusion
from triptych_gpt.settings import SamplerSettings
from triptych_gpt.tasks.task import Task
from triptych_gpt.zoo.source import TaskSpec, report_changes


@dataclass
class TrainedGpt:
    """A trained G.pt with its parameters' scale, its metric and the task that scores its networks; `load` makes it."""

    model: Gpt
    scale: float  # parameters are multiplied by it to be normalised
    metric: str  # that prompts the model
    better: str  # "lower" or "higher"
    trained_range: tuple[float, float] | None  # of the metric over all training checkpoints; None if unknown
    spec: TaskSpec  # how its task is opened
    facts: Mapping[str, Any]  # everything in the model file about its training

    @cached_property
    def task(self) -> Task:
        """The task that scores networks, opened with its data when first needed.

        Raises ValueError for one that cannot be found, or whose networks are not those that the model was trained on.
        """
        task, layout = self.spec.open(), self.model.config.symmetry.layout
        if task.layout != layout:
            sizes = f"networks of {task.layout.size:,} parameters, the model was trained on {layout.size:,}"
            raise ValueError(f"task {self.spec.task}: {sizes}; open the task that it was trained on")
        return task

    @cached_property
    def diffusion(self) -> GaussianDiffusion:
        return make_diffusion()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "TrainedGpt":
        self.model.to(device)
        return self

    def sample(
        self,
        theta: Float[Tensor, "n D"],
        metric: Float[Tensor, " n"],
        target: Float[Tensor, " n"],
        *,
        settings: SamplerSettings | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> Float[Tensor, "n D"]:
        """One update of each network, towards its own target.  [thesis 3.2.2, sampling]

        theta: unnormalised, like the result, on the CPU or the model's device. metric: what theta scores. indices: a network's
        noise follows from the seed and its index, by default its row. progress: called after every denoising step of every batch.
        """
        settings, weight = settings or SamplerSettings(), next(self.model.parameters())
        indices = range(len(theta)) if indices is None else indices
        parts = []
        for first in range(0, len(theta), settings.networks_at_once):
            here = slice(first, first + settings.networks_at_once)
            given = tuple(x[here].to(weight.device, weight.dtype) for x in (theta * self.scale, metric, target))
            noise = SampleNoise(seed, indices[here], theta.shape[1:], device=weight.device, dtype=weight.dtype)

            def denoise(noised: Tensor, t: Tensor, given: tuple[Tensor, ...] = given) -> Tensor:
                return self.model(noised, t, *given)

            # Sharded weights are gathered as needed, which inference mode forbids. A DTensor is recognised by its attribute, since
            # its class takes a second to import.
            with torch.no_grad() if hasattr(weight, "full_tensor") else torch.inference_mode():
                theta_star = final(sampling(settings, denoise, self.diffusion, noise), progress)
            parts.append(theta_star.to(theta.device, theta.dtype))
        return torch.cat(parts) / self.scale if parts else theta.clone()

    def update(
        self, settings: SamplerSettings | None = None, seed: int = 0, progress: Callable[[], None] = lambda: None
    ) -> Update:
        """`sample` as an `Update`, for everything in `triptych_gpt.evaluation`."""
        options: dict[str, Any] = {"settings": settings, "seed": seed, "progress": progress}
        return lambda theta, metric, target, indices: self.sample(theta, metric, target, indices=indices, **options)


def load(path: str | Path, task: str | None = None) -> TrainedGpt:
    """Read a model file, or the one in a run's folder, onto the CPU in evaluation mode.

    task: what scores its networks, a name or file.py:NAME, if the model file does not name it, or names a file: that is run only
        where it is given here.
    Raises FileNotFoundError if there is none, ValueError for a file of another kind.
    """
    return FORMAT.read(path, partial(_build, str(path), task))


def _build(path: str, task: str | None, tensors: dict[str, Tensor], facts: dict[str, Any]) -> TrainedGpt:
    model = Gpt(GptConfig.from_json(facts["config"]))
    model.load_state_dict(tensors)
    ends, spec = facts["trained_range"], TaskSpec.recorded(facts["task"], path, task)
    report_changes(spec, facts, path)
    return TrainedGpt(
        model.requires_grad_(False).eval(), float(facts["scale"]), facts["metric"], facts["better"],
        ends and (float(ends[0]), float(ends[1])), spec, facts,
    )  # fmt: skip
