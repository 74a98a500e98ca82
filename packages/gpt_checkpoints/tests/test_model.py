"""Gpt: the identity at step 0, its size, its scalars and its config."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from triptych_gpt.config import GptConfig, MetricScale
from triptych_gpt.model import Gpt, decayed
from triptych_gpt.presets import PRESETS
from triptych_gpt.tasks import TASKS
from triptych_gpt.tokenizers import ScalarTokens, both_scales

pytestmark = pytest.mark.filterwarnings("ignore:tokens of up to")

DIGITS, CARTPOLE = PRESETS["laptop"].symmetry, PRESETS["cartpole"].symmetry
SCALE = MetricScale(0.2, 2.6, (0.2, 0.3, 0.5, 2.6))
N = 3


def tiny(spec=DIGITS, tokenizer="neuron", **options) -> GptConfig:
    options = {"metric_scale": SCALE, "chunk_size": 100 if tokenizer == "chunk" else None, **options}
    return GptConfig(spec, tokenizer, width=16, depth=2, num_heads=2, edge_width=4, **options)


def random_inputs(size: int) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(1)
    noised, theta = torch.randn(2, N, size, generator=rng)
    metric, target = torch.rand(2, N, generator=rng)
    return noised, torch.tensor([0, 17, 999]), theta, metric, target


@pytest.mark.parametrize("tokenizer", ["neuron", "layer", "chunk"])
@pytest.mark.parametrize("spec", [DIGITS, CARTPOLE], ids=["digits", "cartpole"])
def test_an_untrained_model_is_the_identity_bit_for_bit(tokenizer, spec):
    model = Gpt(tiny(spec, tokenizer))
    inputs = random_inputs(spec.layout.size)
    assert torch.equal(model(*inputs), inputs[2])
    trained = [
        module.weight for name, module in model.named_modules() if "decoder" in name and isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        trained[-1].normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model(*inputs), inputs[2])


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("mnist_loss", 378_283_008),
        ("mnist_error", 378_283_008),
        ("cifar10_loss", 639_459_328),
        ("cifar10_error", 639_459_328),
        ("cartpole", 347_351_040),
    ],
)
def test_released_models_have_their_number_of_parameters(preset, parameters):
    with torch.device("meta"):
        model = Gpt(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not list(model.buffers())


def test_presets_are_of_the_tasks_networks():
    tasks = {"mnist_loss": "mnist_mlp", "cifar10_loss": "cifar_cnn", "laptop": "mnist_mlp_14", "cartpole": "cartpole",
             "cartpole_small": "cartpole_small"}  # fmt: skip
    for preset, task in tasks.items():
        assert PRESETS[preset].symmetry == TASKS[task].symmetry
    assert {name: config.symmetry.layout.size for name, config in PRESETS.items()} == {
        "mnist_loss": 7960, "mnist_error": 7960, "cifar10_loss": 5370, "cifar10_error": 5370, "cartpole": 1250, "laptop": 2080,
        "cartpole_small": 1250,
    }  # fmt: skip
    assert PRESETS["mnist_error"].metric_factor == PRESETS["cifar10_error"].metric_factor == 100


def test_initial_weights_come_from_the_generator_at_the_released_size():
    def weights(seed):
        model = Gpt(tiny(CARTPOLE))
        model.initialize_weights(torch.Generator().manual_seed(seed))
        return model.state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    drawn = torch.cat([x.flatten() for name, x in first.items() if name.startswith("blocks") and x.ndim == 2])
    assert drawn.std().item() == pytest.approx(0.02, rel=0.03)
    assert not first["positions"].any()
    assert not first["tokenizer.edges.0.decoder.weight"].any()


def test_initialize_weights_undoes_training():
    model = Gpt(tiny(CARTPOLE))
    model.initialize_weights(torch.Generator().manual_seed(0))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    model.initialize_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_only_weights_of_linear_layers_decay():
    model = Gpt(tiny(CARTPOLE))
    names = {id(p): name for name, p in model.named_parameters()}
    yes, no = ({names[id(p)] for p in group} for group in decayed(model))
    assert len(yes) + len(no) == len(names)
    assert {name.rsplit(".", 1)[-1] for name in yes} == {"weight"}
    assert "blocks.0.attn.qkv.weight" in yes
    assert "scalars.encoders.1.weight" in yes
    assert {"positions", "norm_in.weight", "blocks.1.norm2.weight", "blocks.1.mlp.fc1.bias"} <= no


def embedding(encoder: nn.Linear, token: torch.Tensor) -> torch.Tensor:
    """What the encoder, made orthogonal, was given."""
    return token @ encoder.weight


def scalar_features(config: GptConfig, t, metric, target) -> list[torch.Tensor]:
    """Embeddings of the scalars in each token, read back through encoders with orthonormal columns."""
    module = ScalarTokens(replace(config, width=260, num_heads=1)).double()
    for encoder in module.encoders:
        nn.init.orthogonal_(encoder.weight)
    with torch.no_grad():
        tokens = module(t, metric, target).unbind(1)
        return [embedding(encoder, token) for encoder, token in zip(module.encoders, tokens, strict=True)]


@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_raw_scalars_are_the_released_ones(factor):
    t, metric, target = torch.tensor([3, 999]), torch.tensor([0.9, 0.31]).double(), torch.tensor([0.1, 0.07]).double()
    found = scalar_features(tiny(scalars="raw", metric_factor=factor), t, metric, target)
    frequencies = [np.float32(2.0) ** f for f in np.linspace(0, 14, 128, dtype=np.float32)]
    wanted = [t.double(), (target - metric) * factor, target * factor, metric * factor]
    for features, scalar in zip(found, wanted, strict=True):
        assert features.shape == (2, 257)
        torch.testing.assert_close(features[:, 256], scalar, rtol=1e-10, atol=1e-10)
        for j in (0, 1, 40, 90):  # float32 frequencies: at the highest, 999 of them are radians with their rounding
            angles = float(frequencies[j]) * scalar
            torch.testing.assert_close(features[:, j], angles.sin(), rtol=0, atol=2e-7 * (1 + angles.abs().max()))
            torch.testing.assert_close(features[:, 128 + j], angles.cos(), rtol=0, atol=2e-7 * (1 + angles.abs().max()))


def test_normalised_scalars_are_written_out():
    t, metric, target = torch.tensor([0, 250]), torch.tensor([2.6, 0.4]).double(), torch.tensor([0.2, 0.3]).double()
    found = scalar_features(tiny(num_frequencies=5, octaves=4.0), t, metric, target)

    def scales(x):  # quantile of the knots .2, .3, .5, 2.6: thirds
        quantile = np.interp(x, [0.2, 0.3, 0.5, 2.6], [0, 1 / 3, 2 / 3, 1])
        return np.stack([2 * (x.numpy() - 0.2) / 2.4 - 1, 2 * quantile - 1], axis=1)

    assert scales(target)[0].tolist() == pytest.approx([-1, -1])
    change = scales(target) - scales(metric)
    wanted = [t.numpy()[:, None] / 1000, np.concatenate([change, scales(target), scales(metric)], axis=1)]
    frequencies = math.pi / 4 * np.array([1, 2, 4, 8, 16])
    for features, each in zip(found, wanted, strict=True):
        angles = each[:, :, None] * frequencies
        written = np.concatenate([np.sin(angles), np.cos(angles), each[:, :, None]], axis=2).reshape(2, -1)
        np.testing.assert_allclose(features.numpy(), written, atol=1e-6)  # frequencies are float32


def test_the_linear_scale_goes_on_outside_the_range_and_the_quantile_stays():
    low, high = both_scales(SCALE, torch.tensor([-1.0, 5.0]).double()).tolist()
    assert low == pytest.approx([-2, -1])
    assert high == pytest.approx([3, 1])


def test_metric_scales_follow_the_quantiles():
    values = torch.rand(4000, generator=torch.Generator().manual_seed(0)).double().square()
    scale = MetricScale.of(values.view(40, 100), knots=9)
    np.testing.assert_allclose(scale.knots, np.quantile(values.numpy(), np.linspace(0, 1, 9)), rtol=1e-12)
    assert (scale.low, scale.high) == (values.min().item(), values.max().item())
    quantile = both_scales(MetricScale.of(values), values)[:, 1]
    assert quantile.mean().item() == pytest.approx(0, abs=0.02)  # where the linear scale's is far below
    assert quantile.std().item() == pytest.approx(3**-0.5, rel=0.03)


def test_metrics_that_crowd_at_a_bound_share_a_knot():
    returns = torch.cat([torch.linspace(0, 499, 100), torch.full((900,), 500.0)])
    scale = MetricScale.of(returns, knots=11)
    assert scale.low == 0
    assert scale.knots[-1] == scale.high == 500
    assert both_scales(scale, returns).isfinite().all()


@pytest.mark.parametrize("values", [[1.0, 1.0], [1.0, math.nan], [], [0.0, math.inf]])
def test_metrics_without_a_range_are_refused(values):
    with pytest.raises(ValueError, match="no range can be taken"):
        MetricScale.of(torch.tensor(values))


@pytest.mark.parametrize("config", [*PRESETS.values(), tiny(), tiny(CARTPOLE, "chunk")])
def test_configs_survive_json(config):
    text = json.dumps(config.to_json(), sort_keys=True)
    assert GptConfig.from_json(json.loads(text)) == config


@pytest.mark.parametrize("change", [{"surprise": 1}, {"metric_scale": {"low": 1}}, {"symmetry": {}}, {"width": None}])
def test_other_json_is_refused(change):
    with pytest.raises(ValueError, match=r"not (the config of a G\.pt|a permutation spec)") as caught:
        GptConfig.from_json({**tiny().to_json(), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "word"}, "tokenizer 'word': expected one of layer, chunk, neuron"),
        ({"tokenizer": "chunk"}, "chunk_size None: chunk tokens need one"),
        ({"chunk_size": 10}, "chunk_size 10: neuron tokens have none"),
        ({"width": 30, "num_heads": 4}, "width 30 is not a multiple of num_heads 4"),
        ({"depth": 0}, "depth 0: expected a number above 0"),
        ({"scalars": "log"}, "scalars 'log': expected one of raw, normalised"),
        ({"metric_factor": 100.0}, "metric_factor 100.0: normalised metrics"),
    ],
)
def test_impossible_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        GptConfig(DIGITS, **options)
    assert "\n" not in str(caught.value)


def test_normalised_scalars_need_a_scale_to_make_a_model():
    with pytest.raises(ValueError, match="need a metric_scale"):
        Gpt(PRESETS["laptop"])
    for low, high, knots in ((1.0, 1.0, (0.0, 1.0)), (0.0, math.nan, (0.0, 1.0)), (0.0, 1.0, (0.0, 0.0, 1.0))):
        with pytest.raises(ValueError, match="metric scale"):
            MetricScale(low, high, knots)


def test_bfloat16_autocast_and_inference_mode_change_rounding_only():
    for spec in (DIGITS, CARTPOLE):
        model = Gpt(tiny(spec))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "decoder" in name:
                    p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        inputs = random_inputs(spec.layout.size)
        whole = model(*inputs).detach()
        with torch.inference_mode():
            torch.testing.assert_close(model(*inputs), whole, rtol=0, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(*inputs)
        assert out.dtype == torch.float32
        assert 0 < (out - whole).abs().max() < 0.2
        out.square().sum().backward()
