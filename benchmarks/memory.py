"""How much memory a job needs on the CPU: the growth of a process that runs nothing else."""

import multiprocessing
import os
import re
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from triptych_common.throughput import release_freed_memory

from benchmarks.runner import Job

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else asking for a GPU here would spoil it for forks


def peak_memory(job: Job, seed: int) -> int | None:
    """Bytes that preparing a job and calling it twice adds at most to a process; None where it fails, for a job
    of the GPU, whose tensors are counted as it is timed, and elsewhere than on Linux.

    The process is a fork of this one, which first gives back what has been freed: it would use that again, and see no growth.
    """
    if sys.platform != "linux" or job.gpu or job.skip is not None:
        return None
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_measure, args=(job, seed, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:  # it raised; timing it will report why
        return None
    finally:
        process.join()


def _measure(job: Job, seed: int, out: Connection) -> None:
    sys.stderr = None  # a job's error is reported when it is timed
    torch.set_num_threads(1)  # threads of a pool do not survive a fork
    release_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # forgets how much it was at most
    before = _resident("VmRSS")
    call = job.prepare(seed)
    call()
    call()
    out.send(_resident("VmHWM") - before)


def _resident(which: str) -> int:
    """Resident bytes of this process: "VmRSS" now, "VmHWM" at most. `ru_maxrss` would count what a fork inherits."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024
