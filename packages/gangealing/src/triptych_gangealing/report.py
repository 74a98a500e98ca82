"""The HTML report of a chapter 4 reproduction."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych_common.claims import load_claims
from triptych_common.metrics.bootstrap import Estimate
from triptych_common.report import Report

from triptych_gangealing import ablations
from triptych_gangealing.gallery import Gallery

if TYPE_CHECKING:
    from triptych_gangealing.reproduce import ReproduceConfig

OURS, AT = "GANgealing", "target box, per point, 0.1"
ALPHAS = ("0.1", "0.05", "0.03", "0.01")


def write_report(path: Path, config: "ReproduceConfig", results: dict[str, Any], gallery: Gallery) -> None:
    """Write the page."""
    training, hardware = results["training"]["one"], results["hardware"]
    minutes = sum(results["seconds"].values()) / 60
    report = Report(
        title="Digits learn to stand in line",
        subtitle=f"Chapter 4 (GANgealing), size {config.size}, seed {config.seed}: a spatial transformer trained on "
        f"{training['batch_size']}-image steps from a frozen generator of coloured, turned, scaled and shifted digits, no "
        f"labels; {minutes:.1f} minutes on {hardware['cores']} cores, {hardware.get('gpu', hardware['cpu'])}.",
        findings=findings(results),
    )
    if config.size == "smoke":
        report.text(
            "Size smoke checks that everything works. The numbers of a barely trained model say nothing about quality."
        )
    report.figures(
        (
            gallery.before_after,
            f"Held-out digits {results['digit']} that nothing was trained on: as they are, and aligned.",
        ),
        (gallery.averages, "The average ink of such digits, before and after."),
        pixels=True,
    )
    _scores(report, results)
    report.heading("Correspondence and edits")
    report.figures((gallery.matches, "Points of one digit found in another, through congealed space."))
    report.figures(
        (gallery.edit, "A disc drawn once, on the average, carried to digits that nothing was trained on."), pixels=True
    )
    _clusters(report, results, gallery)
    _ablations(report, results, config)
    _claims(report, config)
    report.heading("How this was made")
    report.code(f"make reproduce-ch4 SIZE={config.size}\n{results['command']}")
    rows = [[name, f"{seconds:.0f}"] for name, seconds in results["seconds"].items()]
    report.table(["stage", "seconds"], rows, f"Commit {results.get('commit')}; seed {config.seed}.")
    report.write(path)


def findings(results: dict[str, Any]) -> list[str]:
    """What the first screen says, the unwelcome included."""
    scores, clusters = results["scores"]["coloured"], results["clusters"]
    ours = scores[OURS]
    lines = []
    for what, read, larger in (
        ("PCK@0.1 (exact pairs, target box, per point)", lambda s: s["pck"][AT], True),
        ("mean error in rotation, degrees,", lambda s: s["pose"]["rotation_deg"], False),
        ("mean error in log scale", lambda s: s["pose"]["log_scale"], False),
        ("mean error in shift, pixels,", lambda s: s["pose"]["shift_px"], False),
    ):
        others = {name: read(score) for name, score in scores.items() if name not in (OURS, "none")}
        best = (max if larger else min)(others, key=lambda name: others[name]["value"])
        lines.append(
            f"{what} is {_text(read(ours))} on coloured digits; the best baseline, {best}, has {_text(others[best])}: "
            f"{_verdict(read(ours), others[best], larger)}."
        )
    ratio = ours["sharpness"]["ratio"]
    lines.append(
        f"The average of aligned digits is {_text(ratio)} times as sharp as that of digits never jittered (aim: 0.7)."
    )
    k_means = clusters["k-means, moments-aligned pixels"]
    purity = clusters[OURS]["purity"]
    lines.append(
        f"{clusters['clusters']} clusters of all digits have a purity of {_text(purity)}; k-means on moments-aligned pixels "
        f"{_text(k_means['purity'])}: {_verdict(purity, k_means['purity'], True)}."
    )
    return lines


def _verdict(ours: dict[str, Any], theirs: dict[str, Any], larger: bool) -> str:
    if (
        ours["low"] is None
        or theirs["low"] is None
        or (ours["low"] <= theirs["high"] and theirs["low"] <= ours["high"])
    ):
        return "the intervals overlap"
    return "better, intervals apart" if (ours["value"] > theirs["value"]) == larger else "worse, intervals apart"


def _text(estimate: dict[str, Any]) -> str:
    return str(Estimate(estimate["value"], estimate["low"], estimate["high"]))


def _scores(report: Report, results: dict[str, Any]) -> None:
    for kind in ("coloured", "grey"):
        scores = results["scores"][kind]
        rows = [
            [name, *(_text(score["pck"][f"target box, per point, {alpha}"]) for alpha in ALPHAS),
             _text(score["pck"]["target box, per image, 0.1"]), _text(score["pck"]["image, per point, 0.1"])]
            for name, score in scores.items()
        ]  # fmt: skip
        report.heading(f"PCK-Transfer on {kind} digits")
        header = [
            "method",
            *(f"box, per point @{alpha}" for alpha in ALPHAS),
            "box, per image @0.1",
            "image, per point @0.1",
        ]
        report.table(
            header,
            rows,
            "One held-out digit twice, under two elastic deformations, jitters and colours; 95% intervals.",
        )
        rows = [
            [name, *(_text(score["pose"][part]) for part in ("rotation_deg", "log_scale", "shift_px")),
             _text(score["sharpness"]["ratio"])]
            for name, score in scores.items()
        ]  # fmt: skip
        report.table(
            ["method", "rotation, degrees", "log scale", "shift, px", "sharpness"], rows,
            "Between different digits no correspondence is true: mean errors of pose beside the shared mode, which holds the "
            "writers' own slant and size too, and the average's mean gradient over that of un-jittered digits.",
        )  # fmt: skip


def _clusters(report: Report, results: dict[str, Any], gallery: Gallery) -> None:
    report.heading("Clusters")
    rows = [
        [name, _text(found["purity"]), _text(found["nmi"]), f"{found['largest']:.2f}"]
        for name, found in results["clusters"].items() if isinstance(found, dict)
    ]  # fmt: skip
    report.table(
        ["method", "purity", "normalised mutual information", "largest cluster"], rows,
        f"{results['clusters']['clusters']} clusters of held-out coloured digits, against the true digits; 95% intervals.",
    )  # fmt: skip
    report.figures(
        (gallery.clusters, "A row a cluster: its average ink, then members, aligned. Nothing selected."), pixels=True
    )


def _ablations(report: Report, results: dict[str, Any], config: "ReproduceConfig") -> None:
    report.heading("Table 4.3")
    rows = [
        [row, ablations.THESIS[row], _text(score["pck"][AT]), _text(score["pose"]["rotation_deg"])]
        for row, score in results["ablations"].items()
    ]
    left = [row for row in ablations.THESIS if row not in results["ablations"]]
    images = config.ablation_config(ablations.COMPLETE).total_images
    report.table(
        ["ablation", "thesis: PCK@0.1, SPair cats", "ours: PCK@0.1, digits", "ours: rotation, degrees"], rows,
        f"Each trained on {images:,} images, so the complete row differs from the figures above. The thesis's numbers are of "
        f"another data set and scale. {'Not run: ' + ', '.join(left) + ' (--all).' if left else ''} LPIPS's rows need VGG's "
        "weights: triptych-gangealing train --distance lpips.",
    )  # fmt: skip


def _claims(report: Report, config: "ReproduceConfig") -> None:
    if not config.claims.exists():
        return
    rows = [
        [c.item, c.title, c.verdict, c.size, c.interval] for c in load_claims(config.claims).values() if c.chapter == 4
    ]
    report.heading("The thesis's claims")
    report.table(["item", "title", "verdict", "size", "found"], rows, "From claims.toml.")
