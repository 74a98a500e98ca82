import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
from triptych_common.cli import Command, CommonOptions, Diverged, Interrupted, echo, main


@dataclass(frozen=True)
class Inner:
    depth: int = 2
    """blocks"""


@dataclass(frozen=True)
class Config(CommonOptions):
    """Do a thing."""

    lr: float = 0.1
    """learning rate"""
    inner: Inner = Inner()
    """shape"""

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr {self.lr}: expected a number above 0")

    def resolved(self):
        return {"lr": self.lr, "depth": self.inner.depth}


def work(config):
    echo("a line for people")
    if config.seed == 1:
        raise ValueError("bad\n  value; do this")
    if config.seed == 2:
        raise Interrupted("stopped; repeat", 15)
    if config.seed == 3:
        raise Diverged("lost")
    if config.seed == 4:
        raise KeyboardInterrupt
    if config.seed == 5:
        raise FileNotFoundError(2, "No such file or directory", "x.npz")
    return {"lr": config.lr, "depth": config.inner.depth}


PRESETS = {"big": Config(lr=0.5, inner=Inner(depth=9))}
COMMANDS = {"work": Command("do a thing", Config, work, PRESETS, writes="nothing")}


def call(*argv):
    try:
        return main("prog", COMMANDS, argv)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("argv", [("--preset", "big"), ("--preset=big",)])
def test_flags_override_the_preset_wherever_it_stands(argv, capsys):
    assert call("work", "--lr", "0.2", *argv, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1]) == {"lr": 0.2, "depth": 9}
    assert captured.out.count("\n") == 1  # --json reserves stdout for the result
    assert "a line for people" in captured.err


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_output_after_a_command_goes_to_stdout_again(seed, capsys):
    """Output is restored however a --json command ends: the program that calls main may continue."""
    call("work", "--json", "--seed", str(seed))
    capsys.readouterr()
    echo("a line after it")
    assert capsys.readouterr() == ("a line after it\n", "")


def test_dry_run_prints_and_does_nothing(capsys):
    assert call("work", "--dry-run", "--inner.depth", "7") == 0
    assert json.loads(capsys.readouterr().out) == {"lr": 0.1, "depth": 7}


@pytest.mark.parametrize(("argv", "status", "message"), [
    (("work", "--lr", "x"), 2, "could not convert string to float: 'x'"),
    (("work", "--lrr", "1"), 2, "Unrecognized options: --lrr, 1; did you mean --lr?"),
    (("work", "--lr", "-1"), 2, "lr -1.0: expected a number above 0"),
    (("work", "--preset", "huge"), 2, "preset 'huge': expected one of big"),
    (("wrok",), 2, "unknown command 'wrok': expected one of work; did you mean 'work'?"),
    (("play",), 2, "unknown command 'play': expected one of work\n"),
    (("work", "--preset", "bg"), 2, "preset 'bg': expected one of big; did you mean 'big'?"),
    (("work", "--seed", "1"), 1, "error: bad value; do this"),
    (("work", "--seed", "2"), 143, "stopped; repeat"),
    (("work", "--seed", "3"), 1, "error: lost"),
    (("work", "--seed", "4"), 130, "interrupted; repeat the command"),
    (("work", "--seed", "5"), 1, "x.npz"),
])  # fmt: skip
def test_every_error_is_one_line_and_a_status(argv, status, message, capsys):
    assert call(*argv) == status
    err = [line for line in capsys.readouterr().err.splitlines(keepends=True) if line.strip()]
    assert len(err) == 1
    assert message in err[0]


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("TRIPTYCH_DEBUG", "1")
    with pytest.raises(ValueError, match="bad"):
        main("prog", COMMANDS, ["work", "--seed", "1"])


def test_a_long_name_stands_apart_from_its_summary(capsys):
    assert main("prog", {"a": COMMANDS["work"], "train-something-long": COMMANDS["work"]}, ["--help"]) == 0
    assert "  train-something-long  do a thing" in capsys.readouterr().out


def test_overview_and_help_list_what_there_is(capsys):
    assert call("--help") == 0
    assert "do a thing" in capsys.readouterr().out
    assert call("work", "--help") == 0
    out = capsys.readouterr().out
    assert "learning rate" in out
    assert "big" in out
    assert call() == 2


@pytest.mark.parametrize(("text", "shown"), [
    ("plain ü 図 𝜃", "plain ü 図 𝜃"),
    ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    ("a\rb\x07\x9b2J", r"a\rb\x07\x9b2J"),
    ("safe\u202egnp.exe", r"safe\u202egnp.exe"),
    ("a\udcffb", r"a\udcffb"),
])  # fmt: skip
def test_text_of_others_cannot_act_on_the_terminal(text, shown, capsys):
    echo(f"first\n{text}")
    assert capsys.readouterr().out == f"first\n{shown}\n"


OUT_OF_MEMORY = """
import resource, sys
import torch
from dataclasses import dataclass
from triptych_common.cli import Command, CommonOptions, main

def work(config):
    size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))
    if config.seed == 0:
        torch.zeros(1 << 30)
    elif config.seed == 1:
        torch.nn.Conv2d(64, 64, 3)(torch.zeros(64, 64, 48, 48))
    else:
        b"0" * (1 << 30)

sys.exit(main("prog", {"work": Command("", CommonOptions, work, writes="nothing")}, sys.argv[1:]))
"""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_out_of_memory_is_one_line(seed):
    """In torch's allocator, in oneDNN or in Python."""
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, "work", "--seed", str(seed)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "--dry-run"]])
def test_output_that_nobody_reads_to_its_end_is_no_error(words):
    program = [sys.executable, "-m", "triptych_dit.cli", *words]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 141
