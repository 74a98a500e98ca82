"""What a study says of the thesis's figures of chapter 2, and its way into the ledger.

`python -m triptych_thesis.chapter2.ledger RESULTS.json claims.toml` writes it there; `make docs` then renews the ledger's page.
"""

import re
from collections.abc import Mapping
from typing import Any

from triptych_thesis.chapter2.findings import measured
from triptych_thesis.chapter2.statistics import FAILS, HOLDS, SHOWN, UNCLEAR, overall
from triptych_thesis.study.claims import FOUND, run_record

IN_THE_LEDGER = {HOLDS: "confirmed", FAILS: "refuted", UNCLEAR: "undecided", SHOWN: "undecided"}


def verdicts(experiments: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """By id, over all experiments that speak of a claim; of Figure 2.2 two must, each of its halves."""
    found: dict[str, list[str]] = {}
    for result in experiments.values():
        for claim, verdict in result["verdicts"].items():
            found.setdefault(claim, []).append(verdict)
    if len(found.get("dit.fig-2.2", [])) == 1:
        del found["dit.fig-2.2"]
    return {claim: overall(each) for claim, each in sorted(found.items(), key=_place)}


def _place(item: tuple[str, Any]) -> list[str | int]:
    """Figure 2.2 before 2.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", item[0])]


def claims(experiments: Mapping[str, Mapping[str, Any]], size: str) -> dict[str, dict[str, str]]:
    """Verdict, size, interval and command of each claim that the experiments speak of, by id. What nothing measured decides, such
    as a gallery, is undecided; a claim of several experiments has the commands of all, where they differ.
    """
    words = measured(experiments)
    return {
        claim: dict(
            zip(FOUND, (IN_THE_LEDGER[verdict], size, words[claim], _commands(claim, experiments)), strict=True)
        )
        for claim, verdict in verdicts(experiments).items()
    }


def _commands(claim: str, experiments: Mapping[str, Mapping[str, Any]]) -> str:
    made = [result["made"]["command"] for result in experiments.values() if claim in result["verdicts"]]
    return "; ".join(dict.fromkeys(made))


if __name__ == "__main__":
    run_record(2, "triptych_thesis.chapter2.ledger")
