"""Files: written atomically, and JSON read with bounds and checked against a type before anything uses it.

Writing goes to a temporary name, which replaces the old content only once it is complete. When the disk refuses, every
writer raises an OSError that names the file and a remedy, and the old content is intact. Reading takes a type:

    class Row(TypedDict):
        step: Annotated[int, Ge(0)]
        loss: NotRequired[float]

    row = parse(line, Row, source="runs/a/metrics.jsonl, line 7", remedy="remove the line")
    config = read_json(path, DiTConfig, remedy="make or fetch it again")

A type is anything that pydantic knows: dataclasses (unknown keys are refused in those that derive from `Checked`), TypedDicts
of typing_extensions, containers, unions, literals. Values are never converted, but for what JSON lacks: tuples and paths.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from safetensors import SafetensorError

from triptych_common.fields import Constraint, OutOfBounds, printable

if TYPE_CHECKING:
    from pydantic import TypeAdapter

LONGEST_NAME = 255  # bytes, on the file systems of today
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
    if len(os.fsencode(partial.name)) > LONGEST_NAME:  # the file's own name may just fit
        partial = path.with_name(hashlib.sha256(os.fsencode(path.name)).hexdigest() + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # of a killed process; a link there would lead to a file of somebody else
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

    replaces: an existing folder at `path` is replaced if it is empty, hidden files aside, or holds a file of this name.
    Raises ValueError if anything else exists at `path`.
    """
    if path.exists() and not (
        path.is_dir() and ((path / replaces).is_file() or all(entry.name.startswith(".") for entry in path.iterdir()))
    ):
        raise ValueError(f"{path}: holds something else (no {replaces}); choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".*{PARTIAL}"):
        if re.fullmatch(rf"\.{re.escape(path.name[:40])}-\w{{8}}{re.escape(PARTIAL)}", left.name):
            shutil.rmtree(left, ignore_errors=True)  # by a killed process
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}-", suffix=PARTIAL, dir=path.parent))
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
    """The cause of an error of the disk or of a library, in a few words: what a file holds may be thousands of them."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


# --- reading


def fitting(name: str, suffix: str) -> str:
    """A file's name of at most `LONGEST_NAME` bytes: name and suffix, or a beginning of the name, a hash of all of it, suffix."""
    whole = os.fsencode(name)
    if len(whole) + len(suffix) <= LONGEST_NAME:
        return name + suffix
    ending = f"-{hashlib.sha256(whole).hexdigest()[:12]}{suffix}"
    return whole[: LONGEST_NAME - len(ending)].decode(errors="ignore") + ending


class PlainName(Constraint):
    """The name of a file beside the one that names it: no path, nothing hidden, 200 characters at most."""

    def __contains__(self, value: Any) -> bool:
        return (
            0 < len(value) <= 200 and value.isprintable() and not value.startswith(".") and not set(value) & set("/\\:")
        )

    def expected(self, value: Any) -> str:
        return "the name of a file in the same folder"


FileName = Annotated[str, PlainName()]
LARGEST_BYTES = 1 << 28  # of a file: a manifest of a million shards stays below
SHOWN, LONGEST_REASON = 60, 200  # characters of a wrong value, and of a library's error


def read_json(
    path: Path, kind: Any = dict[str, Any], *, remedy: str, largest: int = LARGEST_BYTES, finite: bool = True
) -> Any:
    """The content of a JSON file.

    kind: the type that it must have. remedy: what to do about a damaged file, the end of the error message.
    largest: bytes that are read at most. finite: refuse NaN and numbers that no float holds, which the parser takes.
    Raises FileNotFoundError for an absent file, ValueError, with one line, for one that is too large, not JSON, nested deeper
    than 200 levels, or not of that type.
    """
    return parse(read_bytes(path, largest=largest), kind, source=str(path), remedy=remedy, finite=finite)


def read_bytes(path: Path, *, largest: int = LARGEST_BYTES) -> bytes:
    """The bytes of a regular file: one that is a pipe or a device is refused, since reading it may never end.

    Raises FileNotFoundError for an absent file, ValueError for one that is not regular or has more than `largest` bytes.
    """
    with regular(path).open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{path}: larger than the {largest:,} bytes that such a file may have")
    return content


def regular(path: Path) -> Path:
    """The path itself. Raises ValueError for a folder, and for a pipe or device, since opening or reading it may never end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: {'a folder' if path.is_dir() else 'a pipe or device'}, expected a file")
    return path


def changed_ns(paths: Iterable[Path]) -> int:
    """When the last of some files, or of those in some folders, was written or changed, in nanoseconds."""
    files = (file for path in paths for file in (path.iterdir() if path.is_dir() else (path,)) if file.exists())
    # The time of change, too, which a program that keeps the time of modification cannot set.
    return max((max(status.st_mtime_ns, status.st_ctime_ns) for status in map(Path.stat, files)), default=0)


def parse(text: str | bytes, kind: Any, *, source: str, remedy: str, finite: bool = True) -> Any:
    """`read_json` of a text; `source` names it in errors."""
    from pydantic import ValidationError

    try:
        found = _adapter(kind).validate_json(text, strict=True)
        if finite:
            _refuse_infinite(text if isinstance(text, bytes) else text.encode())
        return found
    except ValidationError as error:
        raise ValueError(f"{source}: {_explained(error)}; {remedy}") from error
    except ArithmeticError as error:  # of a class's own check, on numbers that are too large
        raise ValueError(f"{source}: {error}; {remedy}") from error


_INFINITE = re.compile(rb"NaN|Infinity|[eE]\+?\d{3}")


def _refuse_infinite(text: bytes) -> None:
    """Raise ArithmeticError for numbers in a JSON text that are none, or that no float holds: the parser takes them."""

    def finite(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ArithmeticError(f"{digits[:20]} is no finite number")
        return value

    if _INFINITE.search(text):  # rarely, and perhaps within a string
        json.loads(text, parse_float=finite, parse_constant=finite)


def check(value: Any, kind: Any, *, source: str, remedy: str) -> Any:
    """`parse` of a value that was read from JSON already, such as a part of a larger file."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{source}: nothing that JSON can hold; {remedy}") from error
    return parse(text, kind, source=source, remedy=remedy)


def rows(
    path: Path, kind: Any = dict[str, Any], *, remedy: str = "restore it", damaged: list[str] | None = None
) -> Iterator[Any]:
    """The lines of a file of JSON lines; a last one without its newline, which a killed process leaves, is left out.

    damaged: gets what is wrong with each damaged line; without it, the first such line raises ValueError.
    """
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], start=1):
        try:
            yield parse(line, kind, source=f"{path}, line {number:,}", remedy=remedy)
        except ValueError as error:
            if damaged is None:
                raise
            damaged.append(str(error).removesuffix(f"; {remedy}"))


def open_ended(kind: Any) -> Any:
    """Decorator of TypedDicts: keys that they do not declare are kept, where they would be dropped."""
    kind.__pydantic_config__ = {"extra": "allow"}
    return kind


def recorded_command(text: Any, program: str) -> str | None:
    """A command that a file records, if it can be shown as advice: one of `program`, of plain words, that names no code.

    program: such as "triptych-dit encode".
    """
    words = text.split(" ") if isinstance(text, str) and len(text) < 1000 else []
    plain = all(re.fullmatch(r"[\w./,:=+-]+", word) and ".py" not in word for word in words)
    return text if plain and words[: program.count(" ") + 1] == program.split(" ") else None


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter  # takes a tenth of a second

    return TypeAdapter(kind)


def _explained(error: Any) -> str:
    """The first of pydantic's complaints, as one printable line that names the place and the wrong value."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"not JSON ({first['ctx']['error']})"
    place = printable(".".join(map(str, first["loc"])))
    if isinstance(complaint := first.get("ctx", {}).get("error"), OutOfBounds):
        return printable(f"{place} {complaint}")
    if complaint is not None:  # of a class's own check, which names field and value
        return printable(f"{place}: {complaint}" if place else str(complaint))
    value = repr(first["input"])
    shown = value if len(value) <= SHOWN else f"{value[:SHOWN]}..."
    what = {"missing": "missing", "unexpected_keyword_argument": "unknown", "extra_forbidden": "unknown"}.get(
        first["type"], f"{shown}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    )
    return f"{place or 'content'}: {what}"
