import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from triptych_common import transformer
from triptych_common.transformer import Attention, Block, Modulation, linear


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def _written_out_attention(layer: Attention, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Attention head by head, query by query."""
    batch, tokens, width = x.shape
    dim = width // layer.num_heads
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).split(width, dim=-1)
    out = torch.zeros_like(x)
    for b in range(batch):
        for h in range(layer.num_heads):
            part = slice(h * dim, (h + 1) * dim)
            for i in range(tokens):
                logits = k[b, :, part] @ q[b, i, part] / math.sqrt(dim)
                weights = torch.softmax(logits if bias is None else logits + bias[b, h, i], dim=0)
                out[b, i, part] = weights @ v[b, :, part]
    return F.linear(out, layer.proj.weight, layer.proj.bias)


def test_attention_equals_written_out_sum(rng):
    layer = Attention(12, 3).double()
    x = torch.randn(2, 5, 12, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(layer(x), _written_out_attention(layer, x), rtol=0, atol=1e-12)


def test_a_bias_adds_to_the_logits_of_its_batch_head_query_and_key(rng):
    layer = Attention(12, 3).double()
    x = torch.randn(2, 5, 12, generator=rng, dtype=torch.float64)
    bias = torch.randn(2, 3, 5, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    found, expected = layer(x, bias), _written_out_attention(layer, x, bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), bias)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):  # queries become bfloat16, the bias does not
        rounded = Attention(12, 3)(x.float(), bias.float())
    assert rounded.dtype == torch.bfloat16


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


def test_a_block_of_exact_gelu_own_epsilons_and_bias_is_the_written_out_one(rng):
    block = Block(8, 2, affine_norm=True, attn_norm_eps=0.3, mlp_norm_eps=0.7, gelu="none").double()
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(generator=rng)
    x = torch.randn(3, 4, 8, generator=rng, dtype=torch.float64)
    bias = torch.randn(3, 2, 4, 4, generator=rng, dtype=torch.float64)

    def norm(layer, z, eps):
        z = (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, unbiased=False, keepdim=True) + eps)
        return z * layer.weight + layer.bias

    y = x + _written_out_attention(block.attn, norm(block.norm1, x, 0.3), bias)
    inner = block.mlp.fc1(norm(block.norm2, y, 0.7))
    expected = y + block.mlp.fc2(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))))
    torch.testing.assert_close(block(x, bias=bias), expected, rtol=0, atol=1e-12)


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


def _layer_and_input(rng, rows=60):
    layer, x = nn.Linear(80, 320), torch.randn(rows, 49, 80, generator=rng)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(generator=rng).mul_(0.1)
    return layer, x


@pytest.fixture
def calls_to_onednn(monkeypatch):
    """A list that grows by one with every call of the kernel that `linear` uses in inference."""
    calls, kernel = [], torch.ops.mkldnn._linear_pointwise

    def counted(*inputs):
        calls.append(inputs)
        return kernel(*inputs)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [1, 60])
@pytest.mark.parametrize("grad_mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_linear_is_the_same_function_however_it_runs(rng, gelu, rows, grad_mode):
    layer, x = _layer_and_input(rng, rows)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    if gelu:
        exact = 0.5 * exact * (1 + torch.tanh(math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)))
    with grad_mode():
        torch.testing.assert_close(linear(layer, x, gelu=gelu).double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("grad_mode", [torch.inference_mode, torch.enable_grad])
def test_either_gelu_is_pytorchs_own_however_it_runs(rng, approximate, grad_mode):
    layer, x = _layer_and_input(rng)
    exact = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate=approximate)
    with grad_mode():
        found = linear(layer, x, gelu=True, approximate=approximate)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)  # the two differ by 5e-4


@pytest.mark.skipif(not transformer._ONEDNN, reason="this PyTorch has no oneDNN")
def test_sampling_takes_the_fused_kernel_and_training_does_not(rng, calls_to_onednn):
    layer, x = _layer_and_input(rng)
    linear(layer, x, gelu=True).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        linear(layer, x)
    assert not calls_to_onednn
    with torch.inference_mode():
        linear(layer, x)
        assert len(calls_to_onednn) == 1
        linear(layer, x[:1])  # too small for the kernel
        linear(nn.Linear(80, 80).double(), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(layer, x).dtype == torch.bfloat16
    assert len(calls_to_onednn) == 1


def test_a_layer_that_does_more_than_a_product_is_called(rng, calls_to_onednn):
    layer, x = _layer_and_input(rng)
    seen = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        linear(layer, x)
        handle.remove()

        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        doubled = Doubled(80, 320)
        doubled.load_state_dict(layer.state_dict())
        torch.testing.assert_close(linear(doubled, x), 2 * seen[0])
    assert len(seen) == 1
    assert not calls_to_onednn


def test_a_block_samples_as_it_trains(rng):
    block, x = Block(80, 2), torch.randn(60, 49, 80, generator=rng)
    by = Modulation(*torch.randn(3, 60, 1, 80, generator=rng))
    kept, trained = x.clone(), block(x, by, by)
    with torch.inference_mode():
        torch.testing.assert_close(block(x, by, by), trained.detach(), rtol=0, atol=1e-5)
    assert torch.equal(x, kept)
