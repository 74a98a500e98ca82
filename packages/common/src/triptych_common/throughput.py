"""Peak arithmetic rates of GPUs and memory, for throughput and MFU in the log; the C library's page faults on a CPU."""

import ctypes
import re
import resource
import sys
from collections.abc import Callable

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_NEVER = 2**31 - 1

# Dense TFLOP/s from data sheets, a multiply-add counted as 2: bfloat16 tensor cores, TF32, float32. The first match counts.
_PEAK_TFLOPS = {
    r"\bA100\b": (312, 156, 19.5),
    r"\bH100 PCIe\b": (756, 378, 51),
    r"\b(H100|H200) NVL\b": (835, 417.5, 60),
    r"\b(H100|H200|GH200)\b": (989, 494.5, 67),
    r"\bGB200\b": (2500, 1250, 80),
    r"\bB200\b": (2250, 1125, 75),
    r"\bL40S\b": (362, 183, 91.6),
    r"\bL4\b": (121, 60, 30.3),
    r"\bA10\b": (125, 62.5, 31.2),
    r"\bRTX 4090\b": (165.2, 82.6, 82.6),
    r"\bMI300X\b": (1307, 653.7, 163.4),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of one device in "bf16" or "float32", looked up by the device's name; None if unknown.

    "float32" means TF32 if torch may use it (`torch.set_float32_matmul_precision`).
    """
    if device.type != "cuda" or precision not in ("bf16", "float32"):
        return None
    name = torch.cuda.get_device_name(device)
    if " MIG " in name:  # a slice of a GPU
        return None
    for pattern, (bf16, tf32, float32) in _PEAK_TFLOPS.items():
        if re.search(pattern, name):
            plain = float32 if torch.get_float32_matmul_precision() == "highest" else tf32
            return 1e12 * (bf16 if precision == "bf16" else plain)
    return None


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process in bytes: allocated by tensors if `device` is a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def keep_freed_memory() -> None:
    """Make this process keep the memory it frees, instead of returning it to the system and requesting new pages.

    Convolutional networks on a CPU run up to twice as fast. Does nothing with other C libraries than glibc.
    """
    # glibc otherwise maps every tensor of more than 32 MB anew, and each of its pages then faults once.
    if (mallopt := _glibc("mallopt")) is not None:
        mallopt(_MMAP_THRESHOLD, _NEVER)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def release_freed_memory() -> None:
    """Return the memory that this process has freed so far to the system."""
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc; None for another C library, such as musl, or another system than Linux."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
