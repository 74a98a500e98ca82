"""Derived symmetry: permuted networks compute the same in float64, and unknown layers are refused by name."""

import contextlib
import itertools
import math
import random

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from triptych_gpt.symmetry.derivation import Residual, derive
from triptych_gpt.symmetry.spec import Axis, PermutationSpec, check_invariance, forward_of

IMAGE = (3, 8, 8)


def mlp(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.SELU())]
    return nn.Sequential(*layers[:-1])


def residual_mlp() -> nn.Sequential:
    def body() -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))

    return nn.Sequential(
        nn.Linear(5, 6), Residual(body()), Residual(nn.Sequential(Residual(body()), nn.Tanh())), nn.Linear(6, 3)
    )


def residual_conv() -> nn.Sequential:
    def body() -> nn.Sequential:
        first = [nn.Conv2d(6, 9, 3, padding=1, bias=False), nn.BatchNorm2d(9), nn.ReLU(inplace=True)]
        return nn.Sequential(*first, nn.Conv2d(9, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))

    stem = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)]
    return nn.Sequential(
        *stem, Residual(body()), nn.ReLU(), Residual(body()), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 4)
    )


def gap_cnn() -> nn.Sequential:
    convolutions = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(16, 32, 3, bias=False), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def depthwise() -> nn.Sequential:
    separable = [nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 5, 1)]
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU6(), *separable, nn.Flatten(), nn.Linear(80, 4))


FOUND = {  # network, shape of an input, sizes of its groups
    "mlp one hidden": (mlp(5, 7, 3), (5,), {"0": 7}),
    "mlp three hidden": (mlp(5, 7, 6, 4, 3), (5,), {"0": 7, "2": 6, "4": 4}),
    "mlp of mnist": (mlp(784, 10, 10), (784,), {"0": 10}),
    "linear": (nn.Sequential(nn.Linear(5, 3)), (5,), {}),
    "flattened image": (nn.Sequential(nn.Flatten(), mlp(192, 7, 3)), IMAGE, {"1.0": 7}),
    "normalised input": (nn.Sequential(nn.BatchNorm1d(5), nn.LayerNorm(5), mlp(5, 7, 3)), (5,), {"2.0": 7}),
    "trailing activations": (nn.Sequential(mlp(5, 7, 3), nn.Tanh(), nn.LogSoftmax(1)), (5,), {"0.0": 7}),
    "batch norm": (nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)), (5,), {"0": 7}),
    "without affine": (
        nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7, affine=False), nn.Linear(7, 3)), (5,), {"0": 7}
    ),
    "layer norm": (
        nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.RMSNorm(7), nn.Linear(7, 3)), (5,), {"0": 7}
    ),
    "prelu": (nn.Sequential(nn.Linear(5, 7), nn.PReLU(7), nn.PReLU(), nn.Linear(7, 3)), (5,), {"0": 7}),
    "softmax inside": (nn.Sequential(nn.Linear(5, 7), nn.Softmax(-1), nn.Linear(7, 3)), (5,), {"0": 7}),
    "gap cnn": (gap_cnn(), IMAGE, {"0": 16, "2": 32}),
    "conv flatten linear": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), mlp(54, 7, 2)), IMAGE, {"0": 6, "4.0": 7}
    ),
    "norms of a flattened map": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.BatchNorm1d(216), nn.PReLU(216), nn.LayerNorm(216), nn.Linear(216, 2)),
        IMAGE,
        {"0": 6},
    ),
    "norms of a map": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(1, 6), nn.PReLU(6), nn.InstanceNorm2d(6, affine=True),
                      nn.LayerNorm((6, 6, 6)), nn.Conv2d(6, 2, 6), nn.Flatten()),
        IMAGE,
        {"0": 6},
    ),
    "output is a map": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)), IMAGE, {"0": 6}),
    "conv1d": (
        nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(18, 2)), (3, 8), {"0": 6}
    ),
    "conv3d": (nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(108, 2)), (2, 4, 4, 4), {"0": 4}),
    "transposed": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3)), IMAGE,
        {"0": 6, "1": 4},
    ),
    "depthwise": (depthwise(), IMAGE, {"0": 6, "5": 5}),
    "depthwise twice": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=4), nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 2, 8)),
        IMAGE,
        {"0": 4},
    ),
    "depthwise input": (nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1)), IMAGE, {"1": 4}),
    "grouped": (
        nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 1, groups=4), nn.Flatten(), nn.Linear(288, 2)), IMAGE, {"0": 4}
    ),
    "grouped twice": (
        nn.Sequential(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 1, groups=4), nn.Conv2d(24, 12, 1, groups=6), nn.Conv2d(12, 2, 1)),
        IMAGE,
        {"0": 2},
    ),
    "transposed and grouped": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1)), IMAGE, {"0": 4}
    ),
    "residual mlp": (residual_mlp(), (5,), {"0": 6, "1.body.2": 9, "2.body.0.body.2": 9}),
    "residual conv": (residual_conv(), IMAGE, {"0": 6, "2.body.0": 9, "4.body.0": 9}),
    "residual at the input": (nn.Sequential(Residual(mlp(5, 7, 5)), mlp(5, 6, 3)), (5,), {"0.body.0": 7, "1.0": 6}),
    "residual at the output": (nn.Sequential(nn.Linear(5, 3), Residual(mlp(3, 7, 3))), (5,), {"1.body.0": 7}),
    "residual without parameters": (nn.Sequential(nn.Linear(5, 7), Residual(nn.ReLU()), nn.Linear(7, 3)), (5,), {"0": 7}),
    "residual of a flattened map": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), Residual(mlp(216, 5, 216)), nn.Linear(216, 2)), IMAGE,
        {"0": 6, "2.body.0": 5},
    ),
    "shared activation": ((lambda act: nn.Sequential(nn.Linear(5, 7), act, act, nn.Linear(7, 3)))(nn.Tanh()), (5,), {"0": 7}),
}  # fmt: skip


def random_thetas(spec: PermutationSpec, n: int) -> Tensor:
    """Every entry random, running variances positive."""
    thetas = torch.randn(n, spec.layout.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, span in spec.layout.spans.items():
        if name.endswith("running_var"):
            thetas[:, span] = thetas[:, span].abs() + 0.1
        elif len(spec.layout.shapes[name]) > 1:
            thetas[:, span] *= (spec.layout.shapes[name][0] / (span.stop - span.start)) ** 0.5
    return thetas


def random_inputs(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", FOUND)
def test_permuted_networks_compute_the_same(name):
    network, shape, groups = FOUND[name]
    spec = derive(network)
    assert spec.groups == groups
    thetas = random_thetas(spec, 3)
    assert check_invariance(forward_of(network), spec, thetas, random_inputs(shape)) < 1e-12
    moved = spec.apply(thetas, spec.draw(0, range(3)))
    assert (moved != thetas).any() == bool(groups)


@pytest.mark.parametrize("name", [name for name, (_, _, groups) in FOUND.items() if groups])
def test_half_a_permutation_changes_the_function(name):
    """Freeing any one parameter from any one group shows, so a sound spec is not sound because nothing can be seen."""
    network, shape, _ = FOUND[name]
    spec, forward = derive(network), forward_of(FOUND[name][0])
    thetas, inputs = random_thetas(spec, 2), random_inputs(shape)
    assert forward(thetas[0], inputs).abs().max() > 1e-3
    for parameter, axes in spec.axes.items():
        for dim, axis in enumerate(axes):
            if axis is not None:
                wrong = {**spec.axes, parameter: (*axes[:dim], None, *axes[dim + 1 :])}
                assert check_invariance(forward, PermutationSpec(spec.layout, wrong), thetas, inputs) > 1e-7, parameter


def random_layer(x: Tensor, choose: random.Random) -> nn.Module:
    """A layer that may or may not suit these activations, fitting or mixing their channels."""
    channels, last, out = x.shape[1], x.shape[-1], choose.choice([2, 4, 6])
    dims = choose.choice([1, 2])

    def layer(kind: str, *args: int, **options: int) -> nn.Module:
        return getattr(nn, f"{kind}{dims}d")(*args, **options)

    groups = math.gcd(channels, choose.choice([1, 1, 2, 3, 12]))
    return choose.choice([
        lambda: nn.Linear(last, out), lambda: nn.Linear(last, out), lambda: nn.Flatten(choose.choice([1, 1, 2])),
        lambda: layer("Conv", channels, groups * choose.choice([1, 2, 3]), 2, groups=groups),
        lambda: layer("Conv", channels, out, 1),
        lambda: layer("ConvTranspose", channels, 2 * groups, 2, groups=groups),
        lambda: layer("BatchNorm", channels), lambda: layer("InstanceNorm", channels, affine=True),
        lambda: layer("MaxPool", 2), lambda: layer("AvgPool", 2), lambda: layer("AdaptiveAvgPool", 1),
        lambda: nn.LayerNorm(choose.choice([tuple(x.shape[1:]), last])), lambda: nn.RMSNorm(tuple(x.shape[1:])),
        lambda: nn.GroupNorm(choose.choice([1, groups]), channels), lambda: nn.PReLU(channels), lambda: nn.Softmax(-1),
        lambda: Residual(random_network(x, choose, choose.randint(0, 3))),
    ])()  # fmt: skip


def random_network(x: Tensor, choose: random.Random, depth: int) -> nn.Sequential:
    """Layers that run one after another on x, but need not be ones whose symmetry is known."""
    layers = []
    while len(layers) < depth:
        layer = random_layer(x, choose).double().eval()
        with contextlib.suppress(RuntimeError, ValueError, IndexError):  # one that does not fit
            x = layer(x).detach()
            layers.append(layer)
    return nn.Sequential(*layers)


@pytest.mark.filterwarnings("ignore")
def test_permuted_random_networks_compute_the_same():
    accepted = 0
    for seed in range(400):
        choose = random.Random(seed)
        first, shape = choose.choice(
            [(nn.Linear(6, 4), (6,)), (nn.Conv1d(3, 6, 1), (3, 8)), (nn.Conv2d(2, 6, 1), (2, 6, 6))]
        )
        inputs = random_inputs(shape)
        network = nn.Sequential(first, random_network(first.double()(inputs).detach(), choose, choose.randint(1, 6)))
        try:
            spec = derive(network)
        except ValueError:
            continue
        change = check_invariance(forward_of(network), spec, random_thetas(spec, 2), inputs)
        assert change < 1e-9, f"{seed}: {network}"
        accepted += bool(spec.groups)
    assert accepted > 30


def test_running_statistics_take_part():
    network, _, _ = FOUND["batch norm"]
    spec = derive(network)
    assert {spec.axes[f"1.{name}"] for name in ("weight", "bias", "running_mean", "running_var")} == {(Axis("0"),)}


def test_blocks_of_a_flattened_map_are_its_channels():
    spec = derive(FOUND["conv flatten linear"][0])
    assert spec.axes["4.0.weight"] == (Axis("4.0"), Axis("0", 9))
    residual = derive(FOUND["residual of a flattened map"][0])
    assert residual.axes["2.body.2.weight"] == (Axis("0", 36), Axis("2.body.0"))


def test_the_derived_symmetry_of_an_mlp_is_the_one_written_by_hand():
    hidden = Axis("0")
    spec = derive(mlp(784, 10, 10))
    axes = {"0.weight": (hidden, None), "0.bias": (hidden,), "2.weight": (None, hidden), "2.bias": (None,)}
    assert spec == PermutationSpec(spec.layout, axes)


def test_parameters_beside_the_layers_are_fixed():
    policy = mlp(4, 32, 32, 1)
    policy.log_std = nn.Parameter(torch.zeros(1))
    spec = derive(policy)
    assert spec.layout.size == 1250
    assert spec.axes["log_std"] == (None,)
    assert spec.groups == {"0": 32, "2": 32}


def test_residual_adds():
    body = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    assert torch.equal(functional_call(Residual(body), {}, (x,)), x + body(x))


class Summing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(1)


class Biased(nn.Tanh):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(7))


REFUSED = {
    "attention": ([nn.Linear(5, 7), nn.TransformerEncoderLayer(7, 1)], r"layer 1 \(TransformerEncoderLayer\): not a layer"),
    "glu": ([nn.Linear(5, 8), nn.Sequential(nn.GLU(), nn.Linear(4, 2))], r"layer 1\.0 \(GLU\)"),
    "forward of its own": ([nn.Linear(5, 7), Summing(7, 7), nn.Linear(7, 2)], r"layer 1 \(Summing\): not a layer"),
    "parameter of its own": ([nn.Linear(5, 7), Biased(), nn.Linear(7, 2)], r"layer 1 \(Biased\): its parameter offset"),
    "weight norm": (
        [parametrizations.weight_norm(nn.Linear(5, 7)), nn.Linear(7, 2)], r"layer 0 .*its parameter parametrizations"
    ),
    "groups of channels": ([nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)], r"layer 1 \(GroupNorm\): its 2 groups"),
    "no flatten": ([nn.Conv2d(3, 6, 3), nn.Linear(6, 2)], r"layer 1 \(Linear\): .*Flatten may be missing"),
    "pooling over units": ([nn.Linear(5, 8), nn.MaxPool1d(2), nn.Linear(4, 2)], r"layer 1 \(MaxPool1d\): does not act"),
    "indices": ([nn.Conv2d(3, 6, 3), nn.MaxPool2d(2, return_indices=True)], r"layer 1 \(MaxPool2d\): returns indices"),
    "no multiple": ([nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(64, 2)], r"layer 2 \(Linear\): .*no multiple of the 6"),
    "wrong width": ([nn.Linear(5, 7), nn.Linear(8, 2)], r"layer 1 \(Linear\): takes 8 channels, but gets 7"),
    "part of a map": ([nn.Conv2d(3, 6, 3), nn.Flatten(2), nn.Linear(36, 2)], r"layer 1 \(Flatten\)"),
    "norm of a row": ([nn.Conv2d(3, 6, 3), nn.LayerNorm(6)], r"layer 1 \(LayerNorm\): normalises 1 of 3"),
    "unflatten": ([nn.Linear(5, 8), nn.Unflatten(1, (2, 4))], r"layer 1 \(Unflatten\)"),
    "broadcast": ([nn.Linear(5, 8), Residual(nn.Linear(8, 1))], r"layer 1 \(Residual\): takes 1 channels, but gets 8"),
    "residual flattens": (
        [nn.Conv2d(3, 6, 3), Residual(nn.Flatten())], r"layer 1 \(Residual\): its body turns 2 spatial dimensions into 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_layers_are_refused_by_name(name):
    layers, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        derive(nn.Sequential(*layers))
    assert "\n" not in str(caught.value)
    assert "by hand" in str(caught.value)


def test_a_layer_used_twice_is_refused_without_inputs_to_trace_it_on():
    layer = nn.Linear(7, 7)
    with pytest.raises(
        ValueError, match=r"holds a tensor twice \(2\.weight and 1\.weight\); give derive a batch of inputs"
    ):
        derive(nn.Sequential(nn.Linear(5, 7), layer, layer, nn.Linear(7, 2)))


def test_a_network_with_a_forward_of_its_own_is_refused():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(5, 7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    with pytest.raises(ValueError, match=r"layer \(the network itself\) \(Net\): not a layer"):
        derive(Net())
