"""Ctrl-C and SIGTERM end a program with one line and status 130 or 143, at any moment of its life.

An exception that is raised while modules are imported leaves halves of them behind, and comes back as another one; so until a
command is at work, and once it is done, the process just ends. At work, KeyboardInterrupt cleans up on its way.

`triptych_dit` and its like are entry points: `interrupts:triptych_dit` runs `triptych_dit.cli`, with handlers from the start.
"""

from __future__ import annotations

import _signal as signal  # what the module `signal` wraps: every other import here would be a time without handlers
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LINE = "interrupted; repeat the command to go on"
_received: int | None = None
_installed = _said = False
_stderr = 2  # where the line goes, a file descriptor


def install() -> None:
    """Handle signals from now on, unless they are ignored, as below nohup."""
    global _installed
    _installed = True
    _handle_by(_end)
    sys.unraisablehook = _unraisable


def said() -> None:
    """Note that the user knows of the interruption: the line is printed once."""
    global _said
    _said = True


def received() -> int | None:
    """The signal that interrupted the command's work."""
    return _received


class Work:
    """Within it, a signal raises KeyboardInterrupt, and a second Ctrl-C ends the process; afterwards any signal does."""

    def __enter__(self) -> None:
        if _installed:
            _handle_by(_interrupt)

    def __exit__(self, *_: object) -> None:
        if _installed:
            _handle_by(_end)


class Unheard:
    """Processes started within it ignore Ctrl-C, which a terminal sends to all of a group: this one ends them."""

    def __enter__(self) -> None:
        self.before = signal.getsignal(signal.SIGINT)
        _set(signal.SIGINT, signal.SIG_IGN)

    def __exit__(self, *_: object) -> None:
        _set(signal.SIGINT, self.before)


class Quiet:
    """Within it, what anybody writes to stderr is dropped, C++ libraries too, but for the line of an interruption."""

    def __enter__(self) -> None:
        global _stderr
        _stderr = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)

    def __exit__(self, *_: object) -> None:
        global _stderr
        os.dup2(_stderr, 2)
        kept, _stderr = _stderr, 2
        os.close(kept)


def __getattr__(name: str) -> object:
    if name.startswith("_"):
        raise AttributeError(name)

    def program() -> None:
        install()
        from importlib import import_module

        cli = import_module(f"{name}.cli")
        cli.leave(cli.run())

    return program


def _handle_by(handler: Any) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) != signal.SIG_IGN:
            _set(signum, handler)


def _set(signum: int, handler: Any) -> None:
    try:
        signal.signal(signum, handler)
    except ValueError:  # outside the main thread, where no signal arrives
        return


def _interrupt(signum: int, _frame: object) -> None:
    global _received
    _received = signum
    _handle_by(_end)
    if signum == signal.SIGTERM:
        _set(signum, signal.SIG_IGN)  # a scheduler repeats it, and what is under way cleans up
    raise KeyboardInterrupt


def _end(signum: int, _frame: object) -> None:
    if not _said:
        os.write(_stderr, f"{LINE}\n".encode())
    os._exit(128 + signum)


def _unraisable(lost: Any) -> None:
    """A signal that arrives while an object is deleted, or in a callback, would be printed and forgotten."""
    if isinstance(getattr(lost, "exc_value", None), KeyboardInterrupt):
        _end(_received or signal.SIGINT, None)
    if _received is not None:  # an object that was interrupted half made
        return
    sys.__unraisablehook__(lost)
