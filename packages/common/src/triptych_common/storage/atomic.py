"""Atomic writing of files and folders: under a temporary name, which replaces the old content only once complete.

When the disk refuses, every writer raises an OSError that names the file and a remedy, and the old content is intact.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

PARTIAL = ".partial"  # suffix of unfinished files and folders; a killed process can leave them behind


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON (no NaN) atomically, indented."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with writing(path) as file:
        file.write(content)


@contextlib.contextmanager
def writing(path: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file for writing that replaces `path` at the end of the block.

    flush: wait until it is on the disk, so that a power cut cannot undo it; otherwise call `flush_file` before relying on it.
    """
    with replacing(path, flush=flush) as partial, partial.open("wb") as file:
        yield file


@contextlib.contextmanager
def replacing(path: Path, *, flush: bool = True, refusals: tuple[type[Exception], ...] = (OSError,)) -> Iterator[Path]:
    """Yield a temporary path for the block to write a file to; it replaces `path` at the end unless the block fails.

    flush: as in `writing`. refusals: the exceptions by which the writer reports that the disk refused.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if flush:  # before the rename: a file system may otherwise put the name on the disk before the content
            sync(partial)
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, Exception) and isinstance(error, (OSError, *refusals)):
            raise cannot_write(path, error) from error
        raise


@contextlib.contextmanager
def new_folder(path: Path, *, replaces: str) -> Iterator[Path]:
    """Yield a temporary folder for the block to fill; it is moved to `path` at the end unless the block fails.

    replaces: an existing folder at `path` is replaced if it is empty or holds a file of this name.
    Raises ValueError if anything else exists at `path`.
    """
    if path.exists() and not (path.is_dir() and ((path / replaces).is_file() or not any(path.iterdir()))):
        raise ValueError(f"{path}: holds something else (no {replaces}); choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=PARTIAL, dir=path.parent))
    try:
        whole = temporary / "new"
        whole.mkdir()
        yield whole
        if path.exists():
            path.rename(temporary / "old")
        whole.rename(path)
    except (SafetensorError, OSError) as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_file(path: Path) -> None:
    """`sync`, but raises an OSError that names the file and a remedy when the disk refuses."""
    try:
        sync(path)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> OSError:
    """The OSError for a disk that refused, naming the file and a remedy."""
    return OSError(f"{path}: cannot be written ({reason(error)}); make room or choose another --out, then repeat")


def reason(error: Exception) -> str:
    """The cause of an error of the disk, in a few words."""
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
