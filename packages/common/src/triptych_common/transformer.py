"""The transformer core shared by DiT and G.pt: attention, feed-forward and a pre-norm residual block.

Attribute names (`attn.qkv`, `attn.proj`, `mlp.fc1`, `mlp.fc2`) are those of the released DiT state dict.
"""

import platform
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Tokens = Float[Tensor, "batch tokens width"]
Bias = Float[Tensor, "batch heads tokens tokens"]  # added to attention logits; [..., i, j] is for query i and key j


class Modulation(NamedTuple):
    """How conditioning changes one branch of a block.  [thesis 2.3.2, adaLN and adaLN-Zero]

    The normalised x becomes x * (1 + scale) + shift, and the branch's output is multiplied by `gate` (None: by 1).
    Every tensor has shape (batch, 1, width).
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


def modulate(x: Tokens, by: Modulation | None) -> Tokens:
    """x * (1 + scale) + shift, or x itself without modulation."""
    # 1 + scale, so that a modulation of zeros, as at initialisation, changes nothing.
    return x if by is None else torch.addcmul(by.shift, x, by.scale + 1)


_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
_ENOUGH = 2**15  # values of x; below that the fused kernel's overhead exceeds its gain


def linear(
    layer: nn.Linear, x: Float[Tensor, "*batch inputs"], *, gelu: bool = False, approximate: str = "tanh"
) -> Float[Tensor, "*batch outputs"]:
    """`layer(x)`, followed by GELU if `gelu`; `approximate` is "tanh" or "none" (exact), as in F.gelu.

    For inference in float32 on a CPU, one oneDNN kernel computes product, bias and GELU: done separately, the last two cost
    a small model as much as its matrix products. That kernel has no derivative, hence only in inference mode, and it bypasses
    the layer's forward, hence only for plain layers without hooks.
    """
    eager = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()  # the latter would break a graph
    plain = type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)
    float32 = x.dtype == layer.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if _ONEDNN and x.is_cpu and eager and plain and float32 and x.numel() >= _ENOUGH:
        activation: tuple[str, list[float], str] = ("gelu", [], approximate) if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, *activation)
    return F.gelu(layer(x), approximate=approximate) if gelu else layer(x)


class Attention(nn.Module):
    """Multi-head self-attention without a mask. Raises ValueError for a width that is not a multiple of the heads."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}; change one of them")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tokens, bias: Bias | None = None) -> Tokens:
        batch, tokens, width = x.shape
        # The released order of the 3 * width outputs: q of every head, then k, then v.
        qkv = linear(self.qkv, x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = (z.transpose(1, 2) for z in qkv.unbind(2))  # each (batch, heads, tokens, width / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        return linear(self.proj, mixed.transpose(1, 2).reshape(batch, tokens, width))


class FeedForward(nn.Module):
    """Linear, GELU, Linear. `gelu` is "tanh" for the approximation or "none" for the exact function, as in F.gelu."""

    def __init__(self, width: int, hidden: int, gelu: str = "tanh") -> None:
        super().__init__()
        self.gelu = gelu
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return linear(self.fc2, linear(self.fc1, x, gelu=True, approximate=self.gelu))


class Block(nn.Module):
    """Pre-norm residual block: attention, then feed-forward, each optionally modulated and gated.

        x = Block(width=384, num_heads=6, affine_norm=True)(x)  # (batch, tokens, 384)

    affine_norm: whether the two LayerNorms have learned scales and shifts; a modulated block needs none.
    attn_norm_eps, mlp_norm_eps: their epsilons. gelu: of the feed-forward layer, "tanh" or "none" (exact).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        affine_norm: bool = False,
        attn_norm_eps: float = 1e-6,
        mlp_norm_eps: float = 1e-6,
        gelu: str = "tanh",
    ) -> None:
        super().__init__()
        # LayerNorms without parameters where adaLN supplies scale and shift.
        self.norm1 = nn.LayerNorm(width, eps=attn_norm_eps, elementwise_affine=affine_norm)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=mlp_norm_eps, elementwise_affine=affine_norm)
        self.mlp = FeedForward(width, int(width * mlp_ratio), gelu)

    def forward(
        self, x: Tokens, attn: Modulation | None = None, mlp: Modulation | None = None, bias: Bias | None = None
    ) -> Tokens:
        x = _residual(x, self.attn(modulate(self.norm1(x), attn), bias), attn)
        return _residual(x, self.mlp(modulate(self.norm2(x), mlp)), mlp)


def _residual(x: Tokens, branch: Tokens, by: Modulation | None) -> Tokens:
    # Gates that start at zero (adaLN-Zero) make the block the identity, whatever its other weights.
    return x + branch if by is None or by.gate is None else torch.addcmul(x, by.gate, branch)
