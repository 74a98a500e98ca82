"""The laptop's DiT, training and sampling, against the bare matrix products and attention of the same shapes.

The floor does every GEMM and attention call of the model, forward (and, for training, the two products of each
backward), on ready-made tensors: no norms, activations, residuals, loss, optimiser or sampler.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from triptych_common import data
from triptych_common.parallel import Ranks
from triptych_common.training import Batch
from triptych_dit.config import DiTConfig
from triptych_dit.model import TimestepEmbedder
from triptych_dit.sample import SamplerSettings, sample_images
from triptych_dit.train import TRAIN_PRESETS, make_loss, make_state
from triptych_dit.weights import TrainedModel, make_diffusion

from benchmarks.runner import Job

PRESET = TRAIN_PRESETS["digits"]
SAMPLES, SAMPLING_STEPS = 50, 4
Shape = tuple[int, int, int]  # rows, inputs, outputs of a linear map


def gemm_shapes(config: DiTConfig, batch: int) -> list[Shape]:
    """Every matrix product of one forward pass."""
    width, tokens = config.hidden_size, batch * config.grid[0] * config.grid[1]
    hidden, patch = int(width * config.mlp_ratio), config.patch_size**2
    block = [(tokens, width, 3 * width), (tokens, width, width), (tokens, width, hidden), (tokens, hidden, width)]
    return [
        (tokens, patch * config.in_channels, width),
        (batch, TimestepEmbedder.frequencies, width),
        (batch, width, width),
        *config.depth * [*block, (batch, width, 6 * width)],
        (batch, width, 2 * width),
        (tokens, width, patch * config.out_channels),
    ]


def floor(config: DiTConfig, batch: int, *, backward: bool) -> Callable[[int], Callable[[], Any]]:
    """Prepare the bare products and attention calls of one pass."""

    def prepare(seed: int) -> Callable[[], Any]:
        rng = torch.Generator().manual_seed(seed)
        products = [
            (torch.randn(n, i, generator=rng), torch.randn(o, i, generator=rng), torch.randn(n, o, generator=rng))
            for n, i, o in gemm_shapes(config, batch)
        ]
        head = (batch, config.num_heads, config.grid[0] * config.grid[1], config.hidden_size // config.num_heads)
        q, k, v, gradient = (torch.randn(head, generator=rng, requires_grad=backward) for _ in range(4))

        def once() -> None:
            for x, weight, out in products:
                F.linear(x, weight)
                if backward:
                    out @ weight
                    out.T @ x
            for _ in range(config.depth):
                mixed = F.scaled_dot_product_attention(q, k, v)
                if backward:
                    torch.autograd.grad(mixed, (q, k, v), gradient)

        return once if backward else torch.inference_mode()(once)

    return prepare


def training_step(seed: int) -> Callable[[], Any]:
    """A whole optimiser step: batch, loss, backward, clipping, AdamW, average."""
    torch.manual_seed(seed)
    alone = Ranks(0, 1, torch.device("cpu"))
    state = make_state(PRESET, alone)
    loss_of = make_loss(PRESET, state, data.load(PRESET.data), alone)

    def once() -> None:
        counters = range(state.samples_seen, state.samples_seen + PRESET.batch_size)
        loss_of(counters).total.mean().backward()
        state.update(Batch(state.step, PRESET.batch_size, counters), {})

    return once


def guided_sampling(seed: int) -> Callable[[], Any]:
    """A few guided DDPM steps of a batch, from noise to images."""
    alone = Ranks(0, 1, torch.device("cpu"))
    model = make_state(PRESET, alone).ema
    trained = TrainedModel(model, make_diffusion(PRESET.model, PRESET.predict), {})
    labels = torch.arange(SAMPLES) % PRESET.model.num_classes
    settings = SamplerSettings(num_inference_steps=SAMPLING_STEPS, guidance_scale=1.5)
    return lambda: sample_images(trained, labels, settings, seed=seed)


def sampling_floor(seed: int) -> Callable[[], Any]:
    once = floor(PRESET.model, 2 * SAMPLES, backward=False)(seed)

    def all_steps() -> None:
        for _ in range(SAMPLING_STEPS):
            once()

    return all_steps


def jobs() -> Sequence[Job]:
    batch = PRESET.batch_size
    return [
        Job("training step, floor", floor(PRESET.model, batch, backward=True), batch, "images"),
        Job("training step", training_step, batch, "images", against="training step, floor"),
        Job("guided sampling, floor", sampling_floor, SAMPLES * SAMPLING_STEPS, "image_steps"),
        Job(
            "guided sampling",
            guided_sampling,
            SAMPLES * SAMPLING_STEPS,
            "image_steps",
            against="guided sampling, floor",
        ),
    ]
