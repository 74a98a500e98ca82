"""Names, shapes and settings of diffusers' `DiTTransformer2DModel`, both ways."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from triptych_dit.config import DiTConfig
from triptych_dit.interop.label_tables import unpadded_table
from triptych_dit.interop.released import TABLE, check_keys, fold_table
from triptych_dit.model import DiT, sincos_position_embedding

# Ours -> theirs; qkv is three there, and every block has a copy of the embeddings.
_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_INNER = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_EMBEDDINGS = {
    "t_embedder.mlp.0.weight": "norm1.emb.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "norm1.emb.timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "norm1.emb.timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "norm1.emb.timestep_embedder.linear_2.bias",
    TABLE: "norm1.emb.class_embedder.embedding_table.weight",
}


def _pairs(depth: int) -> dict[str, str]:
    """Names of what is the same tensor in both."""
    modules = _OUTER | {
        f"blocks.{i}.{ours}": f"transformer_blocks.{i}.{theirs}"
        for i in range(depth)
        for ours, theirs in _INNER.items()
    }
    return {f"{ours}.{end}": f"{theirs}.{end}" for ours, theirs in modules.items() for end in ("weight", "bias")}


def renamed(ours: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Our state dict under diffusers' names. Copies are copies: safetensors refuses tensors that share memory."""
    state = {theirs: ours[name] for name, theirs in _pairs(depth).items()}
    for i in range(depth):
        for end in ("weight", "bias"):
            for part, tensor in zip("qkv", ours[f"blocks.{i}.attn.qkv.{end}"].chunk(3), strict=True):
                state[f"transformer_blocks.{i}.attn1.to_{part}.{end}"] = tensor.clone()
        state |= {f"transformer_blocks.{i}.{theirs}": ours[name].clone() for name, theirs in _EMBEDDINGS.items()}
    return state


def translated(
    theirs: Mapping[str, Any], state: dict[str, Tensor], *, num_classes: int | None, shift: int, dropout: float | None
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Config and state dict of ours for diffusers' config and state dict."""
    kinds = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter in old folders
    if theirs.get("_class_name") not in kinds or theirs.get("norm_type") != "ada_norm_zero":
        raise ValueError(f"a {theirs.get('_class_name')} with norm_type {theirs.get('norm_type')}; expected {kinds[0]}")
    for name, wanted in (
        ("activation_fn", "gelu-approximate"),
        ("attention_bias", True),
        ("norm_elementwise_affine", False),
    ):
        if theirs.get(name, wanted) != wanted:
            raise ValueError(f"{name} {theirs[name]}: a DiT has {wanted}")
    depth, width = theirs["num_layers"], theirs["num_attention_heads"] * theirs["attention_head_dim"]
    out_channels = theirs.get("out_channels") or theirs["in_channels"]
    if out_channels not in (theirs["in_channels"], 2 * theirs["in_channels"]):
        raise ValueError(
            f"out_channels {out_channels} for in_channels {theirs['in_channels']}: a DiT has as many or twice"
        )
    shape = DiTConfig(
        input_size=(theirs["sample_size"],) * 2, in_channels=theirs["in_channels"], patch_size=theirs["patch_size"],
        hidden_size=width, depth=depth, num_heads=theirs["num_attention_heads"],
        num_classes=theirs["num_embeds_ada_norm"], learn_sigma=out_channels != theirs["in_channels"],
        timestep_frequency_shift=shift, mlp_norm_eps=theirs.get("norm_eps", 1e-5),
    )  # fmt: skip
    state.pop("pos_embed.pos_embed", None)  # old folders have it; it is the sine-cosine one
    with torch.device("meta"):
        expected = DiT(shape).state_dict()
        expected[TABLE] = torch.empty(theirs["num_embeds_ada_norm"] + 1, width)
    check_keys(state, renamed(expected, depth), "transformer")
    for theirs_name in _EMBEDDINGS.values():
        first = state[f"transformer_blocks.0.{theirs_name}"]
        if not all(torch.equal(first, state[f"transformer_blocks.{i}.{theirs_name}"]) for i in range(1, depth)):
            raise ValueError(f"blocks differ in {theirs_name}, which all blocks of a DiT share; trained in diffusers?")
    table = unpadded_table(state[f"transformer_blocks.0.{_EMBEDDINGS[TABLE]}"], num_classes)
    ours = {name: state[theirs_name] for name, theirs_name in _pairs(depth).items()}
    ours |= {name: state[f"transformer_blocks.0.{theirs_name}"] for name, theirs_name in _EMBEDDINGS.items()}
    for i in range(depth):
        for end in ("weight", "bias"):
            parts = [state[f"transformer_blocks.{i}.attn1.to_{part}.{end}"] for part in "qkv"]
            ours[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(parts)
    ours["pos_embed"] = sincos_position_embedding(*shape.grid, width)[None]
    ours[TABLE] = table.rows
    if not table.num_classes:
        fold_table(ours)
    dropout = (dropout or 0.1) if table.has_null else 0.0
    return replace(shape, num_classes=table.num_classes, class_dropout_prob=dropout), ours
