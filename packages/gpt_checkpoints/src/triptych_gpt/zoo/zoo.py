"""Reading a zoo: its runs as a table, metrics and steps as matrices, theta row by row from memory-mapped files."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor
from triptych_common.storage.files import regular

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.zoo.store import (
    DTYPES,
    INDEX,
    SHARDS,
    THETA,
    Damage,
    Manifest,
    ShardRecord,
    damages,
    refuse_damaged,
    verify_shards,
)

if TYPE_CHECKING:
    import pyarrow

Indices = Int[Tensor, " n"] | Int[np.ndarray, " n"] | Sequence[int]
_BLOCK_ROWS = 64  # bfloat16 rows converted at a time, while they are still in the cache


class RunTable(NamedTuple):
    """The runs of a zoo by number, without dropped ones, with their splits and places."""

    run: Int[np.ndarray, " runs"]
    split: Shaped[np.ndarray, " runs"]  # text
    shard: Int[np.ndarray, " runs"]  # index into the manifest's shards
    row: Int[np.ndarray, " runs"]  # within the shard


class Zoo:
    """A zoo, finished or growing, as it was when it was opened.

    A "row" below is a row of `runs`, not a run's number. Raises FileNotFoundError if there is no zoo, ValueError for a file that is
    missing or truncated; only `verify` and `verify_once` compare contents with their checksums.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        refuse_damaged(self.manifest, contents=False)
        self.facts: Mapping[str, Any] = self.manifest.facts
        self.task: str = self.facts["task"]
        self.layout: ParameterLayout = self.manifest.layout
        self.checkpoints: int = self.facts["checkpoints"]
        self.better: dict[str, str] = dict(self.facts["metrics"])
        self.runs = self._run_table()
        self._expected_rows = {r.name: len(r.runs) * self.checkpoints for r in self.manifest.shards}
        self._maps: dict[int, np.ndarray] = {}
        self._columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.runs.run)

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(self.better)

    @cached_property
    def splits(self) -> dict[str, int]:
        """Number of runs in each split that has any."""
        names, counts = np.unique(self.runs.split, return_counts=True)
        return dict(zip(names.tolist(), counts.tolist(), strict=True))

    @property
    def dropped(self) -> dict[int, str]:
        """Runs that were trained but dropped, and why."""
        return {run: reason for record in self.manifest.shards for run, reason in record.dropped.items()}

    def runs_in(self, split: str) -> Int[np.ndarray, " rows"]:
        """Rows of the runs of a split, ascending. Raises ValueError for one that has none."""
        if split not in self.splits:
            held = ", ".join(f"{name} ({count:,} runs)" for name, count in self.splits.items())
            raise ValueError(f"split {split!r}: no runs in {self.path}, which holds {held or 'none yet'}")
        return np.nonzero(self.runs.split == split)[0]

    def row_of(self, run: int) -> int:
        """Row of the run of this number. Raises ValueError for a run that is dropped or absent."""
        row = int(np.searchsorted(self.runs.run, run))
        if row < len(self) and self.runs.run[row] == run:
            return row
        if run in self.dropped:
            raise ValueError(f"run {run}: dropped when {self.path} was made ({self.dropped[run]}); choose another")
        held = f"runs {self.runs.run[0]}..{self.runs.run[-1]}, {len(self):,} of them" if len(self) else "no runs yet"
        raise ValueError(f"run {run}: not in {self.path}, which holds {held}")

    def metrics(self, name: str) -> Float[Tensor, "runs checkpoints"]:
        """A metric of every checkpoint, float32; read once. Raises ValueError for one that is not recorded."""
        if name not in self.better:
            raise ValueError(f"metric {name!r}: expected one of {', '.join(self.better)}, those of {self.path}")
        return self._column(name)

    @property
    def steps(self) -> Int[Tensor, "runs checkpoints"]:
        """Optimiser steps before every checkpoint; read once."""
        return self._column("step")

    def theta(
        self, rows: Indices, checkpoints: Indices, out: Float[Tensor, "n D"] | None = None
    ) -> Float[Tensor, "n D"]:
        """Checkpoint `checkpoints[i]` of the run at row `rows[i]`, for each i: float32 on the CPU.

        out: filled and returned if given; contiguous. Above some 30 MB that is several times faster than fresh memory, which the
        system clears page by page. Raises IndexError outside the zoo.
        """
        rows, checkpoints = _checked(rows, len(self), "row"), _checked(checkpoints, self.checkpoints, "checkpoint")
        shards = self.runs.shard[rows]
        maps = {
            shard: self._map(shard) for shard in np.unique(shards).tolist()
        }  # before memory is taken for what they claim
        places = self.runs.row[rows] * self.checkpoints + checkpoints
        if out is None:
            out = torch.empty(len(rows), self.layout.size)
        where = zip(shards.tolist(), places.tolist(), strict=True)
        if self.facts["dtype"] == "float32":
            for row, (shard, place) in zip(out.numpy(), where, strict=True):
                row[:] = maps[shard][place]
            return out
        block = np.empty((_BLOCK_ROWS, self.layout.size), dtype=np.int16)
        for part in out.split(_BLOCK_ROWS):
            for row, (shard, place) in zip(block, where, strict=False):
                row[:] = maps[shard][place]
            part.copy_(torch.from_numpy(block[: len(part)]).view(torch.bfloat16))
        return out

    def index(self, columns: Sequence[str] | None = None) -> "pyarrow.Table":
        """The index of all shards, by run and checkpoint: run, checkpoint, step, the metrics and the settings.

        Raises ValueError for a column that no shard has, or a damaged file.
        """
        import pyarrow as pa

        tables = [self._read_index(record.name, columns) for record in self.manifest.shards if record.index]
        return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})

    def verify(self) -> list[Damage]:
        """All files that are not as they were written; reads every one."""
        return list(damages(self.manifest))

    def verify_once(self) -> None:
        """Compare every file with its checksum unless it was found whole before and has not changed since.

        To be called before anything is learned from a zoo; does nothing on ranks other than the main one, which wait for it where
        they join the process group. Raises ValueError for a damaged file.
        """
        if int(os.environ.get("RANK", 0)) == 0:
            verify_shards(self.manifest)

    def shards_of(self, rows: Indices) -> list[ShardRecord]:
        """The shards that hold these rows, by run."""
        return [self.manifest.shards[shard] for shard in np.unique(self.runs.shard[np.asarray(rows)]).tolist()]

    def _run_table(self) -> RunTable:
        records = self.manifest.shards
        counts = np.array([len(record.runs) for record in records], dtype=np.int64)
        return RunTable(
            run=np.array([run for record in records for run in record.runs], dtype=np.int64),
            split=np.repeat(np.array([record.split for record in records], dtype=np.str_), counts),
            shard=np.repeat(np.arange(len(records)), counts),
            row=np.array([row for count in counts for row in range(count)], dtype=np.int64),
        )

    def _map(self, shard: int) -> np.ndarray:
        """A shard's checkpoints [runs * checkpoints, D], mapped from its file."""
        # By safetensors, which does not keep the file open as numpy would: a thousand shards exhaust the file descriptors.
        if shard not in self._maps:
            record = self.manifest.shards[shard]
            path = self.path / SHARDS / (record.name + THETA)
            shape = (len(record.runs), self.checkpoints, self.layout.size)
            dtype = DTYPES[self.facts["dtype"]][1]
            try:
                with safe_open(regular(path), framework="pt") as file:
                    theta = file.get_tensor("theta")
            except (SafetensorError, OSError) as error:
                raise self._damaged(path) from error
            if tuple(theta.shape) != shape or theta.dtype != dtype:
                raise self._damaged(path)
            bits = theta if dtype == torch.float32 else theta.view(torch.int16)  # numpy has no bfloat16
            self._maps[shard] = bits.view(-1, self.layout.size).numpy()
            self._maps[shard].flags.writeable = False
        return self._maps[shard]

    def _column(self, name: str) -> Tensor:
        if name not in self._columns:
            dtype = torch.int64 if name == "step" else torch.float32
            parts = {}
            for shard in np.unique(self.runs.shard).tolist():
                record = self.manifest.shards[shard]
                found = self._read_index(record.name, [name]).column(name)
                try:
                    parts[shard] = torch.tensor(found.to_numpy(), dtype=dtype).view(-1, self.checkpoints)
                except (TypeError, ValueError, RuntimeError) as error:  # not numbers, or not as many
                    raise self._damaged(self.path / SHARDS / (record.name + INDEX)) from error
            # Only now, as the manifest's numbers are claims until the files have as many.
            values = torch.empty((len(self), self.checkpoints), dtype=dtype)
            for shard, part in parts.items():
                values[torch.from_numpy(np.nonzero(self.runs.shard == shard)[0])] = part
            self._columns[name] = values
        return self._columns[name]

    def _read_index(self, name: str, columns: Sequence[str] | None) -> "pyarrow.Table":
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.path / SHARDS / (name + INDEX)
        try:
            with pq.ParquetFile(regular(path)) as file:
                held = file.schema_arrow.names
                # Before anything is read: a few bytes can claim any number of equal rows, in the manifest too, or of equal texts.
                rows, theta = file.metadata.num_rows, (self.path / SHARDS / (name + THETA)).stat().st_size
                kinds = (pa.types.is_primitive, pa.types.is_dictionary, pa.types.is_null)
                small = all(any(is_kind(column) for is_kind in kinds) for column in file.schema_arrow.types)
                if rows != self._expected_rows[name] or rows > theta or not small:
                    raise self._damaged(path)
                absent = [column for column in columns or () if column not in held]
                table = file.read(None if columns is None else list(columns)) if not absent else None
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise self._damaged(path) from error
        if absent:
            raise ValueError(f"{path}: no column {absent[0]!r}; expected one of {', '.join(held)}")
        return table

    def _damaged(self, path: Path) -> ValueError:
        return ValueError(f"{path}: damaged; run {self.manifest.remedy()}")


def _checked(indices: Indices, n: int, what: str) -> Int[np.ndarray, " n"]:
    indices = np.asarray(indices, dtype=np.int64)
    if len(indices) and not 0 <= indices.min() <= indices.max() < n:
        worst = int(indices.min() if indices.min() < 0 else indices.max())
        raise IndexError(f"{what} {worst}: expected 0..{n - 1}")
    return indices
