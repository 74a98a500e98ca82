"""The run directory: a locked folder with the config, provenance, metrics and checkpoints of a run."""

import json
import zlib
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NotRequired

from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from triptych_common.cli import echo
from triptych_common.fields import Ge
from triptych_common.storage.files import (
    cannot_write,
    check,
    open_ended,
    read_json,
    rows,
    write_json,
    write_text,
    writing,
)

if TYPE_CHECKING:
    from triptych_common.data.contents import Contents


@open_ended
class _Config(TypedDict):
    config: dict[str, Any]
    contents: NotRequired[dict[str, dict[str, Any]]]
    crc32: NotRequired[str]
    hardware: NotRequired[dict[str, Any]]
    device: NotRequired[str]


@open_ended
class _Row(TypedDict):
    step: Annotated[int, Ge(0)]


_SEAL = ".metrics.crc32"


class Sum(NamedTuple):
    """Length of a file, bytes, and the CRC-32 of its content."""

    size: int
    crc32: int

    @classmethod
    def of(cls, content: bytes) -> "Sum":
        return cls(len(content), zlib.crc32(content))

    def then(self, more: bytes) -> "Sum":
        """Of the content with more behind it."""
        return Sum(self.size + len(more), zlib.crc32(more, self.crc32))


def _crc32(content: Any) -> str:
    """Of JSON, whatever its layout: a flipped bit in a name or a number leaves valid JSON."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


class RunDirectory:
    """A folder that one process at a time may write to; use it as a context manager.

    identity: the part of the config that decides the run's results. A folder that holds another identity is refused, so
        that repeating a command can only resume its run. contents: by the name of a part of it, the images that it stands for;
        where a run has recorded them, they are compared in its place. free: names of what may differ, at any depth, also where
        an earlier version recorded it. defaults: of settings; one that an earlier version lacked may have its default.
    is_main: on ranks other than the main one nothing is locked or written. device: the type of device that computes, such as
        "cpu", for `compare_hardware`. tensorboard: write TensorBoard events too.

    Entering raises ValueError for another identity or a folder in use, OSError for a folder that cannot be written.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], *, contents: "Mapping[str, Contents] | None" = None,
        free: Collection[str] = (), defaults: Mapping[str, Any] | None = None,
        is_main: bool = True, device: str = "", tensorboard: bool = False,
    ) -> None:  # fmt: skip
        self.path, self.is_main = Path(path), is_main
        self.identity = json.loads(json.dumps(identity))  # tuples become lists, as they will when config.json is read
        self.checkpoints = self.path / "checkpoints"
        self._contents, self._free = dict(contents or {}), free
        self._defaults = json.loads(json.dumps(dict(defaults or {}), default=str))
        self._device, self._begun = device, dict[str, Any]()
        self._want_tensorboard = tensorboard
        self._tensorboard: Any = None
        self._sum: Sum | None = None  # of metrics.jsonl, once it is known

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

    def __exit__(self, *_: object) -> None:
        if self.is_main:
            if self._tensorboard is not None:
                self._tensorboard.close()
            self._lock.release()

    def _check_identity(self) -> None:
        path = self.path / "config.json"
        if not path.exists():
            from triptych_common.storage.provenance import provenance  # needed only here, and slow to import

            known = {"contents": self._contents, "device": self._device}
            self._begun = {"config": self.identity, **{k: v for k, v in known.items() if v}, **provenance()}
            self._write_config()
            return
        remedy = "delete this file and repeat the run's own settings, or use another --out"
        self._begun = read_json(path, _Config, remedy=remedy)
        if (written := self._begun.pop("crc32", None)) is not None and written != _crc32(self._begun):
            echo(f"{path}: changed since it was written, so what it says of the run may be wrong")
        recorded = self._begun.get("contents", {}).keys() & self._contents.keys()
        for name in sorted(recorded):
            from triptych_common.data.contents import Contents, changes  # few runs have pictures

            known = check(self._begun["contents"][name], Contents, source=str(path), remedy=remedy)
            if changed := changes(known, self._contents[name]):
                raise ValueError(
                    f"{self.path}: {name} changed since it began: {changed}; put back what was there, or use another --out"
                )
        before, now = (
            without(self._free, {key: value for key, value in settings.items() if key not in recorded})
            for settings in (self._begun["config"], self.identity)
        )
        added = {key for key in self._defaults.keys() & now.keys() - before.keys() if now[key] == self._defaults[key]}
        if changed := differences(before, without(added, now)):
            raise ValueError(
                f"{self.path}: holds a run with {changed}; repeat its settings to resume it, or use another --out"
            )

    def recorded(self, name: str) -> Any:
        """A setting as the run's config.json has it, also an earlier version's; None where it has none."""
        return self._begun.get("config", {}).get(name)

    def record(self, name: str, value: Any) -> None:
        """Change a setting in the run's config.json, such as the length of a run that goes on."""
        if self.is_main:
            self._begun["config"][name] = value
            self._write_config()

    def _write_config(self) -> None:
        write_json(self.path / "config.json", {**self._begun, "crc32": _crc32(self._begun)})

    def compare_hardware(self) -> None:
        """Report, where a run goes on, what is not as where it began and may change the last digits of its results."""
        import torch

        # Sums of many terms are split over threads, so that rounding depends on their number.
        threads, now = self._begun.get("hardware", {}).get("threads"), torch.get_num_threads()
        device = self._begun.get("device", self._device)
        if self._device != device:
            found = f"device is {self._device}, the run had {device}", f"pass --device {device}"
        elif self._device == "cpu" and threads not in (None, now):
            found = f"thread count is {now}, the run had {threads}", f"set OMP_NUM_THREADS={threads}"
        else:
            return
        echo(f"{found[0]}: results may differ in the last digits; {found[1]} for the same bytes")

    @property
    def metrics_path(self) -> Path:
        """The file of metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row, which must have "step", to metrics.jsonl. Raises OSError when the disk refuses."""
        if not self.is_main:
            return
        line = json.dumps(row, allow_nan=False) + "\n"
        try:
            with self.metrics_path.open("a") as file:
                file.write(line)
        except OSError as error:
            raise cannot_write(self.metrics_path, error) from error
        self._seal((self._sum or Sum.of(self.metrics_path.read_bytes()[: -len(line)])).then(line.encode()))
        if self._want_tensorboard:
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter

                # What an interrupted run logged beyond its checkpoint is hidden, as `truncate_metrics` removes it.
                self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=row["step"])
            for name, value in row.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, row["step"])

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, without damaged ones, which are reported, and without a half-written last one."""
        if self._sum is None:
            self._check_seal()
        if not self.metrics_path.exists():
            return []
        damaged: list[str] = []
        found = list(rows(self.metrics_path, _Row, damaged=damaged))
        if damaged:
            echo(f"left out: {len(damaged):,} damaged rows, the first: {damaged[0]}")
        return found

    def truncate_metrics(self, step: int) -> None:
        """Remove rows after `step`, which a resumed run writes again, and a half-written last one."""
        if not self.is_main:
            return
        kept = [row for row in self.metrics() if row["step"] <= step]
        if self.metrics_path.exists():
            content = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept)
            write_text(self.metrics_path, content)
            self._seal(Sum.of(content.encode()))

    def _seal(self, now: "Sum") -> None:
        """Write the length and the checksum of metrics.jsonl beside it."""
        # A flipped bit in a number or a name leaves valid JSON, and metrics decide which model is kept.
        self._sum = now
        with writing(self.path / _SEAL, flush=False) as file:
            file.write(f"{now.size} {now.crc32:08x}\n".encode())

    def _check_seal(self) -> None:
        """Report a metrics.jsonl that is lost, or not as it was written but for what was appended after the last seal."""
        try:
            size, crc32 = (self.path / _SEAL).read_text().split()
            sealed = Sum(int(size), int(crc32, 16))
        except (OSError, ValueError):  # of an earlier version, or interrupted
            return
        if not self.metrics_path.exists():
            echo(f"{self.metrics_path}: lost; its rows are not made again, and weights do not depend on it")
            return
        content = self.metrics_path.read_bytes()
        if Sum.of(content[: sealed.size]) != sealed:
            echo(
                f"{self.metrics_path}: changed since it was written, so its numbers may be wrong; weights do not depend on it"
            )


def without(names: Collection[str], tree: Any) -> Any:
    """Nested dictionaries without the entries of these names."""
    if not isinstance(tree, dict):
        return tree
    return {key: without(names, child) for key, child in tree.items() if key not in names}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries flattened into one, with keys joined by dots."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, child in tree.items():
        flat |= flatten(child, f"{prefix}.{key}" if prefix else key)
    return flat


def differences(before: Any, now: Any) -> str:
    """The first four settings in which two JSON trees differ, with both values; empty if the trees are equal."""
    before, now = flatten(before), flatten(now)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    return ", ".join(f"{key}={before.get(key)!r} (now {now.get(key)!r})" for key in changed[:4])
