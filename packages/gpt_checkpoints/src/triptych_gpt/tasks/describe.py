"""Names of callables for recipes, which two processes must give alike."""

from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any


def describe(thing: Any) -> str:
    """A callable as a recipe notes it, alike in every process: a function by its name, anything else with its settings.

    Raises ValueError for what has neither.
    """
    if isinstance(thing, partial):
        parts = [*map(describe, thing.args), *(f"{name}={describe(value)}" for name, value in thing.keywords.items())]
        return f"{describe(thing.func)}({', '.join(parts)})"
    if is_dataclass(thing) and not isinstance(thing, type):
        parts = [f"{part.name}={describe(getattr(thing, part.name))}" for part in fields(thing)]
        return f"{type(thing).__qualname__}({', '.join(parts)})"
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    if " at 0x" in repr(thing):
        raise ValueError(f"{type(thing).__name__} object: its settings are unknown; make it a dataclass or a function")
    return repr(thing)
