"""The four block designs against standard transformer layers, published sizes and torch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu
from torch.utils.flop_counter import FlopCounterMode
from triptych_dit import PRESETS, DiT, DiTConfig
from triptych_dit.config import BLOCK_DESIGNS
from triptych_dit.flops import gflops, parameter_count
from triptych_dit.model import BLOCKS, TimestepEmbedder
from triptych_dit.testing import random_model

SMALL = DiTConfig((8, 12), 3, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=5)
designs = pytest.mark.parametrize("design", BLOCK_DESIGNS)


def inputs(batch=4):
    x = torch.randn(batch, 3, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.tensor([7, 300, 7, 300])[:batch], torch.tensor([0, 4, 5, 4])[:batch]


@pytest.mark.parametrize(("name", "parameters"), [
    ("DiT-XL/2-adaln", 600e6), ("DiT-XL/2-in-context", 449e6), ("DiT-XL/2-cross-attention", 598e6),
])  # fmt: skip
def test_parameters_of_the_other_designs_are_the_published_ones(name, parameters):
    assert parameter_count(PRESETS[name]) == pytest.approx(parameters, abs=1e6)


@pytest.mark.parametrize(("name", "published"), [
    ("DiT-XL/2-adaln", 118.56), ("DiT-XL/2-in-context", 119.37), ("DiT-XL/2-cross-attention", 137.62),
])  # fmt: skip
def test_gflops_of_the_other_designs_are_the_published_ones(name, published):
    assert gflops(PRESETS[name]) == pytest.approx(published, rel=0.002)


@designs
@pytest.mark.parametrize("num_classes", [7, 0])
def test_gflops_equal_what_torch_counts(design, num_classes):
    config = DiTConfig(
        (16, 24), 4, 2, hidden_size=32, depth=3, num_heads=4, num_classes=num_classes, block_design=design
    )
    model, counter = DiT(config), FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, 4, 16, 24), torch.tensor([3]), torch.tensor([1]))
    assert gflops(config) == pytest.approx(counter.get_total_flops() / 2e9, rel=1e-9)


@pytest.mark.parametrize(
    "name", ["DiT-S/2", "DiT-S/4", "DiT-S/2-in-context", "DiT-S/2-cross-attention", "DiT-S/2-adaln"]
)
def test_gflops_of_whole_presets_equal_what_torch_counts(name):
    with torch.device("meta"):
        model = DiT(PRESETS[name])
        x, t, y = torch.zeros(1, 4, 32, 32), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x, t, y)
    assert gflops(PRESETS[name]) == pytest.approx(counter.get_total_flops() / 2e9, rel=1e-9)


def test_every_size_patch_resolution_and_design_has_its_row():
    rows = [config for name, config in PRESETS.items() if name.startswith("DiT-")]
    assert len(rows) == 4 * 3 * 2 * 4 == len(set(rows))
    assert PRESETS["DiT-XL/2@512"] == replace(PRESETS["DiT-XL/2"], input_size=(64, 64))


def standard_layer(block, kind):
    """torch's own pre-norm layer with the block's weights."""
    width, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features

    def act(x):
        return gelu(x, approximate="tanh")

    layer = kind(
        width, block.attn.num_heads, hidden, 0.0, act, 1e-6, batch_first=True, norm_first=True, dtype=torch.float64
    )
    pairs = {
        "self_attn.out_proj": block.attn.proj,
        "linear1": block.mlp.fc1,
        "linear2": block.mlp.fc2,
        "norm1": block.norm1,
    }
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(block.attn.qkv.weight)
        layer.self_attn.in_proj_bias.copy_(block.attn.qkv.bias)
        if kind is nn.TransformerEncoderLayer:
            pairs["norm2"] = block.norm2
        else:
            pairs |= {"norm2": block.norm_cross, "norm3": block.norm2, "multihead_attn.out_proj": block.cross_attn.proj}
            cross = block.cross_attn
            layer.multihead_attn.in_proj_weight.copy_(torch.cat([cross.q.weight, cross.kv.weight]))
            layer.multihead_attn.in_proj_bias.copy_(torch.cat([cross.q.bias, cross.kv.bias]))
        for name, module in pairs.items():
            layer.get_submodule(name).weight.copy_(module.weight)
            layer.get_submodule(name).bias.copy_(module.bias)
    return layer


def test_in_context_is_a_standard_encoder_over_tokens_and_embeddings():
    model = random_model(replace(SMALL, block_design="in_context"))
    x, t, y = inputs()
    h = torch.cat(
        [model.x_embedder(x) + model.pos_embed, model.t_embedder(t)[:, None], model.y_embedder(y)[:, None]], 1
    )
    for block in model.blocks:
        h = standard_layer(block, nn.TransformerEncoderLayer)(h)
    final = model.final_layer
    h = final.linear(nn.functional.layer_norm(h[:, :24], (16,), final.norm_final.weight, final.norm_final.bias, 1e-6))
    torch.testing.assert_close(model(x, t, y), model.unpatchify(h), rtol=0, atol=1e-10)


def test_cross_attention_is_a_standard_decoder_attending_to_the_embeddings():
    model = random_model(replace(SMALL, block_design="cross_attention"))
    x, t, y = inputs()
    h, memory = model.x_embedder(x) + model.pos_embed, torch.stack([model.t_embedder(t), model.y_embedder(y)], dim=1)
    for block in model.blocks:
        h = standard_layer(block, nn.TransformerDecoderLayer)(h, memory)
    final = model.final_layer
    h = final.linear(nn.functional.layer_norm(h, (16,), final.norm_final.weight, final.norm_final.bias, 1e-6))
    torch.testing.assert_close(model(x, t, y), model.unpatchify(h), rtol=0, atol=1e-10)


def test_adaln_is_adaln_zero_with_gates_of_one():
    plain = random_model(replace(SMALL, block_design="adaln"))
    gated = random_model(SMALL)
    state = plain.state_dict()
    for i in range(SMALL.depth):
        for kind, gate in (("weight", torch.zeros(16, 16)), ("bias", torch.ones(16))):
            name = f"blocks.{i}.adaLN_modulation.1.{kind}"
            shift_msa, scale_msa, shift_mlp, scale_mlp = state[name].chunk(4)
            state[name] = torch.cat([shift_msa, scale_msa, gate.double(), shift_mlp, scale_mlp, gate.double()])
    gated.load_state_dict(state)
    torch.testing.assert_close(plain(*inputs()), gated(*inputs()), rtol=0, atol=1e-12)


@designs
def test_distinct_conditions_embedded_once_give_the_same_output(design):
    model = random_model(replace(SMALL, block_design=design))
    x, t, y = inputs()
    once = model(x, torch.tensor([300, 7, 7]), torch.tensor([4, 5, 0]), torch.tensor([2, 0, 1, 0]))
    torch.testing.assert_close(once, model(x, t, y), rtol=0, atol=1e-12)


@designs
def test_an_unconditional_model_needs_no_labels_and_ignores_them(design):
    config = replace(SMALL, num_classes=0, block_design=design)
    model = random_model(config)
    x, t, y = inputs()
    assert config.null_label is None
    assert not any(name.startswith("y_embedder") for name in model.state_dict())
    assert torch.equal(model(x, t), model(x, t, y))
    assert not torch.equal(model(x, t), model(x, t + 1))


def test_a_conditional_model_needs_labels():
    with pytest.raises(ValueError, match=r"labels are missing.*num_classes=5"):
        random_model(SMALL)(*inputs()[:2])


@designs
def test_every_design_starts_at_zero_output_and_trains_every_parameter(design):
    model = DiT(replace(SMALL, block_design=design)).double()
    x, t, y = inputs()
    assert float(model(x, t, y).detach().abs().max()) == 0
    random_model_ = random_model(replace(SMALL, block_design=design), trainable=True)
    random_model_(x, t, y).square().sum().backward()
    idle = [name for name, p in random_model_.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert idle == []


def test_only_adaln_zero_starts_as_the_identity():
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    for design in BLOCK_DESIGNS:
        block = DiT(replace(SMALL, block_design=design)).blocks[0]
        c = torch.randn(2, 16) if BLOCKS[design].modulations else torch.randn(2, 2, 16)
        assert torch.equal(block(x, c), x) == (design == "adaln_zero")


@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_frequencies_are_those_of_diffusers(shift):
    from diffusers.models.embeddings import get_timestep_embedding
    from triptych_dit.model import frequency_embedding

    t = torch.tensor([0, 1, 417, 999])
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    torch.testing.assert_close(frequency_embedding(t.float(), 256, shift=shift), theirs, rtol=0, atol=1e-4)
    assert TimestepEmbedder(8, shift).frequency_shift == shift


@pytest.mark.parametrize(("change", "message"), [
    ({"num_classes": -1}, "or 0 for an unconditional model"),
    ({"timestep_frequency_shift": 2}, "expected 0 or 1"),
    ({"mlp_norm_eps": 0.0}, "expected a number above 0"),
])  # fmt: skip
def test_impossible_configs_fail_at_the_door(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
