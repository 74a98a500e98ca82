"""What the DiT suites compare: our model, diffusers' with the same weights, and the floor that neither can go under."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiTTransformer2DModel  # noqa: F401 - imported here, so that no job's memory holds the import
from torch import Tensor, nn
from torch.nn import functional as F
from triptych_dit.config import PRESETS, DiTConfig
from triptych_dit.interop import diffusers_transformer
from triptych_dit.model import DiT, TimestepEmbedder

Shape = tuple[int, int, int]  # rows, inputs, outputs of a linear map


def config_of(preset: str) -> DiTConfig:
    """A preset with the two settings that diffusers fixes otherwise, so that both are the same function."""
    return replace(PRESETS[preset], timestep_frequency_shift=1, mlp_norm_eps=1e-5)


def random_model(config: DiTConfig, seed: int) -> DiT:
    """A model with no zero left in it."""
    model = DiT(config).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1, generator=rng)
    return model


class Diffusers(nn.Module):
    """Diffusers' module with a model's weights, called as ours is."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.transformer = diffusers_transformer(model)
        self.pos_embed = model.pos_embed

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.transformer(x, timestep=t, class_labels=y).sample


def gemm_shapes(config: DiTConfig, batch: int) -> list[Shape]:
    """Every matrix product of one forward pass, conditions embedded sample by sample."""
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


def floor(config: DiTConfig, batch: int, *, passes: int = 1, backward: bool) -> Callable[[int], Callable[[], Any]]:
    """Prepare the bare products and attention calls of some passes, forward or with the two products of each backward, on
    ready-made tensors: no biases, norms, activations, residuals, loss, optimiser or sampler.
    """

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

        def all_passes() -> None:
            for _ in range(passes):
                once()

        return all_passes if backward else torch.inference_mode()(all_passes)

    return prepare
