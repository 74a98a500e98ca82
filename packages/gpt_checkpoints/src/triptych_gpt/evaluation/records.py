"""Results as JSON holds them, and as a table on the console."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate


def plain(value: Any) -> Any:
    """A result as JSON can hold it: tensors and sequences as lists, dataclasses, named tuples and mappings as objects, numbers that
    are not finite as None. Raises TypeError for anything else."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [plain(entry) for entry in value]
    raise TypeError(f"a {type(value).__name__} has no place in a result; expected numbers, text, lists or tensors")


def interval(estimate: Mapping[str, float | None]) -> str:
    """An estimate as `plain` returns it, as text: the value and its 95% interval, if it has one."""
    value = estimate["value"]
    return "not finite" if value is None else str(Estimate(value, estimate["low"], estimate["high"]))


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: cells padded to the width of their column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
