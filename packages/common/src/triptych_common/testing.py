"""Support for tests: running command lines, with signals or torchrun if needed, reading their output, random weights."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}  # for env

_SIGNALLED = """
import os, runpy, sys
from triptych_common.storage.run import RunDirectory

module, step, signum, folder, real_log = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], RunDirectory.log

def log(self, row):
    real_log(self, row)
    if row["step"] == step and self.path.name.endswith(folder):
        os.kill(os.getpid(), signum)

RunDirectory.log = log
del sys.argv[1:5]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def peak_bytes(work: Callable[[], object]) -> int:
    """By how much this process's memory grew at most while some work was done (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = resident_bytes()
    work()
    return resident_bytes("VmHWM") - before


def resident_bytes(name: str = "VmRSS") -> int:
    """Memory that this process has now, or "VmHWM", its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


Done = subprocess.CompletedProcess


def run_cli(
    module: str, *options: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: int = 300
) -> Done:
    """Run `python -m module options` and capture its output."""
    return _python(["-m", module, *options], timeout, env, cwd)


def run_signalled(
    step: int, signum: signal.Signals, module: str, *options: object, folder: str = "", timeout: int = 300
) -> Done:
    """`run_cli` of a process that sends itself a signal once a run directory, whose name ends in `folder`, logs `step`."""
    return _python(["-c", _SIGNALLED, module, step, int(signum), folder, *options], timeout)


def run_torchrun(ranks: int, module: str, *options: str, timeout: int = 300) -> Done:
    """Run a module under torchrun on `ranks` gloo ranks of this machine, with one thread each."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module]
    return _python([*launch, *options], timeout, {"OMP_NUM_THREADS": "1"})


def _python(
    words: Sequence[object], timeout: int, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Done:
    command, merged = [sys.executable, *map(str, words)], {**os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=merged, cwd=cwd)


def run_here(run: Callable[[Sequence[str]], int], *words: object) -> Done:
    """Run a package's command line in this process, as a new one would take seconds to import torch, capturing its output."""
    out, errors = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, [run.__module__, *map(str, words)]  # what provenance records as the command
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = run([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.argv = before
    return Done([str(word) for word in words], status, out.getvalue(), errors.getvalue())


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those they started."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            parents[int(status.parent.name)] = int(re.findall(r"PPid:\t(\d+)", status.read_text())[0])
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [deeper for child in found for deeper in descendants(child)]


def fails_with(done: Done, message: str, status: int = 1, *, quiet: tuple[str, ...] = ()) -> None:
    """Assert that a command ended with `status` and one line on stderr with `message`; lines that begin as `quiet` don't count."""
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(quiet)]
    assert len(lines) == 1, done.stderr
    assert message in lines[0]


def logged(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl without speed and memory, which are not reproducible."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def strict_json(text: str) -> Any:
    """Parse strict JSON: NaN and Infinity, which only Python reads and writes, raise AssertionError."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def assert_self_contained(page: str, *, pictures: int) -> None:
    """Assert that an HTML page embeds `pictures` PNGs, loads nothing external, and links only to files below it."""
    assert page.count("data:image/png;base64,") == pictures
    page = page.replace("\n", " ")
    assert re.findall(r'src="(?!data:)[^"]*"', page) == []
    assert re.findall(r"<(?!a )[^>]*href=", page) == []
    assert re.findall(r'href="(?:/|[^"]*:|[^"]*\.\.)[^"]*"', page) == []


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Make torch use one thread inside the block, as ranks of torchrun do, so that bytes can be compared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_inception_weights(path: Path) -> Path:
    """Random weights of the ADM suite's Inception network, in the published file's format.

    Batch norms take the statistics of noise images: otherwise activations would vanish towards the last layer.
    """
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False) -> None:
            """Keep the initial weights."""

    torch.save({}, path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Untrained("random", ["2048"], feature_extractor_weights_path=str(path)).train()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            network.fc.weight.mul_(10)  # so that predicted classes differ between images, for the Inception score
            network(torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8))
    torch.save(network.state_dict(), path)
    return path
