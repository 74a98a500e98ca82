"""The HTML report of a study of chapter 2."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych_thesis.chapter2.findings import measured
from triptych_thesis.chapter2.sections import SECTIONS
from triptych_thesis.study.claims import load_claims
from triptych_thesis.study.old_report import Report

if TYPE_CHECKING:
    from triptych_thesis.chapter2.command import StudyConfig

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
    """Links to what every row of every table was measured on, experiment by experiment."""
    report.heading("Samples")
    report.text("A set a line: model / images-sampler-steps-nCOUNT; scores.json holds every bootstrap replicate.")
    for name, result in experiments.items():
        links = [(" / ".join(Path(path).parts[1:-1]), _files(config.folder, Path(path))) for path in _sets(result)]
        if links:
            report.links(f"{name}: {len(links)} sets", links)


def _sets(result: Result) -> list[str]:
    """Paths of an experiment's samples, each once; a gallery has rows of real digits too, and lists its own."""
    paths = result["samples"].values() if "samples" in result else [row["samples"] for row in result.get("rows", [])]
    return sorted(set(paths))


def _files(folder: Path, samples: Path) -> dict[str, str]:
    there = [samples.with_name(name) for name in FILES if (folder / samples.with_name(name)).exists()]
    return {path.name: path.as_posix() for path in there}


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
        **_other_commits(results),
        "versions": results["versions"],
        "hardware": results["hardware"],
        "main model": {key: results["model"][key] for key in ("name", "parameters", "gflops_per_forward", "images")},
        "its shape": results["model"]["config"],
        "training, of all models": results["training"],
        "autoencoder": results["autoencoder"] or results["space"],
        **({"decoder of the samples": results["decoder"]} if results["decoder"] else {}),
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


def _other_commits(results: Result) -> dict[str, Any]:
    """Of experiments, and of the models and samples that they are about, which were made at other commits than the page; and the
    experiments' commands, where these differ."""
    made = {name: result["made"] for name, result in results["experiments"].items()}
    experiments = {name: each["commit"] for name, each in made.items()}
    commands = {name: f"`{each['command']}`" for name, each in made.items()}
    pairs = {
        "command, of experiments": commands if len(set(commands.values())) > 1 else {},
        "commit, of experiments": {name: commit for name, commit in experiments.items() if commit != results["commit"]},
        "commits, of models and samples": ", ".join(c for c in results["commits"] if c != results["commit"]),
    }
    return {what: value for what, value in pairs.items() if value}
