"""`triptych-gpt audit`: are the networks a model makes new, or training networks in disguise?"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from triptych_common.cli import CommonOptions, echo
from triptych_common.fields import Ge
from triptych_common.images import figure_png
from triptych_common.storage.atomic import write_bytes, write_json
from triptych_common.storage.provenance import provenance

from triptych_gpt.evaluation.plots import memorization_figure
from triptych_gpt.evaluation.records import interval, plain, table
from triptych_gpt.evaluation.trial import Trial, memorization
from triptych_gpt.trained import SamplerSettings


@dataclass(frozen=True)
class AuditConfig(CommonOptions):
    """Audit a trained G.pt for memorisation: its networks, their nearest training networks, and trivial ways to make either."""

    model: Path = Path("runs/gpt")
    """the trained G.pt: a run folder, or a model file"""
    zoo: Path = Path("runs/zoo")
    """the zoo it was trained on"""
    out: Path = Path("runs/gpt-audit")
    """folder for audit.json and audit.png"""
    samples: Annotated[int, Ge(1)] = 100
    """networks to make, each from another unseen one"""
    target: float | None = None
    """what to ask for; default: what does best on validation runs"""
    every: Annotated[int, Ge(1)] = 1
    """search every so many checkpoints of the training runs; 1: all"""
    sampler: str = "ddpm"
    """ddpm as in the thesis, ddim, or a scheduler of diffusers by name, such as unipc"""
    num_inference_steps: int = 50
    """denoising steps of an update, evenly spaced over the thesis's 1000"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None and not math.isfinite(self.target):
            raise ValueError(f"target {self.target}: expected a finite number")
        self.settings  # noqa: B018 - checked at the door

    @property
    def settings(self) -> SamplerSettings:
        return SamplerSettings(self.sampler, self.num_inference_steps)

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


def audit_command(config: AuditConfig) -> dict[str, Any]:
    """Audit a model, print a table of the groups compared, then the verdict; returns the verdict and the median distances.

    Raises what opening model, task and zoo raises, OSError when the disk refuses.
    """
    trial = Trial.open(config.model, config.zoo, config.settings, config.seed, config.device)
    result = plain(memorization(trial, samples=config.samples, prompt=config.target, every=config.every))
    write_json(config.out / "audit.json", {"experiment": "audit", "result": result, **provenance()})
    write_bytes(config.out / "audit.png", figure_png(memorization_figure(result)))
    for line in audit_table(result):
        echo(line)
    echo(result["verdict"][0])
    echo(f"prompted {result['metric']} {result['prompt']:.4g}; searched {result['searched']}")
    echo(f"wrote audit.json, with {len(result['verdict'])} sentences of verdict, and audit.png to {config.out}")
    medians = {group["name"]: group["median_distance"] for group in result["groups"]}
    return {"memorised": result["memorised"], "verdict": result["verdict"], "median_distance": medians}


def audit_table(result: Mapping[str, Any]) -> list[str]:
    """Lines of a table, one a group of networks: median distance to the nearest training network, and the mean metric."""
    metric = result["metric"]
    rows = [("", "median distance to training", metric)]
    rows += [
        (group["name"], interval(group["median_distance"]), interval(group["metrics"][metric]))
        for group in result["groups"]
    ]
    return table(rows)
