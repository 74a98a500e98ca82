"""The loss of the averaged weights on images that are not trained on."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from triptych_common.parallel import Ranks
from triptych_common.storage.run import RunDirectory
from triptych_common.training import TrainState

from triptych_dit.model import DiT
from triptych_dit.objective import Objective
from triptych_dit.train_config import TrainConfig
from triptych_dit.training_data import TrainingData, check_fits, open_training_data

SEED = 2_022  # of every run's validation, so that runs compare


def make_validation(config: TrainConfig, run: RunDirectory, ranks: Ranks) -> Callable[[TrainState], None]:
    """A callback that logs "validation/mse" and "validation/vb" every `validation_every` steps and at the end.

    The same images, noise and labels, and timesteps spread evenly over all of the process, whatever training uses.
    Raises ValueError or FileNotFoundError where there is nothing to validate on.
    """
    if config.validation_every == 0:
        return lambda state: None
    try:
        held_out = open_training_data(config.validation_data or config.data, config.model, "held_out")
    except (ValueError, OSError) as error:
        raise ValueError(f"validation_every {config.validation_every}: {error}; pass --validation-data") from error
    check_fits(config.model, held_out)
    n = (
        min(config.validation_images, len(held_out)) // ranks.world_size
    )  # as many on every rank: shards wait for each other
    mine = range(ranks.rank * n, (ranks.rank + 1) * n)
    part = config.micro_batch or config.batch_size // ranks.world_size
    fixed = replace(config, seed=SEED, horizontal_flip=False, timesteps="uniform_spread", snapshots=())

    def validate(state: TrainState) -> None:
        if state.step % config.validation_every and state.samples_seen < config.total_images:
            return
        objective = Objective(fixed, state.model, held_out)
        mse, vb = (
            ranks.sum(_loss_sums(state.ema, objective, mine, part, ranks.device)) / (n * ranks.world_size)
        ).tolist()
        run.log({"step": state.step, "images": state.samples_seen, "validation/mse": mse, "validation/vb": vb})

    return validate


def mean_mse(config: TrainConfig, model: DiT, training_data: TrainingData, n: int) -> float:
    """Error of the predicted noise on up to n examples, with noise that training did not see, timesteps as in training."""
    n = min(n, len(training_data))
    objective = Objective(replace(config, seed=SEED, horizontal_flip=False, precision="float32"), model, training_data)
    return float(_loss_sums(model, objective, range(n), 250, torch.device("cpu"))[0]) / n


@torch.no_grad()
def _loss_sums(network: nn.Module, objective: Objective, counters: range, part: int, device: torch.device) -> Tensor:
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(counters), part):
        losses = objective.loss(network, objective.draw(counters[start : start + part]), device)
        sums += torch.stack([losses.mse.double().sum(), losses.vb.double().sum()])
    return sums
