"""Large files compared with their checksums once: what was found whole is remembered until its size or times change."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from typing_extensions import TypedDict

from triptych_common.progress import Progress
from triptych_common.storage.files import read_json, write_json

VERIFIED = ".verified.json"


class _Seen(TypedDict):
    checksum: str
    bytes: int
    modified: int
    changed: int


def verify_once(
    folder: Path,
    checksums: Mapping[str, str],
    verify: Callable[[str], object],
    *,
    damaged: dict[str, str] | None = None,
) -> None:
    """Call `verify` for every file of a folder that is not known to be whole, and remember those for which it returned.

    checksums: file, relative to the folder -> recorded checksum. verify: compares a file's contents with it, and raises
        ValueError if they differ. damaged: gets the message about each such file by its name; without it, the first is raised.
    What is known is in `.verified.json`, with the file's size and its times of modification and of change (nanoseconds): a copy
    is verified again. In a folder that cannot be written to, every call verifies everything.
    """
    seen: dict[str, _Seen] = {}
    with contextlib.suppress(OSError, ValueError):  # a lost or damaged record only costs time
        seen = read_json(folder / VERIFIED, dict[str, _Seen], remedy="")
    found = {name: _stamp(folder / name, checksum) for name, checksum in checksums.items()}
    whole = {name: stamp for name, stamp in found.items() if seen.get(name) == stamp}
    if len(whole) == len(found):
        return
    try:
        with Progress(f"verifying {folder}", len(found), "file") as progress:
            for name, stamp in found.items():
                if name not in whole:
                    try:
                        verify(name)
                        whole[name] = stamp  # taken before reading: a file that changes meanwhile will be read again
                    except ValueError as error:
                        if damaged is None:
                            raise
                        damaged[name] = str(error)
                progress.advance()
    finally:
        with contextlib.suppress(OSError):
            write_json(folder / VERIFIED, whole)


def _stamp(path: Path, checksum: str) -> _Seen:
    status = path.stat()
    # The time of change, too, which a program that keeps the time of modification cannot set.
    modified, changed = status.st_mtime_ns, status.st_ctime_ns
    return {"checksum": checksum, "bytes": status.st_size, "modified": modified, "changed": changed}
