"""The diffusion transformer, read from top to bottom.  [thesis 2.3.2; "Scalable Diffusion Models with Transformers"]

Module names are those of the released state dict, so published weights load by name.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F
from triptych_common.embeddings import frequency_embedding, sincos_position_embedding
from triptych_common.transformer import Block, Modulation, modulate

from triptych_dit.config import DiTConfig


class TimestepEmbedder(nn.Module):
    """Timestep, by 256 frequencies and a two-layer MLP, to a vector."""

    frequencies = 256

    def __init__(self, width: int, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Num[Tensor, " conditions"]) -> Float[Tensor, "conditions width"]:
        angles = frequency_embedding(t.float(), self.frequencies, shift=self.frequency_shift)
        return self.mlp(angles.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class label to a vector; the last row is the null label where the model has one.

    y: labels (conditions,), or mixtures of them: float weights (conditions, rows of the table).
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Num[Tensor, "conditions *labels"]) -> Float[Tensor, "conditions width"]:
        table = self.embedding_table
        return y.to(table.weight.dtype) @ table.weight if y.is_floating_point() else table(y)


class PatchEmbedder(nn.Module):
    """Non-overlapping patches to tokens, row-major."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        p = self.proj.kernel_size[0]
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (batch, channels, rows, p, columns, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (batch, tokens, channels * p * p)
        # As a linear map its result is contiguous; a convolution's would make every block copy it.
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


Tokens = Float[Tensor, "batch tokens width"]
Rows = Int[Tensor, " batch"] | None


def pick(conditions: Float[Tensor, "conditions *rest"], rows: Rows) -> Float[Tensor, "batch *rest"]:
    """What belongs to each sample: rows[i] is sample i's condition (None: one condition a sample, in order)."""
    return conditions if rows is None else conditions[rows]


class AdaLNBlock(Block):
    """Transformer block whose two branches are modulated by shift and scale, regressed from the sum of the embeddings.
    [thesis 2.3.2, adaLN]
    """

    modulations = 4

    def __init__(self, config: DiTConfig) -> None:
        width = config.hidden_size
        super().__init__(width, config.num_heads, config.mlp_ratio, mlp_norm_eps=config.mlp_norm_eps)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.modulations * width))

    def forward(self, x: Tokens, c: Float[Tensor, "conditions width"], rows: Rows = None) -> Tokens:
        parts = pick(self.adaLN_modulation(c), rows)[:, None].chunk(self.modulations, dim=-1)  # each (batch, 1, width)
        half = self.modulations // 2
        return super().forward(x, Modulation(*parts[:half]), Modulation(*parts[half:]))


class AdaLNZeroBlock(AdaLNBlock):
    """adaLN with a gate on each branch besides; the identity at initialisation, since every gate starts at zero.
    [thesis 2.3.2, adaLN-Zero]
    """

    modulations = 6


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to the few embeddings of a condition."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tokens, c: Float[Tensor, "conditions embeddings width"], rows: Rows = None) -> Tokens:
        def heads(z: Tensor) -> Tensor:  # (batch, heads, tokens, width / heads)
            return z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        k, v = pick(self.kv(c), rows).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(heads(self.q(x)), heads(k), heads(v))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class CrossAttentionBlock(Block):
    """Plain transformer block with a cross-attention to the embeddings between its branches.  [thesis 2.3.2]"""

    modulations = 0

    def __init__(self, config: DiTConfig) -> None:
        width, heads = config.hidden_size, config.num_heads
        super().__init__(width, heads, config.mlp_ratio, affine_norm=True, mlp_norm_eps=config.mlp_norm_eps)
        self.norm_cross = nn.LayerNorm(width, eps=1e-6)
        self.cross_attn = CrossAttention(width, heads)

    def forward(self, x: Tokens, c: Float[Tensor, "conditions embeddings width"], rows: Rows = None) -> Tokens:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), c, rows)
        return x + self.mlp(self.norm2(x))


class InContextBlock(Block):
    """Plain transformer block: the embeddings are among its tokens.  [thesis 2.3.2, in-context conditioning]"""

    modulations = 0

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(
            config.hidden_size, config.num_heads, config.mlp_ratio, affine_norm=True, mlp_norm_eps=config.mlp_norm_eps
        )

    def forward(self, x: Tokens, c: Float[Tensor, "conditions embeddings width"], rows: Rows = None) -> Tokens:
        return super().forward(x)


BLOCKS: dict[str, type[AdaLNBlock | CrossAttentionBlock | InContextBlock]] = {
    "adaln_zero": AdaLNZeroBlock,
    "adaln": AdaLNBlock,
    "cross_attention": CrossAttentionBlock,
    "in_context": InContextBlock,
}


class FinalLayer(nn.Module):
    """LayerNorm, modulated where the blocks are, then a linear map to the pixels of a patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, modulated = config.hidden_size, BLOCKS[config.block_design].modulations > 0
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not modulated)
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)) if modulated else None

    def forward(self, x: Tokens, c: Tensor, rows: Rows = None) -> Float[Tensor, "batch tokens patch"]:
        by = None
        if self.adaLN_modulation is not None:
            by = Modulation(*pick(self.adaLN_modulation(c), rows)[:, None].chunk(2, dim=-1))
        return self.linear(modulate(self.norm_final(x), by))


class DiT(nn.Module):
    """Diffusion transformer, conditional on classes or not.

    `model(x, t, y)` maps noisy x (batch, channels, height, width), timesteps t (batch,) and labels y (batch,) to
    (batch, out_channels, height, width): the noise, then, with `learn_sigma`, as many channels of variance. An
    unconditional model (`num_classes=0`) is called as `model(x, t)`, and ignores labels it is given.
    Where many samples share a condition, `model(x, t, y, rows)` embeds each of the distinct (t, y) once: rows[i] says
    which one is sample i's.
    Label dropout is the caller's act (`drop_labels`): the model itself draws nothing at random.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, labels = config.hidden_size, config.num_classes + (config.null_label is not None)
        self.x_embedder = PatchEmbedder(config.patch_size, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width, config.timestep_frequency_shift)
        self.y_embedder = LabelEmbedder(labels, width) if labels else None
        position = sincos_position_embedding(*config.grid, width)
        self.pos_embed = nn.Parameter(position[None], requires_grad=False)  # (1, tokens, width)
        self.blocks = nn.ModuleList(BLOCKS[config.block_design](config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.initialize_weights()

    def initialize_weights(
        self, generator: torch.Generator | None = None, *, embeddings: Literal["released", "unit"] = "released"
    ) -> None:
        """Xavier-uniform linears, zero biases, zero output and, for adaLN-Zero, zero modulations, drawn from `generator`
        where one is given.

        embeddings: timestep MLP and label table from N(0, 0.02), as in the released model, or "unit": scaled to give
        vectors of about unit variance. With the former the modulations need about a thousand optimiser steps before
        they can tell timesteps apart, which a short run does not have.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1), generator=generator)
                nn.init.zeros_(module.bias)
        tables = [] if self.y_embedder is None else [self.y_embedder.embedding_table]
        for module in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], *tables):
            unit = math.sqrt(2 / module.in_features) if isinstance(module, nn.Linear) else 1.0
            nn.init.normal_(module.weight, std=unit if embeddings == "unit" else 0.02, generator=generator)
        zero = [self.final_layer.linear]
        if self.config.block_design == "adaln_zero":
            zero += [layer.adaLN_modulation[1] for layer in (*self.blocks, self.final_layer)]
        for module in zero:
            nn.init.zeros_(module.weight)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        t: Num[Tensor, " conditions"],
        y: Num[Tensor, "conditions *labels"] | None = None,
        rows: Rows = None,
    ) -> Float[Tensor, "batch out_channels height width"]:
        x = self.x_embedder(x) + self.pos_embed  # (batch, tokens, hidden)
        c = self.embed_conditions(t, y)
        tokens = x.shape[1]
        if self.config.block_design == "in_context":
            x = torch.cat([x, pick(c, rows)], dim=1)
        for block in self.blocks:
            x = block(x, c, rows)
        return self.unpatchify(self.final_layer(x[:, :tokens], c, rows))

    def embed_conditions(self, t: Num[Tensor, " conditions"], y: Num[Tensor, "conditions *labels"] | None) -> Tensor:
        """What blocks are conditioned on: the sum of the embeddings (conditions, hidden) for adaLN designs, else the
        embeddings themselves (conditions, 1 or 2, hidden).

        Raises ValueError where a conditional model gets no labels.
        """
        embeddings = [self.t_embedder(t)]
        if self.y_embedder is not None:
            if y is None:
                raise ValueError(f"labels are missing: this model has num_classes={self.config.num_classes}")
            embeddings.append(self.y_embedder(y))
        if self.config.block_design in ("adaln", "adaln_zero"):
            return sum(embeddings[1:], start=embeddings[0])
        return torch.stack(embeddings, dim=1)

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
