"""A training step on this machine's CPU: our DiT and diffusers' with the same weights, batch, loss, AdamW and average, and
the bare matrix products and attention calls of the same shapes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from triptych_common.parallel import Ranks
from triptych_common.training.state import Batch, TrainState
from triptych_dit.model import DiT
from triptych_dit.weights import make_diffusion

from benchmarks.runner import Job
from benchmarks.suites.dit_models import Diffusers, config_of, floor, random_model


class Size(NamedTuple):
    """A model and its batch."""

    preset: str
    batch: int
    repeats: int


SIZES = [Size("digits", 64, 20), Size("digits-latent", 64, 20), Size("DiT-S/4", 8, 10), Size("DiT-S/2", 2, 10)]


def whole_step(size: Size, network_of: Callable[[DiT], nn.Module]) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare forward, loss, backward, clipping, AdamW and average of a batch; what is timed returns the loss."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        config, rng = config_of(size.preset), torch.Generator().manual_seed(seed)
        network, diffusion = network_of(random_model(config, seed)), make_diffusion(config, "noise")
        optimizer = partial(torch.optim.AdamW, lr=1e-8, fused=True)  # too little to make training diverge
        state = TrainState(network, optimizer, Ranks(0, 1, torch.device("cpu")), ema_half_life=1e6)
        shape = (size.batch, config.in_channels, *config.input_size)
        x_0, noise = (torch.randn(shape, generator=rng) for _ in range(2))
        t = torch.randint(1000, (size.batch,), generator=rng)
        labels = torch.randint(config.num_classes, (size.batch,), generator=rng)

        def once() -> Tensor:
            x_t = diffusion.q_sample(x_0, t, noise)
            loss = diffusion.loss(state.parallel_model(x_t, t, labels), x_0, x_t, t, noise).total.mean()
            loss.backward()
            counters = range(state.samples_seen, state.samples_seen + size.batch)
            state.update(Batch(state.step, size.batch, counters), {"loss": loss})
            return loss.detach()

        return once

    return prepare


def ours(model: DiT) -> nn.Module:
    return model


def jobs() -> Sequence[Job]:
    listed: list[Any] = []
    for size in SIZES:
        name = size.preset
        bare, theirs = f"{name}: floor", f"{name}: diffusers"
        for job, prepare, against, same_as in (
            (bare, floor(config_of(name), size.batch, backward=True), (), None),
            (theirs, whole_step(size, Diffusers), (bare,), None),
            (f"{name}: ours", whole_step(size, ours), (bare, theirs), theirs),
        ):
            listed.append(Job(job, prepare, size.batch, "images", against, same_as, size.repeats))
    return listed
