"""The diffusion transformer, from embeddings to output; the plain transformer block is in `triptych_common.transformer`.

Module names are those of the released state dict, so that published weights load by name.
[thesis 2.3.2; Peebles and Xie 2023, "Scalable Diffusion Models with Transformers"]
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F
from triptych_common.transformer import Block, Modulation, Tokens, modulate

from triptych_dit.config import DiTConfig


def sincos_position_embedding(height: int, width: int, dim: int) -> Float[Tensor, "tokens dim"]:
    """Sine-cosine embedding of every cell of a height x width grid, row-major, float32 (computed in float64).

    The first half of the channels encodes the column, the second half the row; each half is [sin, cos] of
    position * 10000^(-i / (dim / 4)): the layout of the released DiT weights.

    Raises ValueError unless dim is a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"position embedding of dim {dim}: expected a multiple of 4; change hidden_size")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def encode(positions: Tensor) -> Tensor:
        angles = positions.to(torch.float64).outer(omega)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([encode(columns.flatten()), encode(rows.flatten())], dim=1).to(torch.float32)


def frequency_embedding(values: Float[Tensor, " batch"], dim: int, *, shift: int = 0) -> Float[Tensor, "batch dim"]:
    """[cos, sin] of values * 10000^(-i / (dim / 2 - shift)), i = 0 .. dim/2 - 1.  [thesis 2.3.2]

    shift: 0 as in the released DiT, 1 as in diffusers' ("downscale_freq_shift").
    Raises ValueError for an odd dim.
    """
    if dim % 2:
        raise ValueError(f"frequency embedding of dim {dim}: expected an even number")
    half = dim // 2
    indices = torch.arange(half, dtype=torch.float32, device=values.device)
    # Divided last, as in diffusers: at t = 999 the other order's rounding moves angles by 1e-4 where shift is 1.
    angles = values[:, None].float() * torch.exp(-math.log(10000.0) * indices / (half - shift))
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(values.dtype)


class TimestepEmbedder(nn.Module):
    """Timesteps to vectors: sines and cosines of 256 frequencies, then a two-layer MLP.  [thesis 2.3.2]"""

    frequencies = 256

    def __init__(self, width: int, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Num[Tensor, " conditions"]) -> Float[Tensor, "conditions width"]:
        # Angles in float32 whatever the weights' type: bfloat16 cannot tell timestep 998 from 999.
        angles = frequency_embedding(t.float(), self.frequencies, shift=self.frequency_shift)
        return self.mlp(angles.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Class labels to vectors. The last row of the table is the null label, where the model has one.

    y: integer labels (conditions,), or mixtures of classes: float weights (conditions, num_labels).
    """

    def __init__(self, num_labels: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, width)

    def forward(self, y: Num[Tensor, "conditions *labels"]) -> Float[Tensor, "conditions width"]:
        table = self.embedding_table
        return y.to(table.weight.dtype) @ table.weight if y.is_floating_point() else table(y)


class PatchEmbedder(nn.Module):
    """Non-overlapping square patches to tokens, row by row."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        p = self.proj.kernel_size[0]
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (batch, channels, rows, p, columns, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (batch, tokens, channels * p * p)
        # The convolution itself would return a non-contiguous tensor, which every block would copy.
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


Embeddings = Float[Tensor, "conditions embeddings width"]  # of the timestep, and of the class where there is one
Summed = Float[Tensor, "conditions width"]  # their sum
ConditionOf = Int[Tensor, " batch"] | None  # the index of each sample's condition; None: sample i has condition i


def per_sample(values: Float[Tensor, "conditions *rest"], condition_of: ConditionOf) -> Float[Tensor, "batch *rest"]:
    """Values computed once for each distinct condition, repeated for every sample that has it."""
    return values if condition_of is None else values[condition_of]


class AdaLNBlock(Block):
    """Transformer block with adaptive layer norm: each of its two branches is shifted and scaled by a linear function of
    the summed embeddings.  [thesis 2.3.2, adaLN]
    """

    modulations = 4

    def __init__(self, config: DiTConfig) -> None:
        width = config.hidden_size
        super().__init__(width, config.num_heads, config.mlp_ratio, mlp_norm_eps=config.mlp_norm_eps)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.modulations * width))

    def forward(self, x: Tokens, c: Summed, condition_of: ConditionOf = None) -> Tokens:  # type: ignore[override]
        modulation = per_sample(self.adaLN_modulation(c), condition_of)[:, None]
        parts = modulation.chunk(self.modulations, dim=-1)  # each (batch, 1, width)
        half = self.modulations // 2
        return super().forward(x, Modulation(*parts[:half]), Modulation(*parts[half:]))


class AdaLNZeroBlock(AdaLNBlock):
    """adaLN with a gate on each branch, which starts at zero.  [thesis 2.3.2, adaLN-Zero]"""

    modulations = 6


class CrossAttention(nn.Module):
    """Multi-head attention from the image's tokens to the embeddings of their condition."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tokens, c: Embeddings, condition_of: ConditionOf = None) -> Tokens:
        def heads(z: Tensor) -> Tensor:  # (batch, heads, tokens, width / heads)
            return z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        k, v = per_sample(self.kv(c), condition_of).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(heads(self.q(x)), heads(k), heads(v))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class CrossAttentionBlock(Block):
    """Plain block with cross-attention to the embeddings between its two branches.  [thesis 2.3.2, cross-attention]"""

    modulations = 0

    def __init__(self, config: DiTConfig) -> None:
        width, heads = config.hidden_size, config.num_heads
        super().__init__(width, heads, config.mlp_ratio, affine_norm=True, mlp_norm_eps=config.mlp_norm_eps)
        self.norm_cross = nn.LayerNorm(width, eps=1e-6)
        self.cross_attn = CrossAttention(width, heads)

    def forward(self, x: Tokens, c: Embeddings, condition_of: ConditionOf = None) -> Tokens:  # type: ignore[override]
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), c, condition_of)
        return x + self.mlp(self.norm2(x))


class InContextBlock(Block):
    """Plain block: `DiT.forward` appends the embeddings to the image's tokens.  [thesis 2.3.2, in-context conditioning]"""

    modulations = 0

    def __init__(self, config: DiTConfig) -> None:
        width, heads = config.hidden_size, config.num_heads
        super().__init__(width, heads, config.mlp_ratio, affine_norm=True, mlp_norm_eps=config.mlp_norm_eps)

    def forward(self, x: Tokens, c: Embeddings, condition_of: ConditionOf = None) -> Tokens:  # type: ignore[override]
        return super().forward(x)


BLOCKS: dict[str, type[AdaLNBlock | CrossAttentionBlock | InContextBlock]] = {
    "adaln_zero": AdaLNZeroBlock,
    "adaln": AdaLNBlock,
    "cross_attention": CrossAttentionBlock,
    "in_context": InContextBlock,
}


class FinalLayer(nn.Module):
    """LayerNorm, modulated if the blocks are, then a linear map from a token to the values of its patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, modulated = config.hidden_size, BLOCKS[config.block_design].modulations > 0
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not modulated)
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)) if modulated else None

    def forward(self, x: Tokens, c: Tensor, condition_of: ConditionOf = None) -> Float[Tensor, "batch tokens patch"]:
        modulation = None
        if self.adaLN_modulation is not None:
            shift, scale = per_sample(self.adaLN_modulation(c), condition_of)[:, None].chunk(2, dim=-1)
            modulation = Modulation(shift, scale)
        return self.linear(modulate(self.norm_final(x), modulation))


class DiT(nn.Module):
    """Diffusion transformer, with or without classes.  [thesis 2.3.2]

    Call it as `model(x, t, y)`; without classes (`num_classes=0`), as `model(x, t)`.

        model = DiT(PRESETS["digits"])
        model(torch.randn(2, 1, 28, 28), torch.tensor([10, 999]), torch.tensor([3, 7]))  # (2, 2, 28, 28)

    x: noisy images or latents (batch, in_channels, height, width).
    t: timesteps (batch,), 0 (almost clean) to 999 (almost pure noise).
    y: class labels (batch,), or mixtures of classes, float weights (batch, labels). The null label of classifier-free
        guidance is `config.null_label`. A model without classes ignores them.
    condition_of: with it, `t` and `y` hold the distinct conditions only, and `condition_of[i]` is the index of sample i's.
        Each condition is then embedded once, however many samples share it.

    Returns (batch, out_channels, height, width): the predicted noise (or clean image), then, with `learn_sigma`, as many
    channels again for the variance. Nothing is random: labels are dropped by the training loop (`drop_labels`).
    Raises ValueError if a model with classes gets no labels.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, num_labels = config.hidden_size, config.num_classes + (config.null_label is not None)
        self.x_embedder = PatchEmbedder(config.patch_size, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width, config.timestep_frequency_shift)
        self.y_embedder = LabelEmbedder(num_labels, width) if num_labels else None
        position = sincos_position_embedding(*config.grid, width)
        self.pos_embed = nn.Parameter(position[None], requires_grad=False)  # (1, tokens, width)
        self.blocks = nn.ModuleList(BLOCKS[config.block_design](config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.initialize_weights()

    def initialize_weights(
        self, generator: torch.Generator | None = None, *, embeddings: Literal["released", "unit"] = "released"
    ) -> None:
        """Initialise the weights: Xavier-uniform for linear layers, zero for biases, for the output layer and, with
        adaLN-Zero, for the modulations.

        generator: source of the random numbers; by default torch's global one.
        embeddings: "released" draws the timestep MLP and the label table from N(0, 0.02), as the released model does; "unit"
            scales them to give vectors of about unit variance.
        """
        linear: list[Any] = [module for module in self.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for layer in linear:
            # As a matrix: the patch embedding is a linear map of patches, although stored as a convolution.
            nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1), generator=generator)
            nn.init.zeros_(layer.bias)
        embedders: list[Any] = [*self.t_embedder.mlp[::2]]  # its two linear layers
        if self.y_embedder is not None:
            embedders.append(self.y_embedder.embedding_table)
        for layer in embedders:
            # From embeddings as small as the released ones, the modulations need about a thousand optimiser steps before they
            # can tell timesteps apart, which a short run does not have.
            unit = math.sqrt(2 / layer.in_features) if isinstance(layer, nn.Linear) else 1.0
            nn.init.normal_(layer.weight, std=unit if embeddings == "unit" else 0.02, generator=generator)
        # The untrained model predicts zero. With adaLN-Zero its gates are zero too, so every block starts as the identity.
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
        condition_of: ConditionOf = None,
    ) -> Float[Tensor, "batch out_channels height width"]:
        x = self.x_embedder(x) + self.pos_embed  # (batch, tokens, width)
        c = self.embed_conditions(t, y)
        tokens = x.shape[1]
        if self.config.block_design == "in_context":
            x = torch.cat([x, per_sample(c, condition_of)], dim=1)
        for block in self.blocks:
            x = block(x, c, condition_of)
        # Embeddings appended as tokens are dropped again.
        x = self.final_layer(x[:, :tokens], c, condition_of)  # (batch, tokens, patch_size^2 * out_channels)
        return self.unpatchify(x)

    def embed_conditions(self, t: Num[Tensor, " conditions"], y: Num[Tensor, "conditions *labels"] | None) -> Tensor:
        """Embeddings of timesteps and classes: for the adaLN designs their sum (conditions, width), for the others both,
        (conditions, 2, width), or (conditions, 1, width) without classes.
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
        """Put the patches, one per token, back together as an image."""
        p, (rows, columns) = self.config.patch_size, self.config.grid
        # The channel is last here, but first in the patches embedded, as released.
        x = x.view(len(x), rows, columns, p, p, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, rows * p, columns * p)


def drop_labels(config: DiTConfig, y: Int[Tensor, " batch"], uniform: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Replace labels by the null label, if there is one, where `uniform`, in [0, 1), is below `class_dropout_prob`.
    [thesis 2.3.1, classifier-free guidance]
    """
    null = config.null_label
    return y if null is None else torch.where(uniform.to(y.device) < config.class_dropout_prob, null, y)
