"""What a study says of the thesis's figures of chapter 2, and its way into the ledger.

`python -m triptych_dit.study.ledger RESULTS.json claims.toml` writes it there; `make docs` then renews the ledger's page.
"""

from collections.abc import Mapping
from typing import Any

from triptych_common.claims import FOUND, run_record

from triptych_dit.study.findings import measured
from triptych_dit.study.statistics import FAILS, HOLDS, SHOWN, UNCLEAR, overall

IN_THE_LEDGER = {HOLDS: "confirmed", FAILS: "refuted", UNCLEAR: "undecided", SHOWN: "undecided"}


def verdicts(experiments: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """By id, over all experiments that speak of a claim; of Figure 2.2 two must, each of its halves."""
    found: dict[str, list[str]] = {}
    for result in experiments.values():
        for claim, verdict in result["verdicts"].items():
            found.setdefault(claim, []).append(verdict)
    if len(found.get("dit.fig-2.2", [])) == 1:
        del found["dit.fig-2.2"]
    return {claim: overall(each) for claim, each in sorted(found.items())}


def claims(experiments: Mapping[str, Mapping[str, Any]], size: str) -> dict[str, dict[str, str]]:
    """Verdict, size, interval and command of each claim that the experiments speak of, by id. What nothing measured decides, such
    as a gallery, is undecided; of several experiments the last one's command stands, which --all makes no shorter.
    """
    words = measured(experiments)
    command = {claim: result["made"]["command"] for result in experiments.values() for claim in result["verdicts"]}
    return {
        claim: dict(zip(FOUND, (IN_THE_LEDGER[verdict], size, words[claim], command[claim]), strict=True))
        for claim, verdict in verdicts(experiments).items()
    }


if __name__ == "__main__":
    run_record(2, "triptych_dit.study.ledger")
