"""The provenance of results: command, commit, versions and hardware."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PROVENANCE = ("command", "commit", "versions", "hardware")


def provenance() -> dict[str, Any]:
    """The command, commit, versions and hardware of this process, as JSON can hold them."""
    return {"command": command_line(), "commit": git_commit(), "versions": versions(), "hardware": hardware()}


def command_line() -> str:
    """The command as a user would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # set under python -m
    program = Path(sys.argv[0]).name if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"
    return f"{program} {shlex.join(sys.argv[1:])}".strip()


def git_commit() -> str:
    """Commit of the source checkout this package runs from ("-dirty" with local changes), or "unknown"."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        # Without locks: status refreshes the index, and killed in the middle it would leave the checkout locked.
        words = ("--no-optional-locks", *words)
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # fails if this is installed inside another project's checkout
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def versions() -> dict[str, str]:
    """Versions of Python, torch, numpy and the packages of triptych that are installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "triptych-common", "triptych-dit", "triptych-gpt", "triptych-gangealing"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def hardware() -> dict[str, Any]:
    """The names of CPU and GPU, the number of cores, and the number of threads that torch uses."""
    import torch

    facts: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
