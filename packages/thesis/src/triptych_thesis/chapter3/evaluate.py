"""`triptych figures`: the figures of chapter 3 for one trained model, as JSON and PNG files."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from triptych_common.cli import CommonOptions, echo
from triptych_common.storage.atomic import write_bytes, write_json
from triptych_common.storage.checkpoint import digest
from triptych_common.storage.provenance import provenance
from triptych_common.storage.run import RunDirectory
from triptych_gpt.evaluation.records import plain
from triptych_gpt.evaluation.trial import Trial
from triptych_gpt.settings import SamplerSettings
from triptych_gpt.zoo.source import recipe_of

from triptych_thesis.chapter3.context import Amounts
from triptych_thesis.chapter3.drawing import drawn
from triptych_thesis.chapter3.findings import findings
from triptych_thesis.chapter3.suite import SUITE


@dataclass(frozen=True)
class EvaluateConfig(CommonOptions):
    """Evaluate a trained G.pt: the figures of chapter 3 that one model suffices for. Repeating the command does what is missing."""

    model: Path = Path("runs/gpt")
    """the trained G.pt: a run folder, or a model file"""
    zoo: Path = Path("runs/zoo")
    """the zoo it was trained on"""
    out: Path = Path("runs/gpt-evaluation")
    """folder for a JSON file and a figure of each experiment"""
    experiments: tuple[str, ...] = tuple(SUITE)
    """which: fig-3.3 (one step), fig-3.4 (optimisers' curves), fig-3.5 (prompts), fig-3.6 (initialisers), fig-3.8 (landscape),
    fig-3.9 (neighbours), audit (memorisation), sampler-steps, filters"""
    sampler: str = "ddpm"
    """ddpm as in the thesis, ddim, or a scheduler of diffusers by name, such as unipc"""
    num_inference_steps: int = 50
    """denoising steps of an update, evenly spaced over the thesis's 1000"""
    networks_at_once: int = 512
    """networks in a batch"""
    amounts: Amounts = field(default_factory=Amounts)

    def __post_init__(self) -> None:
        unknown = [name for name in self.experiments if name not in SUITE]
        if unknown or not self.experiments:
            raise ValueError(f"experiments {', '.join(unknown) or 'none'}: expected some of {', '.join(SUITE)}")
        self.settings  # noqa: B018 - checked at the door

    @property
    def settings(self) -> SamplerSettings:
        return SamplerSettings(self.sampler, self.num_inference_steps, self.networks_at_once)

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run the experiments that are missing; returns all results by name.

    Raises what opening model, task and zoo raises, and ValueError where a folder holds another model's results.
    """
    trial = Trial.open(config.model, config.zoo, config.settings, config.seed, config.device)
    config.amounts.check(trial)
    identity = {
        "model": trial.trained.facts.get("zoo"),
        "weights": digest(trial.trained.model.state_dict())[:16],
        "pairs_seen": trial.trained.facts.get("pairs_seen"),
        "validation": trial.trained.facts.get("validation"),
        "zoo": {"recipe": recipe_of(trial.zoo), "runs": trial.zoo.splits},
        "sampler": asdict(config.settings),
        "amounts": asdict(config.amounts),
        "seed": config.seed,
    }
    results = {}
    with RunDirectory(config.out, identity) as run:
        for name in config.experiments:
            results[name] = _done(run.path / f"{name}.json", name, partial(SUITE[name], trial, config.amounts))
            for figure, png in drawn(name, results[name]).items():
                write_bytes(run.path / f"{figure}.png", png)
    told = findings(results)
    for line in told:
        echo(line)
    echo(f"wrote {len(results)} experiments, with figures, to {config.out}")
    return {"out": str(config.out), "findings": told}


def _done(path: Path, name: str, experiment: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result at `path`, made and written if it is not there yet."""
    if path.exists():
        return json.loads(path.read_text())["result"]
    began = time.perf_counter()
    result = plain(experiment())
    seconds = round(time.perf_counter() - began, 1)
    write_json(path, {"experiment": name, "seconds": seconds, "result": result, **provenance()})
    echo(f"{name}: {seconds:.0f} s")
    return result
