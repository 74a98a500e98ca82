"""Verdicts on the thesis's claims, in one vocabulary for every chapter."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych_common.metrics.bootstrap import Estimate

from triptych_thesis.study.estimates import apart

CONFIRMED, REFUTED, UNDECIDED, NOT_RUN, NOT_APPLICABLE = VERDICTS = (
    "confirmed", "refuted", "undecided", "not run", "not applicable",
)  # fmt: skip
INTERVALS_DECIDE = (
    "Confirmed: every comparison that the claim consists of has its whole 95% interval on the claimed side; refuted: one lies "
    "wholly on the other side; undecided otherwise. Comparisons are not corrected for their number."
)
MARKS = {CONFIRMED: "✓", REFUTED: "✗", UNDECIDED: "?", NOT_RUN: "–", NOT_APPLICABLE: "–"}


@dataclass(frozen=True)
class Evidence:
    """One measured quantity that a verdict rests on; values are formatted, "" where there is none."""

    what: str  # the quantity, with its unit or direction, such as "R² over 20 prompts"
    ours: str  # with its interval, such as "0.93 [0.92, 0.94]"
    thesis: str = ""  # the thesis's own value
    beside: str = ""  # what the value is compared with; the strongest where there are several
    others: Sequence[str] = ()  # what it is compared with besides
    verdict: str = ""  # on this quantity alone

    @property
    def against(self) -> str:
        """Everything that the value is compared with."""
        return ", ".join([*[self.beside] * bool(self.beside), *self.others])

    @property
    def line(self) -> str:
        """The quantity on one line, for the ledger."""
        return f"{self.what}: {self.ours}" + (f" against {self.against}" if self.against else "")


@dataclass(frozen=True)
class Verdict:
    """One run's verdict on one claim of the ledger."""

    claim: str  # id in `claims.toml`, such as "dit.fig-2.5"
    verdict: str  # one of `VERDICTS`
    evidence: Sequence[Evidence] = ()  # the quantities it rests on, the most informative one first
    why: str = ""  # a few words where the evidence does not explain the verdict by itself
    aims: int = (
        0  # how many aims, this one included, stand together for a claim that no number measures, such as a picture
    )
    parts: int = 1  # how many experiments must decide on the claim before it has a verdict

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"claim {self.claim}: verdict {self.verdict!r}, expected one of {', '.join(VERDICTS)}")

    @property
    def shown(self) -> Sequence[Evidence]:
        """What a first screen has room for: the quantities with a verdict of their own, or the most informative one."""
        return [each for each in self.evidence if each.verdict] or self.evidence[:1]

    @property
    def measured(self) -> str:
        """All evidence on one line, for the ledger."""
        return "; ".join([*(each.line for each in self.evidence), *[self.why] * bool(self.why)])


def marked(verdict: str) -> str:
    """A verdict in a table's cell: "✓ confirmed"."""
    return f"{MARKS[verdict]} {verdict}"


def sign(difference: "Estimate | Mapping[str, Any]") -> str:
    """The verdict on "this difference is positive": the whole interval must lie on one side of zero."""
    low, high = (difference["low"], difference["high"]) if isinstance(difference, Mapping) else difference[1:]
    if low is None or high is None:
        return UNDECIDED
    return CONFIRMED if low > 0 else REFUTED if high < 0 else UNDECIDED


def better(ours: Mapping[str, Any], theirs: Mapping[str, Any], direction: str = "higher") -> str:
    """The verdict on "ours is better than theirs", where `direction` values are better: their intervals must not overlap."""
    low, high = (theirs, ours) if direction == "higher" else (ours, theirs)
    return CONFIRMED if apart(low, high) else REFUTED if apart(high, low) else UNDECIDED


def overall(verdicts: Iterable[str]) -> str:
    """The verdict on a claim made of several: confirmed where all are, refuted where any is, else undecided."""
    every = set(verdicts)
    if len(every) == 1:
        return every.pop()
    return REFUTED if REFUTED in every else UNDECIDED


def merged(verdicts: Iterable[Verdict]) -> dict[str, Verdict]:
    """One verdict a claim, by id, with the evidence of all; a claim of several parts is left out until all are measured."""
    by_claim: dict[str, list[Verdict]] = {}
    for each in verdicts:
        by_claim.setdefault(each.claim, []).append(each)
    return {claim: _merged(claim, several) for claim, several in by_claim.items() if len(several) >= several[0].parts}


def _merged(claim: str, several: Sequence[Verdict]) -> Verdict:
    verdicts, aims = [each.verdict for each in several], several[0].aims
    evidence = [replace(each, verdict=part.verdict) if aims else each for part in several for each in part.evidence]
    why = "; ".join(each.why for each in several if each.why)
    if not aims:
        return Verdict(claim, overall(verdicts), evidence, why)
    # Aims that stand for a claim confirm it where all are reached and refute it where none is; otherwise, or where some were not
    # measured, the claim is undecided.
    agreed = len(verdicts) == aims and len(set(verdicts)) == 1
    return Verdict(claim, verdicts[0] if agreed else UNDECIDED, evidence, why)
