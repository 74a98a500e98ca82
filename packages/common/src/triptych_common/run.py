"""The run directory: one locked folder with the resolved config, provenance, metrics and checkpoints of a run."""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout


class RunDirectory:
    """A folder that one process at a time may write to.

    `identity` is the part of the config that decides the run's results: entering a folder that holds another identity
    is refused, so that repeating a command can only resume it. On ranks other than the main one nothing is locked or
    written. Use as a context manager.

    Raises ValueError for another identity or a folder in use, OSError for one that cannot be written.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], *, is_main: bool = True, tensorboard: bool = False
    ) -> None:
        self.path, self.is_main = Path(path), is_main
        self.identity = json.loads(json.dumps(identity))
        self.checkpoints = self.path / "checkpoints"
        self._want_tensorboard, self._tensorboard = tensorboard, None

    def __enter__(self) -> "RunDirectory":
        if not self.is_main:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock", timeout=0)
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"{self.path}: another process is using this run directory; wait for it or use another --out"
            ) from error
        except OSError as error:
            raise OSError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from error
        try:
            self._check_identity()
            if self._want_tensorboard and find_spec("tensorboard") is None:
                raise ValueError("--tensorboard needs a package: pip install 'triptych-common[tensorboard]'")
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_main:
            if self._tensorboard is not None:
                self._tensorboard.close()
            self._lock.release()

    def _check_identity(self) -> None:
        path = self.path / "config.json"
        if not path.exists():
            write_json(path, {"config": self.identity, **provenance()})
            return
        try:
            before = json.loads(path.read_text())["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a run's config; delete the folder or use another --out") from error
        if changed := differences(before, self.identity):
            raise ValueError(
                f"{self.path}: holds a run with {changed}; repeat its settings to resume it, or use another --out"
            )

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl; it must hold "step"."""
        if not self.is_main:
            return
        line = json.dumps(row, allow_nan=False) + "\n"
        try:
            with self.metrics_path.open("a") as file:
                file.write(line)
        except OSError as error:
            raise _cannot_write(self.metrics_path, error) from error
        if self._want_tensorboard:
            if self._tensorboard is None:
                self._tensorboard = _summary_writer(self.path, purge_step=row["step"])
            for name, value in row.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, row["step"])

    def metrics(self) -> list[dict[str, Any]]:
        """Every complete row of metrics.jsonl."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def truncate_metrics(self, step: int) -> None:
        """Forget rows after `step`: those that a resumed run writes again, and a half-written last one."""
        if self.is_main and self.metrics_path.exists():
            rows = [json.dumps(row) + "\n" for row in self.metrics() if row["step"] <= step]
            write_text(self.metrics_path, "".join(rows))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, child in tree.items()
        for name, value in flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }


def differences(before: Any, now: Any) -> str:
    """The first few settings in which two JSON trees differ, with both values; empty where they are equal."""
    before, now = flatten(before), flatten(now)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    return ", ".join(f"{key}={before.get(key)!r} (now {now.get(key)!r})" for key in changed[:4])


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
            raise _cannot_write(path, error) from error
        raise


def flush_file(path: Path) -> None:
    """Wait until a file's content is on the disk, whoever wrote it. Raises OSError when the disk refuses."""
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> OSError:
    return OSError(f"{path}: cannot be written ({error.strerror}); make room or choose another --out, then repeat")


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON (no NaN) atomically, indented."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def provenance() -> dict[str, Any]:
    """What made a result: command, commit, versions and hardware."""
    return {"command": command_line(), "commit": git_commit(), "versions": versions(), "hardware": hardware()}


def command_line() -> str:
    """The command as a user would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # set under python -m
    program = Path(sys.argv[0]).name if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"
    return f"{program} {shlex.join(sys.argv[1:])}".strip()


def git_commit() -> str:
    """Commit of the source checkout this package runs from ("-dirty" with local changes), or "unknown"."""
    here = Path(__file__).parent
    try:
        options = {"cwd": here, "capture_output": True, "text": True, "timeout": 10, "check": True}
        if subprocess.run(["git", "ls-files", "--error-unmatch", __file__], **{**options, "check": False}).returncode:
            return "unknown"  # installed into some other project's checkout
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "triptych-common", "triptych-dit", "triptych-gpt", "triptych-gangealing"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _summary_writer(path: Path, purge_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path / "tensorboard"), purge_step=purge_step)
