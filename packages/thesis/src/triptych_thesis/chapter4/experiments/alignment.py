"""Figures 4.1 and 4.3: how well digits of one class are aligned, beside moments and classical Congealing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from triptych_common.images import from_uint8
from triptych_gangealing.baselines.moments import ink
from triptych_gangealing.keypoints.evaluate import OURS
from triptych_gangealing.keypoints.synthetic import posed_digits

from triptych_thesis.chapter4.alignment_scores import AT
from triptych_thesis.chapter4.context import ONE, Context
from triptych_thesis.chapter4.pictures import COLUMNS, as_grey, inked, save_grid
from triptych_thesis.chapter4.sizes import DIGIT
from triptych_thesis.study.estimates import apart, interval
from triptych_thesis.study.experiment import Experiment, Result, Section, Table
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, Evidence, Verdict

SHARP = 0.7  # least sharpness of an average aimed at, in that of the average of digits never jittered
OPENING = 8  # digits on the report's first screen, before their average
NAMES = {"none": "no alignment", "moments, upright": "moments kept upright", "Congealing": "classical Congealing"}
ALPHAS = ("0.1", "0.05", "0.03", "0.01")
POSE = {"rotation_deg": "rotation, degrees", "log_scale": "scale, natural logarithm", "shift_px": "shift, pixels of 32"}
AIMS = {  # what stands for galleries: claim, quantity, whether more is better
    "rotation_deg": ("gangealing.fig-4.1", "mean error in rotation, degrees", False),
    "log_scale": ("gangealing.fig-4.1", "mean error in scale, natural logarithm", False),
    "shift_px": ("gangealing.fig-4.1", "mean error in shift, pixels of a 32-pixel picture", False),
    "pck": ("gangealing.fig-4.3", "PCK@0.1, two views of one digit", True),
}
AIMS_OF = {
    "gangealing.fig-4.1": 4,
    "gangealing.fig-4.3": 2,
}  # the three errors and sharpness; PCK and purity of clusters


def measure(context: Context) -> dict[str, Any]:
    """Scores of every method on coloured and grey held-out digits; pictures of digits and their average, before and after."""
    scores = {kind: context.scores(grey=kind == "grey") for kind in ("coloured", "grey")}
    aligner = context.aligner(ONE)
    images = from_uint8(posed_digits(context.size.shown, context.seed + 2, DIGIT).images)
    warp = aligner.align(images, iterations=context.size.iterations).warp
    aligned = warp.sample(images, padding=aligner.facts["padding"])
    # Averages of ink: half of all digits are darker than their ground, so an average in colour is grey however well they align.
    before, after = (as_grey(strokes.mean(0))[None] for strokes in (ink(images), inked(images, warp)))
    few = torch.cat([images[:OPENING], before, aligned[:OPENING], after])
    save_grid(context.folder, "before-after", few, columns=OPENING + 1, scale=4)
    save_grid(context.folder, "aligned", torch.cat([images[:COLUMNS], aligned[:COLUMNS]]))
    return scores


def part(score: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """PCK@0.1 or one pose error of a method, as an estimate."""
    return score["pck"][AT] if name == "pck" else score["pose"][name]


def verdicts(result: Result) -> list[Verdict]:
    """The aims: better than every baseline with 95% intervals apart, on coloured digits; and a sharp average."""
    scores = result["coloured"]
    return [*(_beats(name, scores) for name in AIMS), _sharp(scores)]


def _beats(name: str, scores: Mapping[str, Any]) -> Verdict:
    claim, what, larger = AIMS[name]
    ours = part(scores[OURS], name)

    def better(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        return apart(b, a) if larger else apart(a, b)

    baselines = [method for method in scores if method not in (OURS, "none")]
    worse = [method for method in baselines if better(part(scores[method], name), ours)]
    unclear = [method for method in baselines if method not in worse and not better(ours, part(scores[method], name))]
    baselines.sort(key=lambda method: part(scores[method], name)["value"], reverse=larger)
    beside = [f"{NAMES.get(m, m)} {interval(part(scores[m], name))}" for m in [*baselines, "none"] if m in scores]
    reasons = [
        f"{verb} {', '.join(NAMES.get(method, method) for method in methods)}"
        for verb, methods in (("worse than", worse), ("not apart from", unclear))
        if methods
    ]
    return Verdict(
        claim,
        REFUTED if reasons else CONFIRMED,
        [Evidence(what, interval(ours), beside=beside[0] if beside else "", others=beside[1:])],
        f"{what.partition(',')[0]}: {'; '.join(reasons)}" if reasons else "",
        AIMS_OF[claim],
    )


def _sharp(scores: Mapping[str, Any]) -> Verdict:
    ratio, before = (scores[method]["sharpness"]["ratio"] for method in (OURS, "none"))
    what = f"sharpness: gradient of the average (at least {SHARP} asked for)"
    evidence = Evidence(what, interval(ratio), beside=f"no alignment {interval(before)}")
    claim = "gangealing.fig-4.1"
    return Verdict(claim, CONFIRMED if ratio["value"] >= SHARP else REFUTED, [evidence], aims=AIMS_OF[claim])


def section(study: Any, result: Result) -> Section:
    """Digits before and after; PCK and pose errors of every method."""
    tables = [table for kind in ("coloured", "grey") for table in _tables(kind, result[kind])]
    return Section(
        "Alignment of one digit",
        [
            study.figure(
                "aligned", f"Held-out digits {DIGIT}, above as they are, below aligned. Nothing selected.", pixels=True
            )
        ],
        tables,
        "PCK-Transfer: one held-out digit twice, under two elastic deformations, jitters and colours. Between different digits "
        "no correspondence is true, so poses are compared: mean errors beside the pose that all share, which hold the writers' "
        "own slant and size too, or beside that of each digit's own pictures, where these drop out. Sharpness is the average's "
        "mean gradient over that of digits never jittered. Intervals are of 95% and resample digits, each with all its pairs "
        "or pictures. Grey digits are plain white on black, where moments and Congealing are strong.",
    )


def _tables(kind: str, scores: Mapping[str, Any]) -> list[Table]:
    def table(name: str, header: Sequence[str], cells: Callable[[Mapping[str, Any]], Any], *, folded: bool) -> Table:
        rows = [[NAMES.get(method, method), *map(interval, cells(score))] for method, score in scores.items()]
        return Table(["method", *header], rows, f"{name}, {kind} digits.", folded or kind == "grey")

    def at(*keys: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda score: [score["pck"][key] for key in keys]

    tables = [
        table(
            "PCK-Transfer, in target boxes, per point",
            [f"PCK@{alpha}" for alpha in ALPHAS],
            at(*(f"target box, per point, {alpha}" for alpha in ALPHAS)),
            folded=False,
        ),
        table(
            "Errors of pose beside the shared pose, and sharpness of the average",
            [*POSE.values(), "sharpness"],
            lambda score: [*(score["pose"][name] for name in POSE), score["sharpness"]["ratio"]],
            folded=False,
        ),
        table(
            "PCK-Transfer by other protocols",
            ["target box, per image, PCK@0.1", "image, per point, PCK@0.1"],
            at("target box, per image, 0.1", "image, per point, 0.1"),
            folded=True,
        ),
    ]
    if all(score["own_pose"] is not None for score in scores.values()):
        own = "Errors of pose beside each digit's own"
        tables.append(
            table(own, [*POSE.values()], lambda score: [score["own_pose"][name] for name in POSE], folded=True)
        )
    return tables


EXPERIMENT = Experiment(
    name="alignment",
    order=1.0,
    needs=lambda context: [context.training(ONE)],
    measure=measure,
    verdicts=verdicts,
    section=section,
)
