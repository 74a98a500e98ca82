"""Chapter 4 at the thesis's size: its eight data sets, and with `--all` Table 4.3 on cats, as commands for eight GPUs.

Each takes days, so they are not run from here: this writes them down, and reports on those that were run.
"""

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych_common.cli import echo
from triptych_common.storage.files import write_json, write_text
from triptych_common.storage.provenance import provenance
from triptych_common.storage.run import RunDirectory
from triptych_gangealing.aligner import FILE
from triptych_gangealing.train_config import PRESETS, AlignTrainConfig

from triptych_thesis.chapter4.sizes import LPIPS_ROWS, TABLE_4_3, ablation, folder_name
from triptych_thesis.study.experiment import Picture, Section, Table
from triptych_thesis.study.report import Report
from triptych_thesis.study.runner import refuse_others, refuse_torchrun

if TYPE_CHECKING:
    from triptych_thesis.chapter4.study import Chapter4

DATASETS = ("bicycle", "cat", "dog", "tv", "celeba", "cub", "car", "horse")
GPUS = 8
TORCHRUN = f"torchrun --nproc-per-node {GPUS} -m triptych_gangealing.cli"
NUM_WS, W_DIM = 14, 512  # of the generators of 256 pixels that Table 4.3 is about
SSL_VGG = "simclr_vgg_phase150.pt"


@dataclass(frozen=True)
class PaperRun:
    """One training run of the thesis: the preset it starts from, and its settings."""

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
    def trained(self) -> bool:
        return (self.config.out / FILE).exists()

    @property
    def state(self) -> str:
        """How far it has come."""
        if self.trained:
            return "trained"
        if (images := self.last.get("images")) is not None:
            return f"{images:,} of {self.config.total_images:,} images"
        needed = filter(None, (Path(self.config.generator), self.config.distance_weights))
        missing = [str(path) for path in needed if not path.exists()]
        return f"needs {' and '.join(missing)}" if missing else "ready to train"

    @property
    def last(self) -> dict[str, Any]:
        """The newest row of its metrics."""
        rows = [row for row in RunDirectory(self.config.out, {}).metrics() if "loss" in row]
        return rows[-1] if rows else {}

    def as_dict(self) -> dict[str, Any]:
        """As results.json holds it."""
        weights = self.config.distance_weights
        return {
            "command": self.command, "state": self.state, "last": self.last, "settings": self.config.identity(),
            "distance_weights": None if weights is None else str(weights),
        }  # fmt: skip


@dataclass(frozen=True)
class Paper:
    """The thesis's runs that a study covers."""

    study: "Chapter4"

    def __post_init__(self) -> None:
        if unknown := set(self.study.datasets) - set(DATASETS):
            raise ValueError(f"dataset {min(unknown)!r}: expected some of {', '.join(DATASETS)}")

    def runs(self) -> list[PaperRun]:
        """The data sets; with --all, also the rows of Table 4.3 other than the cats of Table 4.1."""
        folder, lpips_weights, datasets = self.study.folder, self.study.lpips_weights, self.study.datasets or DATASETS
        runs = [
            PaperRun(name, name, self._placed(PRESETS[name], folder / name, name, lpips_weights)) for name in datasets
        ]
        for row, published in TABLE_4_3.items() if self.study.all else ():
            if not published or (row == "LPIPS, complete" and "cat" in datasets):  # the data set cat is that row
                continue
            lpips = row in LPIPS_ROWS
            vgg = lpips_weights if lpips else self.study.generators / SSL_VGG
            config = ablation(row, PRESETS["cat-ssl"], NUM_WS, W_DIM, vgg)
            config = self._placed(config, folder / "ablations" / folder_name(row), "cat", vgg)
            runs.append(PaperRun(f"Table 4.3, {row}", "cat" if lpips else "cat-ssl", config))
        return runs

    def _placed(self, config: AlignTrainConfig, out: Path, generator: str, vgg: Path | None) -> AlignTrainConfig:
        """Settings with this study's paths, seed and device. A generator's file may be of any form that can be read."""
        study = self.study
        forms = [study.generators / f"{generator}{ending}" for ending in (".pkl", ".pt", ".safetensors", "")]
        path = str(next((form for form in forms if form.exists()), forms[0]))
        return replace(config, out=out, generator=path, distance_weights=vgg, seed=study.seed, device=study.device)

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints."""
        return {"runs": {run.name: {"command": run.command, **run.config.resolved()} for run in self.runs()}}

    def write(self) -> dict[str, Any]:
        """Write commands.sh, results.json and report.html on what is to run and what has run; returns the results."""
        refuse_torchrun()
        runs, folder, seed = self.runs(), self.study.folder, self.study.seed
        results = {
            "chapter": 4, "size": "paper", "seed": seed, "runs": {run.name: run.as_dict() for run in runs}, **provenance(),
        }  # fmt: skip
        for run in runs:
            echo(f"# {run.name}: {run.state}\n{run.command}")
        lines = ["#!/bin/sh", "# Repeating a command resumes it.", "set -e", *(run.command for run in runs)]
        refuse_others(self.study, folder)
        write_text(folder / "commands.sh", "\n".join(lines) + "\n")
        write_json(folder / "results.json", results)
        trained = f"{sum(run.trained for run in runs)} of {len(runs)} runs trained"
        report = Report(
            title="Eight data sets learn to stand in line",
            headline=f"{trained}; the commands below train the others, on {GPUS} GPUs.",
            setting=f"Chapter 4 (GANgealing), size paper, seed {seed}: the thesis's own settings. "
            "No PCK here: SPair-71k and CUB are not read yet.",
            sections=[_section(runs)],
            command="\n".join(run.command for run in runs),
        )
        report.write(folder / "report.html")
        echo(f"wrote {folder / 'report.html'}: {trained}")
        return results


def _section(runs: list[PaperRun]) -> Section:
    rows, pictures = [], []
    for run in runs:
        distance = f"{run.last['distance']:.4f}" if run.last else ""
        rows.append((run.name, run.state, distance, run.last.get("images", "")))
        if files := sorted((run.config.out / "samples").glob("images-*.png")):
            caption = f"{run.name}, {files[-1].stem}: generated images, aligned, and their targets."
            pictures.append(Picture(files[-1].read_bytes(), caption))
    return Section("Runs", pictures, [Table(("run", "state", "distance to targets", "images"), rows)])
