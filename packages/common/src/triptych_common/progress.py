"""Progress of long work: a bar with rate and remaining time on a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import Any


class Progress:
    """Context manager around `total` units of work; call `at(done)` or `advance(n)`. Writes to stderr if `enabled`."""

    PLAIN_INTERVAL = 15.0  # seconds between lines when stderr is not a terminal

    def __init__(self, title: str, total: int, unit: str, *, enabled: bool = True) -> None:
        self.title, self.total, self.unit, self.enabled = title, total, unit, enabled
        self.done = 0

    def __enter__(self) -> "Progress":
        self._bar: Any = None
        self._first: tuple[float, int] | None = None  # time of the first call of `at`, and the units done by then
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            rate = TextColumn("{task.fields[rate]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, rate="")
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
        elif now - self._printed >= self.PLAIN_INTERVAL:
            self._printed = now
            self._print()

    def _rate(self, now: float) -> float:
        assert self._first is not None  # `at` was called
        start, begun = self._first
        return (self.done - begun) / max(now - start, 1e-9)

    def _print(self) -> None:
        rate = self._rate(time.perf_counter())
        left = f", {(self.total - self.done) / rate:,.0f} s left" if rate and self.done < self.total else ""
        share = f"{self.done:,}/{self.total:,} {self.unit}"
        print(f"{self.title}: {share}, {rate:,.0f} {self.unit}/s{left}", file=sys.stderr, flush=True)
