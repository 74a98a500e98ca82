"""Networks of the spatial transformer: published sizes, convex upsampling against a loop, and configs."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from triptych_gangealing.config import PRESETS
from triptych_gangealing.spatial_transformer import (
    FlowNetwork,
    SimilarityNetwork,
    SpatialTransformerConfig,
    convex_upsample,
)

TINY = SpatialTransformerConfig(
    input_size=16, channel_max=4, channel_multiplier=2.0, flow_size=4, flow_upsampling=4, image_channels=2
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_paper_preset_has_the_published_numbers_of_parameters():
    with torch.device("meta"):
        counts = [parameters(network(PRESETS["paper"])) for network in (SimilarityNetwork, FlowNetwork)]
    assert [round(count / 1e6, 2) for count in counts] == [22.42, 20.63]
    channels = {size: PRESETS["paper"].channels_at(size) for size in (128, 64, 32, 16, 8, 4)}
    assert channels == {128: 64, 64: 128, 32: 512, 16: 512, 8: 512, 4: 512}


@pytest.mark.parametrize("padding", ["replicate", "zeros"])
def test_convex_upsampling_equals_a_loop(padding):
    n, height, width, factor = 2, 3, 4, 2
    delta = torch.randn(n, 2, height, width, dtype=torch.float64, generator=rng(4))
    mask = 2 * torch.randn(n, 9, factor, factor, height, width, dtype=torch.float64, generator=rng(5))
    found = convex_upsample(delta, mask, padding)
    assert found.shape == (n, 2, height * factor, width * factor)
    for i, c, row, column in np.ndindex(found.shape):
        (y, a), (x, b) = divmod(row, factor), divmod(column, factor)
        logits = mask[i, :, a, b, y, x].numpy()
        weights = np.exp(logits) / np.exp(logits).sum()
        total = 0.0
        for k, weight in enumerate(weights):
            v, u = y + k // 3 - 1, x + k % 3 - 1
            inside = 0 <= v < height and 0 <= u < width
            if inside or padding == "replicate":
                total += weight * float(delta[i, c, min(max(v, 0), height - 1), min(max(u, 0), width - 1)])
        assert float(found[i, c, row, column]) == pytest.approx(total, abs=1e-12)


def test_upsampling_keeps_a_constant_displacement_where_zeros_shrink_it_at_borders():
    delta, mask = torch.full((1, 2, 4, 4), 0.3), torch.zeros(1, 9, 8, 8, 4, 4)
    torch.testing.assert_close(convex_upsample(delta, mask), torch.full((1, 2, 32, 32), 0.3))
    shrunk = convex_upsample(delta, mask, "zeros")
    values = torch.stack([shrunk[0, 0, 0, 0], shrunk[0, 0, 0, 16], shrunk[0, 0, 16, 16]])
    torch.testing.assert_close(values, 0.3 * torch.tensor([4 / 9, 6 / 9, 1]))


@pytest.mark.parametrize(
    "change",
    [
        {"transforms": ("flow", "similarity")},
        {"transforms": ()},
        {"input_size": 24},
        {"input_size": 4},
        {"flow_size": 32},
        {"flow_size": 2},
        {"flow_size": 6},
        {"heads": 0},
        {"flow_upsampling": 0},
        {"channel_max": 0},
        {"channel_multiplier": 0.0},
        {"flow_unit_factor": float("inf")},
        {"padding": "wrap"},
        {"flow_padding": "wrap"},
    ],
)
def test_config_refuses(change):
    with pytest.raises(Exception, match=r"expected|type") as caught:
        replace(TINY, **change)
    assert isinstance(caught.value, ValueError) or "Literal" in str(caught.value)


def test_config_survives_json():
    for config in (*PRESETS.values(), TINY, replace(TINY, transforms=("flow",))):
        assert SpatialTransformerConfig.from_json(json.loads(json.dumps(asdict(config)))) == config
