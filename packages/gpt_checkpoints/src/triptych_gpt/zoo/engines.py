"""Where work is done: processes of this machine, or Ray. Both run the same function on the same units of work."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from triptych_gpt.zoo.server import ENVIRONMENT, environment, start

_device = "cpu"


def devices(device: torch.device, workers: int) -> list[str]:
    """The device of each worker: all GPUs in turn where the device is "cuda" without a number."""
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{i % torch.cuda.device_count()}" for i in range(workers)]
    return [str(device)] * workers


def run_here(function: Callable[[Any, str], Any], units: Sequence[Any], devices: Sequence[str]) -> Iterator[Any]:
    """Results of function(unit, device) one after another, in this process, with one thread as everywhere."""
    threads = torch.get_num_threads()
    try:
        for unit in units:
            torch.set_num_threads(1)
            yield function(unit, devices[0])
    finally:
        torch.set_num_threads(threads)


def run_local(function: Callable[[Any, str], Any], units: Sequence[Any], devices: Sequence[str]) -> Iterator[Any]:
    """Results of function(unit, device) as they come, from one process a device, each of one thread.

    Leaving the iterator early, by an error or an interruption, ends the processes; so does the end of this one, however it
    ends. Raises what a unit raised; MemoryError where a process was killed.
    """
    context = start()
    waiting = context.SimpleQueue()
    for device in devices:
        waiting.put(device)
    others = multiprocessing.active_children()
    with environment(ENVIRONMENT):
        pool = ProcessPoolExecutor(len(devices), mp_context=context, initializer=_start, initargs=(waiting,))
        futures = [pool.submit(_call, function, unit) for unit in units]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise MemoryError(
            "a worker process died, perhaps for want of memory; use fewer --workers or a smaller --cohort-runs, and repeat"
        ) from error
    finally:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def run_ray(function: Callable[[Any, str], Any], units: Sequence[Any], devices: Sequence[str]) -> Iterator[Any]:
    """The same on Ray: a cluster where RAY_ADDRESS names one, else this machine with one CPU a device.

    All machines must see the folder that units write to. Raises ImportError without the package.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("--engine ray needs a package: pip install 'triptych-gpt[ray]'") from error
    on_gpu = devices[0].startswith("cuda")
    cluster = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": len(devices), "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level="error", runtime_env={"env_vars": ENVIRONMENT}, **cluster)
    except (ConnectionError, RuntimeError) as error:
        raise ConnectionError(
            f"--engine ray: {error}; check RAY_ADDRESS, or unset it for this machine alone"
        ) from error
    try:
        remote = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0, max_retries=1)(_single_thread)
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


ENGINES = {"here": run_here, "local": run_local, "ray": run_ray}


def _start(waiting: Any) -> None:
    """Make a process a worker: one thread, no signals of its own, no life beyond its parent's."""
    global _device
    _device = waiting.get()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(function: Callable[[Any, str], Any], unit: Any) -> Any:
    return function(unit, _device)


def _single_thread(function: Callable[[Any, str], Any], unit: Any, device: str) -> Any:
    torch.set_num_threads(1)
    return function(unit, device)
