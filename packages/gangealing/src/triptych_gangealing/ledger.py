"""What a reproduction says of the thesis's figures and tables of chapter 4, and its way into the ledger.

`python -m triptych_gangealing.ledger RESULTS.json claims.toml` writes it there; `make docs` then renews the ledger's page.
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

from triptych_gangealing import ablations
from triptych_gangealing.targets import AT, Target, text

FIELDS = ("verdict", "size", "interval", "command")
AIMS = {  # ids of galleries, whose claims no number of the thesis measures, and the aims that stand for them
    "gangealing.fig-4.1": ("rotation_deg", "log_scale", "shift_px", "sharpness"),
    "gangealing.fig-4.3": ("pck", "purity"),
}
TABLE = "gangealing.table-4.3"


def claims(results: Mapping[str, Any], aims: list[Target]) -> dict[str, dict[str, str]]:
    """Verdict, size, interval and command of each claim that digits can speak to, by id.

    A gallery is confirmed where all of its aims are met, refuted where none is. SPair-71k's tables and curves are not touched.
    """
    command = (
        f"triptych-gangealing reproduce --size {results['size']}{' --all' * results['all']} --seed {results['seed']}"
    )
    by_name = {target.name: target for target in aims}
    found = {}
    for claim, names in AIMS.items():
        met = [by_name[name].met for name in names]
        verdict = "confirmed" if all(met) else "undecided" if any(met) else "refuted"
        found[claim] = (verdict, "on coloured digits: " + " ".join(by_name[name].line for name in names))
    found[TABLE] = table(results["ablations"], results["ablation_images"])
    return {
        claim: dict(zip(FIELDS, (verdict, results["size"], interval, command), strict=True))
        for claim, (verdict, interval) in found.items()
    }


def table(rows: Mapping[str, Any], images: int) -> tuple[str, str]:
    """Verdict on Table 4.3, and its numbers.

    The thesis's claim is that three rows collapse (to less than half of the complete method) and the others do not. Confirmed
    where every row with the self-supervised distance was run and does as the thesis has it, with 95% intervals; refuted where
    one does the contrary; undecided otherwise.
    """
    score = {row: found["pck"][AT] for row, found in rows.items()}
    whole = score[ablations.COMPLETE]
    wrong, unclear = [], [row for row in (*ablations.FIRST, *ablations.REST) if row not in score]
    for row, found in score.items():
        if row in (ablations.COMPLETE, ablations.LEARNED, *ablations.LPIPS):
            continue
        collapsed, standing = found["high"] < whole["low"] / 2, found["low"] > whole["high"] / 2
        expected = row in ablations.COLLAPSED
        if standing if expected else collapsed:
            wrong.append(row)
        elif not (collapsed if expected else standing):
            unclear.append(row)
    told = "; ".join(f"{row} {text(found)}" for row, found in score.items())
    contrary = f"; against the thesis: {', '.join(wrong)}" if wrong else ""
    return (
        "refuted" if wrong else "undecided" if unclear else "confirmed",
        f"PCK@0.1 on pairs of one coloured digit, {images:,} images a row: {told}{contrary}",
    )


def record(ledger: Path, found: Mapping[str, Mapping[str, str]]) -> None:
    """Write what was found into the ledger's rows; all else in the file stays as it is.

    Raises ValueError for a claim that the ledger lacks, or what it would not take.
    """
    known = load_claims(ledger)
    if missing := sorted(found.keys() - known.keys()):
        raise ValueError(f"{ledger}: has no claim {missing[0]!r}; expected a ledger with {', '.join(found)}")
    head, *blocks = ledger.read_text().split("[[claim]]\n")
    for i, block in enumerate(blocks):
        values = found.get(tomllib.loads(block)["id"])
        for name in FIELDS if values else ():
            replace(known[tomllib.loads(block)["id"]], **values)  # refuses what is no verdict
            line = f"{name} = {json.dumps(values[name], ensure_ascii=False)}"
            block = re.sub(rf'^{name} = ".*"$', lambda _, line=line: line, block, flags=re.MULTILINE)
        blocks[i] = block
    write_text(ledger, "[[claim]]\n".join([head, *blocks]))


def main(results: Path, ledger: Path) -> None:
    """Raises ValueError for results that decide nothing."""
    content = json.loads(results.read_text())
    if content.get("chapter") != 4 or not content.get("claims") or content["size"] == "smoke":
        raise ValueError(
            f"{results}: decides no claim of chapter 4; expected results.json of reproduce, of size laptop or gpu"
        )
    record(ledger, content["claims"])
    print(f"wrote {', '.join(content['claims'])} into {ledger}; now: make docs")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m triptych_gangealing.ledger RESULTS.json claims.toml")
    try:
        main(*map(Path, sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
