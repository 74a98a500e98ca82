"""Train a G.pt."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triptych_common import randomness
from triptych_common.cli import echo
from triptych_common.parallel import Execution, Ranks, gradient_sync, process_group
from triptych_common.progress import Progress
from triptych_common.storage.run import RunDirectory
from triptych_common.throughput import peak_flops
from triptych_common.training import TrainState, steps

from triptych_gpt.model import Gpt, decayed
from triptych_gpt.objective import Objective, TrainingZoo, training_flops
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.trained import FILE_NAME, write_model
from triptych_gpt.validation import Validation, check

LAST = "last.safetensors"


def train(config: GptTrainConfig) -> dict[str, Any]:
    """Train to the end, or resume; returns where the model is, its prompt alignment, and the last metrics.

    model.safetensors is the averaged model that followed prompts best on validation runs, last.safetensors the one at the end.
    Raises ValueError for a config that does not fit zoo, run directory or ranks, Interrupted after a signal.
    """
    if config.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    data = TrainingZoo(config)
    check(config, data)
    flops = training_flops(data.model_config)  # refuses, too, before there is a folder that knows this config
    identity = config.identity() | {"zoo": data.identity()}
    with (
        process_group(config.device) as ranks,
        RunDirectory(config.out, identity, is_main=ranks.is_main, tensorboard=config.tensorboard) as run,
    ):
        state, objective = make_state(config, data, ranks), Objective(data)
        save = partial(save_average, config, state, data)
        validation = Validation(config, data, run, ranks, save)
        plan = steps(
            state,
            run,
            total_samples=config.total_pairs,
            batch_size=config.batch_size,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            on_step=validation,
            flops_per_sample=flops,
            peak_flops=peak_flops(ranks.device, config.arithmetic),
            unit="pairs",
        )
        with Progress("training", config.total_pairs, "pairs", enabled=ranks.is_main) as progress:
            for batch in plan:
                loss = torch.zeros((), device=ranks.device)
                for counters, last in batch.micro_batches(config.micro_batch):
                    share = len(counters) / len(batch.counters)
                    with gradient_sync(state.parallel_model, last):
                        mean = objective.loss(state.parallel_model, objective.draw(counters), ranks.device).total.mean()
                        (mean * share).backward()
                    loss = loss + mean.detach() * share
                state.update(batch, {"loss": loss})
                progress.at(state.samples_seen)
        save(run.path / LAST, {})
        kept = validation.finish(run.path / LAST)
        if ranks.is_main:
            echo(f"model: {run.path / FILE_NAME} ({kept})")
        rows = [row for row in run.metrics() if "loss" in row]
        return {
            "model": str(run.path / FILE_NAME),
            "metrics": str(run.metrics_path),
            "kept": kept,
            "last": rows[-1] if rows else None,
        }


def make_state(config: GptTrainConfig, data: TrainingZoo, ranks: Ranks) -> TrainState:
    """A model freshly initialised, its average and AdamW, which decays linear weights only, as the config wants them run."""
    model = Gpt(data.model_config)
    model.initialize_weights(randomness.generator(config.seed, "init"))
    model = model.to(config.dtype)

    def optimizer(_: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        with_decay, without = decayed(model)
        groups = [{"params": with_decay, "weight_decay": config.weight_decay}, {"params": without, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.adam_beta2), fused=True)

    return TrainState(
        model,
        optimizer,
        ranks,
        ema_half_life=config.ema_half_life_pairs,
        ema_rampup=config.ema_rampup,
        grad_clip=config.grad_clip,
        learning_rate=config.learning_rate,
        execution=Execution(config.parallel, config.arithmetic, config.activation_checkpointing, config.compile_blocks),
    )


def save_average(
    config: GptTrainConfig, state: TrainState, data: TrainingZoo, path: Path, facts: dict[str, Any]
) -> None:
    """Write the averaged model; every rank must call it."""
    tensors = state.averaged()
    if state.ranks.is_main:
        low, high = float(data.values.min()), float(data.values.max())
        known = {
            "scale": data.scale,
            "metric": data.metric,
            "better": data.zoo.better[data.metric],
            "trained_range": [low, high],
            "task": asdict(data.spec),
            "zoo": data.identity(),
            "seed": config.seed,
            "pairs_seen": state.samples_seen,
        }
        write_model(path, state.model.config, tensors, {**known, **facts})
