"""The released G.pt checkpoint data: a folder of LMDB environments.

DATA/RUN/ (or DATA/RUN_RUN_RUN/, fused) is an LMDB environment with a runs.json and, once complete, a DONE.txt.
runs.json lists the checkpoints of a run (of each run by its name, where fused) with their metrics under keys
RUN/epEEE_itIIIII.pt: `it` iterations into epoch `ep`. Each key's value is theta, raw float32; with "_arch" appended to the
key, the sizes of the parameters, also raw float32. Values are read as numbers of a known length and as nothing else.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from triptych_gpt.layout import ParameterLayout

_KEY = re.compile(r".*/ep(\d{1,9})_it(\d{1,9})\.pt", re.DOTALL)
_AGAIN = "fetch this folder again, or move it away"


class Source(NamedTuple):
    """Where a metric of ours stands in runs.json, what to multiply it by, and which is better."""

    key: str
    scale: float
    better: Literal["lower", "higher"]


SUPERVISED = {
    "test_loss": Source("avg_test_loss", 1.0, "lower"),
    "test_error": Source("avg_test_err", 0.01, "lower"),  # released in percent
    "minibatch_loss": Source("avg_train_loss", 1.0, "lower"),  # of that step's minibatch, not of the training set
    "minibatch_error": Source("avg_train_err", 0.01, "lower"),
}


def find_runs(folder: Path) -> tuple[list[tuple[str, Path]], int]:
    """Name and environment of every complete run, in the released order, and the number of folders without DONE.txt.

    Raises FileNotFoundError where there is no such folder, ValueError for one without complete runs.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the one that holds a folder for each run")
    found = sorted((path for path in folder.iterdir() if (path / "data.mdb").is_file()), key=str)
    done = [path for path in found if (path / "DONE.txt").exists()]
    if not done:
        raise ValueError(
            f"{folder}: no complete runs (folders with data.mdb, runs.json and DONE.txt; {len(found):,} have no DONE.txt)"
        )
    where = {run: path for path in done for run in path.name.split("_")}
    return list(where.items()), len(found) - len(done)


def checkpoints_of(name: str, folder: Path) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """Step and metrics of each checkpoint of a run, by its key."""
    path = folder / "runs.json"
    try:
        content = json.loads(path.read_text())
        listed = content.get(name, content)["checkpoints"]
        places = {key: (_KEY.fullmatch(key), metrics) for key, metrics in listed.items()}
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; {_AGAIN}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of checkpoints as the released data has them; {_AGAIN}") from error
    if wrong := [key for key, (place, _) in places.items() if place is None]:
        raise ValueError(f"{path}: checkpoint {wrong[0][:80]!r}, expected RUN/epEEE_itIIIII.pt; {_AGAIN}")
    # the last checkpoint stands at the end of an epoch, so the largest `it` is an epoch's number of iterations
    epoch = max((int(place[2]) for place, _ in places.values()), default=0)
    return {key: (int(place[1]) * epoch + int(place[2]), metrics) for key, (place, metrics) in places.items()}


def read_metric(source: Source, metrics: Mapping[str, Any], folder: Path, key: str) -> float:
    """Ours of one checkpoint. Raises ValueError where it is no number."""
    try:
        return source.scale * float(metrics[source.key])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / 'runs.json'}: {key} has no number {source.key!r}; {_AGAIN}") from error


def read_theta(folder: Path, keys: Sequence[str], layout: ParameterLayout, out: np.ndarray) -> None:
    """Fill `out` [checkpoints, D]. Raises ValueError for a value that is no theta of this layout."""
    lmdb = require_lmdb()
    try:
        with lmdb.open(str(folder), readonly=True, lock=False, create=False, readahead=False) as environment:
            pages = environment.info()["last_pgno"] + 1
            if (folder / "data.mdb").stat().st_size < pages * environment.stat()["psize"]:  # reading on would be fatal
                raise ValueError(f"{folder / 'data.mdb'}: truncated; {_AGAIN}")
            with environment.begin(buffers=True) as transaction:
                _read_values(transaction, folder, keys, layout, out)
    except lmdb.Error as error:
        raise ValueError(f"{folder}: damaged or not an LMDB environment ({error}); {_AGAIN}") from error


def _read_values(transaction: Any, folder: Path, keys: Sequence[str], layout: ParameterLayout, out: np.ndarray) -> None:
    sizes = [span.stop - span.start for span in layout.spans.values()]
    arch = _floats(transaction.get(f"{keys[0]}_arch".encode()), len(sizes), folder, f"{keys[0]}_arch")
    if arch.tolist() != sizes:
        raise ValueError(
            f"{folder}: parameters of sizes {', '.join(f'{size:g}' for size in arch)}, expected "
            f"{', '.join(map(str, sizes))}; choose the --task whose network this is"
        )
    for row, key in zip(out, keys, strict=True):
        row[:] = _floats(transaction.get(key.encode()), layout.size, folder, key)


def _floats(value: memoryview | None, count: int, folder: Path, key: str) -> np.ndarray:
    if value is None:
        raise ValueError(f"{folder}: no value for {key}, which runs.json lists; {_AGAIN}")
    if len(value) != 4 * count:
        raise ValueError(
            f"{folder}: {key} has {len(value):,} bytes, expected {4 * count:,} ({count:,} float32); choose the --task "
            f"whose network this is, or {_AGAIN}"
        )
    return np.frombuffer(value, dtype="<f4")


def require_lmdb() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ImportError("reading LMDB needs a package: pip install 'triptych-gpt[lmdb]'") from error
    return lmdb
