"""Checkpoints: one safetensors file each, checksummed, complete or absent.

Tensors and a JSON state share a file, so that no interruption can leave halves of two steps: it is written under a
temporary name, flushed to disk and renamed.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_PREFIX, _EXTRA, _SUFFIX, _PARTIAL = "step-", "-extra", ".safetensors", ".partial"


def write(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able state to `path`, atomically.

    Raises OSError when the disk refuses; `path` then holds what it held before.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state, sort_keys=True)
    metadata = {"state": text, "sha256": _digest(contiguous, text)}
    partial = path.with_name(path.name + _PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(contiguous, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (SafetensorError, RuntimeError, OSError) as error:  # a full disk arrives as any of the three
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(
            f"{path}: cannot be written ({reason}); make room or choose another --out, then repeat"
        ) from error


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on CPU) and state of a file that `write` made.

    Raises ValueError when the file is truncated, altered or foreign, OSError when it is absent or cannot be opened.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    path.open("rb").close()  # one that may not be read is not a damaged one
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file; {_remedy(path)}") from error
    if "state" not in metadata or "sha256" not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not one of triptych's checkpoints")
    if _digest(tensors, metadata["state"]) != metadata["sha256"]:
        raise ValueError(f"{path}: checksum differs from the recorded one; {_remedy(path)}")
    return tensors, json.loads(metadata["state"])


def content_sha256(path: Path) -> str:
    """The recorded hash of a file's tensors and state. The file's own bytes are no identity: safetensors writes metadata in
    any order.
    """
    with safe_open(path, framework="pt") as file:
        return file.metadata()["sha256"]


def step_path(folder: Path, step: int, *, extra: bool = False) -> Path:
    """Where a step's checkpoint lies; an extra one is not of the schedule but of an interruption."""
    return folder / f"{_PREFIX}{step:08d}{_EXTRA if extra else ''}{_SUFFIX}"


def steps_in(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}"))


def scheduled_in(folder: Path) -> list[Path]:
    """Checkpoints of a folder without extra ones, oldest first."""
    return [path for path in steps_in(folder) if not path.stem.endswith(_EXTRA)]


def prune(folder: Path, keep: int, spare: Sequence[Path] = ()) -> None:
    """Remove all but the last `keep` checkpoints and those in `spare`, and what an interrupted write left."""
    for path in [*steps_in(folder)[:-keep], *folder.glob(f"*{_PARTIAL}")]:
        if path not in spare:
            path.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _remedy(path: Path) -> str:
    older = [p.name for p in steps_in(path.parent) if p.name < path.name]
    if path.name.startswith(_PREFIX):
        return f"delete it to go on from {older[-1]}" if older else "delete it to start afresh"
    return "make or fetch it again"
