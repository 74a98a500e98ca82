"""Files that are written whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises OSError, the old file intact, when the disk refuses.
    """
    with writing(path) as file:
        file.write(content)


@contextlib.contextmanager
def writing(path: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes its place whole at the end of the block, or not at all.

    flush: wait until it is on the disk, so that a power cut cannot undo it; otherwise call `flush_file` before relying on
    that. Raises OSError, the old file intact, when the disk refuses.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def flush_file(path: Path) -> None:
    """Wait until a file's content is on the disk, whoever wrote it. Raises OSError when the disk refuses."""
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> OSError:
    return OSError(f"{path}: cannot be written ({error.strerror}); make room or choose another --out, then repeat")


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON (no NaN) atomically, indented."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
