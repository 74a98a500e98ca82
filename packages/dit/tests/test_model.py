import math

import pytest
import torch
from torch.nn import functional as F
from triptych_dit import PRESETS, DiT, DiTConfig
from triptych_dit.flops import gflops, parameter_count
from triptych_dit.model import drop_labels
from triptych_dit.testing import random_model

SMALL = DiTConfig((8, 12), 3, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=5)


def inputs(config=SMALL, batch=3, seed=1):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, *config.input_size, generator=rng, dtype=torch.float64)
    return x, torch.tensor([0, 417, 999])[:batch], torch.tensor([0, 4, 5])[:batch]


def written_out_forward(model, x, t, y):
    """The forward pass from its description, on the state dict alone."""
    w, c = model.state_dict(), model.config
    p, (rows, columns), width = c.patch_size, c.grid, c.hidden_size

    def linear(z, name):
        return z @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(z):
        return z / (1 + torch.exp(-z))

    def norm(z):
        return (z - z.mean(-1, keepdim=True)) / torch.sqrt(
            ((z - z.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True) + 1e-6
        )

    def gelu(z):
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    out = []
    for image, step, label in zip(x, t.tolist(), y.tolist(), strict=True):
        patches = [
            image[:, i * p : (i + 1) * p, j * p : (j + 1) * p].reshape(-1) for i in range(rows) for j in range(columns)
        ]
        h = torch.stack(patches) @ w["x_embedder.proj.weight"].reshape(width, -1).T + w["x_embedder.proj.bias"]
        h = h + w["pos_embed"][0]
        angles = torch.tensor([step * math.exp(-math.log(1e4) * i / 128) for i in range(128)], dtype=torch.float32)
        frequencies = torch.cat([angles.cos(), angles.sin()]).double()
        cond = linear(silu(linear(frequencies, "t_embedder.mlp.0")), "t_embedder.mlp.2")
        cond = cond + w["y_embedder.embedding_table.weight"][label]
        for i in range(c.depth):
            name = f"blocks.{i}"
            m = linear(silu(cond), f"{name}.adaLN_modulation.1").chunk(6)
            qkv = linear(norm(h) * (1 + m[1]) + m[0], f"{name}.attn.qkv")
            q, k, v = (z.view(-1, c.num_heads, width // c.num_heads).transpose(0, 1) for z in qkv.chunk(3, dim=-1))
            mixed = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(width // c.num_heads), -1) @ v
            h = h + m[2] * linear(mixed.transpose(0, 1).reshape(-1, width), f"{name}.attn.proj")
            inner = gelu(linear(norm(h) * (1 + m[4]) + m[3], f"{name}.mlp.fc1"))
            h = h + m[5] * linear(inner, f"{name}.mlp.fc2")
        shift, scale = linear(silu(cond), "final_layer.adaLN_modulation.1").chunk(2)
        h = linear(norm(h) * (1 + scale) + shift, "final_layer.linear")
        picture = torch.zeros(c.out_channels, *c.input_size, dtype=torch.float64)
        for token, values in enumerate(h):
            i, j = divmod(token, columns)
            picture[:, i * p : (i + 1) * p, j * p : (j + 1) * p] = values.view(p, p, -1).permute(2, 0, 1)
        out.append(picture)
    return torch.stack(out)


def test_forward_equals_written_out_description_on_a_rectangle():
    model = random_model(SMALL)
    x, _, y = inputs()
    for t, tolerance in ((torch.tensor([0, 1, 2]), 1e-6), (torch.tensor([3, 417, 999]), 1e-4)):  # angles are float32
        torch.testing.assert_close(model(x, t, y), written_out_forward(model, x, t, y), rtol=0, atol=tolerance)


def test_patches_are_a_convolution_laid_out_token_by_token():
    embed = random_model(SMALL).x_embedder
    x, _, _ = inputs()
    tokens = embed(x)
    torch.testing.assert_close(tokens, embed.proj(x).flatten(2).transpose(1, 2), rtol=0, atol=1e-12)
    assert tokens.is_contiguous()


def test_model_is_zero_and_its_blocks_the_identity_at_initialisation():
    model = DiT(SMALL).double()
    assert float(model(*inputs()).abs().max()) == 0
    h, c = torch.randn(2, 24, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    for block in model.blocks:
        assert torch.equal(block(h, c), h)


def test_a_sample_does_not_see_its_batch():
    model = random_model(SMALL)
    x, t, y = inputs()
    whole = model(x, t, y)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], whole[i], rtol=0, atol=1e-12)


def test_state_dict_of_xl_2_has_the_published_names_and_shapes():
    with torch.device("meta"):
        state = DiT(PRESETS["DiT-XL/2"]).state_dict()
    assert len(state) == 292
    d = 1152
    expected = {
        "pos_embed": (1, 256, d), "x_embedder.proj.weight": (d, 4, 2, 2), "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.2.weight": (d, d), "y_embedder.embedding_table.weight": (1001, d),
        "blocks.27.attn.qkv.weight": (3 * d, d), "blocks.27.attn.proj.bias": (d,), "blocks.0.mlp.fc1.weight": (4 * d, d),
        "blocks.0.mlp.fc2.weight": (d, 4 * d), "blocks.5.adaLN_modulation.1.weight": (6 * d, d),
        "final_layer.linear.weight": (32, d), "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }  # fmt: skip
    assert {name: tuple(state[name].shape) for name in expected} == expected


@pytest.mark.parametrize(("name", "millions"), [
    ("DiT-S/2", 32.87), ("DiT-B/2", 130.32), ("DiT-L/2", 457.84),
])  # fmt: skip
def test_trainable_parameters_of_published_sizes(name, millions):
    with torch.device("meta"):
        trainable = sum(p.numel() for p in DiT(PRESETS[name]).parameters() if p.requires_grad)
    assert trainable / 1e6 == pytest.approx(millions, abs=0.006)


def test_parameters_of_xl_2_are_exactly_the_published_number():
    assert parameter_count(PRESETS["DiT-XL/2"]) == 675_129_632


@pytest.mark.parametrize(("name", "published", "tolerance"), [
    ("DiT-S/8", 0.36, 0.01), ("DiT-S/4", 1.41, 0.003), ("DiT-S/2", 6.06, 0.002),
    ("DiT-B/8", 1.42, 0.002), ("DiT-B/4", 5.56, 0.002), ("DiT-B/2", 23.01, 0.002),
    ("DiT-L/8", 5.01, 0.002), ("DiT-L/4", 19.70, 0.002), ("DiT-L/2", 80.71, 0.002),
    ("DiT-XL/8", 7.39, 0.002), ("DiT-XL/4", 29.05, 0.002), ("DiT-XL/2", 118.64, 0.002),
    ("DiT-XL/2@512", 524.60, 0.002),
])  # fmt: skip
def test_gflops_of_published_sizes(name, published, tolerance):
    assert gflops(PRESETS[name]) == pytest.approx(published, rel=tolerance)


def test_gflops_equal_what_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = DiTConfig((16, 24), 4, patch_size=2, hidden_size=32, depth=3, num_heads=4, num_classes=7)
    model = DiT(config)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, 4, 16, 24), torch.tensor([3]), torch.tensor([1]))
    assert gflops(config) == pytest.approx(counter.get_total_flops() / 2 / 1e9, rel=1e-9)


def test_null_label_follows_the_class_count_and_dropout():
    assert SMALL.null_label == 5
    assert DiTConfig(num_classes=10).null_label == 10
    assert DiTConfig(class_dropout_prob=0.0).null_label is None
    assert len(DiT(SMALL).y_embedder.embedding_table.weight) == 6


def test_labels_are_dropped_where_the_draw_is_below_the_probability():
    y = torch.arange(5)
    draws = torch.tensor([0.0, 0.0999, 0.1, 0.5, 0.99])
    assert drop_labels(SMALL, y, draws).tolist() == [5, 5, 2, 3, 4]


def test_unit_embeddings_have_about_unit_variance():
    model = DiT(PRESETS["DiT-S/2"])
    model.initialize_weights(torch.Generator().manual_seed(0), embeddings="unit")
    with torch.no_grad():
        c = model.t_embedder(torch.arange(0, 1000, 10)) + model.y_embedder(torch.arange(100))
    assert 0.5 < float(c.std()) < 2


@pytest.mark.parametrize(("change", "message"), [
    ({"patch_size": 3}, "input_size 8x12 is not a multiple of patch_size 3"),
    ({"hidden_size": 18}, "multiple of 4 and of num_heads"),
    ({"num_heads": 3}, "multiple of 4 and of num_heads"),
    ({"class_dropout_prob": 1.0}, "expected 0 <= p < 1"),
    ({"depth": 0}, "depth 0: expected at least 1"),
])  # fmt: skip
def test_impossible_configs_fail_at_the_door(change, message):
    from dataclasses import replace

    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_initialisation_is_the_released_one():
    model = DiT(DiTConfig((32, 32), 4, patch_size=2, hidden_size=256, depth=1, num_heads=4, num_classes=1000))
    for name, std in (("t_embedder.mlp.0", 0.02), ("t_embedder.mlp.2", 0.02), ("y_embedder.embedding_table", 0.02)):
        assert float(model.get_submodule(name).weight.std()) == pytest.approx(std, rel=0.05)
    bound = math.sqrt(6 / (256 + 768))  # xavier-uniform of qkv as one matrix
    weights = model.blocks[0].attn.qkv.weight
    assert float(weights.abs().max()) == pytest.approx(bound, rel=0.01)
    assert float(F.relu(weights).mean()) == pytest.approx(bound / 4, rel=0.05)
    assert float(model.blocks[0].adaLN_modulation[1].weight.abs().max()) == 0
