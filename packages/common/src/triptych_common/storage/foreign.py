"""Files of other programs, read only as tensors and plain containers, since unpickling anything else runs code."""

import contextlib
import io
import pickle
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from triptych_common.storage.files import replacing


def read(path: Path, *, allow: Sequence[type] = ()) -> Any:
    """The content of a safetensors or torch.save file, on the CPU and memory-mapped if its format permits.

    allow: classes besides tensors and plain containers that may be unpickled; constructing them must be harmless.
    Raises FileNotFoundError for an absent file, ValueError for one that is damaged or holds other objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    path.open("rb").close()  # so that missing permission is not reported as damage
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        with torch.serialization.safe_globals(list(allow)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they concern formats that are rejected here anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError) as error:
        if objects := _refused(path, allow):
            raise ValueError(
                f"{path}: holds Python objects besides tensors ({', '.join(objects)}), which may run code when read; "
                "save its state dict alone where it was made, or get its weights as safetensors"
            ) from error
        raise _damaged(path) from error
    except (SafetensorError, OSError, ValueError, LookupError, EOFError, TypeError, AttributeError) as error:
        raise _damaged(path) from error


def read_bytes(content: bytes, where: str) -> Any:
    """A torch.save file in memory, as `read` reads one. Raises ValueError for one that is damaged or holds other objects."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{where}: damaged, or holds Python objects besides tensors; make or fetch it again"
        ) from error


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for any other file."""
    with contextlib.suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
        return file.metadata() or {}
    return {}


def write(path: Path, content: Any) -> None:
    """torch.save, atomically."""
    # a full disk can raise RuntimeError
    with replacing(path, refusals=(RuntimeError,)) as partial, partial.open("wb") as file:
        torch.save(content, file)


def _refused(path: Path, allow: Sequence[type]) -> list[str]:
    """Names of the classes and functions in a torch.save file that keep it from being read."""
    try:
        with torch.serialization.safe_globals(list(allow)):
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)[:3]
    except Exception:  # a damaged file can raise anything, and lists no objects
        return []


def _damaged(path: Path) -> ValueError:
    return ValueError(
        f"{path}: truncated, or neither a safetensors nor a torch.save file of weights; make or fetch it again"
    )
