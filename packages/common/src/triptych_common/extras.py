"""Packages that only some features need: extras of this project's packages, imported where they are used."""

from importlib import import_module
from typing import Any


def import_extra(module: str, message: str, name: str | None = None) -> Any:
    """Import a module, or what it calls `name`.

    message: says what needs the module and how to install it. Raises ImportError with it if the module is absent, with the
    reason if it is there but cannot be imported.
    """
    try:
        found = import_module(module)
        return getattr(found, name) if name else found
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise ImportError(message) from error
        raise _broken(module, error) from error
    except (ImportError, RuntimeError) as error:  # diffusers raises RuntimeError for what its lazy modules lack
        raise _broken(module, error) from error


def _broken(module: str, error: Exception) -> ImportError:
    reason = str(error).strip().splitlines()[-1]
    return ImportError(
        f"{module}: installed, but cannot be imported ({reason}); install it again, or give it more memory"
    )
