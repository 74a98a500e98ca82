"""One network's forward pass for many parameter vectors at once.

An `nn.Sequential` of common layers is computed by batched products and grouped convolutions; a minibatch that all networks share
enters the first layer as one large product. Any other module goes through `torch.func.vmap`, with the same results but slower; one
that vmap cannot batch, such as a GRU or one whose control flow depends on data, runs network by network.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from triptych_gpt.layout import Functional, ParameterLayout
from triptych_gpt.symmetry.derivation import ELEMENTWISE, POOLING, Residual, join
from triptych_gpt.symmetry.spec import mha_fastpath

Parameters = Mapping[str, Tensor]  # each [networks, *shape]


@dataclass(frozen=True)
class _Activations:
    """Activations between two layers, in one of three layouts.

    kind "input": [items, *shape], the same for every network; "maps": [items, networks x channels, *spatial];
    "features": [networks, features, items], so that products and losses run along items.
    """

    values: Tensor
    kind: str
    networks: int

    def replaced(self, values: Tensor, kind: str | None = None) -> "_Activations":
        return _Activations(values, kind or self.kind, self.networks)


_Layer = Callable[[Parameters, _Activations, bool], _Activations]


class OneByOneWarning(UserWarning):
    """Networks that cannot be batched are trained and scored one after another."""


class _NoBatchedForm(Exception):
    """A layer meets activations for which only vmap works."""


class Stack:
    """`network` as a function of parameters [networks, *shape] and inputs.

    Inputs are [items, *shape], shared by all networks, or [networks, items, *shape]; outputs are [networks, items, out].
    In training mode BatchNorm normalises by each network's own minibatch and updates its running statistics in place.
    Raises ValueError for a layer whose training is random, such as dropout, and for a BatchNorm with statistics outside theta.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layout = ParameterLayout.of(network)
        self.trainable = tuple(name for name, p in network.named_parameters() if p.requires_grad)
        self.network = network
        self._alone = Functional(network)
        for name, module in network.named_modules():
            _check(name, module)
        self._writes = any(getattr(module, "inplace", False) for module in network.modules())
        self._layer = _compile(network, "")
        self._batchable: dict[tuple[bool, int], bool] = {}  # by kind of input
        self._vmappable: dict[bool, bool] = {}  # in training or not

    @property
    def batched(self) -> bool:
        """Whether every layer has a batched form for all inputs so far; otherwise vmap runs the network."""
        return self._layer is not None and all(self._batchable.values())

    def widest(self, inputs: Shaped[Tensor, "one *shape"]) -> int:
        """Numbers in the largest output of a layer for one item and one network, which limits how many fit at once."""
        sizes = [1]

        def note(module: nn.Module, args: tuple, output: object) -> None:
            sizes.append(output.numel() if isinstance(output, Tensor) else 0)

        leaves = [module for module in self.network.modules() if not list(module.children())]
        hooks = [module.register_forward_hook(note) for module in leaves]
        try:
            with torch.no_grad():
                self.network.eval()(
                    inputs.to(next(self.network.parameters())) if inputs.is_floating_point() else inputs
                )
        finally:
            for hook in hooks:
                hook.remove()
        return max(sizes)

    def __call__(
        self, parameters: Parameters, inputs: Tensor, *, shared: bool = True, training: bool = False
    ) -> Float[Tensor, "networks items out"]:
        if self._writes:
            inputs = inputs.clone()  # in-place layers may change them
        kind = shared, inputs.ndim
        if kind not in self._batchable:
            self._batchable[kind] = self._layer is not None and self._fits(parameters, inputs, shared)
        if self._batchable[kind]:
            aliases = {name: parameters[other] for name, other in self.layout.tied.items()}
            return self._batched({**parameters, **aliases}, inputs, shared, training)
        any_of_them = next(iter(parameters.values()))
        with torch.inference_mode(False):  # since buffers that theta does not hold outlive this call
            self.network.train(training).to(any_of_them.device, any_of_them.dtype)
        if training not in self._vmappable:
            self._vmappable[training] = self._can_vmap(parameters, inputs, shared)
        return (self._vmapped if self._vmappable[training] else self._one_by_one)(parameters, inputs, shared)

    def probe(self, inputs: Shaped[Tensor, "items *shape"]) -> None:
        """Find out now, on one network, how networks run; warns if one by one."""
        state = {name: tensor[None] for name, tensor in self.network.state_dict().items() if name in self.layout.shapes}
        with torch.no_grad():
            self(state, inputs)

    def _fits(self, parameters: Parameters, inputs: Tensor, shared: bool) -> bool:
        """Whether all layers can batch these activations; tried on one network and item, in evaluation so that nothing changes."""
        one = {name: value[:1] for name, value in parameters.items()}
        one |= {name: one[other] for name, other in self.layout.tied.items()}
        try:
            with torch.no_grad():
                self._batched(one, inputs[:1] if shared else inputs[:1, :1], shared, False)
        except _NoBatchedForm:
            return False
        return True

    def _batched(self, parameters: Parameters, inputs: Tensor, shared: bool, training: bool) -> Tensor:
        networks = len(next(iter(parameters.values())))
        if shared:
            state = _Activations(inputs, "input", networks)
        elif inputs.ndim == 3:
            state = _Activations(inputs.mT.contiguous(), "features", networks)
        else:
            state = _Activations(inputs.transpose(0, 1).flatten(1, 2), "maps", networks)
        assert self._layer is not None
        state = self._layer(parameters, state, training)
        return (_stacked(state) if state.kind == "input" else _features(state)).values.mT

    def _vmapped(self, parameters: Parameters, inputs: Tensor, shared: bool) -> Tensor:
        dims = (dict.fromkeys(parameters, 0), None if shared else 0)
        with mha_fastpath(enabled=False):
            return vmap(self._alone, in_dims=dims)(dict(parameters), inputs)

    def _one_by_one(self, parameters: Parameters, inputs: Tensor, shared: bool) -> Tensor:
        each = range(len(next(iter(parameters.values()))))
        views = [{name: value[i] for name, value in parameters.items()} for i in each]
        return torch.stack(
            [self._alone(view, inputs if shared else inputs[i]) for i, view in zip(each, views, strict=True)]
        )

    def _can_vmap(self, parameters: Parameters, inputs: Tensor, shared: bool) -> bool:
        """Whether vmap can batch the network; tried on two copies of one network. Raises ValueError for one that is random."""
        two = {name: value[:1].detach().repeat(2, *[1] * (value.ndim - 1)) for name, value in parameters.items()}
        try:
            with torch.no_grad():
                self._vmapped(two, inputs.clone() if shared else inputs[:1].repeat(2, *[1] * (inputs.ndim - 1)), shared)
        except RuntimeError as error:
            if "randomness" in str(error) or self._draws(
                {name: value[0] for name, value in two.items()}, inputs, shared
            ):
                raise ValueError(
                    f"network {type(self.network).__name__}: draws random numbers, so that runs would depend on ambient "
                    "randomness; leave out its dropout"
                ) from error
            kind, reason = type(self.network).__name__, " ".join(str(error).split())[:100]
            problem = f"{kind} cannot be batched ({reason}...), so its networks run one by one, slower"
            warnings.warn(problem, OneByOneWarning, stacklevel=2)
            return False
        return True

    def _draws(self, parameters: Parameters, inputs: Tensor, shared: bool) -> bool:
        """Whether the network draws random numbers."""
        devices = [inputs.device] if inputs.is_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad():
            before = torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)
            self._alone(parameters, inputs if shared else inputs[0])
            after = torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)
        return not all(map(torch.equal, before, after))


def _check(name: str, module: nn.Module) -> None:
    """Raises ValueError for a layer whose training or statistics are not a function of theta and minibatches."""
    problem, norm = "", isinstance(module, nn.modules.batchnorm._BatchNorm)
    if (isinstance(module, nn.modules.dropout._DropoutNd) and module.p) or isinstance(module, nn.RReLU):
        problem = "runs would depend on ambient randomness; leave it out"
    elif norm and (module.momentum is None or not module.track_running_stats):
        problem = "theta does not hold all of its statistics; give it a momentum and let it track running statistics"
    if problem:
        raise ValueError(f"layer {name!r} ({type(module).__name__}): {problem}")


def _compile(module: nn.Module, name: str) -> _Layer | None:
    """The batched form of a layer, None if there is none."""
    kind = next((base for base in type(module).__mro__ if base in _MAKERS), None)
    return _MAKERS[kind](module, name) if kind is not None and computes(module, kind) else None


def computes(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what its kind does: it has no forward of its own, no hooks and no parametrisations."""
    own_forward = getattr(module.forward, "__func__", None) is not kind.forward
    parametrised = module._modules and kind not in (nn.Sequential, Residual)
    return not (own_forward or parametrised or module._forward_hooks or module._forward_pre_hooks)


def _sequential(module: nn.Sequential, name: str) -> _Layer | None:
    # named_children leaves out what comes twice
    found = [_compile(child, join(name, key)) for key, child in module._modules.items() if child is not None]
    layers = [layer for layer in found if layer is not None]
    if len(layers) < len(found):
        return None

    def run(parameters: Parameters, state: _Activations, training: bool) -> _Activations:
        for layer in layers:
            state = layer(parameters, state, training)
        return state

    return run


def _residual(module: Residual, name: str) -> _Layer | None:
    body = _compile(module.body, join(name, "body"))
    if body is None:
        return None

    def run(parameters: Parameters, state: _Activations, training: bool) -> _Activations:
        state = _stacked(state)
        after = body(parameters, state, training)
        if after.kind != state.kind:
            raise _NoBatchedForm
        return state.replaced(state.values + after.values)

    return run


def _stacked(state: _Activations) -> _Activations:
    """The input repeated for each network, if it is still shared."""
    if state.kind != "input":
        return state
    if state.values.ndim == 2:
        return state.replaced(state.values.T.repeat(state.networks, 1, 1), "features")
    return state.replaced(state.values.repeat(1, state.networks, *[1] * (state.values.ndim - 2)), "maps")


def _features(state: _Activations) -> _Activations:
    """Flattened activations, [networks, features, items]; a shared input stays shared."""
    if state.kind == "input":
        return state.replaced(state.values.flatten(1))
    if state.kind == "features":
        return state
    values = state.values.unflatten(1, (state.networks, -1)).flatten(2)  # items networks features
    return state.replaced(values.permute(1, 2, 0).contiguous(), "features")


def _linear(module: nn.Linear, name: str) -> _Layer:
    weight_name, bias_name = join(name, "weight"), join(name, "bias")
    has_bias = module.bias is not None

    def run(parameters: Parameters, state: _Activations, training: bool) -> _Activations:
        if state.kind == "maps" or state.values.ndim != (2 if state.kind == "input" else 3):
            raise _NoBatchedForm
        weight = parameters[weight_name]  # networks out in
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


def _conv(module: Any, name: str) -> _Layer | None:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    weight_name, bias_name = join(name, "weight"), join(name, "bias")
    rank = len(module.kernel_size)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    fixed = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    groups, has_bias = module.groups, module.bias is not None

    def run(parameters: Parameters, state: _Activations, training: bool) -> _Activations:
        if state.kind == "features" or state.values.ndim != rank + 2:
            raise _NoBatchedForm
        weight = parameters[weight_name].flatten(0, 1)
        bias = parameters[bias_name].flatten() if has_bias else None
        if state.kind == "input" and groups > 1:
            state = _stacked(state)
        # A shared input meets all networks' filters at once; otherwise each network is a group of channels.
        split = groups if state.kind == "input" else groups * state.networks
        return state.replaced(convolve(state.values, weight, bias, groups=split, **fixed), "maps")

    return run


def _batch_norm(module: nn.modules.batchnorm._BatchNorm, name: str) -> _Layer:
    names = [join(name, part) for part in ("running_mean", "running_var", "weight", "bias")]
    affine, momentum, eps = module.affine, module.momentum, module.eps
    assert momentum is not None  # refused by _check

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
    return lambda parameters, state, training: state.replaced(module(state.values))


class _FastSelu(torch.autograd.Function):
    """SELU by exp2, twelve times as fast on a CPU as by expm1; exact to 1e-7 of its scale in float32."""

    ALPHA, SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        lowest = _FastSelu.ALPHA * _FastSelu.SCALE
        power = x.clamp(max=0).mul_(1 / math.log(2)).exp2_()  # e^x where x is negative
        out = torch.add(x.new_full((), -lowest), power, alpha=lowest, out=power).add_(x.relu(), alpha=_FastSelu.SCALE)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.elu_backward(gradients[0], _FastSelu.ALPHA, _FastSelu.SCALE, 1, True, out)


def _selu(module: nn.SELU, name: str) -> _Layer:
    return lambda parameters, state, training: state.replaced(_FastSelu.apply(state.values))


def _pooling(module: nn.Module, name: str) -> _Layer | None:
    if getattr(module, "return_indices", False):
        return None

    def run(parameters: Parameters, state: _Activations, training: bool) -> _Activations:
        if state.kind == "features":
            raise _NoBatchedForm
        return state.replaced(module(state.values))

    return run


def _flatten(module: nn.Flatten, name: str) -> _Layer | None:
    if (module.start_dim, module.end_dim) != (1, -1):
        return None
    return lambda parameters, state, training: _features(state)


_MAKERS: dict[type[nn.Module], Callable[[Any, str], _Layer | None]] = {
    nn.Sequential: _sequential,
    Residual: _residual,
    nn.Linear: _linear,
    nn.Flatten: _flatten,
    **{getattr(nn, f"Conv{rank}d"): _conv for rank in (1, 2, 3)},
    **{getattr(nn, f"BatchNorm{rank}d"): _batch_norm for rank in (1, 2, 3)},
    **{getattr(nn, name): _elementwise for name in ELEMENTWISE.split()},
    nn.SELU: _selu,
    **{getattr(nn, f"{kind}{rank}d"): _pooling for kind in POOLING.split() for rank in (1, 2, 3)},
}
