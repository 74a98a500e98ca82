"""Helpers for tests: command lines as subprocesses, alone or under torchrun."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_cli(
    module: str,
    *options: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: int = 300,
) -> "subprocess.CompletedProcess[str]":
    """Run `python -m module options` and capture what it prints."""
    command = [sys.executable, "-m", module, *options]
    where = {"env": {**os.environ, **(env or {})}, "cwd": cwd, "text": True}
    return subprocess.run(command, capture_output=True, timeout=timeout, **where)


def run_torchrun(ranks: int, module: str, *options: str, timeout: int = 300) -> "subprocess.CompletedProcess[str]":
    """Run a module on several gloo ranks of this machine, one thread each."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
