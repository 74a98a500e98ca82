"""Figures 4.1 and 4.3: how well digits of one class are aligned, beside moments and classical Congealing."""

import torch
from triptych_common.images import from_uint8
from triptych_gangealing.baselines.methods import OURS
from triptych_gangealing.baselines.moments import ink
from triptych_gangealing.keypoints.synthetic import posed_digits

from triptych_thesis.chapter4.alignment_scores import AT
from triptych_thesis.chapter4.context import ONE, Context
from triptych_thesis.chapter4.pictures import COLUMNS, as_grey, inked, save_grid
from triptych_thesis.chapter4.sizes import DIGIT
from triptych_thesis.study.estimates import interval
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, UNDECIDED, Evidence, Verdict, better

SHARP = 0.7  # the aim: sharpness of the average, in that of the average of digits never jittered
OPENING = 8  # digits on the report's first screen, before their average
NAMES = {"none": "no alignment", "moments, upright": "moments kept upright", "Congealing": "classical Congealing"}
ALPHAS = ("0.1", "0.05", "0.03", "0.01")
POSE = {"rotation_deg": "rotation, degrees", "log_scale": "scale, natural logarithm", "shift_px": "shift, pixels of 32"}
AIMS = {  # what stands for galleries: claim, quantity, which values are better
    "rotation_deg": ("gangealing.fig-4.1", "mean error in rotation, degrees", "lower"),
    "log_scale": ("gangealing.fig-4.1", "mean error in scale, natural logarithm", "lower"),
    "shift_px": ("gangealing.fig-4.1", "mean error in shift, pixels of a 32-pixel picture", "lower"),
    "pck": ("gangealing.fig-4.3", "PCK@0.1, two views of one digit", "higher"),
}
AIMS_OF = {"gangealing.fig-4.1": 4, "gangealing.fig-4.3": 2}  # three errors and sharpness; PCK and purity of clusters
TABLES: tuple[tuple[str, bool, dict[str, tuple[str, str]]], ...] = (  # title, folded, and where the column's scores are
    ("PCK-Transfer, in target boxes, per point", False,
     {f"PCK@{alpha}": ("pck", f"target box, per point, {alpha}") for alpha in ALPHAS}),
    ("Errors of pose beside the shared pose, and sharpness of the average", False,
     {**{words: ("pose", name) for name, words in POSE.items()}, "sharpness": ("sharpness", "ratio")}),
    ("PCK-Transfer by other protocols", True,
     {"target box, per image, PCK@0.1": ("pck", "target box, per image, 0.1"),
      "image, per point, PCK@0.1": ("pck", "image, per point, 0.1")}),
    ("Errors of pose beside each digit's own", True, {words: ("own_pose", name) for name, words in POSE.items()}),
)  # fmt: skip


def measure(context: Context) -> Result:
    """Scores of every method on coloured and grey held-out digits; pictures of digits and their average, before and after."""
    scores = {kind: context.scores(grey=kind == "grey") for kind in ("coloured", "grey")}
    aligner, folder = context.aligner(ONE), context.study.folder
    images = from_uint8(posed_digits(context.size.shown, context.study.seed + 2, DIGIT).images)
    warp = aligner.align(images, iterations=context.size.iterations).warp
    aligned = warp.sample(images, padding=aligner.facts["padding"])
    # Averages of ink: half of all digits are darker than their ground, so an average in colour is grey however well they align.
    before, after = (as_grey(strokes.mean(0))[None] for strokes in (ink(images), inked(images, warp)))
    few = torch.cat([images[:OPENING], before, aligned[:OPENING], after])
    save_grid(folder, "before-after", few, columns=OPENING + 1, scale=4)
    save_grid(folder, "aligned", torch.cat([images[:COLUMNS], aligned[:COLUMNS]]))
    return scores


def verdicts(result: Result) -> list[Verdict]:
    """The aims: better than every baseline with 95% intervals apart, on coloured digits; and a sharp average."""
    scores = result["coloured"]
    return [*(_beats(name, scores) for name in AIMS), _sharp(scores)]


def _beats(name: str, scores: Result) -> Verdict:
    claim, what, direction = AIMS[name]
    parts = {method: score["pck"][AT] if name == "pck" else score["pose"][name] for method, score in scores.items()}
    ours = parts[OURS]
    baselines = [method for method in scores if method not in (OURS, "none")]
    reasons = []
    for verb, verdict in (("worse than", REFUTED), ("not apart from", UNDECIDED)):
        if methods := [NAMES.get(m, m) for m in baselines if better(ours, parts[m], direction) == verdict]:
            reasons.append(f"{verb} {', '.join(methods)}")
    baselines.sort(key=lambda method: parts[method]["value"], reverse=direction == "higher")
    beside = [f"{NAMES.get(m, m)} {interval(parts[m])}" for m in [*baselines, "none"] if m in scores]
    evidence = Evidence(what, interval(ours), beside=beside[0] if beside else "", others=beside[1:])
    why = f"{what.partition(',')[0]}: {'; '.join(reasons)}" if reasons else ""
    return Verdict(claim, REFUTED if reasons else CONFIRMED, [evidence], why, AIMS_OF[claim])


def _sharp(scores: Result) -> Verdict:
    ratio, before = (scores[method]["sharpness"]["ratio"] for method in (OURS, "none"))
    what = f"sharpness: gradient of the average (the aim is at least {SHARP})"
    evidence = Evidence(what, interval(ratio), beside=f"no alignment {interval(before)}")
    claim = "gangealing.fig-4.1"
    return Verdict(claim, CONFIRMED if ratio["value"] >= SHARP else REFUTED, [evidence], aims=AIMS_OF[claim])


def section(study: Study, result: Result) -> Section:
    caption = f"Held-out digits {DIGIT}, above as they are, below aligned. Nothing selected."
    return Section(
        "Alignment of one digit",
        [study.figure("aligned", caption, pixels=True)],
        [table for kind in ("coloured", "grey") for table in _tables(kind, result[kind])],
        "PCK-Transfer: one held-out digit twice, under two elastic deformations, jitters and colours. Between different digits "
        "no correspondence is true, so poses are compared: mean errors beside the pose that all share, which hold the writers' "
        "own slant and size too, or beside that of each digit's own pictures, where these drop out. Sharpness is the average's "
        "mean gradient over that of digits never jittered. Intervals are of 95% and resample digits, each with all its pairs "
        "or pictures. Grey digits are plain white on black, where moments and Congealing are strong.",
    )


def _tables(kind: str, scores: Result) -> list[Table]:
    """Scores of every method; no table of what was not measured, as digits' own poses where each was drawn once."""
    tables = []
    for title, folded, columns in TABLES:
        places = columns.values()
        if all(score[part] is not None for score in scores.values() for part, _ in places):
            rows = [
                [NAMES.get(m, m), *(interval(score[part][name]) for part, name in places)]
                for m, score in scores.items()
            ]
            tables.append(Table(["method", *columns], rows, f"{title}, {kind} digits.", folded or kind == "grey"))
    return tables


EXPERIMENT = Experiment("alignment", 1, measure, section, verdicts, needs=lambda context: [context.training(ONE)])
