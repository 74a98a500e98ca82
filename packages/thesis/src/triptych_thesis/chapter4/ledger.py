"""What a reproduction says of the thesis's figures and tables of chapter 4, and its way into the ledger.

`python -m triptych_thesis.chapter4.ledger RESULTS.json claims.toml` writes it there; `make docs` then renews the ledger's page.
"""

from collections.abc import Mapping
from typing import Any

from triptych_thesis.chapter4 import ablations
from triptych_thesis.chapter4.targets import AT, Target, text
from triptych_thesis.study.claims import FOUND, run_record

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
    found[TABLE] = table(results["ablations"], results["ablation_images"], results["complete_images"])
    return {
        claim: dict(zip(FOUND, (verdict, results["size"], interval, command), strict=True))
        for claim, (verdict, interval) in found.items()
    }


def table(rows: Mapping[str, Any], images: int, complete_images: int) -> tuple[str, str]:
    """Verdict on Table 4.3, and its numbers, of rows trained on `images` where the complete method takes `complete_images`.

    The thesis's claim is that three rows collapse (to less than half of the complete method) and the others do not. Confirmed
    where every row with the self-supervised distance does as the thesis has it, with 95% intervals; refuted where one does the
    contrary; undecided otherwise, and wherever rows are shorter than the complete method or some were not run: what has
    hardly begun to learn ranks by how fast it starts.
    """
    score = {row: found["pck"][AT] for row, found in rows.items()}
    whole = score[ablations.COMPLETE]
    missing = [row for row in (*ablations.FIRST, *ablations.REST) if row not in score]
    wrong, unclear = [], []
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
    told += f"; against the thesis: {', '.join(wrong)}" if wrong else ""
    short = images < complete_images
    why = [f"rows of {images:,} images, one seed, where the complete method takes {complete_images:,}"] * short
    why += [f"not run: {', '.join(missing)}"] * bool(missing)
    told += f"; undecided for {'; '.join(why)}" if why else ""
    verdict = "undecided" if why else "refuted" if wrong else "undecided" if unclear else "confirmed"
    return verdict, f"PCK@0.1 on pairs of one coloured digit, {images:,} images a row: {told}"


if __name__ == "__main__":
    run_record(4, "triptych_thesis.chapter4.ledger")
