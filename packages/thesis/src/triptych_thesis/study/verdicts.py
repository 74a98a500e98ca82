"""Verdicts on the thesis's claims, in one vocabulary for every chapter."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from triptych_common.metrics.bootstrap import Estimate

from triptych_thesis.study.estimates import apart

CONFIRMED, REFUTED, UNDECIDED, NOT_RUN, NOT_APPLICABLE = VERDICTS = (
    "confirmed", "refuted", "undecided", "not run", "not applicable",
)  # fmt: skip
MARKS = {CONFIRMED: "✓", REFUTED: "✗", UNDECIDED: "?", NOT_RUN: "–", NOT_APPLICABLE: "–"}


@dataclass(frozen=True)
class Evidence:
    """One measured quantity that a verdict rests on.

    Args:
        what: the quantity, with its unit or direction, such as "R² over 20 prompts".
        ours: the value with its interval, formatted, such as "0.93 [0.92, 0.94]".
        thesis: the thesis's own value, "" where it has none.
        beside: what the value is compared with, formatted, "" for nothing.
    """

    what: str
    ours: str
    thesis: str = ""
    beside: str = ""

    @property
    def line(self) -> str:
        """The quantity on one line, for the ledger."""
        return f"{self.what}: {self.ours}" + (f" against {self.beside}" if self.beside else "")


@dataclass(frozen=True)
class Verdict:
    """What one run finds of one claim of the ledger.

    Args:
        claim: id in `claims.toml`, such as "dit.fig-2.5".
        verdict: one of `VERDICTS`.
        evidence: the quantities it rests on, the most telling one first.
        why: a few words where the evidence does not explain the verdict by itself.
    """

    claim: str
    verdict: str
    evidence: Sequence[Evidence] = field(default_factory=tuple)
    why: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"claim {self.claim}: verdict {self.verdict!r}, expected one of {', '.join(VERDICTS)}")

    @property
    def measured(self) -> str:
        """All evidence on one line, for the ledger."""
        return "; ".join([*(each.line for each in self.evidence), *[self.why] * bool(self.why)])


def sign(difference: Estimate | Mapping[str, Any]) -> str:
    """The verdict on "this difference is positive": the whole interval must lie on one side of zero."""
    low, high = difference[1:] if isinstance(difference, Estimate) else (difference["low"], difference["high"])
    if low is None or high is None:
        return UNDECIDED
    return CONFIRMED if low > 0 else REFUTED if high < 0 else UNDECIDED


def better(ours: Mapping[str, Any], theirs: Mapping[str, Any], direction: str = "higher") -> str:
    """The verdict on "ours is better than theirs": their intervals must not overlap.

    direction: which values are better, "higher" or "lower".
    """
    low, high = (theirs, ours) if direction == "higher" else (ours, theirs)
    return CONFIRMED if apart(low, high) else REFUTED if apart(high, low) else UNDECIDED


def overall(verdicts: Iterable[str]) -> str:
    """The verdict on a claim made of several: confirmed where all are, refuted where any is, else undecided."""
    every = set(verdicts)
    if len(every) == 1:
        return every.pop()
    return REFUTED if REFUTED in every else UNDECIDED


def merged(verdicts: Iterable[Verdict]) -> dict[str, Verdict]:
    """One verdict a claim, by id: where several experiments speak of a claim, their overall verdict and all evidence."""
    by_claim: dict[str, list[Verdict]] = {}
    for each in verdicts:
        by_claim.setdefault(each.claim, []).append(each)
    return {
        claim: Verdict(
            claim,
            overall(each.verdict for each in several),
            [evidence for each in several for evidence in each.evidence],
            "; ".join(each.why for each in several if each.why),
        )
        for claim, several in by_claim.items()
    }
