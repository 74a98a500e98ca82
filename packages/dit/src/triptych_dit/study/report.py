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
FILES = ("grid.png", "samples.npz", "scores.json")


def write_report(path: Path, config: "StudyConfig", results: dict[str, Any]) -> None:
    """Write the page."""
    experiments, model = results["experiments"], results["model"]
    hardware = results["hardware"]
    space = "latents of an autoencoder trained on the spot" if results["autoencoder"] else results["space"]
    minutes = sum(results["seconds"].values()) / 60
    subject = "ImageNet" if config.size.startswith("paper") else "digits"
    report = Report(
        title=f"Diffusion transformers on {subject}: what of chapter 2 holds at this size",
        subtitle=f"Chapter 2 (DiT), size {config.size}, seed {config.seed}: {len(results['models'])} models trained on {space} of "
        f"{results['training']['data']}, the largest shown here of {model['parameters']:,} parameters on {model['images']:,} "
        f"images (repeats counted); {minutes:.1f} minutes, without what was cut short by a kill, on {hardware['cores']} cores, "
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
    _samples(report, config, experiments)
    _made(report, config, results)
    report.write(path)


def _samples(report: Report, config: "StudyConfig", experiments: Mapping[str, Result]) -> None:
    """Links to what every row of every table was measured on."""
    listed = {row["samples"]: row for result in experiments.values() for row in _listed(result)}
    links = [
        (
            " / ".join(Path(path).parts[1:-1]),
            {
                file.name: file.as_posix()
                for file in map(Path(path).with_name, FILES)
                if (config.folder / file).exists()
            },
        )
        for path in sorted(listed)
    ]
    report.links(
        f"Samples of all {len(links)} rows: model / images-sampler-steps-nCOUNT, with every bootstrap replicate", links
    )


def _listed(result: Result) -> list[Result]:
    rows = result.get("rows", [])
    places = result.get("samples", {})
    return [{"samples": path} for path in places.values()] if isinstance(rows, dict) else rows


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
        "commit": ", ".join(
            sorted({results["commit"], *(e["made"]["commit"] for e in results["experiments"].values())})
        ),
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
