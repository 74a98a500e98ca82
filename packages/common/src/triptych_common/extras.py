"""Packages that only some features need: extras of this project's packages, imported where they are used."""

from importlib import import_module
from typing import Any


def import_extra(module: str, message: str) -> Any:
    """Import a module. Raises ImportError with `message`, which says what needs it and how to install it, if it is absent."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(message) from error
