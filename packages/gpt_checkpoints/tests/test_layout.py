"""theta's layout: the order of state_dict, its inverse, and what does not fit."""

import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from triptych_gpt.layout import ParameterLayout


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 10), nn.ReLU(), nn.Linear(10, 10))


def test_theta_is_torchs_own_parameter_vector():
    network = mlp()
    layout = ParameterLayout.of(network)
    assert layout.size == 7960
    assert torch.equal(layout.flatten(network.state_dict()), parameters_to_vector(network.parameters()))


def test_running_statistics_are_in_theta_and_the_count_of_batches_is_not():
    layout = ParameterLayout.of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    assert layout.names == ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    assert layout.spans["1.running_mean"] == slice(24, 28)


def test_unflatten_gives_views_that_load_into_the_network():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    layout = ParameterLayout.of(network)
    theta = torch.randn(5, 2, layout.size)
    tensors = layout.unflatten(theta)
    assert tensors["0.weight"].shape == (5, 2, 2, 1, 3, 3)
    tensors["0.weight"].zero_()
    assert (theta[..., :18] == 0).all()
    assert (theta[..., 18:] != 0).all()
    assert torch.equal(layout.flatten(tensors), theta)
    network.load_state_dict({name: tensor[3, 1] for name, tensor in tensors.items()})
    assert torch.equal(layout.flatten(network.state_dict()), theta[3, 1])


def test_a_parameter_without_dimensions_has_one_entry():
    layout = ParameterLayout({"scale": (), "weight": (2, 3)})
    assert layout.size == 7
    assert layout.unflatten(torch.arange(7.0))["scale"].item() == 0
    assert layout.unflatten(torch.arange(14.0).view(2, 7))["scale"].tolist() == [0, 7]


def test_equality_takes_account_of_order_and_survives_json_and_pickle():
    layout = ParameterLayout({"a": (2, 3), "b": ()})
    assert layout == ParameterLayout.from_json(json.loads(json.dumps(layout.to_json())))
    assert layout == pickle.loads(pickle.dumps(layout))
    assert hash(layout) == hash(ParameterLayout({"a": (2, 3), "b": ()}))
    assert layout != ParameterLayout({"b": (), "a": (2, 3)})
    assert layout != ParameterLayout({"a": (3, 2), "b": ()})


def test_what_does_not_fit_is_named_in_one_line():
    layout = ParameterLayout.of(mlp())
    good = mlp().state_dict()
    without = {name: tensor for name, tensor in good.items() if name != "2.bias"}
    for bad, message in [
        (without, "2.bias: absent"),
        ({**good, "4.weight": torch.ones(1)}, "4.weight: not in the layout"),
        ({**good, "2.weight": torch.ones(10, 9)}, r"2.weight: shape \(10, 9\) .* \(10, 10\)"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            layout.flatten(bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="7,959 entries, the layout 7,960"):
        layout.unflatten(torch.zeros(7959))


def test_networks_without_a_vector_are_refused():
    with pytest.raises(ValueError, match="at least one parameter"):
        ParameterLayout.of(nn.ReLU())
    with pytest.raises(ValueError, match=r"0.weight: a lazy layer"):
        ParameterLayout.of(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize("content", [[["a"]], [["a", 3]], [["a", ["x"]]], [["a", [2]], ["a", [2]]], [["a", [0]]], []])
def test_json_of_something_else_is_refused(content):
    with pytest.raises(ValueError, match=r"layout|shape"):
        ParameterLayout.from_json(content)
