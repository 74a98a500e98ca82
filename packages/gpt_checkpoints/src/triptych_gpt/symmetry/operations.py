"""What operations on tensors do to the order of their dimensions: a rule for each, by its name in ATen.

A rule takes the graph's node and the operation's arguments by name, tensors as their `Dims`; it unifies dimensions that must have
one order, fixes those that must not be permuted, and returns the dimensions of what the operation gives. Raises Unknown for
arguments for which none of this is known.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from triptych_gpt.symmetry.dims import Dim, Unknown, concat, cut, fix, fixed, product, split, unify


class Dims(tuple[Dim, ...]):
    """The dimensions of a tensor."""


OPAQUE = object()
"""An output whose dimensions no rule gives, since networks do not use it."""

Rule = Callable[[fx.Node, SimpleNamespace], Any]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Of a node's value, or the first of several."""
    value = node.meta["val"]
    return tuple((value if isinstance(value, Tensor) else value[0]).shape)


def outputs(node: fx.Node, first: Dims, *more: Dims) -> Any:
    """The value of a node that may have several outputs, of which the first ones are known."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return first
    known = [first, *more]
    return tuple(known[i] if i < len(known) else OPAQUE for i in range(len(value)))


def pointwise(node: fx.Node, a: SimpleNamespace) -> Any:
    """Entry by entry; dimensions of one entry are repeated."""
    shape = shape_of(node)
    result = [fixed(1) if n == 1 else None for n in shape]
    for dims in tree_leaves(vars(a)):
        if isinstance(dims, Dims):
            for place, dim in enumerate(dims, start=len(shape) - len(dims)):
                if dim.size != 1:
                    known = result[place]
                    result[place] = dim if known is None else known
                    unify(result[place], dim)  # type: ignore[arg-type]
    whole = Dims(Dim(n) if dim is None else dim for n, dim in zip(shape, result, strict=True))
    value = node.meta["val"]
    same = [] if isinstance(value, Tensor) else [whole for x in value[1:] if tuple(x.shape) == shape]
    return outputs(node, whole, *same)


def unchanged(node: fx.Node, a: SimpleNamespace) -> Any:
    """Entry by entry, or along a dimension whose entries are reordered as they are: softmax."""
    return outputs(node, a.self)


def constant(node: fx.Node, a: SimpleNamespace) -> Dims:
    """Equal entries, which any permutation leaves as they are."""
    return Dims(Dim(n) for n in shape_of(node))


def reduction(node: fx.Node, a: SimpleNamespace) -> Any:
    """Of all entries of some dimensions, in any order."""
    over, keep = getattr(a, "dim", None), getattr(a, "keepdim", False)
    dims = list(a.self)
    places = range(len(dims)) if over in (None, [], ()) else over if isinstance(over, list | tuple) else [over]
    over = {place % max(1, len(dims)) for place in places}
    left = Dims(fixed(1) if i in over else dim for i, dim in enumerate(dims) if keep or i not in over)
    return outputs(node, left, left)


def along(node: fx.Node, a: SimpleNamespace) -> Any:
    """In the order of some dimensions, which are fixed, and the same for every entry of the others."""
    over = getattr(a, "dims", getattr(a, "dim", None))
    if over is None or over == []:
        raise Unknown
    shape, keep = shape_of(node), getattr(a, "keepdim", True)
    places = {place % len(a.self) for place in (over if isinstance(over, list | tuple) else [over])}
    for place in places:
        fix(a.self[place])
    sizes = iter(shape)
    left = Dims(
        fixed(next(sizes)) if i in places else (dim, next(sizes))[0]
        for i, dim in enumerate(a.self)
        if keep or i not in places
    )
    return outputs(node, left, left)


def spatial(node: fx.Node, a: SimpleNamespace) -> Any:
    """On maps: pooling, interpolation and padding, the same for every channel."""
    found = re.search(r"(\d)d", node.target._schema.name)  # type: ignore[union-attr]
    dims = getattr(a, "self", None) or a.input
    count = int(found[1]) if found else len(dims)
    for dim in dims[len(dims) - count :]:
        fix(dim)
    shape = shape_of(node)
    left = Dims([*dims[: len(dims) - count], *map(fixed, shape[len(dims) - count :])])
    return outputs(node, left, left)


def padding(node: fx.Node, a: SimpleNamespace) -> Dims:
    shape, dims = shape_of(node), list(a.self)
    for place, (dim, size) in enumerate(zip(a.self, shape, strict=True)):
        behind = 2 * (len(shape) - 1 - place)
        if any(a.pad[behind : behind + 2]):
            fix(dim)
            dims[place] = fixed(size)
    return Dims(dims)


def triangle(node: fx.Node, a: SimpleNamespace) -> Dims:
    for dim in a.self[-2:]:
        fix(dim)
    return a.self


# Products


def matrix_product(node: fx.Node, a: SimpleNamespace) -> Dims:
    """mm, bmm, mv, dot and their sums with a third tensor."""
    names = next(pair for pair in _FACTORS if all(hasattr(a, name) for name in pair))
    first, second = (getattr(a, name) for name in names)
    unify(first[-1], second[max(0, len(second) - 2)])
    for x, y in zip(first[:-2], second[:-2], strict=True):
        unify(x, y)
    result = Dims([*first[:-1], *(second[-1:] if len(second) > 1 else ())])
    if "self" in names:
        return result
    summand = SimpleNamespace(summand=a.self, product=result)
    return pointwise(node, summand)


_FACTORS = (
    ("mat1", "mat2"),
    ("batch1", "batch2"),
    ("mat", "vec"),
    ("self", "mat2"),
    ("self", "vec"),
    ("self", "tensor"),
)


def linear(node: fx.Node, a: SimpleNamespace) -> Dims:
    unify(a.input[-1], a.weight[1])
    if a.bias is not None:
        unify(a.bias[0], a.weight[0])
    return Dims([*a.input[:-1], a.weight[0]])


def convolution(node: fx.Node, a: SimpleNamespace) -> Dims:
    """Channels are a product of groups and of channels within each group, whose order all groups share."""
    for dim in [*a.input[2:], *a.weight[2:]]:
        fix(dim)
    rows, columns = a.weight[:2]
    if a.transposed:  # weight [in, out / groups, ...]
        unify(a.input[1], rows)
        out = product([split(rows, [a.groups, rows.size // a.groups])[0], columns])
    else:  # weight [out, in / groups, ...]
        of_input, within = split(a.input[1], [a.groups, columns.size])
        of_output, _ = split(rows, [a.groups, rows.size // a.groups])
        unify(of_input, of_output)
        unify(within, columns)
        out = rows
    if a.bias is not None:
        unify(a.bias[0], out)
    return Dims([a.input[0], out, *map(fixed, shape_of(node)[2:])])


def embedding(node: fx.Node, a: SimpleNamespace) -> Dims:
    fix(a.weight[0])
    return Dims([*a.indices, a.weight[1]])


def index(node: fx.Node, a: SimpleNamespace) -> Dims:
    """Rows by one tensor of numbers."""
    given = [(place, each) for place, each in enumerate(a.indices) if each is not None]
    if len(given) != 1:
        raise Unknown
    place, rows = given[0]
    fix(a.self[place])
    return Dims([*a.self[:place], *rows, *a.self[place + 1 :]])


def index_select(node: fx.Node, a: SimpleNamespace) -> Dims:
    place = a.dim % len(a.self)
    fix(a.self[place])
    return Dims([*a.self[:place], *a.index, *a.self[place + 1 :]])


def attention(node: fx.Node, a: SimpleNamespace) -> Any:
    """softmax(q k^T) v over keys, in any order of them; heads and dimensions of q and k, and of v, each have one order."""
    if getattr(a, "dropout_p", 0):
        raise Unknown
    queries, channels, keys, out = a.query[-2], a.query[-1], a.key[-2], a.value[-1]
    unify(channels, a.key[-1])
    unify(keys, a.value[-2])
    for others in (a.key, a.value):
        for x, y in zip(a.query[:-2], others[:-2], strict=True):
            unify(x, y)
    mask = getattr(a, "attn_mask", None) or getattr(a, "attn_bias", None)
    for dim, wanted in zip(reversed(mask or ()), reversed([*a.query[:-2], queries, keys]), strict=False):
        if dim.size != 1:
            unify(dim, wanted)
    if getattr(a, "is_causal", False):
        fix(queries)
        fix(keys)
    return outputs(node, Dims([*a.query[:-1], out]))


# Norms


def channel_norm(node: fx.Node, a: SimpleNamespace) -> Any:
    channel = a.input[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(a, name, None) is not None:
            unify(channel, getattr(a, name)[0])
    return outputs(node, a.input)


def layer_norm(node: fx.Node, a: SimpleNamespace) -> Any:
    for affine in (a.weight, getattr(a, "bias", None)):
        for dim, own in zip(a.input[-len(a.normalized_shape) :], affine or (), strict=False):
            unify(dim, own)
    return outputs(node, a.input)


def group_norm(node: fx.Node, a: SimpleNamespace) -> Any:
    split(a.input[1], [a.group, a.C // a.group])
    for affine in (a.weight, a.bias):
        if affine is not None:
            unify(a.input[1], affine[0])
    return outputs(node, a.input)


# Shapes


def restrided(node: fx.Node, a: SimpleNamespace) -> Dims:
    """Other strides where they do not matter, along dimensions of one entry."""
    before = node.all_input_nodes[0].meta["val"]
    same = tuple(a.size) == tuple(before.shape) and a.storage_offset in (None, before.storage_offset())
    if not same or any(n > 1 and x != y for n, x, y in zip(a.size, a.stride, before.stride(), strict=True)):
        raise Unknown
    return a.self


def view(node: fx.Node, a: SimpleNamespace) -> Dims:
    shape = shape_of(node)
    if node.target._schema.overload_name == "dtype" or 0 in shape:  # type: ignore[union-attr]
        raise Unknown
    return Dims(viewed(a.self, shape))


def viewed(dims: Sequence[Dim], shape: Sequence[int]) -> list[Dim]:
    """Dimensions of a view: neighbours are merged, and split otherwise, where their products agree."""
    found: list[Dim] = []
    left = list(dims)
    sizes = list(shape)
    while left or sizes:
        here, there = left[:1], sizes[:1]
        del left[:1], sizes[:1]
        while (have := math.prod(d.size for d in here)) != (want := math.prod(there)):
            if have < want:
                here.append(left.pop(0))
            else:
                there.append(sizes.pop(0))
        if there:
            found += split(product(here), there)
    return found


def permute(node: fx.Node, a: SimpleNamespace) -> Dims:
    return Dims(a.self[place] for place in a.dims)


def transpose(node: fx.Node, a: SimpleNamespace) -> Dims:
    dims = list(a.self)
    first, second = (getattr(a, "dim0", -1), getattr(a, "dim1", -2)) if len(dims) > 1 else (0, 0)
    dims[first], dims[second] = dims[second], dims[first]
    return Dims(dims)


def unsqueeze(node: fx.Node, a: SimpleNamespace) -> Dims:
    place = a.dim % (len(a.self) + 1)
    return Dims([*a.self[:place], fixed(1), *a.self[place:]])


def squeeze(node: fx.Node, a: SimpleNamespace) -> Dims:
    given = getattr(a, "dim", None)
    places = range(len(a.self)) if given is None else given if isinstance(given, list | tuple) else [given]
    gone = {place % len(a.self) for place in places}
    return Dims(dim for place, dim in enumerate(a.self) if place not in gone or dim.size != 1)


def expand(node: fx.Node, a: SimpleNamespace) -> Dims:
    """Repeated entries are equal, so that any order of them is as good."""
    shape = shape_of(node)
    dims = [*map(fixed, [1] * (len(shape) - len(a.self))), *a.self]
    return Dims(dim if dim.size == n else Dim(n) for dim, n in zip(dims, shape, strict=True))


def repeat(node: fx.Node, a: SimpleNamespace) -> Dims:
    dims = [*map(fixed, [1] * (len(a.repeats) - len(a.self))), *a.self]
    return Dims(product([Dim(times), dim]) for dim, times in zip(dims, a.repeats, strict=True))


def concatenation(node: fx.Node, a: SimpleNamespace) -> Dims:
    rank = len(shape_of(node))
    tensors = [dims for dims in a.tensors if len(dims) == rank]
    place = a.dim % rank
    for others in tensors[1:]:
        for i, (x, y) in enumerate(zip(tensors[0], others, strict=True)):
            if i != place:
                unify(x, y)
    return Dims([*tensors[0][:place], concat(dims[place] for dims in tensors), *tensors[0][place + 1 :]])


def stack(node: fx.Node, a: SimpleNamespace) -> Dims:
    for others in a.tensors[1:]:
        for x, y in zip(a.tensors[0], others, strict=True):
            unify(x, y)
    place = a.dim % (len(a.tensors[0]) + 1)
    return Dims([*a.tensors[0][:place], fixed(len(a.tensors)), *a.tensors[0][place:]])


def parts(node: fx.Node, a: SimpleNamespace) -> tuple[Dims, ...]:
    """split, in parts of one or of several sizes."""
    place = a.dim % len(a.self)
    shapes = [x.shape for x in node.meta["val"]]
    found = cut(a.self[place], [shape[place] for shape in shapes])
    return tuple(Dims([*a.self[:place], part, *a.self[place + 1 :]]) for part in found)


def part(node: fx.Node, a: SimpleNamespace) -> Dims:
    """slice"""
    place = a.dim % len(a.self)
    dim, length = a.self[place], shape_of(node)[place]
    first = 0 if a.start is None else a.start + dim.size * (a.start < 0)
    if a.step != 1:
        fix(dim)
        here = fixed(length)
    else:
        first = min(max(first, 0), dim.size)
        here = cut(dim, [first, length, dim.size - first - length])[1]
    return Dims([*a.self[:place], here, *a.self[place + 1 :]])


def select(node: fx.Node, a: SimpleNamespace) -> Dims:
    place, size = a.dim % len(a.self), a.self[a.dim].size
    cut(a.self[place], [a.index % size, 1, size - 1 - a.index % size])
    return Dims([*a.self[:place], *a.self[place + 1 :]])


def unbind(node: fx.Node, a: SimpleNamespace) -> tuple[Dims, ...]:
    place = a.dim % len(a.self)
    fix(a.self[place])
    return (Dims([*a.self[:place], *a.self[place + 1 :]]),) * len(node.meta["val"])


def halves(node: fx.Node, a: SimpleNamespace) -> Dims:
    """glu: one half of a dimension gates the other."""
    place = a.dim % len(a.self)
    first, second = cut(a.self[place], [a.self[place].size // 2] * 2)
    unify(first, second)
    return Dims([*a.self[:place], first, *a.self[place + 1 :]])


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value has equal entries: made so, seen through views, and written by nobody."""
    made: dict[fx.Node, fx.Node] = {}  # of each candidate, the node that made its memory
    written = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        known = isinstance(node.target, torch._ops.OpOverload)
        rule = rule_of(node) if known else None
        if rule is constant:
            made[node] = node
        elif sources and sources[0] in made and (node.target is operator.getitem or rule in _VIEWS):
            made[node] = made[sources[0]]
        elif known and node.target._schema.is_mutable:
            written |= {made[source] for source in sources if source in made}
    return {node for node, origin in made.items() if origin not in written}


_VIEWS = (view, permute, transpose, unsqueeze, squeeze, expand, parts, part, select, unbind)


def _named(names: str, rule: Rule) -> Iterator[tuple[str, Rule]]:
    return ((name, rule) for name in names.split())


RULES: dict[str, Rule] = dict([
    *_named("hardswish _prelu_kernel log_sigmoid_forward copy fill zero polar complex", pointwise),
    *_named("clone detach alias lift_fresh lift_fresh_copy contiguous _to_copy to _softmax _log_softmax", unchanged),
    *_named("zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty", constant),
    *_named("sum mean amax amin var std var_mean std_mean prod logsumexp linalg_vector_norm norm any all nansum", reduction),
    *_named("flip roll cumsum cumprod cummax sort topk argmax argmin max min kthvalue median logcumsumexp", along),
    *_named("constant_pad_nd", padding),
    *_named("tril triu", triangle),
    *_named("mm bmm addmm baddbmm mv addmv dot", matrix_product),
    *_named("linear", linear),
    *_named("convolution", convolution),
    *_named("embedding", embedding),
    *_named("index", index),
    *_named("index_select", index_select),
    *_named("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm", channel_norm),
    *_named("native_layer_norm _fused_rms_norm", layer_norm),
    *_named("native_group_norm", group_norm),
    *_named("view _unsafe_view reshape _reshape_alias", view),
    *_named("as_strided", restrided),
    *_named("permute", permute),
    *_named("transpose t", transpose),
    *_named("unsqueeze", unsqueeze),
    *_named("squeeze", squeeze),
    *_named("expand", expand),
    *_named("repeat", repeat),
    *_named("cat", concatenation),
    *_named("stack", stack),
    *_named("split split_with_sizes unsafe_split unsafe_split_with_sizes", parts),
    *_named("slice", part),
    *_named("select", select),
    *_named("unbind", unbind),
    *_named("glu", halves),
])  # fmt: skip

_SPATIAL = re.compile(r"_?(adaptive_)?(max|avg)_pool\dd|_?upsample_\w+\dd|(reflection|replication)_pad\dd")
_OF_SHAPE = ("transpose_", "t_", "squeeze_", "unsqueeze_")  # change the shape of a tensor that others may refer to


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a node's operation, None if there is none."""
    name, tags = node.target._schema.name.removeprefix("aten::"), node.target.tags  # type: ignore[union-attr]
    if name.startswith("_scaled_dot_product"):
        return attention
    if torch.Tag.nondeterministic_seeded in tags or (name in _OF_SHAPE and len(node.all_input_nodes[0].users) > 1):
        return None
    known = RULES.get(name) or RULES.get(name.rstrip("_"))
    if known is not None:
        return known
    if _SPATIAL.match(name):
        return spatial
    return pointwise if torch.Tag.pointwise in tags else None
