"""One network's forward pass for many parameter vectors at once.

An `nn.Sequential` of common layers is computed by batched products and grouped convolutions; a minibatch that all networks
share enters the first layer as one large product. Any other module goes through `torch.func.vmap`: right, but slower.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from triptych_gpt.derive import Residual
from triptych_gpt.layout import ParameterLayout

Parameters = Mapping[str, Tensor]  # each [networks, *shape]


@dataclass(frozen=True)
class _Activations:
    """What stands between two layers, in one of three layouts.

    kind "input": [items, *shape], the same for every network; "maps": [items, networks x channels, *spatial];
    "features": [networks, features, items], so that products and losses run along items.
    """

    values: Tensor
    kind: str
    networks: int

    def replaced(self, values: Tensor, kind: str | None = None) -> "_Activations":
        return _Activations(values, kind or self.kind, self.networks)


_Layer = Callable[[Parameters, _Activations, bool], _Activations]


class _NoBatchedForm(Exception):
    """A layer meets activations that only vmap knows how to give it."""


class Stack:
    """`network` as a function of parameters [networks, *shape] and inputs.

    Inputs are [items, *shape], shared by all networks, or [networks, items, *shape]; outputs are [networks, items, out].
    In training mode BatchNorm normalises by each network's own minibatch and updates its running statistics in place.
    Raises ValueError for a layer whose training draws random numbers (dropout), which no two orders of work would share.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layout = ParameterLayout.of(network)
        self.trainable = tuple(name for name, p in network.named_parameters() if p.requires_grad)
        self.network = network
        self._layer = _compile(network, "")
        for name, module in network.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
                raise ValueError(
                    f"layer {name!r} ({type(module).__name__}): runs would depend on ambient randomness; leave it out"
                )

    @property
    def batched(self) -> bool:
        """Whether every layer has its own batched form; otherwise vmap runs the network."""
        return self._layer is not None

    def widest(self, inputs: Float[Tensor, "one *shape"]) -> int:
        """Numbers in the largest output of a layer for one item and one network: what limits how much fits at once."""
        sizes = [1]
        leaves = [module for module in self.network.modules() if not list(module.children())]
        hooks = [m.register_forward_hook(lambda m, args, output: sizes.append(output.numel())) for m in leaves]
        try:
            with torch.no_grad():
                self.network.eval()(inputs.to(next(self.network.parameters())))
        finally:
            for hook in hooks:
                hook.remove()
        return max(sizes)

    def __call__(
        self, parameters: Parameters, inputs: Tensor, *, shared: bool = True, training: bool = False
    ) -> Float[Tensor, "networks items out"]:
        networks = len(next(iter(parameters.values())))
        if self._layer is not None:
            try:
                return self._batched(parameters, inputs, shared, training, networks)
            except _NoBatchedForm:
                self._layer = None
        return self._vmapped(parameters, inputs, shared, training)

    def _batched(self, parameters: Parameters, inputs: Tensor, shared: bool, training: bool, networks: int) -> Tensor:
        if shared:
            state = _Activations(inputs, "input", networks)
        elif inputs.ndim == 3:
            state = _Activations(inputs.mT.contiguous(), "features", networks)
        else:
            state = _Activations(inputs.transpose(0, 1).flatten(1, 2), "maps", networks)
        state = self._layer(parameters, state, training)
        return (_stacked(state) if state.kind == "input" else _features(state)).values.mT

    def _vmapped(self, parameters: Parameters, inputs: Tensor, shared: bool, training: bool) -> Tensor:
        self.network.train(training)
        dims = (dict.fromkeys(parameters, 0), None if shared else 0)
        return vmap(lambda p, x: functional_call(self.network, p, x), in_dims=dims)(dict(parameters), inputs)


def _compile(module: nn.Module, name: str) -> _Layer | None:
    """The batched form of a layer, None where there is none."""
    if isinstance(module, nn.Sequential):
        layers = [
            _compile(child, _join(name, key)) for key, child in module._modules.items()
        ]  # named_children leaves out what comes twice
        return None if None in layers else _chain(layers)
    if isinstance(module, Residual):
        body = _compile(module.body, _join(name, "body"))
        return None if body is None else _residual(body)
    for types, make in _MAKERS:
        if isinstance(module, types):
            return make(module, name)
    return None


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _chain(layers: list[_Layer]) -> _Layer:
    def run(parameters: Parameters, state: _Activations, training: bool) -> _Activations:
        for layer in layers:
            state = layer(parameters, state, training)
        return state

    return run


def _residual(body: _Layer) -> _Layer:
    def run(parameters: Parameters, state: _Activations, training: bool) -> _Activations:
        state = _stacked(state)
        return state.replaced(state.values + body(parameters, state, training).values)

    return run


def _stacked(state: _Activations) -> _Activations:
    """The input repeated for each network, where it still stands alone."""
    if state.kind != "input":
        return state
    if state.values.ndim == 2:
        return state.replaced(state.values.T.expand(state.networks, -1, -1), "features")
    return state.replaced(state.values.repeat(1, state.networks, *[1] * (state.values.ndim - 2)), "maps")


def _features(state: _Activations) -> _Activations:
    """Flattened: [networks, features, items]; the input stays as it is but for its shape."""
    if state.kind == "input":
        return state.replaced(state.values.flatten(1))
    if state.kind == "features":
        return state
    values = state.values.unflatten(1, (state.networks, -1)).flatten(2)  # [items, networks, features]
    return state.replaced(values.permute(1, 2, 0).contiguous(), "features")


def _linear(module: nn.Linear, name: str) -> _Layer:
    weight_name, bias_name = _join(name, "weight"), _join(name, "bias")
    has_bias = module.bias is not None

    def run(parameters: Parameters, state: _Activations, training: bool) -> _Activations:
        if state.values.ndim != (2 if state.kind == "input" else 3) or state.kind == "maps":
            raise _NoBatchedForm
        weight = parameters[weight_name]  # [networks, out, in]
        bias = parameters[bias_name][..., None] if has_bias else None
        if state.kind == "input":  # one product for all networks
            values = (weight.flatten(0, 1) @ state.values.T.contiguous()).unflatten(0, weight.shape[:2])
            values = values if bias is None else values.add_(bias)
        elif bias is None:
            values = weight @ state.values
        else:
            values = torch.baddbmm(bias, weight, state.values)
        return state.replaced(values, "features")

    return run


def _conv(module: nn.Module, name: str) -> _Layer | None:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    weight_name, bias_name = _join(name, "weight"), _join(name, "bias")
    convolve = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}[type(module)]
    fixed = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    groups, has_bias = module.groups, module.bias is not None

    def run(parameters: Parameters, state: _Activations, training: bool) -> _Activations:
        weight = parameters[weight_name].flatten(0, 1)
        bias = parameters[bias_name].flatten() if has_bias else None
        if state.kind == "input" and groups > 1:
            state = _stacked(state)
        split = groups if state.kind == "input" else groups * state.networks
        return state.replaced(convolve(state.values, weight, bias, groups=split, **fixed), "maps")

    return run


def _batch_norm(module: nn.Module, name: str) -> _Layer | None:
    if module.momentum is None or not module.track_running_stats:
        return None
    names = [_join(name, part) for part in ("running_mean", "running_var", "weight", "bias")]
    affine, momentum, eps = module.affine, module.momentum, module.eps

    def run(parameters: Parameters, state: _Activations, training: bool) -> _Activations:
        state = _stacked(state)
        mean, var = (parameters[n].view(-1) for n in names[:2])  # views: updated in place
        scale, shift = (parameters[n].flatten() for n in names[2:]) if affine else (None, None)
        flat = state.kind == "features"
        values = state.values.reshape(1, -1, state.values.shape[-1]) if flat else state.values
        values = F.batch_norm(values, mean, var, scale, shift, training, momentum, eps)
        return state.replaced(values.view(state.values.shape) if flat else values)

    return run


def _elementwise(module: nn.Module, name: str) -> _Layer:
    if getattr(module, "inplace", False):  # the input may be everyone's
        module = copy.copy(module)
        module.inplace = False
    return lambda parameters, state, training: state.replaced(module(state.values))


def _pooling(module: nn.Module, name: str) -> _Layer:
    def run(parameters: Parameters, state: _Activations, training: bool) -> _Activations:
        if state.kind == "features":
            raise _NoBatchedForm
        return state.replaced(module(state.values))

    return run


def _flatten(module: nn.Flatten, name: str) -> _Layer | None:
    if (module.start_dim, module.end_dim) != (1, -1):
        return None
    return lambda parameters, state, training: _features(state)


_ELEMENTWISE = """
    Identity ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Tanh Tanhshrink Sigmoid LogSigmoid Softplus Softsign Hardtanh
    Hardswish Hardsigmoid Softshrink Hardshrink Threshold Dropout
"""
_POOLING = "MaxPool AvgPool LPPool AdaptiveMaxPool AdaptiveAvgPool"

_MAKERS: list[tuple[tuple[type, ...], Callable[[nn.Module, str], _Layer | None]]] = [
    ((nn.Linear,), _linear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    (tuple(getattr(nn, name) for name in _ELEMENTWISE.split()), _elementwise),
    (tuple(getattr(nn, f"{kind}{rank}d") for kind in _POOLING.split() for rank in (1, 2, 3)), _pooling),
    ((nn.Flatten,), _flatten),
]
