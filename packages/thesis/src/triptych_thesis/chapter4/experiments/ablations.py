"""Table 4.3: what the alignment of one digit loses without a part of its method."""

from typing import Any

from triptych_thesis.chapter4.alignment_scores import AT
from triptych_thesis.chapter4.context import ONE, Context
from triptych_thesis.chapter4.sizes import COMPLETE, FIRST_ROWS, LEARNED, LPIPS_ROWS, REMAINING_ROWS, TABLE_4_3
from triptych_thesis.study.estimates import interval
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, UNDECIDED, Evidence, Verdict

COLLAPSED = ("c fixed at the mean", "no style mixing", "c unconstrained")  # to less than half of the complete method


def needs(context: Context) -> list[Any]:
    return [context.training(row) for row in context.rows if not context.was_scored(row)]


def measure(context: Context) -> Result:
    """Scores of every row that the options select, now or before."""
    return {
        "rows": {row: context.row_scores(row) for row in context.rows},
        "ablation_images": context.size.ablation_images,
        "complete_images": context.align_config(ONE).total_images,
    }


def verdicts(result: Result) -> list[Verdict]:
    """The thesis's claim: three rows collapse, to less than half of the complete method, and the others do not.

    Confirmed where every row with the self-supervised distance does as the thesis has it, with 95% intervals; refuted where one
    does the contrary; undecided otherwise, and wherever rows are shorter than the complete method or some were not run:
    early in training, rows rank by how fast they start.
    """
    score = {row: scores["pck"][AT] for row, scores in result["rows"].items()}
    whole = score[COMPLETE]
    missing = [row for row in (*FIRST_ROWS, *REMAINING_ROWS) if row not in score]
    wrong, unclear = [], []
    for row, found in score.items():
        if row in (COMPLETE, LEARNED, *LPIPS_ROWS):
            continue
        as_expected, contrary = found["low"] > whole["high"] / 2, found["high"] < whole["low"] / 2
        if row in COLLAPSED:
            as_expected, contrary = contrary, as_expected
        if contrary:
            wrong.append(row)
        elif not as_expected:
            unclear.append(row)
    images, complete = result["ablation_images"], result["complete_images"]
    short = f"rows of {images:,} images, one seed, where the complete method takes {complete:,}"
    open_questions = [short] * (images < complete) + [f"not run: {', '.join(missing)}"] * bool(missing)
    why = [f"against the thesis: {', '.join(wrong)}"] * bool(wrong)
    why += [f"undecided for {'; '.join(open_questions)}"] * bool(open_questions)
    verdict = UNDECIDED if open_questions else REFUTED if wrong else UNDECIDED if unclear else CONFIRMED
    collapsing = ", ".join(f"{row} {interval(score[row])}" for row in COLLAPSED if row in score)
    what = f"PCK@0.1 of one digit, {images:,} images a row, {COMPLETE}"
    evidence = [
        Evidence(what, interval(found), TABLE_4_3[row], collapsing)
        if row == COMPLETE
        else Evidence(row, interval(found), TABLE_4_3[row])
        for row, found in score.items()
    ]
    return [Verdict("gangealing.table-4.3", verdict, evidence, "; ".join(why))]


def section(study: Study, result: Result) -> Section:
    rows = [
        [row, TABLE_4_3[row] or "(its complete row)", interval(scores["pck"][AT]), interval(scores["pose"]["rotation_deg"])]
        for row, scores in result["rows"].items()
    ]  # fmt: skip
    left, lpips = ([row for row in rows if row not in result["rows"]] for rows in (REMAINING_ROWS, LPIPS_ROWS))
    why = [f"Not run: {'; '.join(left)} (--all)."] * bool(left)
    why += [f"Not run: {'; '.join(lpips)}: no VGG weights were given (--lpips-weights)."] * bool(lpips)
    header = ["ablation", "thesis: PCK@0.1, SPair cats", "ours: PCK@0.1, digits", "ours: rotation, degrees"]
    return Section(
        "Table 4.3",
        tables=[Table(header, rows, f"Each row trained on {result['ablation_images']:,} images. {' '.join(why)}")],
        note=f"The alignment above was trained on {result['complete_images']:,} images, so the complete row differs from it. "
        "The thesis's numbers are of another data set and scale.",
    )


EXPERIMENT = Experiment("ablations", 4, measure, section, verdicts, needs=needs)
