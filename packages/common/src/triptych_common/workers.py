"""Work on many processes: a pool on this machine or a Ray cluster, behind one call.

`run` yields a function's result for each unit of work; `run_all` executes units that record their own completion. Each
worker runs one thread, so results do not depend on the number of workers. This module imports no torch, so that
`start_server` can start the workers' imports before those of the command line.
"""

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from triptych_common.cli import Interrupted, echo
from triptych_common.extras import import_extra
from triptych_common.interrupts import Quiet, Unheard
from triptych_common.progress import Progress

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
Results = Generator[Result, None, None]
Work = Callable[[Any, str], Result]  # takes a unit and the name of a torch device; must be picklable, like the unit

RAY_BYTES = 9e9  # of address space that Ray maps in a process, 6.7 GB of them before any work
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # glibc: keep the memory that every step frees and allocates again, instead of returning it to the system
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}
_device = "cpu"


def on_gpu(device: str) -> bool:
    """Whether the option --device, "auto" included, selects an accelerator on this machine."""
    import torch

    return device != "cpu" and (device != "auto" or torch.cuda.is_available())


def default_workers(device: str) -> int:
    """Number of processes to use: on a CPU one per core (at most 8), as threads hardly speed up small networks; one on a GPU."""
    if on_gpu(device):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, 8))


def devices(device: "torch.device", workers: int) -> list[str]:
    """The device of each worker: `device`, or each GPU in turn if that is "cuda" without an index."""
    import torch

    if device.type == "cuda" and device.index is None:
        return [f"cuda:{i % torch.cuda.device_count()}" for i in range(workers)]
    return [str(device)] * workers


def run(
    engine: Literal["here", "local", "ray"], function: Work[Result], units: Sequence[Any], devices: Sequence[str], *,
    preload: Sequence[str] | None = None, remedy: str = "use --workers 1", extra: str = "triptych-common[ray]",
) -> Results[Result]:  # fmt: skip
    """Yield `function(unit, device)` for every unit, in the order of completion, with one worker per device.

    engine: "here" runs the units one after another in this process; "local" uses processes of this machine; "ray" uses the
        cluster at RAY_ADDRESS, or this machine if that is unset.
    preload: modules that the server of "local" imports before it forks workers; None: workers are spawned.
    remedy: advice for the error message if a process dies. extra: the pip requirement that provides Ray.

    Leaving the iterator early terminates the workers; they also end whenever this process ends, however it does.
    Raises whatever a unit raises, MemoryError if a process dies, ImportError if Ray is not installed.
    """
    if engine == "here":
        return _run_here(function, units, devices[0], one_thread=True)
    if engine == "local":
        return _run_local(function, units, devices, preload, remedy)
    return _run_ray(function, units, devices, extra)


@runtime_checkable
class Unit(Protocol):
    """A picklable piece of work, such as one training run, that is executed by calling it, possibly in another process."""

    @property
    def title(self) -> str: ...

    @property
    def cost(self) -> float: ...  # relative, in any measure: costly units start first

    @property
    def done(self) -> bool: ...  # whether its results already exist

    def __call__(self) -> None: ...


def run_all(what: str, units: Sequence[Unit], workers: int, *, one_thread: bool) -> None:
    """Execute the units that are not done yet, the costliest first.

        run_all("models", [TrainModel(seed) for seed in range(8)], workers=4, one_thread=True)

    what: names the units in progress lines. workers: number of processes; with 1 the units run in this process, each on
    one thread if `one_thread` (worker processes always use one).
    Raises whatever a unit raises, MemoryError if a process dies; units in progress then get SIGTERM, so training loops save.
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
    """The multiprocessing context for workers: a fork server that is importing `preload`, or "spawn" if unsupported.

    The server runs no units, so it can be forked safely; it ends with this process.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    # Forking a process that has run threads, as torch does, may deadlock. The server imports torch and runs nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with _environment(_ENVIRONMENT), Unheard():
        forkserver.ensure_running()
    return context


def _run_here(function: Work[Result], units: Sequence[Any], device: str, *, one_thread: bool) -> Results[Result]:
    import torch

    threads = torch.get_num_threads()
    try:
        for unit in units:
            yield _call_here(function, unit, device) if one_thread else function(unit, device)
    finally:
        torch.set_num_threads(threads)


def _run_local(
    function: Work[Result], units: Sequence[Any], devices: Sequence[str], preload: Sequence[str] | None, remedy: str
) -> Results[Result]:
    context = multiprocessing.get_context("spawn") if preload is None else start_server(preload)
    waiting = context.SimpleQueue()  # a device for each worker to take
    for device in devices:
        waiting.put(device)
    # Workers started here are terminated below, and no other child of this process.
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(len(devices), mp_context=context, initializer=_become_worker, initargs=(waiting,))
    try:
        # Signals wait: a worker that was not quite started prints a traceback.
        with _signals_held(), _environment({} if preload is None else _ENVIRONMENT):
            futures = [pool.submit(_call, function, unit) for unit in units]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise MemoryError(f"a worker process died, most likely for want of memory; {remedy}") from error
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # a training loop saves and stops on SIGTERM
        pool.shutdown(wait=True, cancel_futures=True)


def _run_ray(function: Work[Result], units: Sequence[Any], devices: Sequence[str], extra: str) -> Results[Result]:
    """All machines must share the folder that units write to. Without a cluster, Ray gets one CPU per device here."""
    ray = import_extra("ray", f"--engine ray needs a package: pip install '{extra}'")
    on_gpu = devices[0].startswith("cuda")
    try:
        _start_ray(ray, len(devices))
        remote: Any = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0, max_retries=1)(_call_here)
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
        with _own_sigterm(), Quiet():  # it complains of tasks that are interrupted
            ray.shutdown()


def _start_ray(ray: Any, cpus: int) -> None:
    alone = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": cpus, "include_dashboard": False}
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if (left := _address_space_left()) < RAY_BYTES:  # its C++ would abort, with a stack
        sizes = (
            f"about {RAY_BYTES / 1e9:.0f} GB of address space, this process may take {left / 1e9:.1f} more (ulimit -v)"
        )
        raise MemoryError(f"--engine ray: Ray takes {sizes}; raise that, or use --engine local")
    try:
        with _own_sigterm():
            ray.init(runtime_env={"env_vars": _ENVIRONMENT}, **quiet, **alone)
    except (ConnectionError, RuntimeError) as error:
        raise ConnectionError(
            f"--engine ray: {error}; check RAY_ADDRESS, or unset it for this machine alone"
        ) from error


def _address_space_left() -> float:
    """Bytes that this process may still map; infinity without a limit."""
    if sys.platform != "linux":
        return math.inf
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return math.inf
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return limit - pages * resource.getpagesize()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(signum, lambda signum, _: received.append(signum)) for signum in numbers]
    try:
        yield
    finally:
        for signum, handler in zip(numbers, before, strict=True):
            signal.signal(signum, handler)
        if received:
            signal.raise_signal(received[0])


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's reaction to SIGTERM: Ray installs one that prints its C++ stack, and removes any when it shuts down."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # Ray's reaction while it starts
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, unless they are set already, for processes started inside the block."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _become_worker(waiting: Any) -> None:
    """Initialise a worker process: one thread, a device, no reaction to Ctrl-C, and exit when the parent exits."""
    import torch

    global _device
    _device = waiting.get()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
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
        os._exit(1)  # the parent is stopping: do not start another unit


def _call_here(function: Work[Result], unit: Any, device: str) -> Result:
    import torch

    torch.set_num_threads(1)
    return function(unit, device)


def _do_quietly(unit: Unit, device: str) -> str:
    """Execute a unit without its progress output; returns its title."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        unit()
    return unit.title
