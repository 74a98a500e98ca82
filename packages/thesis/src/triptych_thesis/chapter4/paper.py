"""Chapter 4 at the thesis's size: its eight data sets, and with `--all` Table 4.3 on cats, as commands for eight GPUs.

Each takes days, so they are not run from here: this writes them down, and reports on those that were run.
"""

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych_common.cli import echo
from triptych_common.storage.atomic import write_json, write_text
from triptych_common.storage.provenance import provenance
from triptych_common.storage.run import RunDirectory
from triptych_gangealing.aligner import FILE
from triptych_gangealing.train_config import PRESETS, AlignTrainConfig

from triptych_thesis.chapter4 import ablations
from triptych_thesis.study.old_report import Report

if TYPE_CHECKING:
    from triptych_thesis.chapter4.command import ReproduceConfig

DATASETS = ("bicycle", "cat", "dog", "tv", "celeba", "cub", "car", "horse")
GPUS = 8
TORCHRUN = f"torchrun --nproc-per-node {GPUS} -m triptych_gangealing.cli"
NUM_WS, W_DIM = 14, 512  # of the generators of 256 pixels that Table 4.3 is about
SSL_VGG = "simclr_vgg_phase150.pt"


@dataclass(frozen=True)
class PaperRun:
    """One training run of the thesis: where its settings start from, and what they are."""

    name: str
    preset: str
    config: AlignTrainConfig

    @property
    def command(self) -> str:
        """What to type: the preset, and every setting that differs from it."""
        words = f"{TORCHRUN} train --preset {self.preset}".split()
        for field in fields(self.config):
            value = getattr(self.config, field.name)
            if value != getattr(PRESETS[self.preset], field.name):
                words += [f"--{field.name.replace('_', '-')}", str(value)]
        return shlex.join(words)

    @property
    def state(self) -> str:
        """How far it has come."""
        if (self.config.out / FILE).exists():
            return "trained"
        images = self.last.get("images")
        if images is not None:
            return f"{images:,} of {self.config.total_images:,} images"
        missing = [
            path for path in (Path(self.config.generator), self.config.distance_weights) if path and not path.exists()
        ]
        return f"needs {' and '.join(map(str, missing))}" if missing else "ready to train"

    @property
    def last(self) -> dict[str, Any]:
        """The newest row of its metrics."""
        rows = [row for row in RunDirectory(self.config.out, {}).metrics() if "loss" in row]
        return rows[-1] if rows else {}


def paper_runs(config: "ReproduceConfig") -> list[PaperRun]:
    """The data sets asked for; with `all`, also the rows of Table 4.3 other than the cats of Table 4.1."""
    runs, datasets = [], config.datasets or DATASETS
    for name in datasets:
        out = config.folder / name
        runs.append(PaperRun(name, name, _settled(config, PRESETS[name], out, name, config.lpips_weights)))
    if config.all:
        start = PRESETS["cat-ssl"]
        for row, published in ablations.THESIS.items():
            if not published:
                continue
            lpips = row in ablations.LPIPS
            vgg = config.lpips_weights if lpips else config.generators / SSL_VGG
            changed = ablations.ablation(row, start, num_ws=NUM_WS, w_dim=W_DIM, vgg=vgg)
            out = config.folder / "ablations" / ablations.folder_name(row)
            if row != "LPIPS, complete" or "cat" not in datasets:  # else the preset cat is that row
                settled = _settled(config, changed, out, "cat", vgg)
                runs.append(PaperRun(f"Table 4.3, {row}", "cat" if lpips else "cat-ssl", settled))
    return runs


def _settled(
    config: "ReproduceConfig", settings: AlignTrainConfig, out: Path, generator: str, vgg: Path | None
) -> AlignTrainConfig:
    """With paths, seed and device of a reproduction. A generator may be of any form that can be read."""
    forms = [config.generators / f"{generator}{ending}" for ending in (".pkl", ".pt", ".safetensors", "")]
    path = next((form for form in forms if form.exists()), forms[0])
    return replace(settings, out=out, generator=str(path), distance_weights=vgg, seed=config.seed, device=config.device)


def reproduce_paper(config: "ReproduceConfig") -> dict[str, Any]:
    """Write commands.sh, results.json and report.html of what is to run and what has run; returns the results."""
    runs = paper_runs(config)
    results = {
        "chapter": 4,
        "size": config.size,
        "seed": config.seed,
        "runs": {
            run.name: {
                "command": run.command, "state": run.state, "last": run.last, "settings": run.config.identity(),
                "distance_weights": None if run.config.distance_weights is None else str(run.config.distance_weights),
            }
            for run in runs
        },
        **provenance(),
    }  # fmt: skip
    for run in runs:
        echo(f"# {run.name}: {run.state}\n{run.command}")
    lines = ["#!/bin/sh", "# Repeating a command resumes it.", "set -e", *(run.command for run in runs)]
    write_text(config.folder / "commands.sh", "\n".join(lines) + "\n")
    write_json(config.folder / "results.json", results)
    _report(config, runs)
    echo(f"wrote {config.folder / 'report.html'}: {_trained(runs)}")
    return results


def _trained(runs: list[PaperRun]) -> str:
    return f"{sum(run.state == 'trained' for run in runs)} of {len(runs)} runs trained"


def _report(config: "ReproduceConfig", runs: list[PaperRun]) -> None:
    report = Report(
        title="Eight data sets learn to stand in line",
        subtitle=f"Chapter 4 (GANgealing), size {config.size}, seed {config.seed}: the thesis's own settings.",
        findings=[
            f"{_trained(runs)}. What is missing is trained by the commands below, on {GPUS} GPUs.",
            "No PCK here: SPair-71k and CUB are not read yet. Pictures are of generated images.",
        ],
    )
    header = ["run", "state", "distance to targets", "images"]
    rows = [
        [run.name, run.state, f"{run.last['distance']:.4f}" if run.last else "", run.last.get("images", "")]
        for run in runs
    ]
    report.table(header, rows)
    for run in runs:
        pictures = sorted((run.config.out / "samples").glob("images-*.png"))
        if pictures:
            caption = f"{run.name}, {pictures[-1].stem}: generated images, aligned, and their targets."
            report.figures((pictures[-1].read_bytes(), caption))
    report.heading("Commands")
    report.code("\n".join(run.command for run in runs))
    report.write(config.folder / "report.html")
