"""A G.pt on this machine's CPU: a whole training step, and denoising steps, beside the bare matrix products and attention calls
of the transformer's blocks. No other implementation runs on a CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from triptych_common.parallel import Ranks
from triptych_common.randomness import SampleNoise
from triptych_common.samplers import ddpm, final
from triptych_common.training.state import Batch, TrainState
from triptych_gpt.config import GptConfig, MetricScale
from triptych_gpt.model import Gpt
from triptych_gpt.objective import make_diffusion
from triptych_gpt.presets import PRESETS

from benchmarks.runner import Job

BATCH, STEPS = 256, 4
SCALE = MetricScale(0.3, 2.4, (0.3, 0.4, 0.5, 1.0, 2.4))
CONFIGS = {
    "neuron tokens": replace(PRESETS["laptop"], metric_scale=SCALE),
    "layer tokens": replace(PRESETS["laptop"], metric_scale=SCALE, tokenizer="layer"),
}


def inputs(config: GptConfig, seed: int) -> tuple[Tensor, ...]:
    """theta, theta*, noise, timestep, both metrics."""
    rng, size = torch.Generator().manual_seed(seed), config.symmetry.layout.size
    thetas = [torch.randn(BATCH, size, generator=rng) for _ in range(3)]
    metrics = [torch.rand(BATCH, generator=rng) + 0.4 for _ in range(2)]
    return *thetas, torch.randint(1000, (BATCH,), generator=rng), *metrics


def training_step(config: GptConfig) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare forward, loss, backward, clipping, AdamW and average of a batch; what is timed returns the loss."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        theta, theta_star, noise, t, metric, target = inputs(config, seed)
        optimizer, diffusion = partial(torch.optim.AdamW, lr=1e-8, fused=True), make_diffusion()
        state = TrainState(Gpt(config), optimizer, Ranks(0, 1, torch.device("cpu")), ema_half_life=1e6)

        def once() -> Tensor:
            noised = diffusion.q_sample(theta_star, t, noise)
            output = state.parallel_model(noised, t, theta, metric, target)
            loss = diffusion.loss(output, theta_star, noised, t, noise).total.mean()
            loss.backward()
            counters = range(state.samples_seen, state.samples_seen + BATCH)
            state.update(Batch(state.step, BATCH, counters), {"loss": loss})
            return loss.detach()

        return once

    return prepare


def denoising(config: GptConfig) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare a few DDPM steps of a batch."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        theta, _, _, _, metric, target = inputs(config, seed)
        model, diffusion = Gpt(config).eval(), make_diffusion().respaced(STEPS)

        @torch.inference_mode()
        def once() -> Tensor:
            noise = SampleNoise(seed, range(BATCH), theta.shape[1:])
            return final(ddpm(lambda x, t: model(x, t, theta, metric, target), diffusion, noise))

        return once

    return prepare


def floor(config: GptConfig, passes: int, *, backward: bool) -> Callable[[int], Callable[[], None]]:
    """Prepare the bare products and attention calls of the blocks alone, on ready-made tensors."""

    def prepare(seed: int) -> Callable[[], None]:
        rng, width, heads = torch.Generator().manual_seed(seed), config.width, config.num_heads
        with torch.device("meta"):
            tokens = sum(Gpt(config).token_kinds)
        rows = BATCH * tokens
        shapes = [(rows, width, 3 * width), (rows, width, width), (rows, width, 4 * width), (rows, 4 * width, width)]
        products = [
            (torch.randn(n, i, generator=rng), torch.randn(o, i, generator=rng), torch.randn(n, o, generator=rng))
            for n, i, o in shapes
        ]
        head = (BATCH, heads, tokens, width // heads)
        q, k, v, gradient = (torch.randn(head, generator=rng, requires_grad=backward) for _ in range(4))

        def once() -> None:
            for _ in range(passes * config.depth):
                for x, weight, out in products:
                    F.linear(x, weight)
                    if backward:
                        out @ weight
                        out.T @ x
                mixed = F.scaled_dot_product_attention(q, k, v)
                if backward:
                    torch.autograd.grad(mixed, (q, k, v), gradient)

        return once if backward else torch.inference_mode()(once)

    return prepare


def jobs() -> Sequence[Job]:
    listed = []
    for name, config in CONFIGS.items():
        bare, steps = f"{name}, training: floor", f"{name}, {STEPS} denoising steps: floor"
        listed += [
            Job(bare, floor(config, 1, backward=True), BATCH, "pairs", repeats=10),
            Job(f"{name}, training: ours", training_step(config), BATCH, "pairs", (bare,), repeats=10),
            Job(steps, floor(config, STEPS, backward=False), BATCH, "networks", repeats=10),
            Job(f"{name}, {STEPS} denoising steps: ours", denoising(config), BATCH, "networks", (steps,), repeats=10),
        ]
    return listed
