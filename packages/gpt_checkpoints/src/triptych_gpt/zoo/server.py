"""The process that workers are forked from: it imports torch once for all of them, while the command line does so too."""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from multiprocessing.context import BaseContext

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # glibc: keep the megabytes that every step frees and asks for again, instead of returning them page by page
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}
# the first optimiser of a process imports torch._dynamo, the first task all that tasks are made of
_PRELOAD = ["torch._dynamo", "triptych_gpt.zoo.cohorts", "triptych_gpt.tasks.registry"]


def start() -> BaseContext:
    """The context to make workers in, with its server under way; where there is none to fork from, workers are spawned.

    The server never runs a product, has one thread, and ends with this process.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with environment(ENVIRONMENT):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for processes started meanwhile, where they are not set already."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
