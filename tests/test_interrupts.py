"""Signals at any moment of a program's life: at most one line, status 130 or 143, and never a traceback."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Whatever ends Python before our first line runs is Python's own.
START = "import sys; print('up', flush=True); from triptych_common.interrupts import {0}; {0}()"
PROGRAMS = {
    "triptych_dit": ["train", "--preset", "digits"],
    "triptych_gangealing": ["train-gan", "--preset", "digits32"],
    "triptych_gpt": ["collect", "mnist_mlp_14", "--engine", "here"],
    "triptych_thesis": ["reproduce", "ch2", "--size", "smoke"],
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_program_ends_in_one_line(program, signum, tmp_path):
    rng = random.Random(f"{program} {signum}")
    words = [*PROGRAMS[program], "--out", str(tmp_path / "out")]
    running = [
        (rng.uniform(0.03, 2), subprocess.Popen(
            [sys.executable, "-c", START.format(program), *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        ))
        for _ in range(2)
    ]  # fmt: skip
    for delay, process in running:
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signum, f"after {delay:.3f} s: {errors}"
        assert "Traceback" not in errors
        assert "interrupted" in errors
        assert len([line for line in errors.splitlines() if "interrupted" in line]) == 1


LOST = """
import os, signal, sys
from triptych_common import interrupts
from triptych_common.cli import Command, CommonOptions, leave, main

class Holder:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100): pass

def work(config):
    {0}

interrupts.install()
command = Command("", CommonOptions, work)
leave(main("x", {{"work": command}}, ["work", "--out", "out"]))
"""


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("holder = Holder(); del holder; return {}", 130),  # Python would print the exception, and go on
        ("try: os.kill(os.getpid(), signal.SIGTERM)\n    except BaseException: import not_there", 143),
        ("os.kill(os.getpid(), signal.SIGINT)", 130),
        ("with interrupts.Quiet():\n        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)", 130),
        # Python notes an interruption that leaves such a text, and would end by SIGINT whatever the status.
        ("exec('os.kill(os.getpid(), signal.SIGTERM)\\nfor _ in range(100): pass')", 143),
    ],
)
def test_a_signal_is_neither_lost_nor_taken_for_another_error(body, status, tmp_path):
    done = subprocess.run([sys.executable, "-c", LOST.format(body)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (status, "interrupted; repeat the command to go on\n")


def test_every_program_is_an_entry_point():
    for project in (Path(__file__).parent.parent / "packages").glob("*/pyproject.toml"):
        assert ".cli:run" not in project.read_text()
