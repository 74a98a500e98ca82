"""Shards: the checkpoints of a cohort of runs as one safetensors file and one Parquet index.

`shards/NAME.safetensors` holds one tensor, "theta" [runs, checkpoints, D]; `shards/NAME.parquet` one row a checkpoint, run
by run: run, checkpoint, step, the metrics, the settings. Both are written whole or not at all. A shard counts once its
record stands in the manifest (`triptych_gpt.zoo.manifest`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor
from triptych_common.storage.atomic import writing

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
