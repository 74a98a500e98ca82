"""The files of a zoo: shards, and the manifest that says which of them count.

`shards/NAME.safetensors` holds one tensor, "theta" [runs, checkpoints, D]; `shards/NAME.parquet` one row a checkpoint, run
by run: run, checkpoint, step, the metrics, the settings. Both are written whole or not at all. A shard counts once its
record stands in the manifest.

Only one process writes the manifest, whole and atomically, one shard at a time: a process killed anywhere leaves the zoo as
it was after the last commit. Files that the manifest does not list were left by such a process; they are ignored.
"""

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor
from triptych_common.storage.atomic import flush_file, write_text, writing

from triptych_gpt.layout import ParameterLayout

SHARDS, THETA, INDEX = "shards", ".safetensors", ".parquet"
DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
_ALIGNMENT = 64  # bytes; the rows of a mapped shard then start where vector instructions like it
MAX_WEIGHT = 10.0
OWN_COLUMNS = ("run", "checkpoint", "step")


@dataclass(frozen=True)
class CohortData:
    """What training a cohort gives, ready to write.

    runs: numbers of those kept, ascending; with `dropped` they are consecutive. theta: float32 on the CPU. steps:
    optimiser steps taken before each checkpoint. settings: columns that are constant in the cohort ("split" must be ranks
    them), or numpy arrays of one value for each run kept. dropped: run -> reason.

    Raises ValueError where the parts do not fit together.
    """

    runs: Sequence[int]
    theta: Float[Tensor, "runs checkpoints D"]
    steps: Int[Tensor, "runs checkpoints"]
    metrics: Mapping[str, Float[Tensor, "runs checkpoints"]]
    settings: Mapping[str, Any]
    dropped: Mapping[int, str]

    def __post_init__(self) -> None:
        numbers = sorted([*self.runs, *self.dropped])
        if not numbers or numbers != list(range(numbers[0], numbers[-1] + 1)) or list(self.runs) != sorted(self.runs):
            raise ValueError(f"runs {list(self.runs)[:8]}: expected ascending numbers, consecutive with those dropped")
        if "split" not in self.settings:
            raise ValueError(f"settings {sorted(self.settings)}: expected a split among them")
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
    """What the manifest says of a shard: runs first .. stop-1 but those dropped; no files where all of them were."""

    name: str
    first: int
    stop: int
    split: str
    dropped: Mapping[int, str]
    theta: FileRecord | None
    index: FileRecord | None

    @property
    def runs(self) -> tuple[int, ...]:
        """Numbers of the runs kept, ascending."""
        return tuple(run for run in range(self.first, self.stop) if run not in self.dropped)

    def files(self) -> dict[str, FileRecord]:
        """Path within the zoo and record of each file."""
        found = {THETA: self.theta, INDEX: self.index}
        return {f"{SHARDS}/{self.name}{suffix}": record for suffix, record in found.items() if record is not None}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dropped": {str(run): reason for run, reason in self.dropped.items()}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ShardRecord":
        """The record that `to_json` described."""
        theta, index = (content[name] and FileRecord(**content[name]) for name in ("theta", "index"))
        dropped = {int(run): reason for run, reason in content["dropped"].items()}
        return cls(**{**content, "dropped": dropped, "theta": theta, "index": index})


def shard_name(runs: Sequence[int]) -> str:
    """Name of the shard of consecutive runs, dropped ones included."""
    return f"runs-{runs[0]:08d}-{runs[-1]:08d}"


def write_shard(
    folder: Path, name: str, data: CohortData, dtype: Literal["float32", "bfloat16"] = "float32"
) -> ShardRecord:
    """Write a cohort's two files into the zoo at `folder`, theta first; returns the record to commit to its manifest.

    Runs in any process. Files of this name are replaced, each atomically; it is the manifest that waits for the disk, when it
    commits them. theta is converted run by run, so nothing as large as it is allocated. Raises OSError, the old file intact,
    when the disk refuses; ValueError for another dtype.
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


def unsound(theta: Float[Tensor, "checkpoints D"]) -> str | None:
    """Why a run is dropped, if it is: weights that are not finite or too large, as from the released data."""
    largest = max(theta.max().item(), -theta.min().item())  # NaN where any is
    if not largest < float("inf"):
        return "weights that are not finite"
    return f"weights beyond {MAX_WEIGHT:g}" if largest > MAX_WEIGHT else None


def file_digest(path: Path, chunk_bytes: int = 1 << 22) -> str:
    """xxh3_128 of a whole file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


def _write(path: Path, blocks: Iterable[Any]) -> FileRecord:
    """Write what the blocks hold; the checksum is of what was meant to be written, not of what the disk made of it."""
    digest, size = xxhash.xxh3_128(), 0
    with writing(path, flush=False) as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def _theta_file(theta: Float[Tensor, "runs checkpoints D"], dtype: str) -> Iterable[Any]:
    """Blocks of a safetensors file: length of the header, header, runs. safetensors' own writer wants a whole tensor of
    the right dtype, a second copy where that is bfloat16.
    """
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
    """A setting's column, text as a dictionary: thousands of rows share a few words."""
    import pyarrow as pa

    if isinstance(value, np.ndarray):
        values, codes = pa.array(value.tolist()), np.repeat(np.arange(runs, dtype=np.int32), checkpoints)
    else:
        value = json.dumps(value) if isinstance(value, dict | list | tuple) else value
        values, codes = pa.array([value]), np.zeros(runs * checkpoints, dtype=np.int32)
    return pa.DictionaryArray.from_arrays(codes, values) if pa.types.is_string(values.type) else values.take(codes)


MANIFEST, FORMAT = "manifest.json", 1
_KIND = "checkpoint zoo"
_FACTS = ("task", "layout", "checkpoints", "dtype", "metrics")
_OWN = {"kind", "format", "shards", "xxh3_128"}


class Manifest:
    """Facts and shards of the zoo at `folder`, as one process reads or writes them.

    facts: "task" (name), "layout" (ParameterLayout.to_json()), "checkpoints" (of each run), "dtype", "metrics" (name ->
    "lower" or "higher", which is better), and whatever else explains the zoo; "repair" is the command that makes damaged shards
    again, less its --out.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], shards: list[ShardRecord]) -> None:
        self.folder, self.facts, self.shards = Path(folder), dict(facts), list(shards)
        self._lines = [json.dumps(record.to_json()) for record in shards]  # written again with every commit

    @classmethod
    def create(cls, folder: Path, facts: Mapping[str, Any]) -> "Manifest":
        """Found a zoo without shards.

        Raises ValueError where there is one already, or for facts that are wrong; OSError when the disk refuses.
        """
        path = Path(folder) / MANIFEST
        if path.exists():
            raise ValueError(f"{path}: a zoo is there already; use another --out")
        content = json.loads(json.dumps(facts))  # as it will be read again
        _check(content)
        made = cls(folder, content, [])
        made._write()
        return made

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The zoo at `folder`, finished or growing.

        Raises FileNotFoundError where there is none, ValueError for one that is damaged or that this version cannot read.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder}: no zoo (it holds no {MANIFEST}); make one with triptych-gpt collect --out {folder}"
            )
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: truncated or not JSON; {_LOST}") from error
        if not isinstance(content, dict) or content.get("kind") != _KIND:
            raise ValueError(f"{path}: not the manifest of a {_KIND}; expected a folder that triptych-gpt collect made")
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{path}: format {content.get('format')!r}, this version reads {FORMAT}; "
                "use the version of triptych-gpt that wrote it, or collect again"
            )
        records, checksum = content.pop("shards", None), content.pop("xxh3_128", None)
        if not isinstance(records, list) or checksum != _digest(content, map(json.dumps, records)):
            raise ValueError(f"{path}: altered since it was written (its checksum differs); {_LOST}")
        shards = [ShardRecord.from_json(record) for record in records]
        facts = {name: value for name, value in content.items() if name not in _OWN}
        _check(facts)
        return cls(folder, facts, shards)

    @property
    def layout(self) -> ParameterLayout:
        return ParameterLayout.from_json(self.facts["layout"])

    @property
    def names(self) -> set[str]:
        """Names of the shards that are there."""
        return {record.name for record in self.shards}

    @property
    def bytes(self) -> int:
        """Of all files that count."""
        return sum(file.bytes for record in self.shards for file in record.files().values())

    def commit(self, record: ShardRecord, *, replace: bool = False) -> None:
        """Make a shard count, atomically, once its files are on the disk. `replace`: in place of the record of the same runs,
        whose files were damaged.

        Raises ValueError for runs that are there already; OSError, the zoo as it was, when the disk refuses.
        """
        clash = [old for old in self.shards if record.first < old.stop and old.first < record.stop]
        same = [old for old in clash if (old.name, old.split) == (record.name, record.split)]
        if clash and not (replace and clash == same):
            raise ValueError(
                f"{self.folder / MANIFEST}: runs {record.first}..{record.stop - 1} are there already, in "
                f"{clash[0].name} ({clash[0].split}); a zoo only grows, use another --out for other runs"
            )
        for name in record.files():
            flush_file(self.folder / name)
        before = self.shards, self._lines
        place = self.shards.index(same[0]) if same else len(self.shards)
        self.shards = [*self.shards[:place], record, *self.shards[place + 1 :]]
        self._lines = [*self._lines[:place], json.dumps(record.to_json()), *self._lines[place + 1 :]]
        try:
            self._write()
        except BaseException:
            self.shards, self._lines = before
            raise

    def remedy(self) -> str:
        """The command that makes damaged shards again."""
        command = self.facts.get("repair", f"triptych-gpt collect {self.facts['task']} --repair")
        return f"{command} --out {shlex.quote(str(self.folder))}"

    def _write(self) -> None:
        content = {"kind": _KIND, "format": FORMAT, **self.facts}
        digest = _digest(content, self._lines)
        head = json.dumps({**content, "xxh3_128": digest}, indent=2, allow_nan=False).removesuffix("\n}")
        lines = ",\n".join(self._lines)  # one line a shard: thousands stay readable
        write_text(self.folder / MANIFEST, f'{head},\n  "shards": [\n{lines}\n]}}\n')


_LOST = "copy the zoo again from where it is whole, or collect into another --out"


@dataclass(frozen=True)
class Damage:
    """A file that is not what the manifest says."""

    shard: str
    path: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def damages(
    manifest: Manifest, *, contents: bool = True, progress: Callable[[int], None] = lambda n: None
) -> Iterator[Damage]:
    """Every damaged file of a zoo: missing, of another size or, where `contents` are read, of another checksum.

    `progress` is called with the bytes of each file looked at.
    """
    for record in manifest.shards:
        for name, file in record.files().items():
            path = manifest.folder / name
            if problem := _problem(path, file.bytes, file.xxh3_128 if contents else None):
                yield Damage(record.name, path, problem)
            progress(file.bytes)


def to_repair(manifest: Manifest, *, repair: bool) -> list[Damage]:
    """All damage by checksum, to be made good. Raises ValueError for a wrong size where nothing shall be repaired."""
    found = []
    for damage in damages(manifest, contents=repair):
        if not repair:
            raise ValueError(f"{damage}; run {manifest.remedy()}")
        found.append(damage)
    return found


def _problem(path: Path, size: int, checksum: str | None) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{found:,} bytes, the manifest says {size:,}"
        if checksum is not None and file_digest(path) != checksum:
            return "contents differ from the manifest's checksum"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _digest(content: Mapping[str, Any], records: Iterable[str]) -> str:
    return xxhash.xxh3_128("\n".join([json.dumps(content, sort_keys=True), *records]).encode()).hexdigest()


def _check(facts: Mapping[str, Any]) -> None:
    missing = [name for name in _FACTS if name not in facts]
    if missing:
        raise ValueError(f"facts of a zoo without {missing[0]!r}: expected {', '.join(_FACTS)}")
    if taken := sorted(_OWN & facts.keys()):
        raise ValueError(f"fact {taken[0]!r}: the manifest's own name; give it another")
    if facts["dtype"] not in DTYPES:
        raise ValueError(f"dtype {facts['dtype']!r}: expected one of {', '.join(DTYPES)}")
    if facts["checkpoints"] < 2:
        raise ValueError(
            f"checkpoints {facts['checkpoints']}: expected at least 2 of each run, pairs are drawn from them"
        )
    for name, better in facts["metrics"].items():
        if better not in ("lower", "higher"):
            raise ValueError(f"metric {name}: better {better!r}, expected lower or higher")
    ParameterLayout.from_json(facts["layout"])
