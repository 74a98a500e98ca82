"""Reading LMDB in a process of its own: it maps files into memory, and one wrong byte in a page ends the process by a signal."""

import atexit
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from triptych_common.interrupts import Unheard

AGAIN = "fetch this folder again, or move it away"


def read_apart(folder: Path, keys: Sequence[str], sizes: Sequence[int]) -> Float32[np.ndarray, "checkpoints D"]:
    """The parameters of a run's checkpoints, in the order of the keys.

    folder: of the environment, with data.mdb. sizes: entries of each parameter, in the order of theta.
    Raises ValueError for a damaged environment, or networks of other sizes.
    """
    try:
        return _process().submit(_read, folder, list(keys), list(sizes)).result()
    except BrokenProcessPool as error:
        _process.cache_clear()  # the next run gets a new process
        raise ValueError(f"{folder}: damaged, reading it ended a process; {AGAIN}") from error


@cache
def _process() -> ProcessPoolExecutor:
    """The reading process; started once, as that takes half a second."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with Unheard():
        pool.submit(int)
    atexit.register(pool.shutdown, wait=False, cancel_futures=True)
    return pool


def _read(folder: Path, keys: list[str], sizes: list[int]) -> Float32[np.ndarray, "checkpoints D"]:
    lmdb = require_lmdb()
    theta = np.empty((len(keys), sum(sizes)), dtype=np.float32)
    try:
        with lmdb.open(str(folder), readonly=True, lock=False, create=False, readahead=False) as environment:
            pages = environment.info()["last_pgno"] + 1
            if (folder / "data.mdb").stat().st_size < pages * environment.stat()["psize"]:
                raise ValueError(f"{folder / 'data.mdb'}: truncated; {AGAIN}")
            with environment.begin(buffers=True) as transaction:
                arch = _floats(transaction.get(f"{keys[0]}_arch".encode()), len(sizes), folder, f"{keys[0]}_arch")
                if arch.tolist() != sizes:
                    given, expected = ", ".join(f"{size:g}" for size in arch), ", ".join(map(str, sizes))
                    remedy = "choose the --task whose network this is"
                    raise ValueError(f"{folder}: parameters of sizes {given}, expected {expected}; {remedy}")
                for row, key in zip(theta, keys, strict=True):
                    row[:] = _floats(transaction.get(key.encode()), theta.shape[1], folder, key)
    except lmdb.Error as error:
        # As a plain error: lmdb's own may not survive the way to the parent.
        raise ValueError(f"{folder}: damaged or not an LMDB environment ({error}); {AGAIN}") from None
    return theta


def _floats(value: memoryview | None, count: int, folder: Path, key: str) -> Float32[np.ndarray, " count"]:
    if value is None:
        raise ValueError(f"{folder}: no value for {key}, which runs.json lists; {AGAIN}")
    if len(value) != 4 * count:
        sizes = f"{len(value):,} bytes, expected {4 * count:,} ({count:,} float32)"
        raise ValueError(f"{folder}: {key} has {sizes}; choose the --task whose network this is, or {AGAIN}")
    return np.frombuffer(value, dtype="<f4")


def require_lmdb() -> Any:
    """The package. Raises ImportError, saying how to install it, if it is absent."""
    try:
        import lmdb
    except ImportError as error:
        raise ImportError("reading LMDB needs a package: pip install 'triptych-gpt[lmdb]'") from error
    return lmdb
