"""Progress of long work: a bar with rate and remaining time on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any

from triptych_common.fields import printable


class Progress:
    """Context manager around `total` units of work; call `at(done)` or `advance(n)`. Writes to stderr if `enabled`.

    note: words to show beside the rate, such as the loss. They are asked for once a second at most, as they may be costly.
    """

    PLAIN_INTERVAL = 15.0  # seconds between lines when stderr is not a terminal
    NOTE_INTERVAL = 1.0

    def __init__(
        self, title: str, total: int, unit: str, *, enabled: bool = True, note: Callable[[], str] = lambda: ""
    ) -> None:
        self.title, self.total, self.unit, self.enabled, self.note = printable(title), total, unit, enabled, note
        self.done = 0

    def __enter__(self) -> "Progress":
        self._bar: Any = None
        self._first: tuple[float, int] | None = None  # time of the first call of `at`, and the units done by then
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            # Without markup: names in titles may have brackets.
            texts = (TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("rate", "note"))
            columns = (
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), *texts, TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, rate="", note="")
            self._noted = -self.NOTE_INTERVAL
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.enabled and kind is None and self._first is not None:
            self._print()

    def advance(self, n: int = 1) -> None:
        """Report that `n` more units are done."""
        self.at(self.done + n)

    def at(self, done: int) -> None:
        """Report that `done` units are done in all. The rate counts from the first call, so it leaves out resumed work."""
        if not self.enabled:
            return
        now = time.perf_counter()
        if self._first is None:
            self._first, self._printed = (now, self.done or done), now
        self.done = min(done, self.total)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{self._rate(now):,.0f} {self.unit}/s")
            if now - self._noted >= self.NOTE_INTERVAL:
                self._noted = now
                self._bar.update(self._task, note=self.note())
        elif now - self._printed >= self.PLAIN_INTERVAL:
            self._printed = now
            self._print()

    def _rate(self, now: float) -> float:
        assert self._first is not None  # `at` was called
        start, begun = self._first
        return (self.done - begun) / max(now - start, 1e-9)

    def _print(self) -> None:
        rate = self._rate(time.perf_counter())
        parts = [f"{self.done:,}/{self.total:,} {self.unit}", f"{rate:,.0f} {self.unit}/s", self.note()]
        if rate and self.done < self.total:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        print(f"{self.title}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time in words, rounded: 40 s, 2 min, 3.5 h, 12 days."""
    for unit, size, digits in (("s", 1, 0), ("min", 60, 0), ("h", 3600, 1)):
        if seconds < {"s": 100, "min": 100 * 60, "h": 48 * 3600}[unit]:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86400:,.0f} days"
