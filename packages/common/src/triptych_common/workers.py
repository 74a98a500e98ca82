"""Units of work on many processes: a pool on this machine, or Ray behind the same call.

`run` yields what a function returns for each unit; `run_all` does units that know whether they are done. Each worker runs
one thread, so results do not depend on how many workers there are. This module imports no torch: `start_server` lets the
workers' imports begin before those of the command line.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from triptych_common.cli import echo
from triptych_common.errors import Interrupted
from triptych_common.progress import Progress

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
Work = Callable[[Any, str], Result]  # of a unit and the name of a torch device; pickled, like the unit

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # glibc: keep the megabytes that every step frees and asks for again, instead of returning them page by page
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}
_device = "cpu"


def on_gpu(device: str) -> bool:
    """Whether a device option means an accelerator here."""
    import torch

    return device != "cpu" and (device != "auto" or torch.cuda.is_available())


def default_workers(device: str) -> int:
    """How many processes to use: one a core on a CPU, where small networks gain little from threads; one on a GPU."""
    if on_gpu(device):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, 8))


def devices(device: "torch.device", workers: int) -> list[str]:
    """The device of each worker: all GPUs in turn where the device is "cuda" without a number."""
    import torch

    if device.type == "cuda" and device.index is None:
        return [f"cuda:{i % torch.cuda.device_count()}" for i in range(workers)]
    return [str(device)] * workers


def run(
    engine: Literal["here", "local", "ray"],
    function: Work[Result],
    units: Sequence[Any],
    devices: Sequence[str],
    *,
    preload: Sequence[str] | None = None,
    remedy: str = "use --workers 1",
    extra: str = "triptych-common[ray]",
) -> Iterator[Result]:
    """Results of function(unit, device) as they come, on one worker a device.

    engine: "here", one unit after another in this process; "local", processes of this machine; or "ray", a cluster where
    RAY_ADDRESS names one, else this machine. Leaving the iterator early, by an error or an interruption, ends the processes;
    so does the end of this one, however it ends. preload: modules that processes of this machine are forked with; None:
    they are spawned. remedy: what to do where a process dies. extra: what to install for Ray.

    Raises what a unit raises, MemoryError where a process died, ImportError without the package of Ray.
    """
    if engine == "here":
        return _run_here(function, units, devices[0], one_thread=True)
    if engine == "local":
        return _run_local(function, units, devices, preload, remedy)
    return _run_ray(function, units, devices, extra)


@runtime_checkable
class Unit(Protocol):
    """Something to be done, which can tell whether it is: called in another process, so pickled.

    cost: in any unit, for the order and the progress bar.
    """

    @property
    def title(self) -> str: ...

    @property
    def cost(self) -> float: ...

    @property
    def done(self) -> bool: ...

    def __call__(self) -> None: ...


def run_all(what: str, units: Sequence[Unit], workers: int, *, one_thread: bool) -> None:
    """Do the units that are not done yet, costly ones first, each on one thread if `one_thread`.

    Raises what a unit raises, MemoryError where a process dies; other units are then stopped, and save what they have.
    """
    missing = sorted((unit for unit in units if not unit.done), key=lambda unit: -unit.cost)
    if not missing:
        return
    echo(f"{what}: {len(missing)} of {len(units)} to do")
    if workers > 1 and len(missing) > 1:
        titles = run("local", _do_quietly, missing, ["cpu"] * min(workers, len(missing)))
    else:
        titles = _run_here(_do_quietly, missing, "cpu", one_thread=one_thread)
    with Progress(what, len(missing), "done") as progress:
        progress.at(0)
        for title in titles:
            echo(f"  {what}: {title}")
            progress.advance()


def start_server(preload: Sequence[str]) -> BaseContext:
    """The context to fork workers in, its server under way with these modules; where there is none, workers are spawned.

    The server never runs a unit, has one thread, and ends with this process.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with _environment(_ENVIRONMENT):
        forkserver.ensure_running()
    return context


def _run_here(function: Work[Result], units: Sequence[Any], device: str, *, one_thread: bool) -> Iterator[Result]:
    import torch

    threads = torch.get_num_threads()
    try:
        for unit in units:
            if one_thread:
                torch.set_num_threads(1)
            yield function(unit, device)
    finally:
        torch.set_num_threads(threads)


def _run_local(
    function: Work[Result], units: Sequence[Any], devices: Sequence[str], preload: Sequence[str] | None, remedy: str
) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn") if preload is None else start_server(preload)
    waiting = context.SimpleQueue()
    for device in devices:
        waiting.put(device)
    others = set(multiprocessing.active_children())
    with _environment({} if preload is None else _ENVIRONMENT):
        pool = ProcessPoolExecutor(len(devices), mp_context=context, initializer=_become_worker, initargs=(waiting,))
        futures = [pool.submit(_call, function, unit) for unit in units]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise MemoryError(f"a worker process died, most likely for want of memory; {remedy}") from error
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # in training: save and stop
        pool.shutdown(wait=True, cancel_futures=True)


def _run_ray(function: Work[Result], units: Sequence[Any], devices: Sequence[str], extra: str) -> Iterator[Result]:
    """All machines must see the folder that units write to; alone, this one gets as many CPUs as there are devices."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"--engine ray needs a package: pip install '{extra}'") from error
    on_gpu = devices[0].startswith("cuda")
    cluster: dict[str, Any] = (
        {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": len(devices), "include_dashboard": False}
    )
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": _ENVIRONMENT}, **cluster)
    except (ConnectionError, RuntimeError) as error:
        raise ConnectionError(
            f"--engine ray: {error}; check RAY_ADDRESS, or unset it for this machine alone"
        ) from error
    try:
        remote: Any = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0, max_retries=1)(_on_one_thread)
        pending = [remote.remote(function, unit, "cuda" if on_gpu else devices[0]) for unit in units]
        while pending:
            done, pending = ray.wait(pending)
            try:
                yield ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:
                raise MemoryError(f"a Ray worker died ({type(error).__name__}); repeat the command to go on") from error
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for processes started meanwhile, where they are not set already."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _become_worker(waiting: Any) -> None:
    """Make a process a worker: one thread, a device, deaf to Ctrl-C, and ending when its parent does."""
    import torch

    global _device
    _device = waiting.get()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is a child"
    parent.join()
    os._exit(1)


def _call(function: Work[Result], unit: Any) -> Result:
    try:
        return function(unit, _device)
    except Interrupted:
        os._exit(1)  # the parent is stopping: take no other unit


def _on_one_thread(function: Work[Result], unit: Any, device: str) -> Result:
    import torch

    torch.set_num_threads(1)
    return function(unit, device)


def _do_quietly(unit: Unit, device: str) -> str:
    """Do a unit without the bars and lines that every single run would print; returns its title."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        unit()
    return unit.title
