"""A score with its interval. Imports no torch, so that commands that only show scores are quick."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """A score with its 95% interval; the bounds are None if no interval was requested."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return _short(self.value)
        return f"{_short(self.value)} [{_short(self.low)}, {_short(self.high)}]"


def _short(value: float) -> str:
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"
