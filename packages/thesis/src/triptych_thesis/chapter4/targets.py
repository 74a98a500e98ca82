"""What a reproduction of chapter 4 aims at, and whether it got there: one line each, the unwelcome included."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triptych_common.metrics.bootstrap import Estimate

OURS, AT = "GANgealing", "target box, per point, 0.1"
CLUSTERS = "GANgealing's clusters: k-means on a contrastive descriptor"  # the alignment itself has no part in them
K_MEANS = "k-means, moments-aligned pixels"
SHARP = 0.7  # of the average of digits never jittered
NAMES = {"none": "no alignment", "moments, upright": "moments kept upright", "Congealing": "classical Congealing"}
Found = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One aim; `found` says by which numbers it was met or missed."""

    name: str
    met: bool
    found: str

    @property
    def line(self) -> str:
        return f"{'Met' if self.met else 'Missed'}: {self.found}"


def targets(results: Found) -> list[Target]:
    """Of a reproduction's results: held-out coloured digits, against baselines that learn nothing or see one picture at a time."""
    scores = results["scores"]["coloured"]
    return [
        _beats("pck", "PCK@0.1 between two views of one digit (target box, per point; more is better)", scores, True),
        _beats("rotation_deg", "mean error in rotation, degrees", scores, False),
        _beats("log_scale", "mean error in scale, natural logarithm (0.1 is a tenth)", scores, False),
        _beats("shift_px", "mean error in shift, pixels of a 32-pixel picture", scores, False),
        _sharp(scores),
        _pure(results["clusters"]),
    ]


def on_grey(results: Found) -> str:
    """What is reported beside: plain grey digits, where moments and Congealing are strong."""
    scores = results["scores"]["grey"]
    told = [
        f"{what} {text(part(scores[OURS], name))} ({_listed(scores, name)})"
        for what, name in (("PCK@0.1", "pck"), ("rotation, degrees", "rotation_deg"))
    ]
    return f"Beside, on plain grey digits, where these baselines are strong: {'; '.join(told)}."


def part(score: Found, name: str) -> dict[str, Any]:
    """PCK@0.1 or a pose error of one method."""
    return score["pck"][AT] if name == "pck" else score["pose"][name]


def apart(low: Found, high: Found) -> bool:
    """Whether one interval lies wholly below another."""
    return low["high"] is not None and high["low"] is not None and low["high"] < high["low"]


def text(estimate: Found) -> str:
    """Value and interval."""
    return str(Estimate(estimate["value"], estimate["low"], estimate["high"]))


def _beats(name: str, what: str, scores: Found, larger: bool) -> Target:
    """Better than every baseline, with 95% intervals apart."""
    ours = part(scores[OURS], name)
    baselines = [other for other in scores if other not in (OURS, "none")]

    def better(a: Found, b: Found) -> bool:
        return apart(b, a) if larger else apart(a, b)

    worse = [NAMES.get(n, n) for n in baselines if better(part(scores[n], name), ours)]
    unclear = [
        NAMES.get(n, n)
        for n in baselines
        if not better(ours, part(scores[n], name)) and not better(part(scores[n], name), ours)
    ]
    told = [f"worse than {', '.join(worse)}"] * bool(worse) + [f"not apart from {', '.join(unclear)}"] * bool(unclear)
    verdict = "; ".join(told) or "better than every baseline, 95% intervals apart"
    return Target(name, not told, f"{what}: {text(ours)}; {_listed(scores, name)}: {verdict}.")


def _listed(scores: Found, name: str) -> str:
    return ", ".join(f"{NAMES.get(n, n)} {text(part(score, name))}" for n, score in scores.items() if n != OURS)


def _sharp(scores: Found) -> Target:
    ratio, before = scores[OURS]["sharpness"]["ratio"], scores["none"]["sharpness"]["ratio"]
    return Target(
        "sharpness",
        ratio["value"] >= SHARP,
        f"mean gradient of the average of aligned digits, over that of digits never jittered: {text(ratio)}; no alignment "
        f"{text(before)}; at least {SHARP} asked for.",
    )


def _pure(clusters: Found) -> Target:
    ours, theirs = clusters[CLUSTERS]["purity"], clusters[K_MEANS]["purity"]
    overlap = "" if apart(ours, theirs) or apart(theirs, ours) else " The intervals overlap."
    return Target(
        "purity",
        ours["value"] > theirs["value"],
        f"purity of {clusters['clusters']} clusters of all digits, {CLUSTERS}: {text(ours)}; k-means on moments-aligned "
        f"pixels: {text(theirs)}.{overlap}",
    )
