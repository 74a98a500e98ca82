"""Initial networks: distributions against closed forms, reproducible run by run, without touching global randomness."""

import math

import pytest
import torch
from torch import Tensor, nn
from triptych_common.randomness import generator
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.tasks.initialisers import INITIALISERS, initial_networks

WIDE, TALL = (64, 256), (256, 64)  # out, in


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 256))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 48, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10))


def weights(initialiser: str, build=network, runs: int = 4) -> dict[str, Tensor]:
    theta = initial_networks(build, 0, range(runs), initialiser)
    return ParameterLayout.of(build()).unflatten(theta)


def bound(initialiser: str, fan_out: int, fan_in: int) -> float:
    """Half-width of a uniform distribution, or standard deviation of a normal one."""
    std = math.sqrt(2 / (fan_in + fan_out)) if initialiser.startswith("xavier") else math.sqrt(2 / fan_in)
    return std * math.sqrt(3) if initialiser.endswith("uniform") else std


@pytest.mark.parametrize("initialiser", ["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"])
def test_moments_and_shape_of_xavier_and_kaiming(initialiser):
    found, convolutions = weights(initialiser), weights(initialiser, convolutional)
    for weight, fan_out, fan_in in (
        (found["0.weight"], *WIDE),
        (found["2.weight"], *TALL),
        (convolutions["0.weight"], 48 * 9, 8 * 9),
    ):
        scaled = weight.double() / bound(initialiser, fan_out, fan_in)
        error = 5 / math.sqrt(scaled.numel())  # five standard errors of a mean of unit variance
        assert scaled.mean().abs() < error
        if initialiser.endswith("uniform"):  # variance 1/3, fourth moment 1/5
            assert 0.99 < scaled.abs().max() <= 1.000001
            assert (scaled.square().mean() - 1 / 3).abs() < error
            assert (scaled.pow(4).mean() - 1 / 5).abs() < error
        else:  # variance 1, fourth moment 3
            assert (scaled.square().mean() - 1).abs() < math.sqrt(2) * error
            assert (scaled.pow(4).mean() - 3).abs() < math.sqrt(96) * error


@pytest.mark.parametrize("initialiser", ["orthogonal_uniform", "orthogonal_normal"])
def test_orthogonal_weights_keep_lengths(initialiser):
    found = weights(initialiser)
    rows, columns = found["0.weight"].double(), found["2.weight"].double()
    assert (rows @ rows.mT - torch.eye(64, dtype=torch.float64)).abs().max() < 1e-5
    assert (columns.mT @ columns - torch.eye(64, dtype=torch.float64)).abs().max() < 1e-5
    kernel = weights(initialiser, convolutional)["0.weight"].double().flatten(2)  # 48 outputs of 72 inputs
    assert (kernel @ kernel.mT - torch.eye(48, dtype=torch.float64)).abs().max() < 1e-5
    diagonal = torch.cat([rows.diagonal(dim1=1, dim2=2), columns.diagonal(dim1=1, dim2=2)]).sign()
    assert diagonal.mean().abs() < 5 / math.sqrt(diagonal.numel())  # QR alone would fix the signs


def test_orthogonal_draws_differ_by_what_they_factorise():
    assert not torch.equal(weights("orthogonal_uniform")["0.weight"], weights("orthogonal_normal")["0.weight"])


@pytest.mark.parametrize("initialiser", INITIALISERS[1:])
def test_biases_are_zero(initialiser):
    found = weights(initialiser)
    assert not found["0.bias"].any()
    assert not found["2.bias"].any()


def test_default_is_the_networks_own():
    """As if the network were built right after seeding the global generator."""
    found = initial_networks(network, 3, [7])[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(3, "init-default", 7).initial_seed())
        expected = network()
    assert torch.equal(found, nn.utils.parameters_to_vector(expected.parameters()))
    bounded = weights("default")
    for name, fan_in in (("0.weight", 256), ("0.bias", 256), ("2.weight", 64), ("2.bias", 64)):
        assert 0.95 < bounded[name].abs().max() * math.sqrt(fan_in) <= 1.000001


@pytest.mark.parametrize("initialiser", INITIALISERS)
def test_a_function_of_seed_and_run_alone(initialiser):
    together = initial_networks(network, 1, range(5), initialiser)
    torch.rand(3)  # ambient randomness moves on
    assert torch.equal(initial_networks(network, 1, [4, 2], initialiser), together[[4, 2]])
    assert not torch.equal(initial_networks(network, 2, [4], initialiser)[0], together[4])
    assert together.dtype == torch.float32
    assert len(together.unique(dim=0)) == 5


def test_initialisers_differ_from_each_other():
    drawn = torch.stack([initial_networks(network, 0, [0], initialiser)[0] for initialiser in INITIALISERS])
    assert len(drawn.unique(dim=0)) == len(INITIALISERS)


@pytest.mark.parametrize("initialiser", INITIALISERS)
def test_global_randomness_is_left_alone(initialiser):
    before = torch.get_rng_state()
    initial_networks(network, 0, range(2), initialiser)
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_without_a_matrix_start_as_they_always_do():
    """A normalisation of scale zero, or a PReLU of slope zero, would be another network."""

    def build() -> nn.Module:
        norms = [nn.BatchNorm2d(4), nn.PReLU(4), nn.GroupNorm(2, 4), nn.LayerNorm([4, 3, 3])]
        return nn.Sequential(nn.Conv2d(2, 4, 3), *norms, nn.Flatten(), nn.RMSNorm(36), nn.Linear(36, 3))

    state = build().state_dict()
    for initialiser in INITIALISERS[1:]:
        found = weights(initialiser, build, 1)
        for name in found:
            drawn = name in ("0.weight", "0.bias", "7.weight", "7.bias")
            assert torch.equal(found[name][0], state[name]) != drawn, name


def test_unknown_initialiser():
    with pytest.raises(ValueError, match="initialiser 'he': expected one of default, xavier_uniform, xavier_normal"):
        initial_networks(network, 0, [0], "he")
