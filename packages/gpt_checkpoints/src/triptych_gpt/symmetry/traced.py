"""The permutation symmetry of any network whose forward pass can be traced into a graph of tensor operations.

Every dimension of every parameter starts free, those of inputs and outputs are fixed, and each operation in the graph unifies
the dimensions that it contracts, adds or concatenates. What stays free may be permuted. Operations without a rule fix every
dimension of what they read: fewer symmetries, never a wrong one.
"""

import copy
import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

from triptych_gpt.layout import Functional, ParameterLayout
from triptych_gpt.symmetry import operations
from triptych_gpt.symmetry.dims import Dim, Part, Unknown, cut, fix, fixed, is_fixed, segments, unify
from triptych_gpt.symmetry.operations import OPAQUE, Dims, rule_of, shape_of
from triptych_gpt.symmetry.spec import Axis, Blocks, Entry, Factor, PermutationSpec, mha_fastpath


class SymmetryWarning(UserWarning):
    """Axes that may have a symmetry, but are not permuted."""


def trace(network: nn.Module, inputs: Tensor) -> PermutationSpec:
    """The symmetry of a network between fixed inputs and outputs; of `inputs`, a batch, only shape and type matter.

    It consists of units of linear, convolution and embedding layers, through elementwise functions, norms, pooling, views and
    concatenation; heads of attention, and channels within them; hidden units of recurrences, in all gates at once. Running
    statistics are part of theta, and follow their channels. Warns of operations without a rule, and of a network that cannot be
    traced, such as one whose control flow depends on data: none of its units are permuted.

    Raises ValueError for a network that cannot be run on the inputs either.
    """
    layout = ParameterLayout.of(network)
    try:
        graph, names = _graph(network, layout, inputs)
        parameters, unknown = _infer(graph, names)
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        _check_runs(network, inputs)
        reason = _line(error)
        warnings.warn(
            f"the network cannot be traced ({reason}): its units are not permuted", SymmetryWarning, stacklevel=2
        )
        return PermutationSpec(layout, {name: (None,) * len(shape) for name, shape in layout.shapes.items()})
    if unknown:
        ops = ", ".join(sorted(unknown))
        warnings.warn(f"axes that pass through {ops} are not permuted: their symmetry is not known", SymmetryWarning, 2)
    return _spec(layout, parameters)


def _check_runs(network: nn.Module, inputs: Tensor) -> None:
    network, parameter = copy.deepcopy(network).eval(), next(network.parameters())
    try:
        with torch.no_grad():
            network(inputs.to(parameter) if inputs.is_floating_point() else inputs.to(parameter.device))
    except Exception as error:
        problem = f"cannot be run on a batch {list(inputs.shape)} ({_line(error)})"
        raise ValueError(
            f"network {type(network).__name__}: {problem}; its forward takes a batch of inputs alone"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _graph(network: nn.Module, layout: ParameterLayout, inputs: Tensor) -> tuple[fx.Graph, list[str | None]]:
    """The forward pass in evaluation as a graph, and the parameter that each of its placeholders is, None for others."""
    # In float64: in float32 some layers take a path of the CPU's that is one opaque operation. Nothing is computed.
    held = {name: torch.empty(shape, dtype=torch.float64) for name, shape in layout.shapes.items()}
    for name, buffer in network.named_buffers():
        if name not in held and buffer.is_floating_point():
            held[name] = torch.empty(buffer.shape, dtype=torch.float64)
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with mha_fastpath(enabled=False):
            traced = make_fx(Functional(network), tracing_mode="fake", _allow_non_fake_inputs=True)
            made = traced(held, inputs.double() if inputs.is_floating_point() else inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    made.graph.eliminate_dead_code()
    return made.graph, [*(name if name in layout.shapes else None for name in held), None]


def _infer(graph: fx.Graph, names: Sequence[str | None]) -> tuple[dict[str, Dims], set[str]]:
    """The dimensions of every parameter, and the operations that have no rule."""
    stacked: frozenset[tuple[str, int]] = frozenset()
    while True:
        walk = _Walk(stacked)
        try:
            return walk.run(graph, names), walk.unknown
        except _Indexed as found:
            stacked |= {found.place}


class _Indexed(Exception):
    """A dimension that a view made is indexed later, so that each index may have an order of its own behind it."""

    def __init__(self, place: tuple[str, int]) -> None:
        super().__init__(place)
        self.place = place


@dataclass(frozen=True)
class _Stack:
    """A tensor that is going to be indexed along one dimension, as the tensors before it was stacked; all have that dimension."""

    items: list[Dims]
    along: Dim


_KEEP_STACKS = {"permute": operations.permute, "transpose": operations.transpose, "unsqueeze": operations.unsqueeze,
                "squeeze": operations.squeeze, "clone": operations.unchanged}  # fmt: skip


class _Walk:
    """Dimensions of every value in a graph, inferred from its first node to its last.

    stacked: views, and which of their dimensions are indexed later.
    """

    def __init__(self, stacked: frozenset[tuple[str, int]]) -> None:
        self.stacked = stacked
        self.made: dict[int, tuple[Dim, tuple[str, int]]] = {}  # dimensions that views made, by id
        self.unknown: set[str] = set()
        self.values: dict[fx.Node, Any] = {}

    def run(self, graph: fx.Graph, names: Sequence[str | None]) -> dict[str, Dims]:
        """The dimensions of every parameter, names[i] being the i-th placeholder."""
        parameters: dict[str, Dims] = {}
        self.constants = operations.constants(graph)
        waiting = iter(names)
        for node in graph.nodes:
            if node.op == "placeholder":
                name = next(waiting)
                free = name is not None and node.users  # a parameter that takes no part in the forward pass is fixed
                self.values[node] = Dims(Dim(n) if free else fixed(n) for n in node.meta["val"].shape)
                if name is not None:
                    parameters[name] = self.values[node]
            elif node.op == "get_attr":
                self.values[node] = Dims(map(fixed, getattr(graph.owning_module, str(node.target)).shape))
            elif node.op == "call_function":
                self.values[node] = self.call(node)
            else:
                self.fix_inputs(node)
        return parameters

    def call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        schema = node.target._schema  # type: ignore[union-attr]
        given = {argument.name: argument.default_value for argument in schema.arguments}
        given |= dict(zip(given, node.args, strict=False)) | dict(node.kwargs)
        name = schema.name.removeprefix("aten::")
        if any(isinstance(self.values[source], _Stack) for source in node.all_input_nodes):
            stack = self.values[node.all_input_nodes[0]]
            if name in _KEEP_STACKS:
                items = [_KEEP_STACKS[name](node, SimpleNamespace(**{**given, "self": item})) for item in stack.items]
                return _Stack(items, stack.along)
            if name in ("select", "unbind") and stack.items[0][given["dim"]] is stack.along:
                found = [Dims(dim for dim in item if dim is not stack.along) for item in stack.items]
                return found[given["index"]] if name == "select" else tuple(found)
            for source in node.all_input_nodes:
                self.values[source] = _unstacked(self.values[source])
        arguments = SimpleNamespace(**fx.node.map_arg(given, self.value))
        if any(value is OPAQUE for value in tree_leaves(vars(arguments))):
            raise ValueError(f"{name} takes an output of another operation that has no rule")
        if name in ("select", "unbind"):
            self.note_indexed(arguments.self[arguments.dim])
        rule = rule_of(node)
        try:
            if rule is None:
                raise Unknown
            if rule is operations.view:
                return self.view(node, arguments)
            return rule(node, arguments)
        except Unknown:
            if self.fix_inputs(node):
                self.unknown.add(name)
            return tree_map_only(Tensor, lambda x: Dims(map(fixed, x.shape)), node.meta["val"])

    def value(self, source: fx.Node) -> Any:
        """The dimensions of what a node reads; those of equal entries have any order, another one for each that reads them."""
        fresh = source in self.constants and isinstance(self.values[source], Dims)
        return Dims(Dim(dim.size) for dim in self.values[source]) if fresh else self.values[source]

    def fix_inputs(self, node: fx.Node) -> bool:
        """Fix all that a node reads; returns whether anything was not fixed yet."""
        changed = False
        for source in node.all_input_nodes:
            for dims in tree_leaves(_unstacked(self.values[source])):
                if dims is OPAQUE:
                    raise ValueError(f"{source.target} gives an output that has no rule")
                for dim in dims if isinstance(dims, Dims) and source not in self.constants else ():
                    changed |= not is_fixed(dim)
                    fix(dim)
        return changed

    def view(self, node: fx.Node, arguments: SimpleNamespace) -> Dims | _Stack:
        """A view; its dimensions are remembered, and it is a stack along the one that is indexed later."""
        shape = shape_of(node)
        for place in range(len(shape)):
            if (node.name, place) in self.stacked and (stack := _stacked(arguments.self, shape, place)):
                return stack
        value = operations.view(node, arguments)
        for place, dim in enumerate(value):
            if not is_fixed(dim) and all(dim is not other for other in arguments.self):
                self.made[id(dim)] = dim, (node.name, place)
        return value

    def note_indexed(self, dim: Dim) -> None:
        _, place = self.made.get(id(dim), (None, None))
        if place is not None and place not in self.stacked:
            raise _Indexed(place)


def _stacked(dims: Dims, shape: Sequence[int], place: int) -> _Stack | None:
    """The view as a stack along its dimension at `place`, if that is the outermost part of one dimension that is viewed."""
    count, before = shape[place], math.prod(shape[:place])
    for at, dim in enumerate(dims):
        if math.prod(d.size for d in dims[:at]) == before and dim.size > 1 and dim.size % count == 0:
            along = fixed(count)
            items = []
            for segment in cut(dim, [dim.size // count] * count):
                item = operations.viewed([*dims[:at], segment, *dims[at + 1 :]], [*shape[:place], *shape[place + 1 :]])
                items.append(Dims([*item[:place], along, *item[place:]]))
            return _Stack(items, along)
    return None


def _unstacked(value: Any) -> Any:
    """The dimensions of a stack if it is used as one tensor: those of every index have one order."""
    if not isinstance(value, _Stack):
        return value
    for item in value.items[1:]:
        for first, other in zip(value.items[0], item, strict=True):
            unify(first, other)
    return value.items[0]


def _spec(layout: ParameterLayout, parameters: dict[str, Dims]) -> PermutationSpec:
    """The free dimensions as groups, each named after the layer of the first parameter that has it."""
    found: dict[str, list[list[list[Part]]]] = {}
    # What cannot be written becomes fixed on the way, which may concern parameters that were passed already.
    while found != (found := {name: [segments(dim) for dim in parameters[name]] for name in layout.names}):
        pass
    names: dict[Dim, str] = {}
    for name, dims in found.items():
        layer = name.rpartition(".")[0] or name
        for unit in (unit for dim in dims for segment in dim for unit, _ in segment if unit is not None):
            if unit not in names:
                others = sum(other.partition(":")[0] == layer for other in names.values())
                names[unit] = layer if others == 0 else f"{layer}:{others + 1}"
    return PermutationSpec(layout, {name: tuple(_entry(dim, names) for dim in dims) for name, dims in found.items()})


def _entry(segments: list[list[Part]], names: dict[Dim, str]) -> Entry:
    written: list[tuple[Factor, ...]] = []
    for segment in segments:
        factors: list[Factor] = []
        for unit, size in segment:
            if factors and unit is None and factors[-1][0] is None:
                factors[-1] = (None, factors[-1][1] * size)
            else:
                factors.append((None if unit is None else names[unit], size))
        written.append(tuple(factors))
    match written:
        case [((None, _),)]:
            return None
        case [((str(group), _),)]:
            return Axis(group)
        case [((str(group), _), (None, block))]:
            return Axis(group, block)
    return Blocks(tuple(written))
