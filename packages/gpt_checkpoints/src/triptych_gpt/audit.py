"""`triptych-gpt audit`: are the networks a model makes new, or training networks in disguise?"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triptych_common.cli import CommonOptions, echo
from triptych_common.storage.atomic import write_bytes, write_json
from triptych_common.storage.provenance import provenance
from triptych_thesis.chapter3.context import Amounts
from triptych_thesis.chapter3.drawing import drawn
from triptych_thesis.chapter3.evaluate import EvaluateConfig, open_bench
from triptych_thesis.chapter3.suite import memorisation


@dataclass(frozen=True)
class AuditConfig(CommonOptions):
    """Audit a trained G.pt for memorisation: its networks, their nearest training networks, and trivial ways to make either."""

    model: Path = Path("runs/gpt")
    """the trained G.pt: a run folder, or a model file"""
    zoo: Path = Path("runs/zoo")
    """the zoo it was trained on"""
    out: Path = Path("runs/gpt-audit")
    """folder for audit.json and audit.png"""
    samples: int = 100
    """networks to make, each from another unseen one"""
    target: float | None = None
    """what to ask for; default: what does best on validation runs"""
    every: int = 1
    """search every so many checkpoints of the training runs; 1: all"""
    sampler: str = "ddpm"
    """ddpm as in the thesis, ddim, or a scheduler of diffusers by name, such as unipc"""
    num_inference_steps: int = 50
    """denoising steps of an update, evenly spaced over the thesis's 1000"""

    def __post_init__(self) -> None:
        if self.target is not None and not math.isfinite(self.target):
            raise ValueError(f"target {self.target}: expected a finite number")
        self._evaluation()  # checked at the door

    def _evaluation(self) -> EvaluateConfig:
        return EvaluateConfig(
            model=self.model, zoo=self.zoo, sampler=self.sampler, num_inference_steps=self.num_inference_steps,
            seed=self.seed, device=self.device, amounts=Amounts(audit_samples=self.samples, every=self.every),
        )  # fmt: skip

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


def audit_command(config: AuditConfig) -> dict[str, Any]:
    """Audit, and say what was found; returns the verdict and the medians.

    Raises what opening model, task and zoo raises, OSError when the disk refuses.
    """
    bench = open_bench(config._evaluation())
    result = memorisation(bench, config.target)
    write_json(config.out / "audit.json", {"experiment": "audit", "result": result, **provenance()})
    for name, png in drawn("audit", result).items():
        write_bytes(config.out / f"{name}.png", png)
    echo(f"asked for {result['prompt']:.4g}; searched {result['searched']}")
    for line in result["verdict"]:
        echo(line)
    echo(f"wrote audit.json and audit.png to {config.out}")
    medians = {group["name"]: group["median_distance"] for group in result["groups"]}
    return {"memorised": result["memorised"], "verdict": result["verdict"], "median_distance": medians}
