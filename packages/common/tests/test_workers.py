"""Units of work: executed once, costly ones first, with or without processes; failures and deaths are reported."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triptych_common.workers import default_workers, on_gpu

UNITS = """
import os, signal, sys
from dataclasses import dataclass
from pathlib import Path
import torch
from triptych_common.workers import run_all

@dataclass(frozen=True)
class Write:
    title: str
    cost: int
    does: str = "write"

    @property
    def done(self):
        return Path(self.title).exists()

    def __call__(self):
        print("not to be seen")
        if self.does == "fail":
            raise ValueError("no such thing: expected another")
        if self.does == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        with open("order", "a") as order:
            order.write(self.title)
        Path(self.title).write_text(f"{torch.get_num_threads()} {os.getpid() != int(os.environ['PARENT'])}")

if __name__ == "__main__":
    os.environ["PARENT"] = str(os.getpid())
    torch.set_num_threads(2)
    units = [Write(word[0], int(word[1]), word[2:] or "write") for word in sys.argv[2:]]
    run_all("writing", units, int(sys.argv[1]), one_thread=True)
    print("threads after", torch.get_num_threads())
"""


def done_by(folder: Path, workers: int, *units: str) -> subprocess.CompletedProcess:
    (folder / "units.py").write_text(UNITS)
    command = [sys.executable, "units.py", str(workers), *units]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


def test_what_is_missing_is_done_once_on_one_thread_costly_ones_first(tmp_path):
    (tmp_path / "b").write_text("before")
    done = done_by(tmp_path, 1, "a1", "b5", "c3", "d2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "order").read_text() == "cda"
    assert (tmp_path / "b").read_text() == "before"
    assert (tmp_path / "a").read_text() == "1 False"
    assert "threads after 2" in done.stdout
    assert "not to be seen" not in done.stdout
    again = done_by(tmp_path, 1, "a1", "b5", "c3", "d2")
    assert again.returncode == 0
    assert (tmp_path / "order").read_text() == "cda"


def test_two_processes_do_the_same(tmp_path):
    done = done_by(tmp_path, 2, "a1", "b5", "c3")
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "order").read_text()) == ["a", "b", "c"]
    assert {(tmp_path / name).read_text() for name in "abc"} == {"1 True"}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_unit_is_raised(tmp_path, workers):
    done = done_by(tmp_path, workers, "a9fail", "b1", "c1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: no such thing: expected another"
    assert not (tmp_path / "a").exists()


def test_a_process_that_dies_is_reported(tmp_path):
    done = done_by(tmp_path, 2, "a9die", "b1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("MemoryError: a worker process died")


def test_a_cpu_has_a_process_a_core_and_a_gpu_one():
    assert not on_gpu("cpu")
    assert on_gpu("cuda")
    assert on_gpu("auto") == torch.cuda.is_available()
    assert 1 <= default_workers("cpu") <= 8
    assert default_workers("cuda") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="address space is counted by /proc")
def test_ray_is_not_started_in_too_little_address_space():
    """Its C++ would abort the process, with a stack."""
    program = (
        "import resource\nfrom triptych_common import workers\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6_000_000_000, -1))\n"
        "try:\n    list(workers.run('ray', abs, [1], ['cpu']))\nexcept MemoryError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "--engine ray: Ray takes about 9 GB of address space" in done.stdout, done.stderr
