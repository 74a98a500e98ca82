"""Prompt alignment on validation runs, by which the saved model is chosen.  [thesis 3.4.4]"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from triptych_common.cli import echo
from triptych_common.parallel import Ranks
from triptych_common.storage.files import write_bytes
from triptych_common.storage.run import RunDirectory
from triptych_common.training import TrainState

from triptych_gpt.evaluation.alignment import prompt_alignment
from triptych_gpt.evaluation.prompted import with_prompts
from triptych_gpt.model import FILE_NAME, Gpt
from triptych_gpt.objective import TrainingZoo
from triptych_gpt.settings import SamplerSettings
from triptych_gpt.tasks.task import Metric
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.trained import TrainedGpt
from triptych_gpt.zoo.source import NO_TASK

SEED = 3_022  # of every run's validation, so that runs can be compared
PROMPTS = 20
SCORE = "validation/alignment"


class Validation:
    """A callback that logs "validation/alignment" every `validation_every` steps, and saves the averaged model if it is the best.

    save(path, facts) writes the averaged model. `check` must have been called before.
    """

    def __init__(
        self, config: GptTrainConfig, data: TrainingZoo, run: RunDirectory, ranks: Ranks,
        save: Callable[[Path, dict[str, Any]], None],
    ) -> None:  # fmt: skip
        # The same untrained networks are updated every time, with the same prompts and the same noise.
        self.config, self.data, self.run, self.ranks, self.save = config, data, run, ranks, save
        if config.validation_every == 0:
            return
        n = min(config.validation_networks, data.zoo.splits["validation"])
        n -= n % ranks.world_size
        self.mine = ranks.share(range(n))
        rows = torch.from_numpy(data.zoo.runs_in("validation"))[list(self.mine)]
        self.theta = data.zoo.theta(rows, torch.zeros_like(rows)).to(ranks.device)  # where it is scored
        self.metric = metric_of(data)

    def __call__(self, state: TrainState) -> None:
        every, finished = self.config.validation_every, state.samples_seen >= self.config.total_pairs
        if every == 0 or (state.step % every and not finished):
            return
        score = self.score(state)
        best = self.best(before=state.step)
        # Rank 0 decides: the others may read the log before it is written, or round differently.
        if self.ranks.gather(best is None or score >= best[0])[0]:
            self.save(self.run.path / FILE_NAME, {"validation": {"alignment": score, "step": state.step}})
        self.run.log({"step": state.step, "pairs": state.samples_seen, SCORE: score})

    def score(self, state: TrainState) -> float:
        """R^2 of the averaged model, mean over all ranks' networks."""
        data = self.data
        trained = TrainedGpt(
            cast("Gpt", state.ema), data.scale, self.metric.name, self.metric.better,
            (float(data.values.min()), float(data.values.max())), data.spec, {},
        )  # fmt: skip
        settings = SamplerSettings("ddpm", self.config.validation_inference_steps, PROMPTS * len(self.mine))
        alignment = prompt_alignment(
            trained.update(settings, SEED), data.task, self.metric, self.theta, prompts=PROMPTS,
            networks_at_once=settings.networks_at_once, first_index=PROMPTS * self.mine.start,
        )  # fmt: skip
        means = self.ranks.gather(sum(alignment.r2_each) / len(alignment.r2_each))
        return sum(means) / len(means)

    def best(self, before: int | None = None) -> tuple[float, int] | None:
        """The best score so far and its step, the later of equals; None before the first."""
        rows = [row for row in self.run.metrics() if SCORE in row and (before is None or row["step"] < before)]
        return max(((row[SCORE], row["step"]) for row in rows), default=None)

    def finish(self, last: Path) -> str:
        """Make sure that there is a model; returns which one it is, in words."""
        best, lost = self.best(), not (self.run.path / FILE_NAME).exists()
        if best is not None and not lost:
            return f"prompt alignment R^2 {best[0]:.3f} on validation runs, at step {best[1]:,}"
        if self.ranks.is_main:
            write_bytes(self.run.path / FILE_NAME, last.read_bytes())
        # The weights of an earlier step are in no checkpoint any more.
        return "the last one, not validated" if best is None else f"the last one, since {FILE_NAME} was lost"


def check(config: GptTrainConfig, data: TrainingZoo) -> None:
    """Raises ValueError if the zoo has no validation runs, or the task does not score the metric; says if there are few."""
    # Called before there is a run's folder, which would refuse the settings that the messages recommend.
    if config.validation_every == 0:
        return
    metric_of(data)
    if data.zoo.task == NO_TASK and data.config.task is None:
        problem = "came without a task, so that no model can be validated by prompting"
        raise ValueError(f"{data.zoo.path}: {problem}; give --task file.py:NAME, or --validation-every 0")
    held, ranks = data.zoo.splits.get("validation", 0), int(os.environ.get("WORLD_SIZE", 1))
    if held < ranks:
        problem = f"{held:,} validation runs, too few to choose a model by (a rank needs one)"
        raise ValueError(f"{data.zoo.path}: {problem}; collect more, or --validation-every 0")
    if config.validation_networks < ranks:
        expected = f"at least {ranks} (one a rank), or --validation-every 0"
        raise ValueError(f"validation_networks {config.validation_networks}: expected {expected}")
    if config.validation_networks > held:
        echo(f"validated on {held:,} networks, not {config.validation_networks:,}: {data.zoo.path} has no more for it")


def metric_of(data: TrainingZoo) -> Metric:
    """The metric that the model is prompted with, with prompts. Raises ValueError if the task does not score it."""
    best = float(data.values.min() if data.zoo.better[data.metric] == "lower" else data.values.max())
    try:
        return with_prompts(data.metric, data.task.metrics, best)
    except ValueError as error:
        raise ValueError(f"{error}, or --validation-every 0") from error
