"""What every experiment of chapter 3 is given: a trained model, the zoo it learned from, and networks it never saw."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from triptych_gpt.evaluation.baselines import identity, mean_of_finals, retrieval
from triptych_gpt.evaluation.prompted import prompted, starting_metrics
from triptych_gpt.evaluation.prompts import with_prompts
from triptych_gpt.evaluation.sweep import trained_best
from triptych_gpt.evaluation.update import Update
from triptych_gpt.tasks import Metric, Task
from triptych_gpt.trained import SamplerSettings, TrainedGpt
from triptych_gpt.zoo.source import recipe_of
from triptych_gpt.zoo.zoo import Zoo

CANDIDATES = (0.0, 0.1, 0.5, 0.9, 1.0)  # quantiles of the metric at which training runs end


@dataclass(frozen=True)
class Amounts:
    """How much of everything an evaluation does."""

    networks: int = 32
    """unseen networks for prompt alignment"""
    prompts: int = 20
    """prompts for each"""
    baseline_networks: int = 5
    """unseen networks in the comparison with optimisers, and as many validation networks to tune on; the thesis has five"""
    optimizer_steps: int | None = None
    """steps of the optimisers' curves; default: those of a training run"""
    updates: int = 10
    """updates in a row, of networks from other initialisers"""
    recursion_networks: int = 8
    """networks of each initialiser"""
    samples: int = 16
    """samples of one start, for diversity and landscape"""
    audit_samples: int = 100
    """networks of the memorisation audit"""
    neighbour_prompts: int = 5
    """prompts of the nearest-neighbour score"""
    every: int = 1
    """search every so many checkpoints of the training runs for neighbours; 1: all"""
    sampler_steps: tuple[int, ...] = (2, 5, 10, 25, 50, 100)
    """denoising steps to compare samplers at"""

    def __post_init__(self) -> None:
        for name in ("networks", "baseline_networks", "updates", "recursion_networks", "audit_samples", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        for name, least in (("prompts", 2), ("samples", 3), ("neighbour_prompts", 2)):  # three samples span a plane
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least {least}")
        if any(not 1 <= steps <= 1000 for steps in self.sampler_steps):
            raise ValueError(f"sampler_steps {self.sampler_steps}: expected numbers of 1..1000")


@dataclass
class Bench:
    """A trained model on trial.

    Raises ValueError where zoo and model do not belong together, or the zoo has too few unseen runs.
    """

    trained: TrainedGpt
    zoo: Zoo
    settings: SamplerSettings
    amounts: Amounts
    seed: int = 0

    def __post_init__(self) -> None:
        if self.zoo.layout != self.trained.model.config.symmetry.layout:
            raise ValueError(
                f"{self.zoo.path}: networks of {self.zoo.layout.size:,} parameters, the model was trained on "
                f"{self.trained.model.config.symmetry.layout.size:,}; give the zoo that it was trained on"
            )
        known = self.trained.facts.get("zoo")
        if known and known["recipe"] != recipe_of(self.zoo):  # a converted model's file does not know
            raise ValueError(
                f"{self.zoo.path}: collected by another recipe than the zoo of the model, whose training runs it cannot hold; "
                "give the zoo that it was trained on"
            )
        self.metric  # noqa: B018 - refused now if the zoo or the task does not have it

    def check(self) -> None:
        """Raises ValueError where the zoo has too few unseen runs, before a folder knows the amounts."""
        wanted = max(self.amounts.networks, self.amounts.baseline_networks)
        self._rows("test", wanted)
        self._rows("validation", self.amounts.baseline_networks)

    @property
    def task(self) -> Task:
        return self.trained.task

    @cached_property
    def metric(self) -> Metric:
        """The prompted metric, with prompts. Raises ValueError where the zoo or the task does not score it."""
        if self.trained.metric not in self.zoo.better:
            raise ValueError(
                f"metric {self.trained.metric!r}: {self.zoo.path} records {', '.join(self.zoo.better)}; give the zoo that the "
                "model was trained on"
            )
        return with_prompts(self.trained.metric, self.task.metrics, self.trained_best[self.trained.metric])

    @cached_property
    def training(self) -> Int[np.ndarray, " rows"]:
        """Rows of the runs that the model was trained on, not those that the zoo has gained since."""
        rows, known = self.zoo.runs_in("train"), self.trained.facts.get("zoo")
        return rows if known is None else rows[: known["training_runs"]]

    @cached_property
    def trained_best(self) -> dict[str, float]:
        return trained_best(self.zoo, rows=self.training)

    def starts(self, split: str, count: int) -> Float[Tensor, "n D"]:
        """Untrained networks of the first runs of a split. Raises ValueError where it has fewer."""
        return self.zoo.theta(self._rows(split, count), [0] * count).to(self.trained.device)  # where it is scored

    def _rows(self, split: str, count: int) -> Int[np.ndarray, " count"]:
        held = len(self.training) if split == "train" else self.zoo.splits.get(split, 0)
        if count > held:
            raise ValueError(
                f"{count:,} networks of {split} runs: {self.zoo.path} has {held:,}; ask for fewer, or collect more"
            )
        return (self.training if split == "train" else self.zoo.runs_in(split))[:count]

    @property
    def update(self) -> Update:
        return self.trained.update(self.settings, self.seed)

    @cached_property
    def baselines(self) -> Mapping[str, Update]:
        """What could fake a headline number."""
        return {
            "retrieval": retrieval(self.zoo, self.metric.name, rows=self.training),
            "mean of finals": mean_of_finals(self.zoo, rows=self.training),
            "mean of matched finals": mean_of_finals(self.zoo, self.task.symmetry, rows=self.training),
            "identity": identity(),
        }

    @cached_property
    def best_prompt(self) -> float:
        """What to ask for when asking for the best: of the task's own prompt, the best of the zoo and values at which training
        runs end, the one whose updates of validation networks score best. The thesis, too, asks for a value near the best.
        [thesis 3.4.1]
        """
        finals = self.zoo.metrics(self.metric.name)[torch.from_numpy(self.training), -1].double()
        levels = torch.tensor(CANDIDATES, dtype=torch.float64)
        found = [self.trained_best[self.metric.name], *torch.quantile(finals, levels).tolist()]
        candidates = list(dict.fromkeys([float(self.metric.prompts.best), *found]))
        theta = self.starts("validation", min(16, len(self.zoo.runs_in("validation"))))
        before = starting_metrics(self.task, theta, self.metric)[self.metric.name]
        n = len(theta)
        target = torch.tensor(candidates, dtype=torch.float64).repeat_interleave(n)
        found = prompted(
            self.update, self.task, theta.repeat(len(candidates), 1), before.repeat(len(candidates)), target,
            list(range(n)) * len(candidates),
        ).metrics[self.metric.name]  # fmt: skip
        worst = torch.inf if self.metric.better == "lower" else -torch.inf
        means = found.nan_to_num(worst).view(len(candidates), n).mean(1)
        return candidates[int(means.argmin() if self.metric.better == "lower" else means.argmax())]
