"""The HTML report of a study of chapter 2."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych_common.claims import load_claims
from triptych_common.report import Report

from triptych_dit.study.findings import measured
from triptych_dit.study.sections import SECTIONS

if TYPE_CHECKING:
    from triptych_dit.study.command import StudyConfig

Result = Mapping[str, Any]


def write_report(path: Path, config: "StudyConfig", results: dict[str, Any]) -> None:
    """Write the page."""
    experiments, model = results["experiments"], results["model"]
    hardware = results["hardware"]
    space = "latents of an autoencoder trained on the spot" if results["autoencoder"] else results["space"]
    minutes = sum(results["seconds"].values()) / 60
    report = Report(
        title="Diffusion transformers on digits: what of chapter 2 holds at this size",
        subtitle=f"Chapter 2 (DiT), size {config.size}, seed {config.seed}: {len(results['models'])} models trained on {space} of "
        f"{results['training']['data']}, the largest shown here of {model['parameters']:,} parameters on {model['images']:,} "
        f"images (repeats counted); {minutes:.1f} minutes on {hardware['cores']} cores, "
        f"{hardware.get('gpu', hardware['cpu'])}.",
        findings=results["findings"],
    )
    if config.size.startswith("smoke"):
        report.text(
            "A smoke size checks that everything works. The scores of barely trained models say nothing about quality."
        )
    _verdicts_table(report, config, results)
    for name, section in SECTIONS.items():
        if name in experiments:
            section(report, config, results, experiments[name])
    report.text(
        "Samples of every row of these tables lie in the run's folder, in samples/MODEL/IMAGES-SAMPLER-STEPS-...-nCOUNT: "
        "samples.npz, grid.png and scores.json with every bootstrap replicate."
    )
    _made(report, config, results)
    report.write(path)


def _verdicts_table(report: Report, config: "StudyConfig", results: Result) -> None:
    words, ledger = measured(results["experiments"]), load_claims(config.claims) if config.claims.exists() else {}
    rows = [
        (claim, f"{ledger[claim].item}: {ledger[claim].claim}" if claim in ledger else "", verdict, words[claim])
        for claim, verdict in results["verdicts"].items()
    ]
    if rows:
        report.heading("The thesis's claims, and what this run says of them")
        report.table(
            ("id", "claim", "verdict", "measured"),
            rows,
            "The claims are about ImageNet and models up to 1,000 times as large; a verdict speaks of this size alone. A claim "
            "holds where every comparison it consists of has an interval on its side of zero, does not where any has it on the "
            "other side, and is else not told apart from noise. Comparisons are many and not corrected for their number.",
        )


def _made(report: Report, config: "StudyConfig", results: Result) -> None:
    report.heading("How this was made")
    report.code(f"make reproduce-ch2 SIZE={config.size}\n{results['command']}")
    pairs = {
        "commit": results["commit"],
        "versions": results["versions"],
        "hardware": results["hardware"],
        "main model": {key: results["model"][key] for key in ("name", "parameters", "gflops_per_forward", "images")},
        "its shape": results["model"]["config"],
        "training, of all models": results["training"],
        "autoencoder": results["autoencoder"] or {"none": results["space"]},
        "seconds": results["seconds"],
        "seconds of training, one model": results["models"],
    }
    if "gallery" in results["experiments"]:
        pairs |= {
            f"instrument {k}": f"SHA-256 {v}" for k, v in results["experiments"]["gallery"]["instruments"].items()
        }
    report.table(
        ("what", "value"),
        [
            (k, v if isinstance(v, str) else ", ".join(f"{key} {value}" for key, value in v.items()))
            for k, v in pairs.items()
        ],
    )
