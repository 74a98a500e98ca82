"""The HTML report of a chapter 4 reproduction."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych_thesis.chapter4 import ablations
from triptych_thesis.chapter4.gallery import Gallery
from triptych_thesis.chapter4.targets import AT, NAMES, on_grey, targets, text
from triptych_thesis.study.claims import load_claims
from triptych_thesis.study.old_report import Report

if TYPE_CHECKING:
    from triptych_thesis.chapter4.command import ReproduceConfig

ALPHAS = ("0.1", "0.05", "0.03", "0.01")
POSE = {
    "rotation_deg": "rotation, degrees",
    "log_scale": "scale, natural logarithm",
    "shift_px": "shift, pixels of 32",
}


def write_report(path: Path, config: "ReproduceConfig", results: dict[str, Any], gallery: Gallery) -> None:
    """Write the page."""
    training, hardware = results["training"]["one"], results["hardware"]
    minutes = sum(results["seconds"].values()) / 60
    report = Report(
        title="Digits learn to stand in line",
        subtitle=f"Chapter 4 (GANgealing), size {config.size}, seed {config.seed}: a spatial transformer trained on "
        f"{training['batch_size']}-image steps from a frozen generator of coloured, turned, scaled and shifted digits, no "
        f"labels; {minutes:.1f} minutes on {hardware['cores']} cores, {hardware.get('gpu', hardware['cpu'])}.",
        findings=[*(target.line for target in targets(results)), on_grey(results)],
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
    _ablations(report, results)
    _claims(report, config, results)
    report.heading("How this was made")
    report.code(f"make reproduce-ch4 SIZE={config.size}\n{results['command']}")
    rows = [[name, f"{seconds:.0f}"] for name, seconds in results["seconds"].items()]
    report.table(["stage", "seconds"], rows, f"Commit {results.get('commit')}; seed {config.seed}.")
    report.write(path)


def _scores(report: Report, results: dict[str, Any]) -> None:
    for kind in ("coloured", "grey"):
        scores = results["scores"][kind]
        rows = [
            [NAMES.get(name, name), *(text(score["pck"][f"target box, per point, {alpha}"]) for alpha in ALPHAS),
             text(score["pck"]["target box, per image, 0.1"]), text(score["pck"]["image, per point, 0.1"])]
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
            "One held-out digit twice, under two elastic deformations, jitters and colours; 95% intervals resample digits, each "
            "with all its pairs.",
        )
        rows = [
            [NAMES.get(name, name), *(text(score["pose"][part]) for part in POSE),
             text(score["sharpness"]["ratio"])]
            for name, score in scores.items()
        ]  # fmt: skip
        report.table(
            ["method", *POSE.values(), "sharpness"], rows,
            "Between different digits no correspondence is true: mean errors of pose beside the shared mode, which holds the "
            "writers' own slant and size too, and the average's mean gradient over that of un-jittered digits; 95% intervals "
            "resample digits, each with all of its pictures.",
        )  # fmt: skip
        if any(score["own_pose"] is None for score in scores.values()):
            continue
        rows = [
            [NAMES.get(name, name), *(text(score["own_pose"][part]) for part in POSE)] for name, score in scores.items()
        ]
        report.table(
            ["method", *POSE.values()], rows,
            "The same errors beside the mode of each digit's own pictures, so that writers' slant and size drop out.",
        )  # fmt: skip


def _clusters(report: Report, results: dict[str, Any], gallery: Gallery) -> None:
    report.heading("Clusters")
    rows = [
        [name, text(found["purity"]), text(found["nmi"]), f"{found['largest']:.2f}"]
        for name, found in results["clusters"].items() if isinstance(found, dict)
    ]  # fmt: skip
    report.table(
        ["method", "purity", "normalised mutual information", "largest cluster"], rows,
        f"{results['clusters']['clusters']} clusters of held-out coloured digits, against the true digits; 95% intervals, "
        "which resample digits. Clusters were found in generated images, without a label, by k-means of what a contrastive "
        "descriptor says, whose views are turned, scaled and moved as far as these digits are: alignment has no part in them.",
    )  # fmt: skip
    report.figures(
        (gallery.clusters, "A row a cluster: its average ink, then members, aligned. Nothing selected."), pixels=True
    )


def _ablations(report: Report, results: dict[str, Any]) -> None:
    report.heading("Table 4.3")
    rows = [
        [
            row,
            ablations.THESIS[row] or "(its complete row)",
            text(score["pck"][AT]),
            text(score["pose"]["rotation_deg"]),
        ]
        for row, score in results["ablations"].items()
    ]
    left = [row for row in ablations.REST if row not in results["ablations"]]
    lpips = [row for row in ablations.LPIPS if row not in results["ablations"]]
    why = [f"Not run: {'; '.join(left)} (--all)."] * bool(left)
    why += [f"Not run: {'; '.join(lpips)}: no VGG weights were given (--lpips-weights)."] * bool(lpips)
    report.table(
        ["ablation", "thesis: PCK@0.1, SPair cats", "ours: PCK@0.1, digits", "ours: rotation, degrees"], rows,
        f"Each trained on {results['ablation_images']:,} images, so the complete row differs from the figures above. The thesis's "
        f"numbers are of another data set and scale. {' '.join(why)}",
    )  # fmt: skip


def _claims(report: Report, config: "ReproduceConfig", results: dict[str, Any]) -> None:
    if not config.claims.exists():
        return
    ledger, found = load_claims(config.claims), results["claims"] if config.size != "smoke" else {}
    rows = [
        [c.id, f"{c.item}: {c.title}", found[c.id]["verdict"] if c.id in found else "", f"{c.verdict} {c.size}".strip(),
         found[c.id]["interval"] if c.id in found else ""]
        for c in ledger.values() if c.chapter == 4 and c.id.startswith("gangealing.")
    ]  # fmt: skip
    report.heading("Claims of the thesis this run touches")
    report.table(
        ["id", "item", "this run, on digits", "verdict in the ledger", "found"], rows,
        f"From {config.claims.name}, which lists every figure and table. Where nothing stands, this run says nothing.",
    )  # fmt: skip
