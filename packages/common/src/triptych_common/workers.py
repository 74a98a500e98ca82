"""Units of work that are each done once, on as many processes as there are cores."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from triptych_common.cli import echo
from triptych_common.errors import Interrupted
from triptych_common.progress import Progress


@runtime_checkable
class Unit(Protocol):
    """Something to be done, which can tell whether it is: called in another process, so pickled.

    cost: in any unit, for the order and the progress bar.
    """

    @property
    def title(self) -> str: ...

    @property
    def cost(self) -> float | int: ...

    @property
    def done(self) -> bool: ...

    def __call__(self) -> None: ...


def on_gpu(device: str) -> bool:
    """Whether a device option means an accelerator here."""
    return device != "cpu" and (device != "auto" or torch.cuda.is_available())


def default_workers(device: str) -> int:
    """A process a core on a CPU, where small networks gain little from threads; one on a GPU."""
    if on_gpu(device):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, 8))


def run_all(what: str, units: Sequence[Unit], workers: int, *, one_thread: bool) -> None:
    """Do what is not done yet, costly units first, each on one thread where `one_thread`: results do not depend on `workers`.

    Raises what a unit raises, MemoryError where a process dies; other units are then stopped, and save what they have.
    """
    missing = sorted((unit for unit in units if not unit.done), key=lambda unit: -unit.cost)
    if not missing:
        return
    echo(f"{what}: {len(missing)} of {len(units)} to do")
    several = workers > 1 and len(missing) > 1
    finished = _in_processes(missing, workers) if several else _here(missing, one_thread)
    with Progress(what, len(missing), "done") as progress:
        progress.at(0)
        for unit in finished:
            echo(f"  {what}: {unit.title}")
            progress.advance()


def _here(units: Sequence[Unit], one_thread: bool) -> Iterator[Unit]:
    threads = torch.get_num_threads()
    if one_thread:
        torch.set_num_threads(1)
    try:
        for unit in units:
            _quietly(unit)
            yield unit
    finally:
        torch.set_num_threads(threads)


def _in_processes(units: Sequence[Unit], workers: int) -> Iterator[Unit]:
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(units)), mp_context=multiprocessing.get_context("spawn"), initializer=_start
    )
    try:
        pending: dict[Any, Unit] = {pool.submit(_in_worker, unit): unit for unit in units}
        for future in as_completed(pending):
            future.result()
            yield pending[future]
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()  # in training: save and stop
        if isinstance(error, BrokenProcessPool):
            raise MemoryError("a worker process died, most likely for want of memory; use --workers 1") from error
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    """Make a process a worker: one thread, deaf to Ctrl-C, which the parent hears, and no life beyond its parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _in_worker(unit: Unit) -> None:
    try:
        _quietly(unit)
    except Interrupted:
        os._exit(1)  # the parent is stopping: take no other unit


def _quietly(unit: Unit) -> None:
    """Without the bars and lines that every single run would print."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        unit()
