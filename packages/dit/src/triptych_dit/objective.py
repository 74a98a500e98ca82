"""The training objective: what is drawn for each sample counter, its loss, and the same loss on held-out images."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from triptych_common import randomness
from triptych_common.diffusion import GaussianDiffusion, Loss
from triptych_common.parallel import Ranks, onto
from triptych_common.storage.run import RunDirectory
from triptych_common.training import TrainState

from triptych_dit.model import DiT
from triptych_dit.train_config import TrainConfig
from triptych_dit.training_data import TrainingData, check_fits, open_training_data
from triptych_dit.weights import make_diffusion

VALIDATION_SEED = 2_022  # the same for every run, so that runs can be compared


class Examples(NamedTuple):
    """Everything a loss needs besides the network, on the CPU."""

    x_0: Float[Tensor, "batch channels height width"]
    t: Int[Tensor, " batch"]
    noise: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, " batch"]


class Objective:
    """Denoising of a training set's examples. All that is random about an example follows from (seed, its counter)."""

    def __init__(self, config: TrainConfig, model: DiT, training_data: TrainingData) -> None:
        self.config, self.training_data, self.drop_labels = config, training_data, model.drop_labels
        self.diffusion: GaussianDiffusion = make_diffusion(config.model, config.predict)

    def draw(self, counters: Sequence[int]) -> Examples:
        """The examples of some counters: an endless walk over the data, reshuffled every epoch."""
        config, seed = self.config, self.config.seed
        items = randomness.shuffled(seed, "order", counters, len(self.training_data))
        flipped = torch.zeros(len(items), dtype=torch.bool)
        if config.horizontal_flip:
            flipped = randomness.uniform(seed, "flip", counters) < 0.5
        x_0 = self.training_data.examples(items, flipped, seed, counters).to(config.dtype)
        noise = randomness.normal(seed, "noise", counters, x_0.shape[1:], dtype=config.dtype)
        labels = self.drop_labels(self.training_data.labels[items], randomness.uniform(seed, "label-drop", counters))
        return Examples(x_0, draw_timesteps(config, counters, len(self.diffusion.schedule)), noise, labels)

    def loss(self, network: nn.Module, examples: Examples, device: torch.device) -> Loss:
        """Loss of each example under `network`, which may be a parallel wrapper of the model."""
        x_0, t, noise, labels = (onto(device, value) for value in examples)
        x_t = self.diffusion.q_sample(x_0, t, noise)
        return self.diffusion.loss(network(x_t, t, labels), x_0, x_t, t, noise)


def draw_timesteps(config: TrainConfig, counters: Sequence[int], num_steps: int) -> Int[Tensor, " batch"]:
    """Timestep of each sample counter.

    "uniform_spread": uniform, consecutive counters spread evenly. "logit_normal": one in five uniform, the others
    num_steps * sigmoid(-0.6 + 0.8 z) with z normal, spread evenly too.  [logit-normal: Esser et al. 2024, "Scaling
    Rectified Flow Transformers"]
    """
    if config.timesteps == "uniform":
        share = randomness.uniform(config.seed, "timestep", counters)
    else:
        share = u = randomness.evenly_spread(config.seed, "timestep", counters)
        if config.timesteps == "logit_normal":
            peaked = torch.sigmoid(0.8 * torch.special.ndtri((u - 0.2) / 0.8) - 0.6)
            share = torch.where(u < 0.2, u / 0.2, peaked)
    return (share * num_steps).long().clamp(max=num_steps - 1)


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
    fixed = replace(config, seed=VALIDATION_SEED, horizontal_flip=False, timesteps="uniform_spread", snapshots=())

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
    objective = Objective(
        replace(config, seed=VALIDATION_SEED, horizontal_flip=False, precision="float32"), model, training_data
    )
    return float(_loss_sums(model, objective, range(n), 250, torch.device("cpu"))[0]) / n


@torch.no_grad()
def _loss_sums(network: nn.Module, objective: Objective, counters: range, part: int, device: torch.device) -> Tensor:
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(counters), part):
        losses = objective.loss(network, objective.draw(counters[start : start + part]), device)
        sums += torch.stack([losses.mse.double().sum(), losses.vb.double().sum()])
    return sums
