"""The diffusion transformer, read from top to bottom.  [thesis 2.3.2; "Scalable Diffusion Models with Transformers"]

Module names are those of the released state dict, so published weights load by name.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from triptych_common.embeddings import frequency_embedding, sincos_position_embedding
from triptych_common.transformer import Block, Modulation, modulate

from triptych_dit.config import DiTConfig


class TimestepEmbedder(nn.Module):
    """Timestep, by 256 frequencies and a two-layer MLP, to a vector."""

    frequencies = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Int[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        return self.mlp(frequency_embedding(t.float(), self.frequencies).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class label to a vector; the last row is the null label where the model has one."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Int[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        return self.embedding_table(y)


class PatchEmbedder(nn.Module):
    """Non-overlapping patches to tokens, row-major."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        return self.proj(x).flatten(2).transpose(1, 2)


class AdaLNZeroBlock(Block):
    """Transformer block whose two branches are modulated and gated by the conditioning vector; the identity at
    initialisation, since every gate starts at zero.  [thesis 2.3.2, adaLN-Zero]
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__(width, num_heads, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x: Float[Tensor, "batch tokens width"], c: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch tokens width"]:
        shift_scale_gate = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)  # each (batch, 1, width)
        return super().forward(x, Modulation(*shift_scale_gate[:3]), Modulation(*shift_scale_gate[3:]))


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then a linear map to the pixels of a patch."""

    def __init__(self, width: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(
        self, x: Float[Tensor, "batch tokens width"], c: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch tokens patch"]:
        return self.linear(
            modulate(self.norm_final(x), Modulation(*self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)))
        )


class DiT(nn.Module):
    """Class-conditional diffusion transformer.

    `model(x, t, y)` maps noisy x (batch, channels, height, width), timesteps t (batch,) and labels y (batch,) to
    (batch, out_channels, height, width): the noise, then, with `learn_sigma`, as many channels of variance.
    Label dropout is the caller's act (`drop_labels`): the model itself draws nothing at random.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.x_embedder = PatchEmbedder(config.patch_size, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes + (config.null_label is not None), width)
        position = sincos_position_embedding(*config.grid, width)
        self.pos_embed = nn.Parameter(position[None], requires_grad=False)  # (1, tokens, width)
        self.blocks = nn.ModuleList(
            AdaLNZeroBlock(width, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(width, config.patch_size, config.out_channels)
        self.initialize_weights()

    def initialize_weights(
        self, generator: torch.Generator | None = None, *, embeddings: Literal["released", "unit"] = "released"
    ) -> None:
        """Xavier-uniform linears, zero biases, zero modulations and output, drawn from `generator` where one is given.

        embeddings: timestep MLP and label table from N(0, 0.02), as in the released model, or "unit": scaled to give
        vectors of about unit variance. With the former the modulations need about a thousand optimiser steps before
        they can tell timesteps apart, which a short run does not have.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1), generator=generator)
                nn.init.zeros_(module.bias)
        for module in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.y_embedder.embedding_table):
            unit = math.sqrt(2 / module.in_features) if isinstance(module, nn.Linear) else 1.0
            nn.init.normal_(module.weight, std=unit if embeddings == "unit" else 0.02, generator=generator)
        modulations = [block.adaLN_modulation[1] for block in self.blocks]
        for module in (*modulations, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(module.weight)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        t: Int[Tensor, " batch"],
        y: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch out_channels height width"]:
        x = self.x_embedder(x) + self.pos_embed  # (batch, tokens, hidden)
        c = self.t_embedder(t) + self.y_embedder(y)  # (batch, hidden)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def unpatchify(self, x: Float[Tensor, "batch tokens patch"]) -> Float[Tensor, "batch channels height width"]:
        """Tokens of p * p * channels values back to an image."""
        p, (rows, columns) = self.config.patch_size, self.config.grid
        x = x.view(len(x), rows, columns, p, p, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, rows * p, columns * p)

    def drop_labels(self, y: Int[Tensor, " batch"], uniform: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Labels with the null label wherever `uniform` (draws from [0, 1)) is below class_dropout_prob."""
        if self.config.null_label is None:
            return y
        return torch.where(uniform.to(y.device) < self.config.class_dropout_prob, self.config.null_label, y)
