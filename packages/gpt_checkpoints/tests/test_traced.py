"""Symmetry of traced networks: permuted networks compute the same in float64, whatever their forward pass is made of."""

import random
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import (
    ConvNeXt,
    DenseNet,
    MobileNetV2,
    MobileNetV3,
    ResNet,
    ShuffleNetV2,
    SwinTransformer,
    VisionTransformer,
)
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.symmetry.derivation import derive
from triptych_gpt.symmetry.matching import canonicalise
from triptych_gpt.symmetry.spec import Axis, Blocks, PermutationSpec, check_invariance, forward_of
from triptych_gpt.symmetry.traced import SymmetryWarning, trace

IMAGE = (3, 8, 8)
FUZZED = 20


def net(forward: Callable[..., Tensor], **layers: nn.Module) -> nn.Module:
    """A module of its own class, whose forward pass is `forward(self, x)`."""
    module = type("Own", (nn.Module,), {"forward": forward})()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


def fc() -> nn.Module:
    return net(lambda s, x: s.fc2(F.relu(s.fc1(x))), fc1=nn.Linear(5, 7), fc2=nn.Linear(7, 3))


def vgg() -> nn.Module:
    features = make_layers([6, "M", 8, "M"], batch_norm=True)
    return net(lambda s, x: s.head(torch.flatten(s.features(x), 1)), features=features, head=nn.Linear(32, 3))


def unet() -> nn.Module:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        down = F.silu(s.norm(s.down(x)))
        up = F.silu(s.up(F.max_pool2d(down, 2)))
        return s.out(torch.cat([F.interpolate(up, scale_factor=1.0), F.pad(down, (0, 0, 0, 0)), x], 1))

    return net(
        forward, down=nn.Conv2d(3, 6, 3, padding=1), norm=nn.GroupNorm(2, 6), up=nn.ConvTranspose2d(6, 4, 2, 2),
        out=nn.Conv2d(13, 2, 1),
    )  # fmt: skip


def grouped() -> nn.Module:
    layers = [nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 1, groups=4), nn.ReLU(), nn.InstanceNorm2d(8, affine=True)]
    layers = [layers[0], nn.ReLU(), *layers[1:], nn.Conv2d(8, 8, 3, groups=8)]
    return net(lambda s, x: s.layers(x).mean((2, 3)), layers=nn.Sequential(*layers, nn.Conv2d(8, 2, 1)))


def recurrent(kind: str, **options: int | bool) -> nn.Module:
    width = 6 * (1 + options.get("bidirectional", False))
    rnn = getattr(nn, kind)(4, 6, batch_first=True, **options)
    return net(lambda s, x: s.out(s.rnn(x)[0][:, -1]), rnn=rnn, out=nn.Linear(width, 2))


def cells() -> nn.Module:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 6)
        for t in range(x.shape[1]):
            h, c = s.cell(x[:, t], (h, c))
        return s.out(h)

    return net(forward, cell=nn.LSTMCell(4, 6), out=nn.Linear(6, 2))


def written_gates() -> nn.Module:
    """A gated recurrence of one's own, whose state is changed in place."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 6, dtype=x.dtype)
        for step in x.unbind(1):
            keep, new = (s.on_x(step) + s.on_h(h)).chunk(2, -1)
            h.mul_(keep.sigmoid()).add_(new.tanh())
        return s.out(h)

    return net(forward, on_x=nn.Linear(4, 12), on_h=nn.Linear(6, 12, bias=False), out=nn.Linear(6, 2))


def packed_attention() -> nn.Module:
    """Heads as most people write them: one layer for queries, keys and values."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.embed(x)
        q, k, v = s.qkv(s.norm(x)).reshape(*x.shape[:2], 3, 2, 5).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / 5**0.5).softmax(-1)
        return s.head((x + s.proj((weights @ v).transpose(1, 2).flatten(2))).mean(1))

    layers = {"embed": nn.Linear(4, 6), "norm": nn.LayerNorm(6), "qkv": nn.Linear(6, 30), "proj": nn.Linear(10, 6)}
    return net(forward, **layers, head=nn.Linear(6, 3))


def language_model() -> nn.Module:
    """Causal attention over embeddings, which are the output layer's weights, too."""

    def forward(s: nn.Module, tokens: Tensor) -> Tensor:
        x = s.tokens(tokens) + s.places(torch.arange(tokens.shape[1]))
        q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in s.qkv(x).split(6, -1))
        x = x + s.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return s.head(x + s.down(F.gelu(s.up(x))))

    module = net(
        forward, tokens=nn.Embedding(7, 6), places=nn.Embedding(5, 6), qkv=nn.Linear(6, 18), proj=nn.Linear(6, 6),
        up=nn.Linear(6, 9), down=nn.Linear(9, 6), head=nn.Linear(6, 7, bias=False),
    )  # fmt: skip
    module.head.weight = module.tokens.weight
    return module


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return net(
        lambda s, x: s.head(s.body(s.embed(x))[:, 0]), embed=nn.Linear(4, 8), body=nn.TransformerEncoder(layer, 2),
        head=nn.Linear(8, 3),
    )  # fmt: skip


def gated() -> nn.Module:
    return net(
        lambda s, x: s.out(F.glu(s.a(x)) * s.b(x).sigmoid()), a=nn.Linear(5, 14), b=nn.Linear(5, 7), out=nn.Linear(7, 3)
    )


def mixer() -> nn.Module:
    """Tokens and channels mixed in turn, with a weight used twice."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + s.back(F.gelu(s.tokens(x.mT))).mT
            x = x + s.down(F.gelu(s.up(F.rms_norm(x, (4,)))))
        return x.mean(1)

    return net(forward, tokens=nn.Linear(6, 9), back=nn.Linear(9, 6), up=nn.Linear(4, 7), down=nn.Linear(7, 4))


SEQUENCE = (6, 4)
HEADS = {"qkv": 2, "qkv:2": 5, "qkv:3": 5}
GROUPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int] | int]] = {  # or how many groups
    "fc1, relu, fc2": (fc, (5,), {"fc1": 7}),
    "vgg with batch norm": (vgg, IMAGE, {"features.0": 6, "features.4": 8}),
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], 3, width_per_group=64), (3, 17, 17), 8),
    "mobilenet v2": (
        lambda: MobileNetV2(3, 0.25, [[1, 8, 1, 1], [6, 8, 2, 2]], dropout=0.0), (3, 16, 16), 5
    ),
    "mobilenet v3": (
        lambda: MobileNetV3([InvertedResidualConfig(8, 3, 16, 8, True, "HS", 1, 1, 0.5)], 16, 3, dropout=0.0), (3, 16, 16), 4
    ),
    "densenet": (lambda: DenseNet(4, (2, 2), 8, 2, num_classes=3), (3, 32, 32), 10),
    "shufflenet": (lambda: ShuffleNetV2([1, 1, 1], [8, 8, 16, 16, 16], num_classes=3), (3, 32, 32), None),
    "convnext": (lambda: ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=3), (3, 16, 16), 4),
    "vision transformer": (lambda: VisionTransformer(8, 4, 2, 2, 8, 12, num_classes=3), IMAGE, 9),
    "swin": (lambda: SwinTransformer([2, 2], 8, [2], [2], [2, 2], stochastic_depth_prob=0.0, num_classes=3), (3, 8, 8), None),
    "unet": (unet, IMAGE, {"down": 2, "down:2": 3, "up": 4}),
    "groups of convolutions": (
        grouped, IMAGE, {"layers.0": 4, "layers.0:2": 3, "layers.2": 2}
    ),
    "gru": (lambda: recurrent("GRU"), SEQUENCE, {"rnn": 6}),
    "lstm both ways, twice": (
        lambda: recurrent("LSTM", bidirectional=True, num_layers=2), SEQUENCE, {"rnn": 6, "rnn:2": 6, "rnn:3": 6, "rnn:4": 6}
    ),
    "rnn": (lambda: recurrent("RNN"), SEQUENCE, {"rnn": 6}),
    "cells": (cells, SEQUENCE, {"cell": 6}),
    "written gates": (written_gates, SEQUENCE, {"on_x": 6}),
    "packed attention": (packed_attention, SEQUENCE, {"embed": 6, **HEADS}),
    "language model": (language_model, (5,), {"tokens": 6, "qkv": 2, "qkv:2": 3, "qkv:3": 3, "up": 9}),
    "encoder layers": (encoder, SEQUENCE, 9),
    "glu": (gated, (5,), {"a": 7}),
    "mixer": (mixer, SEQUENCE, {"tokens": 9, "up": 7}),
}  # fmt: skip


def inputs_of(shape: tuple[int, ...], *, tokens: bool = False) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(7, (3, *shape), generator=rng) if tokens else torch.randn(3, *shape, generator=rng).double()


def thetas_of(network: nn.Module, n: int) -> Tensor:
    """Networks as they are initialised, with norms, biases and running statistics at random, too."""
    layout, rng = ParameterLayout.of(network), torch.Generator().manual_seed(0)
    theta = layout.flatten(network.state_dict()).double().repeat(n, 1)
    noise = 0.3 * torch.rand(theta.shape, generator=rng, dtype=torch.float64)
    for name, span in layout.spans.items():
        fan_in = (span.stop - span.start) / layout.shapes[name][0] if len(layout.shapes[name]) > 1 else 1
        theta[:, span] += noise[:, span] / fan_in**0.5
    return theta


@pytest.mark.parametrize("name", GROUPS)
def test_permuted_networks_compute_the_same(name):
    build, shape, groups = GROUPS[name]
    torch.manual_seed(0)
    network = build().eval()
    inputs = inputs_of(shape, tokens=name == "language model")
    with warnings.catch_warnings():
        warnings.simplefilter("error" if groups is not None else "ignore")
        spec = trace(network, inputs)
    if isinstance(groups, dict):
        assert spec.groups == groups
    elif groups is not None:
        assert len(spec.groups) == groups, spec.groups
    thetas, forward = thetas_of(network, 3), forward_of(network)
    assert forward(thetas[0], inputs).std() > 1e-4
    assert check_invariance(forward, spec, thetas, inputs) < 1e-10
    if spec.groups:
        assert (spec.apply(thetas, spec.draw(0, range(3))) != thetas).any()
    assert PermutationSpec.from_json(spec.to_json()) == spec


SHOWN = ["fc1, relu, fc2", "groups of convolutions", "gru", "packed attention", "language model", "glu"]


@pytest.mark.parametrize("name", SHOWN)
def test_half_a_permutation_changes_the_function(name):
    """Leaving any one parameter out of any one group shows, so what is found is not sound because nothing can be seen."""
    build, shape, _ = GROUPS[name]
    torch.manual_seed(0)
    network = build().eval()
    inputs = inputs_of(shape, tokens=name == "language model")
    spec, forward, thetas = trace(network, inputs), forward_of(network), thetas_of(network, 2)
    for parameter, axes in spec.axes.items():
        for dim, axis in enumerate(axes):
            if axis is not None:
                wrong = {**spec.axes, parameter: (*axes[:dim], None, *axes[dim + 1 :])}
                # A bias of keys changes no attention weight, in whichever order it is.
                assert check_invariance(forward, PermutationSpec(spec.layout, wrong), thetas, inputs) > 1e-8, (
                    parameter,
                    dim,
                )


def test_axes_are_strided_blocks():
    spec = trace(packed_attention(), inputs_of(SEQUENCE))
    query = (("qkv", 2), ("qkv:2", 5))
    rows = Blocks((query, query, (("qkv", 2), ("qkv:3", 5))))
    assert spec.axes["qkv.weight"] == (rows, Axis("embed"))
    assert spec.axes["proj.weight"] == (Axis("embed"), Blocks(((("qkv", 2), ("qkv:3", 5)),)))
    gates = Blocks((((None, 3), ("rnn", 6)),))
    assert trace(recurrent("GRU"), inputs_of(SEQUENCE)).axes["rnn.weight_hh_l0"] == (gates, Axis("rnn"))
    assert trace(vgg(), inputs_of(IMAGE)).axes["head.weight"] == (None, Axis("features.4", 4))


def test_running_statistics_follow_their_channels():
    spec = trace(vgg(), inputs_of(IMAGE))
    names = ("weight", "bias", "running_mean", "running_var")
    assert {spec.axes[f"features.1.{name}"] for name in names} == {(Axis("features.0"),)}


def test_traced_and_read_sequentials_have_one_symmetry():
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5), nn.Linear(5, 2)
    )
    assert trace(network, inputs_of(IMAGE)) == derive(network)


def test_tied_weights_are_one_parameter():
    network = language_model()
    layout = ParameterLayout.of(network)
    assert layout.tied == {"head.weight": "tokens.weight"}
    assert layout.size == sum(p.numel() for p in network.parameters())
    assert ParameterLayout.from_json(layout.to_json()) == layout
    state = layout.state_dict(layout.flatten(network.state_dict()))
    assert network.load_state_dict(state)
    with pytest.raises(ValueError, match=r"head\.weight: differs from tokens\.weight, which it is tied to"):
        layout.flatten({**state, "head.weight": torch.zeros(7, 6)})
    twice = nn.Linear(7, 7)
    shared = nn.Sequential(nn.Linear(5, 7), twice, nn.ReLU(), twice, nn.Linear(7, 2))
    spec = derive(shared, inputs_of((5,)))
    assert spec.groups == {"0": 7}
    assert check_invariance(forward_of(shared), spec, thetas_of(shared, 2), inputs_of((5,))) < 1e-12


def branching() -> nn.Module:
    return net(lambda s, x: s.b(s.a(x)) if x.sum() > 0 else s.b(s.a(-x)), a=nn.Linear(5, 7), b=nn.Linear(7, 3))


def transformed() -> nn.Module:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        return s.c(F.relu(s.b(torch.fft.rfft(s.a(x)).abs())))

    return net(forward, a=nn.Linear(5, 6), b=nn.Linear(4, 7), c=nn.Linear(7, 3))


def sorted_units() -> nn.Module:
    return net(lambda s, x: s.b(s.a(x).sort(-1).values), a=nn.Linear(5, 7), b=nn.Linear(7, 3))


def partly_written() -> nn.Module:
    """Some of the units are overwritten in place, which concerns every view of them."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        h = s.a(x)
        h[:, :3] = s.b(x)
        return s.c(h)

    return net(forward, a=nn.Linear(5, 7), b=nn.Linear(5, 3), c=nn.Linear(7, 3))


def transposed_in_place() -> nn.Module:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        h = s.a(x)  # [6, 4, 6]
        view = h[:]
        h.transpose_(1, 2)
        return s.b(F.relu(h) @ F.relu(view)).mean(1)

    return net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3))


UNKNOWN = {  # groups, the warning if there is one
    "branching": (branching, (5,), {}, "cannot be traced"),
    "transformed": (transformed, (5,), {"b": 7}, "axes that pass through _fft_r2c are not permuted"),
    "sorted": (sorted_units, (5,), {}, None),
    "partly written": (partly_written, (5,), {"a": 3, "a:2": 4}, None),
    "transposed in place": (transposed_in_place, SEQUENCE, None, None),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_not_permuted(name):
    build, shape, groups, warning = UNKNOWN[name]
    network, inputs = build(), inputs_of(shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spec = trace(network, inputs)
    assert groups is None or spec.groups == groups
    said = [str(each.message) for each in caught if issubclass(each.category, SymmetryWarning)]
    assert len(said) == (warning is not None) or groups is None
    assert warning is None or warning in said[0]
    assert check_invariance(forward_of(network), spec, thetas_of(network, 3), inputs) < 1e-10


def test_a_network_that_does_not_run_is_refused():
    with pytest.raises(
        ValueError, match=r"network Own: cannot be run on a batch \[3, 5\] \(RuntimeError: mat1 and mat2"
    ):
        derive(net(lambda s, x: s.b(s.a(x)), a=nn.Linear(5, 7), b=nn.Linear(8, 3)), torch.randn(3, 5))


class Program(nn.Module):
    """A random sequence of operations on the tensors so far, with layers where they are needed."""

    def __init__(self, seed: int, x: Tensor) -> None:
        super().__init__()
        choose, self.steps = random.Random(seed), []
        values = [x]
        while len(self.steps) < choose.randint(6, 16):
            step = self.step(choose, values)
            try:
                new = step(self, values)
            except (RuntimeError, IndexError, ValueError):  # one that does not fit
                continue
            if 0 < new.numel() < 4000 and new.ndim:
                self.steps.append(step)
                values.append(new.detach())
        self.out = nn.Parameter(torch.randn(values[-1].shape[-1], 3, dtype=torch.float64))

    def step(self, choose: random.Random, values: list[Tensor]) -> Callable[[nn.Module, list[Tensor]], Tensor]:
        i, j = (len(values) - 1 - min(int(choose.expovariate(0.9)), len(values) - 1) for _ in range(2))
        x, size = values[i], choose.choice([2, 3, 4, 6, 8, 12])
        dim, other = choose.randrange(x.ndim), choose.randrange(x.ndim)
        factors = [n for n in (2, 3, 4) if x.shape[dim] % n == 0] or [1]
        count = choose.choice(factors)
        split = [count, x.shape[dim] // count] if choose.random() < 0.5 else [x.shape[dim] // count, count]
        name = f"p{len(self._parameters)}"

        def linear(s: nn.Module, v: list[Tensor]) -> Tensor:
            if name not in s._parameters:
                s.register_parameter(
                    name, nn.Parameter(torch.randn(x.shape[-1], size, dtype=torch.float64) / x.shape[-1])
                )
            return v[i] @ getattr(s, name)

        def biased(s: nn.Module, v: list[Tensor]) -> Tensor:
            if name not in s._parameters:
                s.register_parameter(name, nn.Parameter(torch.randn(x.shape[dim:], dtype=torch.float64)))
            return v[i] * getattr(s, name)

        def written(s: nn.Module, v: list[Tensor]) -> Tensor:
            y = v[i] + 0
            y.narrow(dim, 0, min(2, y.shape[dim])).copy_(v[j].narrow(dim, 0, min(2, y.shape[dim])))
            return y

        return choose.choice([
            linear, linear, linear, biased, written,
            lambda _, v: v[i].tanh(), lambda _, v: v[i] + v[j], lambda _, v: v[i] * v[j].sigmoid(),
            lambda _, v: v[i].softmax(dim),
            lambda _, v: v[i].transpose(dim, other), lambda _, v: v[i].unflatten(dim, split),
            lambda _, v: v[i].unflatten(dim, split),
            lambda _, v: v[i].flatten(min(dim, other), max(dim, other)), lambda _, v: v[i].sum(dim),
            lambda _, v: v[i].mean(dim, True),
            lambda _, v: torch.cat([v[i], v[j]], dim), lambda _, v: torch.stack([v[i], v[j]], dim),
            lambda _, v: v[i].chunk(count, dim)[-1], lambda _, v: v[i].select(dim, 0), lambda _, v: v[i].unbind(dim)[-1],
            lambda _, v: v[i] @ v[j].mT, lambda _, v: v[i].unsqueeze(dim), lambda _, v: v[i].reshape(*x.shape[:-1], -1, count),
            lambda _, v: F.layer_norm(v[i], v[i].shape[dim:]), lambda _, v: v[i].cumsum(dim), lambda _, v: v[i].flip(dim),
            lambda _, v: F.scaled_dot_product_attention(v[i], v[j], v[j]), lambda _, v: v[i].amax(dim),
            lambda _, v: F.glu(v[i], dim),
            lambda _, v: torch.zeros_like(v[i]).add_(v[j]), lambda _, v: v[i].narrow(dim, 1, 2),
            lambda _, v: v[i].expand(2, *x.shape),
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(step(self, values))
        return values[-1] @ self.out


@pytest.mark.filterwarnings("ignore")
def test_permuted_random_programs_compute_the_same():
    found = 0
    for seed in range(FUZZED):
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        torch.manual_seed(seed)
        program = Program(seed, x)
        spec = trace(program, x)
        thetas = ParameterLayout.of(program).flatten(program.state_dict()).repeat(3, 1)
        outputs = program(x)
        change = check_invariance(forward_of(program), spec, thetas, x)
        assert change < 1e-10 * max(1.0, outputs.abs().max().item()), seed
        found += bool(spec.groups)
    assert found > FUZZED // 5


def test_matching_undoes_permutations_of_heads_and_gates():
    for network, inputs in ((packed_attention(), inputs_of(SEQUENCE)), (recurrent("LSTM"), inputs_of(SEQUENCE))):
        spec = trace(network, inputs)
        theta = torch.randn(1, spec.layout.size, generator=torch.Generator().manual_seed(0)).double()
        permuted = spec.apply(theta, spec.draw(0, [3]))
        back = canonicalise(spec, permuted, theta[0])
        assert (back - theta).norm() <= (permuted - theta).norm()
        forward = forward_of(network)
        torch.testing.assert_close(forward(back[0], inputs), forward(theta[0], inputs), rtol=0, atol=1e-10)
