"""Where commands write: only into folders that they marked as theirs or found empty, one process at a time."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from triptych_common.storage.files import cannot_write, read_json, write_json

MARK, LOCK = ".triptych.json", ".triptych.lock"
_RUN = "config.json"  # by which run directories of versions without marks are known


class _Mark(TypedDict):
    command: str


@contextlib.contextmanager
def claimed(folder: Path, command: str, *, overwrite: bool = False) -> Iterator[None]:
    """Hold a folder, which is made if absent, as the place that `command` writes to.

    command: such as "triptych-dit sample"; repeated, it finds its mark and may write again. overwrite: also write among files
        that it did not make.
    Afterwards a folder in which nothing was written is as it was before: absent or empty.
    Raises ValueError for a file, a folder with files of others, or one that another process writes to; OSError where the
    disk refuses.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out {folder}: a file, expected a folder")
    if not overwrite and (stranger := _stranger(folder, command)):
        raise ValueError(f"out {folder}: holds {stranger}; choose another --out, or pass --overwrite to write among it")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{folder}: another process is writing to this folder; wait for it or use another --out"
        ) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        if not (folder / MARK).exists():
            write_json(folder / MARK, {"command": command})
        yield
    finally:
        if {path.name for path in folder.iterdir()} <= {MARK, LOCK, ".lock"}:
            for name in (MARK, ".lock", LOCK):
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a file that appeared meanwhile
                for path in made:
                    path.rmdir()
        elif not (folder / MARK).exists():  # the command put a new folder in place of the old one
            write_json(folder / MARK, {"command": command})
        lock.release()


def refuse_to_overwrite(path: Path, *, overwrite: bool = False) -> None:
    """Raise ValueError if a file that a command is to write exists already, unless `overwrite`."""
    if path.exists() and not overwrite:
        raise ValueError(f"out {path}: exists already; choose another --out, or pass --overwrite to replace it")


def _stranger(folder: Path, command: str) -> str | None:
    """What in a folder the command did not write, in a few words; None in a folder that is absent, empty or its own."""
    mark, run = folder / MARK, folder / _RUN
    if mark.is_file():
        owner = read_json(mark, _Mark, remedy="delete it and repeat with --overwrite")["command"]
        return None if owner == command else f"what {json.dumps(owner)} wrote"
    if run.is_file() and str(_made_by(run)).startswith((command, "python -m triptych_")):
        return None
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []
    return f"{len(names):,} files that {command} did not write, such as {names[0]}" if names else None


def _made_by(config: Path) -> object:
    """The command that a run's config names; None for another file."""
    with contextlib.suppress(ValueError):
        return read_json(config, remedy="").get("command")
    return None
