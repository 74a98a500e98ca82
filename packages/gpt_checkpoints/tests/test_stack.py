"""A stack of networks computes what each computes alone, layer by layer, in every layout; gradients and inputs included."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from triptych_gpt.symmetry.derivation import Residual
from triptych_gpt.tasks.stack import Stack

NETWORKS, ITEMS = 3, 4


class Doubled(nn.Linear):
    """A Linear by inheritance, not by what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Skipping(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Centred(nn.Module):
    """Keeps a buffer that no state dict holds, and so theta does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("centre", torch.arange(6.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - self.centre)


def twice() -> nn.Module:
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(6, 5), relu, nn.Linear(5, 5), relu, nn.Linear(5, 3))


def hooked() -> nn.Module:
    network = nn.Sequential(nn.Linear(6, 3), nn.Tanh())
    network[0].register_forward_hook(lambda module, args, output: 3 * output)
    return network


def elementwise(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), *layers, nn.Linear(5, 3))


def on_maps(*layers: nn.Module, features: int = 36) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), *layers, nn.Flatten(), nn.Linear(features, 3))


VECTOR, LINE, IMAGE, VOLUME = (6,), (2, 9), (2, 5, 5), (2, 4, 4, 4)
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Tanhshrink, nn.Sigmoid,
    nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softshrink, nn.Hardshrink, nn.Identity,
)  # fmt: skip
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {  # network, shape of an item, batched
    **{kind.__name__: (lambda kind=kind: elementwise(kind()), VECTOR, True) for kind in ACTIVATIONS},
    "Linear alone": (lambda: nn.Linear(6, 3), VECTOR, True),
    "no biases": (lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)), VECTOR, True),
    "threshold": (lambda: elementwise(nn.Threshold(0.1, -2.0)), VECTOR, True),
    "dropout that drops nothing": (lambda: elementwise(nn.Dropout(0.0)), VECTOR, True),
    "ReLU first, in place": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)), VECTOR, True),
    "ReLU in place twice": (lambda: elementwise(nn.ReLU(inplace=True), nn.Linear(5, 5), nn.ReLU(inplace=True)), VECTOR, True),
    "ReLU on maps first, in place": (lambda: nn.Sequential(nn.ReLU(True), *on_maps()), IMAGE, True),
    "one ReLU in two places": (twice, VECTOR, True),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.Sequential()), nn.Linear(5, 3)), VECTOR, True),
    "flattened image": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(50, 3)), IMAGE, True),
    "flattened twice": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(50, 3), nn.Flatten()), IMAGE, True),
    "residual": (lambda: elementwise(Residual(nn.Sequential(nn.Tanh(), nn.Linear(5, 5)))), VECTOR, True),
    "residual first": (lambda: nn.Sequential(Residual(nn.Linear(6, 6)), nn.Linear(6, 3)), VECTOR, True),
    "residual first, in place": (lambda: nn.Sequential(Residual(nn.ReLU(True)), nn.Linear(6, 3)), VECTOR, True),
    "residual changed in place": (
        lambda: elementwise(Residual(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 5)))), VECTOR, True),
    "residual on maps": (lambda: on_maps(Residual(nn.Conv2d(4, 4, 3, padding=1))), IMAGE, True),
    "residual on maps first": (lambda: nn.Sequential(Residual(nn.Conv2d(2, 2, 1)), *on_maps()), IMAGE, True),
    "residual of Identity": (lambda: nn.Sequential(Residual(nn.Identity()), nn.Linear(6, 3)), VECTOR, True),
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3, stride=2), nn.Flatten(), nn.Linear(16, 3)), LINE, True),
    "Conv2d without biases": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.Flatten()), IMAGE, True),
    "Conv2d dilated": (lambda: nn.Sequential(nn.Conv2d(2, 4, (1, 2), dilation=2), nn.Flatten()), IMAGE, True),
    "Conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(81, 3)), VOLUME, True),
    "grouped convolution": (lambda: on_maps(nn.Conv2d(4, 8, 2, groups=4), features=32), IMAGE, True),
    "grouped convolution first": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten()), IMAGE, True),
    "two convolutions": (lambda: on_maps(nn.ReLU(), nn.Conv2d(4, 5, 3), features=5), IMAGE, True),
    "MaxPool": (lambda: on_maps(nn.MaxPool2d(2, 1), features=16), IMAGE, True),
    "MaxPool first": (lambda: nn.Sequential(nn.MaxPool2d(3), nn.Flatten(), nn.Linear(2, 3)), IMAGE, True),
    "AvgPool": (lambda: on_maps(nn.AvgPool2d(2, 1), features=16), IMAGE, True),
    "LPPool": (lambda: on_maps(nn.Sigmoid(), nn.LPPool2d(2, 2), features=4), IMAGE, True),
    "AdaptiveAvgPool": (lambda: on_maps(nn.AdaptiveAvgPool2d(1), features=4), IMAGE, True),
    "AdaptiveMaxPool": (lambda: on_maps(nn.AdaptiveMaxPool2d((2, 1)), features=8), IMAGE, True),
    "BatchNorm1d": (lambda: elementwise(nn.BatchNorm1d(5)), VECTOR, True),
    "BatchNorm1d first": (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), VECTOR, True),
    "BatchNorm1d on lines": (lambda: nn.Sequential(nn.BatchNorm1d(2), nn.Conv1d(2, 3, 9), nn.Flatten()), LINE, True),
    "BatchNorm2d": (lambda: on_maps(nn.BatchNorm2d(4, momentum=0.4)), IMAGE, True),
    "BatchNorm2d first": (lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(50, 3)), IMAGE, True),
    "BatchNorm2d, not affine": (lambda: on_maps(nn.BatchNorm2d(4, affine=False, eps=0.1)), IMAGE, True),
    "BatchNorm3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3), nn.Flatten()), VOLUME, True),
    # what vmap must do
    "Linear on maps": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(3, 2), nn.Flatten()), IMAGE, False),
    "BatchNorm, then Linear on maps": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(3, 2), nn.Flatten()), IMAGE, False),
    "MaxPool1d on features": (lambda: nn.Sequential(nn.Linear(6, 6), nn.MaxPool1d(2), nn.Linear(3, 3)), VECTOR, False),
    "Flatten of some dimensions": (lambda: nn.Sequential(nn.Flatten(2), nn.Flatten(), nn.Linear(50, 3)), IMAGE, False),
    "circular padding": (lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Flatten()), IMAGE, False),
    "padding by name": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding="same"), nn.Flatten()), IMAGE, False),
    "LayerNorm": (lambda: elementwise(nn.LayerNorm(5)), VECTOR, False),
    "GroupNorm": (lambda: on_maps(nn.GroupNorm(2, 4)), IMAGE, False),
    "InstanceNorm": (lambda: on_maps(nn.InstanceNorm2d(4, affine=True)), IMAGE, False),
    "Softmax": (lambda: elementwise(nn.Softmax(1)), VECTOR, False),
    "PReLU": (lambda: elementwise(nn.PReLU(5)), VECTOR, False),
    "BatchNorm through vmap": (lambda: elementwise(nn.BatchNorm1d(5), nn.LayerNorm(5)), VECTOR, False),
    "ReLU first, in place, through vmap": (
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3), nn.LayerNorm(3)), VECTOR, False),
    "a subclass of Linear": (lambda: nn.Sequential(Doubled(6, 3), nn.Tanh()), VECTOR, False),
    "a subclass of Sequential": (lambda: Skipping(nn.Linear(6, 6), nn.Tanh()), VECTOR, False),
    "a forward hook": (hooked, VECTOR, False),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 3)), nn.Tanh()), VECTOR, False),
    "residual of another layout": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 5), Residual(nn.Sequential(nn.Flatten(), nn.Linear(4, 4))), nn.Flatten()),
        IMAGE, False),
    "a buffer of its own": (Centred, VECTOR, False),
}  # fmt: skip


def stack_of(make: Callable[[], nn.Module]) -> tuple[Stack, dict[str, Tensor]]:
    """The stack of a network and parameters for some of its kind, running statistics included, in float64."""
    torch.manual_seed(0)
    stack = Stack(make())
    built = [make().state_dict() for _ in range(NETWORKS)]
    parameters = {name: torch.stack([state[name] for state in built]).double() for name in stack.layout.names}
    for name, value in parameters.items():
        value += 0.1 * torch.rand_like(value)
        if name not in stack.trainable:
            continue
        value.requires_grad_()
    return stack, parameters


def alone(make: Callable[[], nn.Module], parameters: dict[str, Tensor], network: int, training: bool) -> nn.Module:
    """One of the networks as an ordinary module."""
    module = make().double().train(training)
    module.load_state_dict({name: value[network].detach() for name, value in parameters.items()}, strict=False)
    return module


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])
@pytest.mark.parametrize("name", CASES)
def test_stack_equals_each_network_alone(name, shared, training):
    """Outputs, gradients and running statistics; the given inputs stay as they were."""
    make, shape, batched = CASES[name]
    stack, parameters = stack_of(make)
    before = copy.deepcopy(parameters)
    inputs = torch.randn(*(() if shared else (NETWORKS,)), ITEMS, *shape, dtype=torch.float64)
    given, weights = inputs.clone(), torch.randn(NETWORKS, ITEMS, 1, dtype=torch.float64)
    outputs = stack(parameters, inputs, shared=shared, training=training)
    gradients = torch.autograd.grad((outputs.sin() * weights).sum(), [parameters[name] for name in stack.trainable])
    assert stack.batched == batched
    assert torch.equal(inputs, given)
    for network in range(NETWORKS):
        module = alone(make, before, network, training)
        expected = module((inputs if shared else inputs[network]).clone())
        assert outputs[network].shape == expected.shape
        assert (outputs[network] - expected).abs().max() < 1e-12
        own = torch.autograd.grad((expected.sin() * weights[network]).sum(), list(module.parameters()))
        for found, wanted in zip(gradients, own, strict=True):
            assert (found[network] - wanted).abs().max() < 1e-11
        for key, value in module.state_dict().items():
            if key in parameters:
                assert (parameters[key][network] - value).abs().max() < 1e-12, key


def test_one_network_and_one_item():
    for name in ("one ReLU in two places", "two convolutions", "ReLU first, in place", "LayerNorm"):
        make, shape, _ = CASES[name]
        stack, parameters = stack_of(make)
        one = {key: value[:1].detach() for key, value in parameters.items()}
        inputs = torch.randn(1, *shape, dtype=torch.float64)
        given = inputs.clone()
        expected = alone(make, parameters, 0, False)(inputs.clone())
        assert (stack(one, inputs)[0] - expected).abs().max() < 1e-12
        assert (stack(one, inputs[None], shared=False)[0] - expected).abs().max() < 1e-12
        assert torch.equal(inputs, given)


def test_a_stack_takes_shared_and_independent_inputs_in_turn():
    make, shape, _ = CASES["MaxPool"]
    stack, parameters = stack_of(make)
    inputs = torch.randn(ITEMS, *shape, dtype=torch.float64)
    apart = inputs.expand(NETWORKS, -1, -1, -1, -1)
    for _ in range(2):
        assert (stack(parameters, inputs) - stack(parameters, apart, shared=False)).abs().max() < 1e-12


def test_buffers_outside_theta_survive_scoring():
    """They follow the parameters' type, and may be trained with after having been scored with."""
    stack, parameters = stack_of(Centred)
    with torch.inference_mode():
        stack({name: value.float() for name, value in parameters.items()}, torch.randn(ITEMS, 6))
        stack(parameters, torch.randn(ITEMS, 6, dtype=torch.float64))
    outputs = stack(parameters, torch.randn(ITEMS, 6, dtype=torch.float64), training=True)
    torch.autograd.grad(outputs.sum(), list(parameters.values()))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(0.1), r"layer '1' \(Dropout\): runs would depend on ambient randomness; leave it out"),
        (nn.Sequential(nn.Identity(), nn.AlphaDropout(0.2)), r"layer '1\.1' \(AlphaDropout\): runs would depend"),
        (nn.RReLU(), r"layer '1' \(RReLU\): runs would depend"),
        (
            nn.BatchNorm1d(5, momentum=None),
            r"layer '1' \(BatchNorm1d\): theta does not hold all of its statistics; give",
        ),
        (nn.BatchNorm1d(5, track_running_stats=False), r"layer '1' \(BatchNorm1d\): theta does not hold"),
    ],
)
def test_layers_that_theta_and_minibatches_do_not_determine_are_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        Stack(nn.Sequential(nn.Linear(6, 5), layer, nn.Linear(5, 3)))


def test_widest_layer():
    for network, shape, expected in (
        (nn.Sequential(nn.Linear(784, 10), nn.ReLU(), nn.Linear(10, 12)), (784,), 12),
        (nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(4096, 10)), (3, 32, 32), 4096),
        (Centred(), (6,), 3),
    ):
        assert Stack(network).widest(torch.zeros(1, *shape, dtype=torch.float64)) == expected


def test_frozen_parameters_are_not_trainable():
    network = twice()
    network[2].requires_grad_(False)
    assert Stack(network).trainable == ("0.weight", "0.bias", "4.weight", "4.bias")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 2e-15)])
def test_selu_by_exp2_is_selu(dtype, tolerance):
    x = torch.linspace(-20, 5, 1001, dtype=dtype).requires_grad_()
    network = Stack(nn.Sequential(nn.Linear(1, 1), nn.SELU()))  # the identity first
    parameters = {"0.weight": torch.ones(1, 1, 1, dtype=dtype), "0.bias": torch.zeros(1, 1, dtype=dtype)}
    found, expected = network(parameters, x[None, :, None], shared=False)[0, :, 0], nn.functional.selu(x)
    assert network.batched
    assert (found - expected).abs().max() <= tolerance
    gradients = [torch.autograd.grad(values.sum(), x)[0] for values in (found, expected)]
    assert (gradients[0] - gradients[1]).abs().max() <= tolerance
