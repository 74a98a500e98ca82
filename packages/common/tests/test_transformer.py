import math

import pytest
import torch
from torch.nn import functional as F
from triptych_common.transformer import Attention, Block, Modulation


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def _written_out_attention(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """Attention head by head, query by query."""
    batch, tokens, width = x.shape
    dim = width // layer.num_heads
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).split(width, dim=-1)
    out = torch.zeros_like(x)
    for b in range(batch):
        for h in range(layer.num_heads):
            part = slice(h * dim, (h + 1) * dim)
            for i in range(tokens):
                weights = torch.softmax(k[b, :, part] @ q[b, i, part] / math.sqrt(dim), dim=0)
                out[b, i, part] = weights @ v[b, :, part]
    return F.linear(out, layer.proj.weight, layer.proj.bias)


def test_attention_equals_written_out_sum(rng):
    layer = Attention(12, 3).double()
    x = torch.randn(2, 5, 12, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(layer(x), _written_out_attention(layer, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_block_equals_written_out_formula(rng, gated):
    block = Block(8, 2).double()
    x = torch.randn(3, 4, 8, generator=rng, dtype=torch.float64)
    values = torch.randn(6, 3, 1, 8, generator=rng, dtype=torch.float64)
    attn = Modulation(values[0], values[1], values[2] if gated else None)
    mlp = Modulation(values[3], values[4], values[5] if gated else None)

    def norm(z):
        return (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, unbiased=False, keepdim=True) + 1e-6)

    def gelu(z):
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    gate1, gate2 = (values[2], values[5]) if gated else (1.0, 1.0)
    y = x + gate1 * _written_out_attention(block.attn, norm(x) * (1 + values[1]) + values[0])
    inner = gelu(block.mlp.fc1(norm(y) * (1 + values[4]) + values[3]))
    torch.testing.assert_close(block(x, attn, mlp), y + gate2 * block.mlp.fc2(inner), rtol=0, atol=1e-12)


def test_zero_gates_make_the_block_the_identity(rng):
    x = torch.randn(2, 4, 8, generator=rng)
    zero = torch.zeros(2, 1, 8)
    by = Modulation(torch.randn(2, 1, 8, generator=rng), torch.randn(2, 1, 8, generator=rng), zero)
    assert torch.equal(Block(8, 2)(x, by, by), x)


def test_unmodulated_block_commutes_with_permuting_tokens(rng):
    block = Block(8, 2, affine_norm=True).double()
    x = torch.randn(2, 6, 8, generator=rng, dtype=torch.float64)
    order = torch.randperm(6, generator=rng)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order], rtol=0, atol=1e-12)


def test_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width 10 is not a multiple of num_heads 4"):
        Attention(10, 4)
