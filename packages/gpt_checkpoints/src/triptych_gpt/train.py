"""Train a G.pt."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triptych_common import randomness
from triptych_common.cli import echo
from triptych_common.parallel import Ranks, prepare, process_group
from triptych_common.training import TrainState, open_run, summary, training_steps

from triptych_gpt.model import FILE_NAME, FORMAT, Gpt, decayed, write_model
from triptych_gpt.objective import Objective, TrainingZoo, training_flops
from triptych_gpt.train_config import GptTrainConfig

if TYPE_CHECKING:
    from triptych_common.cost import StepCost

LAST = "last.safetensors"


def train(config: GptTrainConfig) -> dict[str, Any]:
    """Train to the end, or resume; returns where the model is, its prompt alignment, and the last metrics.

    model.safetensors is the averaged model that followed prompts best on validation runs, last.safetensors the one at the end.
    Raises ValueError for a config that does not fit zoo, run directory or ranks, Interrupted after a signal.
    """
    # Imported here, since scoring needs samplers, tasks and intervals, which the loop itself does not.
    from triptych_gpt.validation import Validation, check

    data = TrainingZoo(config)
    check(config, data)
    # Builds the model, so that a config that does not work is refused before there is a folder.
    flops = training_flops(data.model_config)
    data.zoo.verify_once()
    with process_group(config.device) as ranks:
        step_cost(config, data, ranks).check(config, ranks)
        with open_run(config, ranks, {"zoo": data.identity()}) as run:
            state, objective = make_state(config, data, ranks), Objective(data)
            state.describe = lambda: {
                "ema": FORMAT.facts_of(data.model_config.to_json(), facts_about(config, state, data))
            }
            save = partial(save_average, config, state, data)
            validation = Validation(config, data, run, ranks, save)

            # A step's loss depends on its range of counters alone, so resuming, ranks and micro-batches change no pair.
            def losses(counters: range) -> dict[str, Tensor]:
                return {
                    "loss": objective.loss(state.parallel_model, objective.draw(counters), ranks.device).total.mean()
                }

            for batch in training_steps(config, state, run, on_step=validation, flops_per_sample=flops):
                state.update(batch, state.accumulate(batch, config.micro_batch, losses))
            save(run.path / LAST, {})
            chosen = validation.finish(run.path / LAST)
            echo(f"model: {run.path / FILE_NAME} ({chosen})")
            return {"model": str(run.path / FILE_NAME), "kept": chosen, **summary(run)}


def preview(config: GptTrainConfig) -> dict[str, Any]:
    """What --dry-run prints: the settings, what there is to train on, and what a step takes in memory and the whole run in time.

    Raises ValueError or OSError for a zoo that cannot be used.
    """
    data = TrainingZoo(config)
    flops = training_flops(data.model_config)
    with process_group(config.device) as ranks:
        return config.resolved() | {
            "zoo": data.identity(),
            "parameters": parameter_count(data),
            "gflops_per_pair": round(flops / 1e9, 6),
            "training_gflops": round(flops / 1e9 * config.total_pairs, 1),
            "estimate": step_cost(config, data, ranks).estimate(config, ranks),
        }


def step_cost(config: GptTrainConfig, data: TrainingZoo, ranks: Ranks) -> "StepCost":
    """What a step takes, measured on one and two pairs; of a model that is sharded or does not fit, what its weights do."""
    from triptych_common.cost import StepCost, available_bytes  # no part of a step

    value = 8 if config.precision == "float64" else 4
    states = 4 * value * parameter_count(data)  # weights, average and AdamW's two slots; gradients are measured
    if config.execution.sharded(ranks):
        return StepCost.of((), states * 5 / 4 / ranks.world_size)
    if states > available_bytes(ranks.device):
        return StepCost.of((), states * 5 / 4)
    model = Gpt(data.model_config).to(ranks.device, config.dtype)
    prepare(model, Ranks(0, 1, ranks.device), replace(config.execution, compile=False))
    objective = Objective(TrainingZoo(replace(config, canonicalise=False)))  # the order of units costs no memory

    def run(counters: range) -> None:
        objective.loss(model, objective.draw(counters), ranks.device).total.mean().backward()
        model.zero_grad(set_to_none=True)

    return StepCost.of([(run, 1)], states)


def parameter_count(data: TrainingZoo) -> int:
    """Parameters of the model."""
    shape = data.model_config
    with torch.device("meta"):
        return sum(p.numel() for p in Gpt(shape).parameters())


def make_state(config: GptTrainConfig, data: TrainingZoo, ranks: Ranks) -> TrainState:
    """A freshly initialised model, its average, and AdamW with weight decay on linear weights only."""
    model = Gpt(data.model_config)
    model.initialize_weights(randomness.generator(config.seed, "init"))
    if data.source is not None:
        model.load_state_dict(data.source.model.state_dict())
        echo(f"start from {config.init_from}, {data.source.facts.get('pairs_seen', 0):,} pairs")
    model = model.to(config.dtype)

    def optimizer(_: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        # Decay would pull norms and positions, which only scale and label tokens, towards zero.
        with_decay, without = decayed(model)
        groups = [{"params": with_decay, "weight_decay": config.weight_decay}, {"params": without, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.adam_beta2), fused=True)

    return TrainState(model, optimizer, ranks, **config.state_options())


def save_average(
    config: GptTrainConfig, state: TrainState, data: TrainingZoo, path: Path, facts: dict[str, Any]
) -> None:
    """Write the averaged model with all that prompting needs; every rank must call it."""
    tensors = state.averaged()  # gathers shards, so that it waits for all ranks
    if state.ranks.is_main:
        write_model(path, data.model_config, tensors, facts_about(config, state, data) | facts)


def facts_about(config: GptTrainConfig, state: TrainState, data: TrainingZoo) -> dict[str, Any]:
    """The facts of a model file that prompting needs, and what it was trained on."""
    return {
        "scale": data.scale,
        "metric": data.metric,
        "better": data.zoo.better[data.metric],
        "trained_range": [float(data.values.min()), float(data.values.max())],
        "task": asdict(data.spec),
        **data.spec.source(),
        "zoo": data.identity(),
        "seed": config.seed,
        "pairs_seen": state.samples_seen,
    }
