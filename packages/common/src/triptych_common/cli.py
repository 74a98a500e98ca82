"""Command lines built from dataclasses: presets, --dry-run, --json, and one line for every error.

A package lists its commands and calls `main`. Each command consists of a frozen dataclass derived from `CommonOptions`
and a function that takes an instance of it and returns a result that JSON can hold.
"""

import argparse
import atexit
import contextlib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from triptych_common import interrupts
from triptych_common.fields import FREE, Checked, one_of, printable


class Interrupted(Exception):
    """A signal stopped the run after everything was saved; `exit_code` is 128 plus the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Diverged(RuntimeError):
    """The loss became non-finite again after every permitted rollback."""


@dataclass(frozen=True)
class CommonOptions(Checked):
    """Options every command takes."""

    out: Annotated[Path, FREE] = Path("runs/out")
    """where to write"""
    seed: int = 0
    """random seed"""
    device: Annotated[str, FREE] = "auto"
    """torch device; auto: the GPU if there is one"""
    json: Annotated[bool, FREE] = False
    """print the results as one JSON object, the last line of stdout"""
    dry_run: Annotated[bool, FREE] = False
    """print what would be run, and stop"""
    overwrite: Annotated[bool, FREE] = False
    """write to --out even if it holds files that this command did not make"""

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints."""
        config = asdict(self)
        return {"config": {name: str(value) if isinstance(value, Path) else value for name, value in config.items()}}


@dataclass(frozen=True)
class Command:
    """One subcommand. What it is made of is given itself, or as "module:name" and imported on use, so that --help stays fast.

    summary: its line in the program's overview.
    config: the class of its options. run: takes the options and returns the result.
    presets: named instances of `config`. default: the name of the one that is used without --preset.
    start: computes the defaults from the preset and the command line, for defaults that depend on other options.
    preview: takes the options and returns what --dry-run prints.
    writes: what --out is. "folder": one that is claimed as the command's for as long as it runs; "file": one if it has a suffix,
        and it is not replaced unless --overwrite; "nothing": the command writes nothing, or checks what it overwrites itself.
    """

    summary: str
    config: type[CommonOptions] | str
    run: Callable[[Any], dict[str, Any]] | str
    presets: Mapping[str, CommonOptions] | str = field(default_factory=dict)
    default: str | None = None
    start: Callable[[Any, Sequence[str]], Any] | str = lambda preset, argv: preset
    preview: Callable[[Any], dict[str, Any]] | str = lambda config: config.resolved()
    writes: Literal["folder", "file", "nothing"] = "folder"


def located(target: Any) -> Any:
    """The object that "module:name" names, imported; anything else but text is returned as it is."""
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


_to_stderr = False


def echo(text: str) -> None:
    """Print lines for people, on rank 0 only: to stdout, or to stderr while --json reserves stdout for the result."""
    if int(os.environ.get("RANK", 0)) == 0:
        lines = map(printable, text.split("\n"))
        print("\n".join(lines), file=sys.stderr if _to_stderr else sys.stdout, flush=True)


Commands = Mapping[str, Command]
_OUT_OF_MEMORY = (  # of the CPU: torch, oneDNN, the C++ library, the operating system, Python
    "DefaultCPUAllocator", "could not create a primitive", "bad_alloc", "Cannot allocate memory", "can't start new thread",
)  # fmt: skip


def main(prog: str, commands: Commands, argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status.

    commands: by name.
    argv: the words after the program's name, `sys.argv[1:]` by default.

    Errors that a user can act on (ValueError, OSError, a diverged run) become one line on stderr and status 1, mistyped
    options give status 2, an interruption by Ctrl-C or SIGTERM 128 plus the signal; TRIPTYCH_DEBUG=1 shows the traceback
    instead.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview(prog, commands), flush=True)
            return 0 if argv else 2
        if argv[0] not in commands:
            return _fail(f"unknown command {argv[0]!r}: expected {one_of(argv[0], commands)}", 2)
        command = commands[argv[0]]
        with _stdout_reserved("--json" in argv):  # from the start: defaults that come from data are reported
            config = parse(f"{prog} {argv[0]}", command, argv[1:])
        with _stdout_reserved(config.json):
            return _run(f"{prog} {argv[0]}", command, config)
    except Interrupted as stop:
        interrupts.said()
        return _fail(str(stop), stop.exit_code, prefix="")
    except BrokenPipeError:  # whoever reads the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        interrupts.said()
        return _fail(interrupts.LINE, 128 + (interrupts.received() or signal.SIGINT), prefix="")
    except Exception as error:
        if signum := interrupts.received():  # an interrupted import may come back as any other error
            interrupts.said()
            return _fail(interrupts.LINE, 128 + signum, prefix="")
        return _explained(error)


def _explained(error: Exception) -> int:
    """Print what a user can act on, and return the status; raise anything else."""
    if isinstance(error, ValueError | OSError | ImportError | MemoryError | Diverged):
        if os.environ.get("TRIPTYCH_DEBUG"):
            raise error
        return _fail(_one_line(error), 1)
    if is_out_of_memory(error) and not os.environ.get("TRIPTYCH_DEBUG"):
        return _fail(f"{_one_line(error)}; use a smaller batch", 1)
    raise error


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was short, of the machine or a GPU, rather than anything wrong."""
    # By name, as only torch has that class, and importing torch takes seconds; on the CPU it raises a plain RuntimeError.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY))


def leave(status: int) -> NoReturn:
    """End the program, as the last line of one that torchrun may have started, or a signal interrupted."""
    # Now and then a thread that gloo leaves behind aborts a rank whose work is done, while the process is torn down. And an
    # interruption that passed through `exec` of a text, as libraries call it, makes `python -m` kill itself by SIGINT at its end.
    rank, interrupted = "TORCHELASTIC_RUN_ID" in os.environ, interrupts.received() is not None
    if not (rank or interrupted):
        sys.exit(status)
    if interrupted:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def parse(prog: str, command: Command, argv: Sequence[str]) -> Any:
    """Parse options into an instance of `command.config`; `--preset NAME` chooses the values that other flags override.

    Raises SystemExit: status 2, after one line on stderr, for options that do not parse, and 0 after --help.
    """
    import tyro

    kind, presets = located(command.config), located(command.presets)
    preset, argv = option(argv, "preset", command.default)
    if preset is not None and preset not in presets:
        raise SystemExit(_fail(f"preset {preset!r}: expected {one_of(preset, presets or ['none'])}", 2))
    default = located(command.start)(presets[preset] if preset else kind(), argv)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, prog=prog, args=argv, default=default)
    except SystemExit as stop:
        if stop.code:
            _fail(f"{_unboxed(errors.getvalue())} (see {prog} --help)", 2)
        elif presets:
            print(f"--preset NAME picks a row to start from: {', '.join(presets)}")
        raise


def option(argv: Sequence[str], name: str, default: str | None = None) -> tuple[str | None, list[str]]:
    """The value of an option in a command line that is not parsed yet ("" if it has none), and the other words."""
    # By argparse: tyro needs the defaults, which may depend on this option.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", nargs="?", const="", default=default, dest="value")
    known, rest = parser.parse_known_args(argv)
    return known.value, rest


@contextlib.contextmanager
def _stdout_reserved(reserved: bool) -> Iterator[None]:
    """Make `echo` write to stderr while a command runs that reserves stdout for its result."""
    global _to_stderr
    before, _to_stderr = _to_stderr, reserved
    try:
        yield
    finally:
        _to_stderr = before


def _run(name: str, command: Command, config: CommonOptions) -> int:
    if config.dry_run:
        result = located(command.preview)(config)
        if not config.json:
            echo(json.dumps(result, indent=2, default=str))
    else:
        run = located(command.run)
        with interrupts.Work(), _claimed(name, command, config):
            result = run(config)
    if config.json and int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(result, default=str, allow_nan=False), flush=True)
    return 0


def _claimed(name: str, command: Command, config: CommonOptions) -> contextlib.AbstractContextManager[None]:
    """Hold the place that a command writes to; on ranks other than the main one there is nothing to hold."""
    if command.writes == "nothing" or int(os.environ.get("RANK", 0)) != 0:
        return contextlib.nullcontext()
    from triptych_common.storage.output import claimed, refuse_to_overwrite  # loads numpy through safetensors

    if command.writes == "file" and config.out.suffix:
        refuse_to_overwrite(config.out, overwrite=config.overwrite)
        return contextlib.nullcontext()
    return claimed(config.out, name, overwrite=config.overwrite)


def _overview(prog: str, commands: Commands) -> str:
    width = 2 + max(map(len, commands))
    rows = "\n".join(f"  {name:<{width}}{command.summary}" for name, command in commands.items())
    usage = f"usage: {prog} COMMAND [--preset NAME] [OPTIONS]"
    return f"{usage}\n\n{rows}\n\n{prog} COMMAND --help lists a command's options."


def _unboxed(text: str) -> str:
    """The message inside tyro's boxed error, on one line, followed by the first option that tyro suggests instead."""
    # The message is between the box's title and its first rule; there are boxes of two styles.
    groups: list[list[str]] = [[]]
    for line in text.splitlines():
        inner = line.strip("│╭╮╰╯ ")
        if inner and not inner.strip("─-"):
            groups.append([])
        elif inner and not line.startswith(("╭", "╰")):
            groups[-1].append(inner)
    messages = groups if text.lstrip().startswith("╭") else groups[1:]
    if not messages or not messages[0]:
        return " ".join(text.split())
    suggested = [group[1].split()[0].rstrip(",") for group in messages[1:] if group[:1] == ["Perhaps you meant:"]]
    # tyro begins the message of a class's own check with the class, which is nothing to a user.
    message = re.sub(r"^Error parsing (?!--)\S+: ", "", " ".join(messages[0]))
    return message + "".join(f"; did you mean {option}?" for option in suggested[:1])


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename and str(error.filename) not in text:
        return f"{error.filename}: {text}"
    return text


def _fail(message: str, status: int, prefix: str = "error: ") -> int:
    print(f"{prefix}{printable(message)}", file=sys.stderr, flush=True)
    return status
