"""The permutation symmetry of a network of known layers, derived by walking through it.

The walk tracks what may be permuted in the current activations: their channel axis, dimension 1 of [batch, channels, *spatial] and
of [batch, features]. Every Linear and convolution starts a new group of units; layers that add or multiply two axes tie their
groups; the network's inputs and outputs are fixed, and so is everything tied to them. To leave an axis fixed is always sound: a
coarser symmetry than the finest is no error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor, nn

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.symmetry.spec import Axis, PermutationSpec


class Residual(nn.Module):
    """x + body(x). The units of body's output are those of x, the residual stream, and share their permutation."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def derive(network: nn.Module, inputs: Tensor | None = None) -> PermutationSpec:
    """The permutation symmetry of a network between fixed inputs and outputs.

    An nn.Sequential, nested or not, is read layer by layer. Known are Linear, (transposed) convolutions, batch, instance, layer and
    RMS normalisation, GroupNorm of one group, elementwise activations, softmax, PReLU, pooling, Flatten, dropout, Identity and
    `Residual`. Groups are named after the layer that first produces them.
    Inputs are [batch, features] or [batch, channels, *spatial].
    Any other network is traced on `inputs`, a batch of which only shape and type matter: see `triptych_gpt.symmetry.traced`.

    Raises ValueError naming the first layer that is not known if there are no inputs to trace the network on.
    """
    layout = ParameterLayout.of(network)
    walk = _Walk(layout)
    try:
        if layout.tied:
            _refuse("", network, f"holds a tensor twice ({' and '.join(next(iter(layout.tied.items())))})")
        walk.fix(walk.visit(network, "", _Value()).node)
    except ValueError:
        if inputs is None:
            raise
        from triptych_gpt.symmetry.traced import trace  # imports torch's tracing, which takes a second

        return trace(network, inputs)
    return PermutationSpec(layout, {name: walk.resolve(name) for name in layout.names})


@dataclass(frozen=True)
class _Value:
    """What is known of activations [batch, length, *spatial]."""

    node: int | None = None  # whose units the channel axis consists of; None: fixed
    # Unknown after a Flatten, too, until a layer fixes it: each unit then covers length / units entries.
    length: int | None = None
    rank: int | None = None  # number of spatial dimensions


class _Walk:
    """Groups of units as a union-find, and the axes of the parameters passed so far.

    A node is a set of units that some axis consists of. Nodes tied together have one root, and as many units as divide both.
    """

    def __init__(self, layout: ParameterLayout) -> None:
        self.layout = layout
        self.names: list[str] = []
        self.units: list[int] = []  # valid at roots
        self.parents: list[int] = []
        self.fixed: set[int] = set()  # valid at roots
        self.axes: dict[str, tuple[int | None, ...]] = {}

    def new(self, name: str, units: int) -> int:
        self.names.append(name)
        self.units.append(units)
        self.parents.append(len(self.parents))
        return len(self.parents) - 1

    def root(self, node: int) -> int:
        while self.parents[node] != node:
            node = self.parents[node]
        return node

    def fix(self, node: int | None) -> None:
        if node is not None:
            self.fixed.add(self.root(node))

    def tie(self, a: int | None, b: int | None) -> None:
        if a is None or b is None:
            self.fix(a)
            self.fix(b)
            return
        first, second = sorted((self.root(a), self.root(b)))  # the earlier one gives the name
        self.parents[second] = first
        self.units[first] = math.gcd(self.units[first], self.units[second])
        if second in self.fixed:
            self.fixed.add(first)

    def resolve(self, name: str) -> tuple[Axis | None, ...]:
        """A parameter's axes, now that all ties are known."""
        return tuple(map(self._axis, self.axes[name], self.layout.shapes[name]))

    def _axis(self, node: int | None, length: int) -> Axis | None:
        root = None if node is None else self.root(node)
        return None if root is None or root in self.fixed else Axis(self.names[root], length // self.units[root])

    def visit(self, module: nn.Module, name: str, value: _Value) -> _Value:
        """The activations after a module; notes the axes of its parameters."""
        # A subclass with its own forward may compute anything, so only unmodified layers are known.
        kind = next((base for base in type(module).__mro__ if base in _RULES), None)
        if kind is None or getattr(module.forward, "__func__", None) is not kind.forward:
            _refuse(name, module, "not a layer whose symmetry is known")
        value = _RULES[kind](self, module, name, value)
        for own, tensor in module.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and join(name, own) not in self.axes:
                _refuse(name, module, f"its parameter {own} is none that this layer usually has")
        return value

    def note(self, name: str, module: nn.Module, **axes: tuple[int | None, ...]) -> None:
        """Note the axes of those of these parameters that the module has."""
        mine = module.state_dict()
        self.axes |= {join(name, own): nodes for own, nodes in axes.items() if own in mine}

    def ranked(self, name: str, module: nn.Module, value: _Value, *ranks: int) -> _Value:
        """The value for a layer that acts on channels of this many spatial dimensions, one of `ranks`."""
        if value.rank is None:
            return replace(value, rank=ranks[0]) if len(ranks) == 1 else value
        if value.rank not in ranks:
            shape = ", ".join(["batch", "channels", *["spatial"] * value.rank])
            _refuse(name, module, f"does not act on the channels of its input [{shape}] (a Flatten may be missing)")
        return value

    def sized(self, name: str, module: nn.Module, value: _Value, length: int) -> _Value:
        """The value for a layer that takes this number of channels."""
        if value.length not in (None, length):
            _refuse(name, module, f"takes {length} channels, but gets {value.length}")
        units = 1 if value.node is None else self.units[self.root(value.node)]
        if length % units:
            _refuse(name, module, f"takes {length} features, no multiple of the {units} channels flattened before it")
        return replace(value, length=length)


def _elementwise(walk: _Walk, module: nn.Module, name: str, value: _Value) -> _Value:
    return value


def _sequential(walk: _Walk, module: nn.Sequential, name: str, value: _Value) -> _Value:
    # Parameters of a Sequential's own, such as a policy's log_std, take no part in its forward, and are fixed.
    for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        walk.axes[join(name, own)] = (None,) * tensor.ndim
    for own, child in module._modules.items():  # named_children leaves out what comes twice
        value = walk.visit(child, join(name, own), value)
    return value


def _residual(walk: _Walk, module: Residual, name: str, value: _Value) -> _Value:
    after = walk.visit(module.body, f"{name}.body".lstrip("."), value)
    if value.rank is not None and after.rank != value.rank:
        _refuse(name, module, f"its body turns {value.rank} spatial dimensions into {after.rank}")
    if after.length is not None:
        value = walk.sized(name, module, value, after.length)
    walk.tie(value.node, after.node)
    return replace(value, rank=after.rank)


def _linear(walk: _Walk, module: nn.Linear, name: str, value: _Value) -> _Value:
    value = walk.sized(name, module, walk.ranked(name, module, value, 0), module.in_features)
    node = walk.new(name, module.out_features)
    walk.note(name, module, weight=(node, value.node), bias=(node,))
    return _Value(node, module.out_features, 0)


def _convolution(rank: int, transposed: bool = False) -> "_Rule":
    def rule(walk: _Walk, module: Any, name: str, value: _Value) -> _Value:
        value = walk.sized(name, module, walk.ranked(name, module, value, rank), module.in_channels)
        if module.groups == 1:
            node = walk.new(name, module.out_channels)
            channels = (value.node, node) if transposed else (node, value.node)
        else:  # output group i sees input group i alone, so both move as one; a depthwise layer ties output to input
            node = walk.new(name, module.groups)
            walk.tie(node, value.node)
            channels = (node, None)
        walk.note(name, module, weight=(*channels, *[None] * rank), bias=(node,))
        return _Value(node, module.out_channels, rank)

    return rule


def _channel_norm(*ranks: int) -> "_Rule":
    def rule(walk: _Walk, module: Any, name: str, value: _Value) -> _Value:
        value = walk.sized(name, module, walk.ranked(name, module, value, *ranks), module.num_features)
        channel = (value.node,)
        walk.note(name, module, weight=channel, bias=channel, running_mean=channel, running_var=channel)
        return value

    return rule


def _layer_norm(walk: _Walk, module: nn.LayerNorm | nn.RMSNorm, name: str, value: _Value) -> _Value:
    shape = tuple(module.normalized_shape)
    if value.rank is not None:
        if len(shape) != value.rank + 1:
            _refuse(name, module, f"normalises {len(shape)} of {value.rank + 1} dimensions; let it take all")
        value = walk.sized(name, module, value, shape[0])
    axes = (value.node, *[None] * (len(shape) - 1))
    walk.note(name, module, weight=axes, bias=axes)
    return value


def _group_norm(walk: _Walk, module: nn.GroupNorm, name: str, value: _Value) -> _Value:
    if module.num_groups != 1:
        _refuse(name, module, f"its {module.num_groups} groups of channels may not be mixed; num_groups=1 may")
    value = walk.sized(name, module, value, module.num_channels)
    walk.note(name, module, weight=(value.node,), bias=(value.node,))
    return value


def _prelu(walk: _Walk, module: nn.PReLU, name: str, value: _Value) -> _Value:
    if module.num_parameters > 1:
        value = walk.sized(name, module, value, module.num_parameters)
    walk.note(name, module, weight=(value.node if module.num_parameters > 1 else None,))
    return value


def _pooling(rank: int) -> "_Rule":
    def rule(walk: _Walk, module: nn.Module, name: str, value: _Value) -> _Value:
        if getattr(module, "return_indices", False):
            _refuse(name, module, "returns indices, too")
        return walk.ranked(name, module, value, rank)

    return rule


def _flatten(walk: _Walk, module: nn.Flatten, name: str, value: _Value) -> _Value:
    if (module.start_dim, module.end_dim) != (1, -1):
        _refuse(name, module, f"flattens dimensions {module.start_dim} to {module.end_dim}, not 1 to -1")
    return value if value.rank == 0 else _Value(value.node, None, 0)


def _refuse(name: str, module: nn.Module, reason: str) -> NoReturn:
    raise ValueError(
        f"layer {name or '(the network itself)'} ({type(module).__name__}): {reason}; give derive a batch of inputs to "
        "trace the network on, build it of known layers in nn.Sequential and Residual, or declare its PermutationSpec by hand"
    )


def join(name: str, own: str) -> str:
    """The name of a part within the network."""
    return f"{name}.{own}" if name else own


_Rule = Callable[[_Walk, Any, str, _Value], _Value]

ELEMENTWISE = """
    Identity ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Tanh Tanhshrink Sigmoid LogSigmoid Softplus Softsign Hardtanh
    Hardswish Hardsigmoid Softshrink Hardshrink Threshold Dropout
"""
POOLING = "MaxPool AvgPool LPPool AdaptiveMaxPool AdaptiveAvgPool"
# Softmax over channels is reordered as they are; over another dimension it acts on each channel alone.
_ALSO = "RReLU Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout Softmax Softmax2d LogSoftmax Softmin"

_RULES: dict[type[nn.Module], _Rule] = {
    nn.Sequential: _sequential,
    Residual: _residual,
    nn.Linear: _linear,
    nn.BatchNorm1d: _channel_norm(0, 1),
    nn.BatchNorm2d: _channel_norm(2),
    nn.BatchNorm3d: _channel_norm(3),
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _prelu,
    nn.Flatten: _flatten,
    **{getattr(nn, name): _elementwise for name in f"{ELEMENTWISE} {_ALSO}".split()},
    **{getattr(nn, f"Conv{rank}d"): _convolution(rank) for rank in (1, 2, 3)},
    **{getattr(nn, f"ConvTranspose{rank}d"): _convolution(rank, transposed=True) for rank in (1, 2, 3)},
    **{getattr(nn, f"InstanceNorm{rank}d"): _channel_norm(rank) for rank in (1, 2, 3)},
    **{getattr(nn, f"{kind}{rank}d"): _pooling(rank) for kind in POOLING.split() for rank in (1, 2, 3)},
}
