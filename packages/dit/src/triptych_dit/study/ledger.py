"""What a study says of the thesis's figures of chapter 2, and its way into the ledger.

`python -m triptych_dit.study.ledger RESULTS.json claims.toml` writes it there; `make docs` then renews the ledger's page.
"""

import json
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from triptych_common.claims import load_claims
from triptych_common.run import write_text

from triptych_dit.study.findings import measured
from triptych_dit.study.statistics import FAILS, HOLDS, UNCLEAR, overall

FIELDS = ("verdict", "size", "interval", "command")
IN_THE_LEDGER = {HOLDS: "confirmed", FAILS: "refuted", UNCLEAR: "undecided"}


def verdicts(experiments: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """By id, over all experiments that speak of a claim; of Figure 2.2 two must, each of its halves."""
    found: dict[str, list[str]] = {}
    for result in experiments.values():
        for claim, verdict in result["verdicts"].items():
            found.setdefault(claim, []).append(verdict)
    if len(found.get("dit.fig-2.2", [])) == 1:
        del found["dit.fig-2.2"]
    return {claim: overall(each) for claim, each in sorted(found.items())}


def claims(experiments: Mapping[str, Mapping[str, Any]], size: str, command: str) -> dict[str, dict[str, str]]:
    """Verdict, size, interval and command of each claim that the experiments speak of, by id. Tables 2.2 and 2.3 are numbers on
    ImageNet, which only paper sizes could touch, and galleries claim nothing that is measured: they are left as they are.
    """
    words = measured(experiments)
    return {
        claim: dict(zip(FIELDS, (IN_THE_LEDGER[verdict], size, words[claim], command), strict=True))
        for claim, verdict in verdicts(experiments).items()
    }


def record(ledger: Path, found: Mapping[str, Mapping[str, str]]) -> None:
    """Write what was found into the ledger's rows; all else in the file stays as it is.

    Raises ValueError for a claim that the ledger lacks, or what it would not take.
    """
    known = load_claims(ledger)
    if missing := sorted(found.keys() - known.keys()):
        raise ValueError(f"{ledger}: has no claim {missing[0]!r}; expected a ledger with {', '.join(found)}")
    head, *blocks = ledger.read_text().split("[[claim]]\n")
    for i, block in enumerate(blocks):
        claim = tomllib.loads(block)["id"]
        values = found.get(claim)
        for name in FIELDS if values else ():
            replace(known[claim], **values)  # refuses what is no verdict
            line = f"{name} = {json.dumps(values[name], ensure_ascii=False)}"
            block = re.sub(rf'^{name} = ".*"$', lambda _, line=line: line, block, flags=re.MULTILINE)
        blocks[i] = block
    write_text(ledger, "[[claim]]\n".join([head, *blocks]))


def main(results: Path, ledger: Path) -> None:
    """Raises ValueError for results that decide nothing."""
    content = json.loads(results.read_text())
    if content.get("chapter") != 2 or not content.get("claims") or content["size"].startswith("smoke"):
        raise ValueError(
            f"{results}: decides no claim of chapter 2; expected results.json of a study larger than smoke"
        )
    record(ledger, content["claims"])
    print(f"wrote {', '.join(content['claims'])} into {ledger}; now: make docs")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m triptych_dit.study.ledger RESULTS.json claims.toml")
    try:
        main(*map(Path, sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
