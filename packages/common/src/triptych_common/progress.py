"""Progress of long work: a bar with rate and time left on a terminal, a plain line now and then elsewhere; and what it took."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from triptych_common.storage.atomic import write_json


class Progress:
    """Context manager around `total` units of work; call `at(done)` or `advance(n)`. Writes to stderr."""

    PLAIN_INTERVAL = 15.0  # seconds between lines where there is no terminal

    def __init__(self, title: str, total: int, unit: str, *, enabled: bool = True) -> None:
        self.title, self.total, self.unit, self.enabled = title, total, unit, enabled
        self.done = 0

    def __enter__(self) -> "Progress":
        self._bar: Any = None
        self._first: tuple[float, int] | None = None  # when work began here, and how much was done then
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.enabled and kind is None and self._first is not None:
            self._print()

    def advance(self, n: int = 1) -> None:
        self.at(self.done + n)

    def at(self, done: int) -> None:
        """Set how much is done; the rate counts from the first call, so resumed work is not credited to this run."""
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


class Stopwatch:
    """Seconds spent in each stage of something long, kept in a JSON file and summed over all the times it was resumed.

        with clock("training"):
            train(config)

    finished: it was done before, and stages that have their seconds keep them: finding work done is no work.
    """

    def __init__(self, path: Path, *, finished: bool = False) -> None:
        self.path, self.finished = path, finished
        try:
            kept = json.loads(path.read_text()) if path.exists() else {}
            self.seconds: dict[str, float] = {stage: float(seconds) for stage, seconds in kept.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged, expected JSON; delete it, the time so far is lost with it") from error

    @contextmanager
    def __call__(self, stage: str, *, afresh: bool = False) -> Iterator[None]:
        """Time a stage; `afresh`: one that is not resumed but done again, so that only the last time counts."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if not (self.finished and stage in self.seconds):
                before = 0.0 if afresh else self.seconds.get(stage, 0.0)
                self.seconds[stage] = round(before + time.perf_counter() - began, 2)
                write_json(self.path, self.seconds)
