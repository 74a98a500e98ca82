"""Constraints on the fields of settings, declared beside the type and checked by one function.

    @dataclass(frozen=True)
    class Settings(Checked):
        batch_size: Annotated[int, Gt(0)] = 64
        micro_batch: Annotated[int | None, Ge(1), FREE] = None
        precision: Literal["float32", "bf16"] = "float32"

    Settings(batch_size=0)  # ValueError: batch_size 0: expected a number above 0

A subclass that declares a field again, for another default or help text, keeps the constraints and marks of its bases.
"""

import math
import operator
import types
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from inspect import get_annotations
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin


class Constraint:
    """What a value must satisfy; within `Annotated` it also holds for the types that `storage.files` reads."""

    def __contains__(self, value: Any) -> bool:
        raise NotImplementedError

    def expected(self, value: Any) -> str:
        """What was expected instead of `value`, for an error."""
        raise NotImplementedError

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """The protocol by which pydantic takes a constraint of another library's from `Annotated`."""
        from pydantic import AfterValidator

        return AfterValidator(self._checked).__get_pydantic_core_schema__(source, handler)

    def _checked(self, value: Any) -> Any:
        if value is not None and value not in self:
            raise OutOfBounds(f"{value!r:.60}: expected {self.expected(value)}")
        return value


class OutOfBounds(ValueError):
    """A value that does not satisfy its constraint."""


@dataclass(frozen=True)
class Interval(Constraint):
    """Bounds of a number, or of every number in a tuple; NaN satisfies none.

    gt, ge, lt, le: above, at least, below, at most. wanted: replaces the bounds in error messages.
    """

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    wanted: str | None = None

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, tuple):
            return all(number in self for number in value)
        bounds = (self.gt, operator.gt), (self.ge, operator.ge), (self.lt, operator.lt), (self.le, operator.le)
        return all(bound is None or compare(value, bound) for bound, compare in bounds)

    def expected(self, value: Any) -> str:
        if self.wanted is not None:
            return self.wanted
        if self.ge is not None and self.le is not None:
            kind = {float: "a number in ", tuple: "numbers of "}.get(type(value), "")
            return f"{kind}{self.ge}..{self.le}"
        words = ("above", self.gt), ("at least", self.ge), ("below", self.lt), ("at most", self.le)
        bounds = " and ".join(f"{word} {bound}" for word, bound in words if bound is not None)
        if bounds.startswith("above") and " and " not in bounds:
            return f"a number {bounds}"
        return f"a number of {bounds}" if isinstance(value, float) and " and " not in bounds else bounds


def Gt(bound: float, wanted: str | None = None) -> Interval:
    """The interval above `bound`."""
    return Interval(gt=bound, wanted=wanted)


def Ge(bound: float, wanted: str | None = None) -> Interval:
    """The interval from `bound` upwards."""
    return Interval(ge=bound, wanted=wanted)


FINITE = Interval(gt=-math.inf, lt=math.inf, wanted="finite numbers")


@dataclass(frozen=True)
class OneOf(Constraint):
    """One of several names, for fields where a `Literal`, which is checked without this, cannot list them."""

    names: Iterable[str]

    def __contains__(self, value: object) -> bool:
        return value in tuple(self.names)

    def expected(self, value: Any) -> str:
        return one_of(value, self.names)


class Filled(Constraint):
    """A container that holds something."""

    def __contains__(self, value: Any) -> bool:
        return len(value) > 0

    def expected(self, value: Any) -> str:
        return "one entry or more"


FILLED = Filled()


def printable(text: str) -> str:
    """A text in which characters that a terminal acts on are escaped: controls, marks of direction, ends of lines.

    Names of files, tensors and classes come from others, and may hold them.
    """
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c
        for c in text
    )


def one_of(word: object, names: Iterable[object]) -> str:
    """The expectation in an error about a mistyped word: all names, and a suggestion if one is similar."""
    import difflib

    known = [str(name) for name in names]
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"one of {', '.join(known)}" + "".join(f"; did you mean {name!r}?" for name in near)


FREE = object()  # marks a field that does not affect a run's results


class Checked:
    """Base of dataclasses whose fields are checked on construction.

    None passes if the type admits it. A subclass with further checks calls `super().__post_init__()`.
    Raises ValueError, naming the field, its value and the expectation.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # for `storage.files`

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, (constraints, optional) in _rules(cls).items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            for constraint in constraints:
                if value not in constraint:
                    shown = repr(value) if isinstance(constraint, OneOf) else value
                    none = ", or None for none" if optional and getattr(constraint, "gt", None) is not None else ""
                    raise ValueError(f"{name} {shown}: expected {constraint.expected(value)}{none}")
        if hasattr(super(), "__post_init__"):  # that of a further base class, if several are combined
            super().__post_init__()  # type: ignore[misc]


def identity(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass instance that decide a run's results: all but those marked `FREE`, as a dictionary."""
    free = free_names(type(settings))
    return {name: value for name, value in asdict(settings).items() if name not in free}


def free_names(cls: type) -> set[str]:
    """The names of a dataclass's fields that are marked `FREE`."""
    return {name for name, metadata in _metadata(cls).items() if FREE in metadata}


def defaults_of(cls: type) -> dict[str, Any]:
    """The defaults of a dataclass's fields that have plain ones."""
    return {field.name: field.default for field in fields(cls) if field.default is not MISSING}


@cache
def _metadata(cls: type) -> dict[str, tuple[Any, ...]]:
    """The metadata of each field's annotations in all classes that declare it, base classes first."""
    out: dict[str, tuple[Any, ...]] = {}
    for base in reversed(cls.__mro__):
        for name, annotation in get_annotations(base).items():
            out[name] = out.get(name, ()) + getattr(annotation, "__metadata__", ())
    return out


@cache
def _rules(cls: type) -> dict[str, tuple[tuple[Constraint, ...], bool]]:
    """The constraints of each field that has any, and whether the field may be None."""
    rules = {}
    for field in fields(cls):
        # The type is that of the class that declares the field last; constraints are those of all classes.
        declared = next(a[field.name] for a in map(get_annotations, cls.__mro__) if field.name in a)
        members = list(_members(declared))
        constraints = [m for m in _metadata(cls)[field.name] if isinstance(m, Constraint)]
        if members and all(get_origin(m) is Literal or m is type(None) for m in members):
            constraints.append(OneOf(tuple(name for m in members for name in get_args(m))))
        if constraints:
            rules[field.name] = tuple(constraints), type(None) in members
    return rules


def _members(annotation: Any) -> Iterator[Any]:
    """The members of a union, or the type itself, without metadata."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation
