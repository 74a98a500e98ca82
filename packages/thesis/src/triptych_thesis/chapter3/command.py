"""Chapter 3 end to end: collect a zoo, train a G.pt on it, prompt it, audit it, draw, report."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from triptych_common.cli import CommonOptions, echo
from triptych_common.progress import Stopwatch
from triptych_common.storage.atomic import write_bytes, write_json
from triptych_common.storage.provenance import provenance
from triptych_common.storage.run import RunDirectory
from triptych_gpt.prompting import PromptConfig, prompt_command
from triptych_gpt.train import train
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.trained import load
from triptych_gpt.zoo.collect import collect
from triptych_gpt.zoo.collect_config import IDENTITY, CollectConfig
from triptych_gpt.zoo.inspect import ExportConfig, export
from triptych_gpt.zoo.zoo import Zoo

from triptych_thesis.chapter3.drawing import drawn
from triptych_thesis.chapter3.evaluate import EvaluateConfig, evaluate
from triptych_thesis.chapter3.findings import findings
from triptych_thesis.chapter3.further_models import run_study, scaling
from triptych_thesis.chapter3.report import write_report
from triptych_thesis.chapter3.sizes import FIRST, REST, SIZES
from triptych_thesis.study.old_report import publish


@dataclass(frozen=True)
class ReproduceConfig(CommonOptions):
    """Reproduce chapter 3: collect checkpoints, train G.pt on them, prompt, audit, report. Repeating the command resumes it."""

    out: Path = Path("runs/ch3")
    """everything goes to OUT/SIZE; OUT/report.html is the latest finished size"""
    size: str = "laptop"
    """smoke (a minute), laptop (two cores, under twenty minutes), gpu or gpu-cifar10 (one GPU, resumable slices), paper or
    paper-cifar10 (the thesis's settings; train under torchrun first)"""
    all: bool = False
    """also what takes longer: the figures left out, and models trained to compare (scaling, ablations)"""
    claims: Path = Path("claims.toml")
    """ledger of the thesis's figures and tables, for the report; left out where absent"""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r}: expected one of {', '.join(SIZES)}")

    @property
    def folder(self) -> Path:
        return self.out / self.size

    def collect_config(self) -> CollectConfig:
        return replace(SIZES[self.size].collect, out=self.folder / "zoo", seed=self.seed, device=self.device)

    def train_config(self) -> GptTrainConfig:
        preset, zoo = SIZES[self.size].train, self.folder / "zoo"
        return replace(preset, zoo=zoo, out=self.folder / "gpt", seed=self.seed, device=self.device)

    def evaluate_config(self) -> EvaluateConfig:
        size = SIZES[self.size]
        return EvaluateConfig(
            out=self.folder / "evaluation", model=self.folder / "gpt", zoo=self.folder / "zoo",
            experiments=(*FIRST, *REST) if self.all else FIRST, sampler=size.sampler,
            num_inference_steps=size.num_inference_steps, amounts=size.amounts, seed=self.seed, device=self.device,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What decides the result, wherever it lies."""
        collected = self.collect_config()
        zoo = {name: getattr(collected, name) for name in ("task", "runs", "data", "epochs", "early", *IDENTITY)}
        return {"size": self.size, "seed": self.seed, "zoo": zoo, "train": self.train_config().identity()}

    def resolved(self) -> dict[str, Any]:
        return {
            "collect": asdict(self.collect_config()),
            "train": asdict(self.train_config()),
            "evaluate": asdict(self.evaluate_config()),
            "study": asdict(SIZES[self.size].study) if self.all else None,
        }


def reproduce(config: ReproduceConfig) -> dict[str, Any]:
    """Run what is missing of the reproduction; returns the content of results.json.

    Raises what collecting, training and evaluating raise, and ValueError under torchrun.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "reproduce is for one process; use triptych-gpt collect and train under torchrun, then repeat it"
        )
    with RunDirectory(config.folder, config.identity()) as run:
        clock = Stopwatch(run.path / "seconds.json", finished=(run.path / "results.json").exists())
        echo(f"chapter 3, size {config.size}: {run.path}")
        with clock("collecting"):
            collect(config.collect_config())
        with clock("training"):
            train(config.train_config())
        with clock("prompting", afresh=True):
            example = _example(config)
        with clock("evaluating"):
            evaluate(config.evaluate_config())
        if config.all:
            with clock("further models"):
                _study(config)
        results = assemble(config, example, clock.seconds)
        write_json(run.path / "results.json", results)
        write_report(run.path / "report.html", config, results)
    publish(config.folder, config.out, config.size)
    return results


def _example(config: ReproduceConfig) -> dict[str, Any]:
    """What a user does: a network's file in, prompted networks out."""
    zoo, out = Zoo(config.folder / "zoo"), config.folder / "prompted"
    start = out / "start.safetensors"
    if not start.exists():
        run = int(zoo.runs.run[zoo.runs_in("test")[0]])
        export(ExportConfig(zoo=zoo.path, run=run, checkpoint="0", out=start))
    trained = load(config.folder / "gpt")
    metric, values = trained.metric, zoo.metrics(trained.metric)
    asked = float(values[zoo.runs_in("train"), -1].median())
    size = SIZES[config.size]
    return prompt_command(
        PromptConfig(
            out=out, checkpoint=start, target=f"{metric}={asked:.3g}", model=config.folder / "gpt", samples=4,
            sampler=size.sampler, num_inference_steps=size.num_inference_steps, seed=config.seed, device=config.device,
        )
    )  # fmt: skip


def _study(config: ReproduceConfig) -> None:
    """Train what is compared, and draw Fig. 3.7."""
    size, folder = SIZES[config.size], config.folder / "study"
    settings = config.evaluate_config().settings
    results = run_study(size.study, config.train_config(), folder, settings, size.amounts)
    result = scaling(results)
    write_json(folder / "fig-3.7.json", {"experiment": "fig-3.7", "result": result, **provenance()})
    for name, png in drawn("fig-3.7", result).items():
        write_bytes(folder / f"{name}.png", png)


def assemble(config: ReproduceConfig, example: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The content of results.json: what was run, what it found, and where the rest lies."""
    evaluation, study = config.evaluate_config().out, config.folder / "study" / "study.json"
    experiments = {
        name: json.loads((evaluation / f"{name}.json").read_text())["result"]
        for name in (*FIRST, *REST)
        if (evaluation / f"{name}.json").exists()
    }
    trained = load(config.folder / "gpt")
    zoo = Zoo(config.folder / "zoo")
    return {
        "chapter": 3,
        "size": config.size,
        "seed": config.seed,
        "findings": findings(experiments),
        "experiments": experiments,
        "study": json.loads(study.read_text()) if study.exists() else None,
        "example": example,
        "zoo": {"task": zoo.task, "runs": zoo.splits, "checkpoints": zoo.checkpoints, "parameters": zoo.layout.size,
                "bytes": zoo.manifest.bytes},
        "model": {
            "parameters": sum(p.numel() for p in trained.model.parameters()),
            "scale": trained.scale,
            "metric": trained.metric,
            "kept": trained.facts.get("validation"),
            "trained_range": trained.trained_range,
        },
        "training": config.train_config().identity(),
        "sampler": asdict(config.evaluate_config().settings),
        "seconds": seconds,
        **provenance(),
    }  # fmt: skip
