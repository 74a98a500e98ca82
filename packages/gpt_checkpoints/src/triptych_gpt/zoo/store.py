"""The files of a zoo: shards, and the manifest that lists them.

`shards/NAME.safetensors` holds one tensor, "theta" [runs, checkpoints, D], and `shards/NAME.parquet` one row for each checkpoint,
run by run: run, checkpoint, step, the metrics, the settings. Both are written whole or not at all.

Only one process writes the manifest, whole and atomically, one shard at a time. A process killed anywhere leaves the zoo as it was
after the last commit; files that the manifest does not list were left by such a process, and are ignored.

`records/NAME.json` is a manifest of one shard, with all facts of the zoo: from these a lost or damaged manifest is made again.
"""

import contextlib
import hashlib
import json
import shlex
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor
from triptych_common.cli import echo
from triptych_common.fields import FILLED, Ge, OneOf
from triptych_common.storage.files import (
    FileName,
    check,
    flush_file,
    open_ended,
    read_bytes,
    read_json,
    recorded_command,
    regular,
    write_text,
    writing,
)
from triptych_common.storage.model_file import refuse_non_finite
from triptych_common.storage.verified import verify_once
from typing_extensions import TypedDict

from triptych_gpt.layout import ParameterLayout

SHARDS, RECORDS, THETA, INDEX = "shards", "records", ".safetensors", ".parquet"
DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
_ALIGNMENT = 64  # bytes of theta's start in a file, as fits vector instructions
MAX_WEIGHT = 10.0  # of the released data, too
MAX_RUNS = 1_000_000  # of a shard
OWN_COLUMNS = ("run", "checkpoint", "step")


@dataclass(frozen=True)
class CohortData:
    """The result of training a cohort, ready to write. Raises ValueError if its parts do not fit together."""

    runs: Sequence[int]  # numbers of those not dropped, ascending; consecutive together with the dropped ones
    theta: Float[Tensor, "runs checkpoints D"]  # float32 on the CPU
    steps: Int[Tensor, "runs checkpoints"]  # optimiser steps before each checkpoint
    metrics: Mapping[str, Float[Tensor, "runs checkpoints"]]
    settings: Mapping[str, Any]  # columns of one value, including "split", or numpy arrays of one value for each run
    dropped: Mapping[int, str]  # run -> reason

    def __post_init__(self) -> None:
        numbers = sorted([*self.runs, *self.dropped])
        if not numbers or numbers != list(range(numbers[0], numbers[-1] + 1)) or list(self.runs) != sorted(self.runs):
            raise ValueError(f"runs {list(self.runs)[:8]}: expected ascending numbers, consecutive with those dropped")
        if "split" not in self.settings:
            raise ValueError(f"settings {sorted(self.settings)}: expected a split, too")
        rows = (len(self.runs), self.theta.shape[1])
        for name, tensor in {"theta": self.theta[..., 0], "steps": self.steps, **self.metrics}.items():
            if tuple(tensor.shape) != rows:
                raise ValueError(f"{name}: {tuple(tensor.shape)} runs and checkpoints, expected {rows}")
        names = [*OWN_COLUMNS, *self.metrics, *self.settings]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"column {twice[0]}: named twice; give the metric or setting another name")
        for name, value in self.settings.items():
            if isinstance(value, np.ndarray) and value.shape != rows[:1]:
                raise ValueError(f"setting {name}: shape {value.shape}, expected one value for each of {rows[0]} runs")


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a whole file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class ShardRecord:
    """A shard in the manifest: runs first .. stop-1 but for dropped ones; without files if all of them were."""

    name: FileName
    first: Annotated[int, Ge(0)]
    stop: Annotated[int, Ge(1)]
    split: str
    dropped: Mapping[int, str]
    theta: FileRecord | None
    index: FileRecord | None

    def __post_init__(self) -> None:
        if not self.first < self.stop <= self.first + MAX_RUNS:
            raise ValueError(f"runs {self.first}..{self.stop - 1}: expected 1 to {MAX_RUNS:,} of a shard")

    @property
    def runs(self) -> tuple[int, ...]:
        """Numbers of the runs that were not dropped, ascending."""
        return tuple(run for run in range(self.first, self.stop) if run not in self.dropped)

    def files(self) -> dict[str, FileRecord]:
        """Path within the zoo and record of each file."""
        files = {THETA: self.theta, INDEX: self.index}
        return {f"{SHARDS}/{self.name}{suffix}": record for suffix, record in files.items() if record is not None}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dropped": {str(run): reason for run, reason in self.dropped.items()}}


def written_ns(manifest: "Manifest", record: ShardRecord) -> int:
    """When the first of a shard's files was written, in nanoseconds; for one without files, 0."""
    return min(((manifest.folder / name).stat().st_mtime_ns for name in record.files()), default=0)


def shard_name(runs: Sequence[int]) -> str:
    """Name of the shard of consecutive runs, including dropped ones."""
    return f"runs-{runs[0]:08d}-{runs[-1]:08d}"


def write_shard(
    folder: Path, name: str, data: CohortData, dtype: Literal["float32", "bfloat16"] = "float32"
) -> ShardRecord:
    """Write a cohort's two files into the zoo at `folder`, in any process; returns the record to commit to its manifest.

    Files of this name are replaced, each atomically; `Manifest.commit` waits for the disk. Raises OSError, the old file intact, if
    writing fails; ValueError for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    theta = index = None
    if len(data.runs):
        path = Path(folder) / SHARDS / name
        theta = _write(path.with_name(name + THETA), _theta_file(data.theta, dtype))
        index = _write(path.with_name(name + INDEX), [_index_file(data)])
    numbers = sorted([*data.runs, *data.dropped])
    return ShardRecord(name, numbers[0], numbers[-1] + 1, str(data.settings["split"]), dict(data.dropped), theta, index)


def theta_record(data: CohortData, dtype: str) -> FileRecord | None:
    """What `write_shard` would record of the weights; None if every run was dropped."""
    if not len(data.runs):
        return None
    digest, size = xxhash.xxh3_128(), 0
    for block in _theta_file(data.theta, dtype):
        digest.update(block)
        size += len(block)
    return FileRecord(size, digest.hexdigest())


def unsound(theta: Float[Tensor, "checkpoints D"]) -> str | None:
    """Why a run is dropped, if it is: weights that are not finite or too large."""
    largest = max(theta.max().item(), -theta.min().item())  # NaN where any is
    if not largest < float("inf"):
        return "weights that are not finite"
    return f"weights beyond {MAX_WEIGHT:g}" if largest > MAX_WEIGHT else None


def _write(path: Path, blocks: Iterable[Any]) -> FileRecord:
    """Write a file's blocks."""
    # The checksum is of what was meant to be written, not of what the disk made of it.
    digest, size = xxhash.xxh3_128(), 0
    with writing(path, flush=False) as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def _theta_file(theta: Float[Tensor, "runs checkpoints D"], dtype: str) -> Iterable[Any]:
    """Blocks of a safetensors file: length of the header, header, runs."""
    # Written by hand, since safetensors takes a whole tensor of the right dtype: a second copy of theta if that is bfloat16.
    code, torch_dtype = DTYPES[dtype]
    entry = {"dtype": code, "shape": list(theta.shape), "data_offsets": [0, theta.numel() * torch_dtype.itemsize]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "theta": entry}).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    yield len(header).to_bytes(8, "little") + header
    for run in theta:
        yield run.detach().to(torch_dtype).contiguous().view(-1).view(torch.uint8).numpy().data


def _index_file(data: CohortData) -> memoryview:
    import pyarrow as pa
    import pyarrow.parquet as pq

    runs, checkpoints = data.steps.shape
    columns: dict[str, Any] = {
        "run": np.repeat(np.asarray(data.runs, dtype=np.int32), checkpoints),
        "checkpoint": np.tile(np.arange(checkpoints, dtype=np.int32), runs),
        "step": data.steps.reshape(-1).to(torch.int64).numpy(),
        **{name: values.detach().reshape(-1).float().numpy() for name, values in data.metrics.items()},
        **{name: _setting(value, runs, checkpoints) for name, value in data.settings.items()},
    }
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return memoryview(buffer.getvalue())


def _setting(value: Any, runs: int, checkpoints: int) -> Any:
    """A setting's column; text is encoded as a dictionary, since thousands of rows share a few words."""
    import pyarrow as pa

    if isinstance(value, np.ndarray):
        values, codes = pa.array(value.tolist()), np.repeat(np.arange(runs, dtype=np.int32), checkpoints)
    else:
        value = json.dumps(value) if isinstance(value, dict | list | tuple) else value
        values, codes = pa.array([value]), np.zeros(runs * checkpoints, dtype=np.int32)
    return pa.DictionaryArray.from_arrays(codes, values) if pa.types.is_string(values.type) else values.take(codes)


MANIFEST, FORMAT = "manifest.json", 1
_KIND = "checkpoint zoo"
_OWN = {"kind", "format", "shards", "xxh3_128"}


@open_ended
class _Facts(TypedDict):
    task: str
    layout: Annotated[list[tuple[str, list[Annotated[int, Ge(1)]] | str]], FILLED]
    checkpoints: Annotated[int, Ge(2)]  # of each run, to make pairs of them
    dtype: Annotated[str, OneOf(DTYPES)]
    metrics: Annotated[dict[str, Literal["lower", "higher"]], FILLED]
    repair: NotRequired[str]
    recipe: NotRequired[dict[str, Any]]
    networks_at_once: NotRequired[Annotated[int, Ge(1)]]


class Manifest:
    """Facts and shards of the zoo at `folder`, in the order of their runs.

    facts: "task" (name), "layout" (ParameterLayout.to_json()), "checkpoints" (of each run), "dtype", "metrics" (name -> "lower" or
    "higher", which is better), and others; "repair" is the command that makes damaged shards again, without its --out.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], shards: Iterable[ShardRecord]) -> None:
        self.folder, self.facts = Path(folder), dict(facts)
        self.shards = sorted(shards, key=lambda record: record.first)
        self._lines = [json.dumps(record.to_json()) for record in self.shards]  # all are written with every commit

    @classmethod
    def create(cls, folder: Path, facts: Mapping[str, Any]) -> "Manifest":
        """Create a zoo without shards. Raises ValueError if there is one already, or for wrong facts; OSError if writing fails."""
        path = Path(folder) / MANIFEST
        if path.exists():
            raise ValueError(f"{path}: a zoo is there already; use another --out")
        content = json.loads(json.dumps(facts))  # as it will be read
        _check(content, "facts of a zoo")
        made = cls(folder, content, [])
        write_text(path, made._text([]))
        return made

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The zoo at `folder`. Raises FileNotFoundError if there is none, ValueError if it is damaged or of another version."""
        path = Path(folder) / MANIFEST
        try:
            return cls._parsed(path, Path(folder))
        except (FileNotFoundError, ValueError) as error:
            if (made := cls.from_records(folder)) is not None:
                problem = str(error).removeprefix(f"{path}: ").partition(";")[0]
                problem = "missing" if isinstance(error, FileNotFoundError) else problem
                remedy = f"run {made.remedy()}, which makes it again from {RECORDS}/"
                raise ValueError(f"{path}: {problem}; {remedy}") from error
            if isinstance(error, ValueError):
                raise
            remedy = f"make one with triptych-gpt collect --out {folder}"
            raise FileNotFoundError(f"{folder}: no zoo (it holds no {MANIFEST}); {remedy}") from error

    @classmethod
    def recover(cls, folder: Path) -> "Manifest | None":
        """The zoo at `folder`, from the records of its shards if its manifest is missing or damaged; None if there is none.

        Nothing is written until it is saved. Raises ValueError if shards are there, and nothing that lists them.
        """
        path = Path(folder) / MANIFEST
        try:
            return cls._parsed(path, Path(folder))
        except (FileNotFoundError, ValueError) as error:
            if (made := cls.from_records(folder)) is None and isinstance(error, ValueError):
                raise
        if made is None and any((Path(folder) / SHARDS).glob("runs-*")):
            problem = f"shards without their {MANIFEST} and {RECORDS}/"
            raise ValueError(f"{folder}: {problem}; put one of them back, or use another --out")
        return made

    @classmethod
    def from_records(cls, folder: Path) -> "Manifest | None":
        """The zoo that the whole ones of its shards' records make up; None if there are none.

        Raises ValueError for records of several zoos.
        """
        held: list[Manifest] = []
        for path in sorted((Path(folder) / RECORDS).glob("*.json")):
            with contextlib.suppress(ValueError, OSError):  # its shard is collected again
                one = cls._parsed(path, Path(folder))
                held += [one] if [record.name for record in one.shards] == [path.stem] else []
        if other := [one for one in held if one.facts != held[0].facts]:
            names = f"{held[0].shards[0].name} and {other[0].shards[0].name}"
            raise ValueError(f"{Path(folder) / RECORDS}: {names} are of different zoos; take away those of the other")
        return cls(folder, held[0].facts, [record for one in held for record in one.shards]) if held else None

    @classmethod
    def _parsed(cls, path: Path, folder: Path) -> "Manifest":
        """A manifest, or the record of a shard."""
        content = read_json(path, remedy=_LOST)
        if content.get("kind") != _KIND:
            raise ValueError(f"{path}: not the manifest of a {_KIND}; expected a folder that triptych-gpt collect made")
        if content.get("format") != FORMAT:
            remedy = "use the version of triptych-gpt that wrote it, or collect again"
            raise ValueError(f"{path}: format {content.get('format')!r}, this version reads {FORMAT}; {remedy}")
        records, checksum = content.pop("shards", None), content.pop("xxh3_128", None)
        if not isinstance(records, list) or checksum != _digest(content, map(json.dumps, records)):
            raise ValueError(f"{path}: altered since it was written (its checksum differs); {_LOST}")
        shards = check(records, list[ShardRecord], source=f"{path}: shards", remedy=_LOST)
        facts = {name: value for name, value in content.items() if name not in _OWN}
        _check(facts, str(path))
        return cls(folder, facts, shards)

    @property
    def layout(self) -> ParameterLayout:
        return ParameterLayout.from_json(self.facts["layout"])

    @property
    def bytes(self) -> int:
        """Of all files in the manifest."""
        return sum(file.bytes for record in self.shards for file in record.files().values())

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """Numbers of runs by split, and of dropped ones by reason."""
        runs, dropped = Counter[str](), Counter[str]()
        for record in self.shards:
            runs[record.split] += len(record.runs)
            dropped.update(record.dropped.values())
        return runs, dropped

    def commit(self, record: ShardRecord, *, replace: bool = False) -> None:
        """Add a shard to the zoo, atomically, once its files are on the disk.

        replace: the record of the same runs, whose files were damaged.
        Raises ValueError for runs that are there already; OSError, with the zoo as it was, if writing fails.
        """
        clash = [old for old in self.shards if record.first < old.stop and old.first < record.stop]
        same = [old for old in clash if (old.name, old.split) == (record.name, record.split)]
        if clash and not (replace and clash == same):
            there = f"runs {record.first}..{record.stop - 1} are there already, in {clash[0].name} ({clash[0].split})"
            remedy = "a zoo only grows, use another --out for other runs"
            raise ValueError(f"{self.folder / MANIFEST}: {there}; {remedy}")
        # The files first: the manifest must not list what a crash could still lose.
        for name in record.files():
            flush_file(self.folder / name)
        before = self.shards, self._lines
        place = bisect_left(self.shards, record.first, key=lambda old: old.first)
        after = place + len(same)
        self.shards = [*self.shards[:place], record, *self.shards[after:]]
        self._lines = [*self._lines[:place], json.dumps(record.to_json()), *self._lines[after:]]
        try:
            write_text(self.folder / MANIFEST, self._text(self._lines))
        except BaseException:
            self.shards, self._lines = before
            raise
        # The record last: whatever has one is in the manifest, so that records never contradict each other.
        self._write_record(place)

    def save(self) -> None:
        """Write what is missing or differs of the manifest and the records of its shards."""
        if _write_new(self.folder / MANIFEST, self._text(self._lines)):
            echo(f"{self.folder / MANIFEST}: written again, with {len(self.shards):,} shards")
        for place in range(len(self.shards)):
            self._write_record(place)

    def remedy(self) -> str:
        """What to run to make damaged shards again: the command in the manifest, if it can do nothing else."""
        text = self.facts.get("repair", f"triptych-gpt collect {self.facts['task']} --repair")
        command = recorded_command(text, "triptych-gpt collect") or recorded_command(text, "triptych-gpt import")
        if command:
            return f"{command} --out {shlex.quote(str(self.folder))}"
        return "triptych-gpt collect --repair with the task, settings and --out that made the zoo"

    def _write_record(self, place: int) -> None:
        path = self.folder / RECORDS / f"{self.shards[place].name}.json"
        _write_new(path, self._text(self._lines[place : place + 1]))

    def _text(self, lines: Sequence[str]) -> str:
        content = {"kind": _KIND, "format": FORMAT, **self.facts}
        head = json.dumps({**content, "xxh3_128": _digest(content, lines)}, indent=2, allow_nan=False)
        records = ",\n".join(lines)  # one line a shard: thousands stay readable
        return head.removesuffix("\n}") + f',\n  "shards": [\n{records}\n]}}\n'


_LOST = "copy the zoo again from where it is whole, or collect into another --out"


def _write_new(path: Path, text: str) -> bool:
    """Write a file unless that is its content; returns whether it was written."""
    with contextlib.suppress(OSError, ValueError):
        if read_bytes(path) == text.encode():
            return False
    write_text(path, text)
    return True


@dataclass(frozen=True)
class Damage:
    """A file that differs from the manifest."""

    shard: str
    path: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def damages(
    manifest: Manifest, *, contents: bool = True, progress: Callable[[int], None] = lambda n: None
) -> Iterator[Damage]:
    """Every damaged file of a zoo: missing, of another size or, if `contents` are read, of another checksum.

    progress: called with the number of bytes of each file.
    """
    for record in manifest.shards:
        for name, file in record.files().items():
            path = manifest.folder / name
            if problem := _problem(path, file.bytes, file.xxh3_128 if contents else None):
                yield Damage(record.name, path, problem)
            progress(file.bytes)


def refuse_damaged(manifest: Manifest, *, contents: bool) -> None:
    """Raises ValueError for a file that is missing, of another size or, if `contents` are read, of another checksum."""
    if damage := next(damages(manifest, contents=contents), None):
        raise ValueError(f"{damage}; run {manifest.remedy()}")


def verify_shards(manifest: Manifest) -> None:
    """Raises ValueError for a damaged file, or weights that are not finite; contents are read once, see `verify_once`."""
    refuse_damaged(manifest, contents=False)
    files = {name: file for record in manifest.shards for name, file in record.files().items()}

    def verify(name: str) -> None:
        path, file = manifest.folder / name, files[name]
        if problem := _problem(path, file.bytes, file.xxh3_128):
            raise ValueError(f"{path}: {problem}; run {manifest.remedy()}")
        if name.endswith(THETA):
            refuse_non_finite(load_file(path), str(path))

    verify_once(manifest.folder, {name: file.xxh3_128 for name, file in files.items()}, verify)


def to_repair(manifest: Manifest, *, repair: bool) -> list[Damage]:
    """All damage, to be repaired. Raises ValueError for any if nothing is to be repaired."""
    if repair:
        return list(damages(manifest))
    verify_shards(manifest)
    return []


def _problem(path: Path, size: int, checksum: str | None) -> str | None:
    try:
        found = regular(path).stat().st_size
        if found != size:
            return f"{found:,} bytes, the manifest says {size:,}"
        if checksum is not None:
            with path.open("rb") as file:
                if hashlib.file_digest(file, xxhash.xxh3_128).hexdigest() != checksum:
                    return "contents differ from the manifest's checksum"
    except FileNotFoundError:
        return "missing"
    except ValueError:
        return "no regular file"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _digest(content: Mapping[str, Any], records: Iterable[str]) -> str:
    return xxhash.xxh3_128("\n".join([json.dumps(content, sort_keys=True), *records]).encode()).hexdigest()


def _check(facts: Mapping[str, Any], source: str) -> None:
    if taken := sorted(_OWN & facts.keys()):
        raise ValueError(f"fact {taken[0]!r}: the manifest's own name; give it another")
    check(facts, _Facts, source=source, remedy=_LOST)
    try:
        ParameterLayout.from_json(facts["layout"])
    except ValueError as error:
        raise ValueError(f"{source}: layout: {error}") from error
