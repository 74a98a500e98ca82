"""Dimensions of tensors whose order is not known yet, as derivation by tracing infers it.

A dimension is free (its entries may be permuted), fixed, a product of dimensions (row-major, as after a view), or a concatenation
of them. Dimensions that must have one order are unified, and take on each other's structure. Whatever cannot be expressed becomes
fixed, which is always sound: a fixed dimension is one that no permutation moves.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Literal


class Unknown(Exception):
    """An operation whose effect on the order of dimensions is not known."""


class Dim:
    """A dimension of `size` entries; `root` gives what it has become."""

    __slots__ = ("kind", "link", "parts", "size")

    def __init__(self, size: int, kind: "Kind" = "free", parts: Sequence["Dim"] = ()) -> None:
        self.size, self.parts = size, list(parts)
        self.kind: Kind = "fixed" if size <= 1 else kind
        self.link: Dim | None = None

    @property
    def root(self) -> "Dim":
        dim = self
        while dim.link is not None:
            dim = dim.link
        return dim

    def become(self, kind: Literal["product", "concat"], parts: Sequence["Dim"]) -> None:
        """Give a free dimension, or one that is described otherwise, this structure."""
        self.kind, self.parts = kind, list(parts)


Kind = Literal["free", "fixed", "product", "concat"]


def fixed(size: int) -> Dim:
    return Dim(size, "fixed")


def fix(dim: Dim) -> None:
    """Let no permutation move it."""
    dim = dim.root
    if dim.kind != "fixed":
        parts, dim.parts = dim.parts, []
        dim.kind = "fixed"
        for part in parts:
            fix(part)


def is_fixed(dim: Dim) -> bool:
    return dim.root.kind == "fixed" or (dim.root.kind != "free" and all(map(is_fixed, dim.root.parts)))


def product(parts: Iterable[Dim]) -> Dim:
    """The dimension that a view makes of these, the last one changing fastest."""
    parts = [part.root for part in parts if part.size > 1]
    parts = list(chain.from_iterable(part.parts if part.kind == "product" else [part] for part in parts))
    if len(parts) < 2:
        return parts[0] if parts else fixed(1)
    return Dim(math.prod(part.size for part in parts), "product", parts)


def concat(parts: Iterable[Dim]) -> Dim:
    """These dimensions, one after another."""
    parts = [part.root for part in parts if part.size]
    parts = list(chain.from_iterable(part.parts if part.kind == "concat" else [part] for part in parts))
    if len(parts) < 2:
        return parts[0] if parts else fixed(0)
    return Dim(sum(part.size for part in parts), "concat", parts)


def split(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """A dimension as a product of dimensions of these sizes."""
    return _divided(dim.root, sizes, _split, trivial=1)


def _split(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    if dim.kind == "fixed":
        return [fixed(size) for size in sizes]
    if dim.kind == "free":
        dim.become("product", [Dim(size) for size in sizes])
        return list(dim.parts)
    if dim.kind == "concat":  # equal segments: a fixed number of one
        first, *others = cut(dim, [dim.size // sizes[0]] * sizes[0])
        for other in others:
            unify(first, other)
        if dim.root.kind == "fixed":
            return None
        dim.become("product", [fixed(sizes[0]), first])
        return [dim.parts[0], *split(first, sizes[1:])]
    left, found = list(dim.parts), []
    for size in sizes:
        taken, missing = [], size
        while missing > 1:
            part = left.pop(0).root
            if missing % part.size == 0:
                taken.append(part)
                missing //= part.size
            elif part.size % missing == 0:
                now, later = split(part, [missing, part.size // missing])
                taken.append(now)
                left.insert(0, later)
                missing = 1
            else:
                return None
        found.append(product(taken))
    return found


def cut(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """A dimension as segments of these sizes, one after another."""
    return _divided(dim.root, sizes, _cut, trivial=0)


def _divided(
    dim: Dim, sizes: Sequence[int], divide: Callable[[Dim, list[int]], list[Dim] | None], trivial: int
) -> list[Dim]:
    """A dimension divided into parts of these sizes; fixed if that cannot be done. Parts of the trivial size do not count."""
    wanted = [size for size in sizes if size != trivial]
    found = [dim] * len(wanted) if len(wanted) < 2 else divide(dim, wanted)
    if found is None:
        fix(dim)
        found = [fixed(size) for size in wanted]
    rest = iter(found)
    return [fixed(trivial) if size == trivial else next(rest) for size in sizes]


def _cut(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    if dim.kind == "fixed":
        return [fixed(size) for size in sizes]
    if dim.kind == "free":
        dim.become("concat", [Dim(size) for size in sizes])
        return list(dim.parts)
    if dim.kind == "product":  # between entries of the outermost factor
        outer, inner = dim.parts[0], dim.parts[1:]
        stride = dim.size // outer.size
        if any(size % stride for size in sizes):
            return None
        return [product([part, *inner]) for part in cut(outer, [size // stride for size in sizes])]
    left, found = list(dim.parts), []
    for size in sizes:
        taken, missing = [], size
        while missing:
            part = left.pop(0)
            if part.size > missing:
                part, later = cut(part, [missing, part.size - missing])
                left.insert(0, later)
            taken.append(part)
            missing -= part.size
        found.append(concat(taken))
    return found


def unify(a: Dim, b: Dim) -> None:
    """Let both have one order. Raises Unknown for different sizes."""
    a, b = a.root, b.root
    if a.size != b.size:
        raise Unknown
    if a is b:
        return
    if "fixed" in (a.kind, b.kind):
        fix(a)
        fix(b)
    elif b.kind == "free":
        b.link = a
    elif a.kind == "free":
        a.link = b
    elif a.kind == b.kind == "product":
        _unify_products(a, b)
    elif a.kind == b.kind == "concat":
        _unify_concats(a, b)
    else:
        whole, segments = (a, b) if a.kind == "product" else (b, a)
        theirs = list(segments.parts)
        for mine, other in zip(cut(whole, [part.size for part in theirs]), theirs, strict=True):
            unify(mine, other)


def _unify_products(a: Dim, b: Dim) -> None:
    mine, theirs = list(a.parts), list(b.parts)
    while mine and theirs:
        x, y = mine.pop(0), theirs.pop(0)
        if x.size % y.size and y.size % x.size:
            fix(a)
            fix(b)
            return
        if x.size > y.size:
            x, rest = split(x, [y.size, x.size // y.size])
            mine.insert(0, rest)
        elif y.size > x.size:
            y, rest = split(y, [x.size, y.size // x.size])
            theirs.insert(0, rest)
        unify(x, y)


def _unify_concats(a: Dim, b: Dim) -> None:
    mine, theirs = list(a.parts), list(b.parts)
    while mine and theirs:
        x, y = mine.pop(0), theirs.pop(0)
        if x.size > y.size:
            x, rest = cut(x, [y.size, x.size - y.size])
            mine.insert(0, rest)
        elif y.size > x.size:
            y, rest = cut(y, [x.size, y.size - x.size])
            theirs.insert(0, rest)
        unify(x, y)


Part = tuple[Dim | None, int]  # a free dimension or None, and its size


def segments(dim: Dim) -> list[list[Part]]:
    """A dimension as segments of factors.

    Fixes what cannot be written so, segments within units that are permuted: to be called again until nothing changes.
    """
    dim = dim.root
    if dim.kind == "free":
        return [[(dim, dim.size)]]
    if dim.kind == "fixed":
        return [[(None, dim.size)]]
    if dim.kind == "concat":
        return _repeated(list(chain.from_iterable(segments(part) for part in dim.parts)))
    found: list[list[Part]] = [[]]
    for part in reversed(dim.parts):
        outer = segments(part)
        if len(found) > 1:
            if len(outer) > 1 or outer[0][0][0] is not None or len(outer[0]) > 1:
                fix(dim)
                return [[(None, dim.size)]]
            found = found * part.size
        else:
            found = [[*own, *found[0]] for own in outer]
    return _repeated(found)


def _repeated(found: list[list[Part]]) -> list[list[Part]]:
    """Equal segments as one segment with a fixed first factor; neighbours that are fixed are merged."""
    merged: list[list[Part]] = []
    for segment in found:
        if merged and len(segment) == len(merged[-1]) == 1 and segment[0][0] is merged[-1][0][0] is None:
            merged[-1] = [(None, merged[-1][0][1] + segment[0][1])]
        else:
            merged.append(segment)
    if len(merged) > 1 and all(segment == merged[0] for segment in merged):
        return [[(None, len(merged)), *merged[0]]]
    return merged
