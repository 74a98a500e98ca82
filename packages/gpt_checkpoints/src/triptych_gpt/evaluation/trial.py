"""A trained model on trial: the zoo that it was trained on, networks it never saw, and baselines that could fake its scores."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from triptych_common.diffusion import normal_kl
from triptych_common.parallel import process_group

from triptych_gpt.evaluation.alignment import alignment_of, prompt_sweep, quality_against_steps, trained_best
from triptych_gpt.evaluation.baselines import identity, mean_of_finals, retrieval
from triptych_gpt.evaluation.prompted import Update, Updated, prompted, starting_metrics, with_prompts
from triptych_gpt.evaluation.records import plain
from triptych_gpt.memorization import audit
from triptych_gpt.settings import SamplerSettings
from triptych_gpt.tasks.task import Metric, Task
from triptych_gpt.trained import TrainedGpt, load
from triptych_gpt.zoo.source import contents_of, recipe_of
from triptych_gpt.zoo.zoo import Zoo

CANDIDATES = (0.0, 0.1, 0.5, 0.9, 1.0)  # quantiles of the metric at which training runs end
MODEL = "G.pt"  # the model's name beside those of the baselines


@dataclass
class Trial:
    """A trained model, its zoo, and how its updates are sampled. Raises ValueError if zoo and model do not belong together."""

    trained: TrainedGpt
    zoo: Zoo
    settings: SamplerSettings
    seed: int = 0

    def __post_init__(self) -> None:
        layout, known, problem = self.trained.model.config.symmetry.layout, self.trained.facts.get("zoo"), ""
        if self.zoo.layout != layout:
            problem = f"networks of {self.zoo.layout.size:,} parameters, the model was trained on {layout.size:,}"
        elif known and known["recipe"] != recipe_of(self.zoo):  # a converted model's file does not have this fact
            problem = "collected by another recipe than the zoo of the model, whose training runs it cannot hold"
        if problem:
            raise ValueError(f"{self.zoo.path}: {problem}; give the zoo that it was trained on")
        self.metric  # noqa: B018 - refused now if the zoo or the task does not have it

    @classmethod
    def open(
        cls, model: str | Path, zoo: str | Path, settings: SamplerSettings, seed: int = 0, device: str = "auto",
        task: str | None = None,
    ) -> "Trial":  # fmt: skip
        """The model of a run folder or model file, on a device, with its zoo, verified. Raises what `load` and `Zoo` raise.

        task: as for `load`.
        """
        trial = cls(load(model, task), Zoo(zoo), settings, seed)
        with process_group(device) as ranks:
            trial.trained.to(ranks.device)
        trial.zoo.verify_once()
        return trial

    @property
    def task(self) -> Task:
        return self.trained.task

    @cached_property
    def metric(self) -> Metric:
        """The prompted metric, with prompts. Raises ValueError if the zoo or the task does not score it."""
        if self.trained.metric not in self.zoo.better:
            held = f"{self.zoo.path} records {', '.join(self.zoo.better)}"
            raise ValueError(f"metric {self.trained.metric!r}: {held}; give the zoo that the model was trained on")
        return with_prompts(self.trained.metric, self.task.metrics, self.trained_best[self.trained.metric])

    @cached_property
    def training(self) -> Int[np.ndarray, " rows"]:
        """Rows of the runs that the model was trained on; runs that the zoo has gained since are left out."""
        rows, known = self.zoo.runs_in("train"), self.trained.facts.get("zoo")
        return rows if known is None else rows[: known["training_runs"]]

    @cached_property
    def trained_best(self) -> dict[str, float]:
        """The best value of every metric over the training checkpoints."""
        return trained_best(self.zoo, self.training)

    def zoo_identity(self) -> dict[str, Any]:
        """What of the zoo decides results."""
        zoo = self.zoo
        return {"recipe": recipe_of(zoo), "runs": zoo.splits, "contents": contents_of(zoo.manifest.shards)}

    def starts(self, split: str, count: int) -> Float[Tensor, "n D"]:
        """Untrained networks of the first runs of a split, on the model's device. Raises ValueError if it has fewer."""
        return self.zoo.theta(self.rows(split, count), [0] * count).to(self.trained.device)

    def rows(self, split: str, count: int) -> Int[np.ndarray, " count"]:
        """Rows of the first runs of a split. Raises ValueError if it has fewer."""
        held = len(self.training) if split == "train" else self.zoo.splits.get(split, 0)
        if count > held:
            raise ValueError(f"{count:,} networks of {split} runs: {self.zoo.path} has {held:,}; use fewer")
        return (self.training if split == "train" else self.zoo.runs_in(split))[:count]

    @property
    def update(self) -> Update:
        return self.trained.update(self.settings, self.seed)

    @cached_property
    def baselines(self) -> Mapping[str, Update]:
        """Updates that learn nothing and could fake a good score, by name."""
        return {
            "retrieval": retrieval(self.zoo, self.metric.name, rows=self.training),
            "mean of finals": mean_of_finals(self.zoo, rows=self.training),
            "mean of matched finals": mean_of_finals(self.zoo, self.task.symmetry, rows=self.training),
            "identity": identity(),
        }

    @cached_property
    def best_prompt(self) -> float:
        """The prompt whose updates of validation networks score best.  [thesis 3.4.1]

        Candidates are the task's own best prompt, the zoo's best value, and quantiles of the values at which training runs end.
        """
        finals = self.zoo.metrics(self.metric.name)[torch.from_numpy(self.training), -1].double()
        levels = torch.tensor(CANDIDATES, dtype=torch.float64)
        values = [self.trained_best[self.metric.name], *torch.quantile(finals, levels).tolist()]
        assert self.metric.prompts is not None  # added by with_prompts
        candidates = list(dict.fromkeys([float(self.metric.prompts.best), *values]))
        theta = self.starts("validation", min(16, len(self.zoo.runs_in("validation"))))
        before = starting_metrics(self.task, theta, self.metric)[self.metric.name]
        n = len(theta)
        each = list(range(n)) * len(candidates)
        target = torch.tensor(candidates, dtype=torch.float64).repeat_interleave(n)
        updated = prompted(self.update, self.task, theta[each], before[each], target, each)
        achieved = updated.metrics[self.metric.name]
        # The thesis, too, prompts with a value near the best: lower ones may be beyond what the model was trained on.
        worst = torch.inf if self.metric.better == "lower" else -torch.inf
        means = achieved.nan_to_num(worst).view(len(candidates), n).mean(1)
        return candidates[int(means.argmin() if self.metric.better == "lower" else means.argmax())]

    def prompted(
        self,
        theta: Float[Tensor, "n D"],
        start: Mapping[str, Float[Tensor, " n"]],
        update: Update | None = None,
        prompt: float | None = None,
    ) -> Updated:
        """One update of networks that score `start`: the model's towards the best prompt, unless others are given."""
        target = torch.full((len(theta),), self.best_prompt if prompt is None else prompt, dtype=torch.float64)
        update = self.update if update is None else update
        return prompted(update, self.task, theta, start[self.metric.name], target, range(len(theta)))


def alignment_beside_baselines(trial: Trial, *, networks: int, prompts: int = 20) -> dict[str, Any]:
    """Sweeps over prompts on unseen networks, and R^2, of the model and of the baselines.  [thesis 3.4.4]

    JSON-able: "sweeps" and "alignment" by the update's name, and "kl_last_step". Raises ValueError for too few test runs.
    """
    theta = trial.starts("test", networks)
    sweeps = {
        name: prompt_sweep(
            update, trial.task, trial.metric, theta, prompts=prompts, trained_best=trial.trained_best,
            networks_at_once=trial.settings.networks_at_once,
        )
        for name, update in {MODEL: trial.update, **trial.baselines}.items()
    }  # fmt: skip
    return {
        "sweeps": plain(sweeps),
        "alignment": {name: plain(alignment_of(sweep)) for name, sweep in sweeps.items()},
        "kl_last_step": _kl_last_step(trial),
    }


def quality_against_sampler_steps(
    trial: Trial, steps: Sequence[int], *, networks: int, prompts: int = 20
) -> dict[str, Any]:
    """Prompt alignment on at most 16 validation networks against denoising steps, for each sampler; "rows" are JSON-able.

    The samplers are ours and, if diffusers is installed, UniPC as an example of its fast ones.
    """
    samplers = ("ddpm", "ddim", *(("unipc",) if find_spec("diffusers") else ()))
    updates = {}
    for sampler, count in itertools.product(samplers, steps):
        if sampler in ("ddpm", "ddim") or count >= 5:  # with fewer, those of diffusers would not start from noise
            settings = replace(trial.settings, sampler=sampler, num_inference_steps=count)
            updates[sampler, count] = trial.trained.update(settings, trial.seed)
    theta = trial.starts("validation", min(networks, 16))
    rows = quality_against_steps(
        updates, trial.task, trial.metric, theta, prompts=prompts, trained_best=trial.trained_best,
        networks_at_once=trial.settings.networks_at_once,
    )  # fmt: skip
    return {"rows": plain(rows)}


def memorization(trial: Trial, *, samples: int, prompt: float | None = None, every: int = 1) -> dict[str, Any]:
    """The memorisation audit of one update each of unseen networks, `samples` of them if the zoo has as many; JSON-able.

    prompt: by default the one that gives the best networks. every: search each k-th training checkpoint only.
    Raises ValueError if no update is finite.
    """
    prompt = trial.best_prompt if prompt is None else float(prompt)
    count = min(samples, len(trial.zoo.runs_in("test")))
    theta = trial.starts("test", count)
    new = trial.prompted(theta, starting_metrics(trial.task, theta, trial.metric), prompt=prompt)
    finite = new.theta.isfinite().all(1)
    if not finite.any():
        raise ValueError(f"none of {count:,} updates is finite, so there is nothing to audit; train the model further")
    result = audit(
        new.theta[finite], trial.zoo, trial.task, trial.metric.name,
        torch.full((int(finite.sum()),), prompt, dtype=torch.float64), trial.trained.scale, seed=trial.seed,
        every=every, rows=trial.training,
    )  # fmt: skip
    return {"prompt": prompt, "non_finite": int((~finite).sum()), **result.as_dict()}


def _kl_last_step(trial: Trial) -> float:
    """`kl_last_step` on final and other checkpoints of test runs.  [thesis 3.3]"""
    rows = torch.from_numpy(trial.zoo.runs_in("test"))[:32].repeat_interleave(8)
    places = torch.linspace(0, trial.zoo.checkpoints - 1, 8).long().repeat(len(rows) // 8)
    theta_star = trial.zoo.theta(rows, places) * trial.trained.scale
    return kl_last_step(trial.trained.diffusion.schedule.alpha_bar[-1], theta_star)


def kl_last_step(alpha_bar_last: float | Float[Tensor, ""], theta_star: Float[Tensor, "n D"]) -> float:
    """KL(q(x_T | x_0) || N(0, I)) in bits per dimension, mean over normalised networks: about 8e-6 in thesis 3.3."""
    alpha_bar = torch.as_tensor(alpha_bar_last, dtype=torch.float64)
    mean = alpha_bar.sqrt() * theta_star.detach().to("cpu", torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    return float(normal_kl(mean, torch.log1p(-alpha_bar), zero, zero).mean()) / math.log(2)
