"""`triptych figures`: chapter 3's experiments with any trained G.pt and its zoo, as JSON and PNG files."""

import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from triptych_common.cli import CommonOptions, echo
from triptych_common.storage.run import RunDirectory
from triptych_gpt.settings import SamplerSettings

from triptych_thesis.chapter3.sizes import Amounts
from triptych_thesis.study.experiment import Experiment, discover
from triptych_thesis.study.runner import measure
from triptych_thesis.study.verdicts import merged

OF_ONE_RUN = ("example", "fig-3.7", "training")  # what belongs to a training run of the chapter's own


def offered() -> dict[str, Experiment]:
    """The experiments that any trained model allows, by name; they are imported on the first call, and torch with them."""
    experiments = discover("triptych_thesis.chapter3.experiments")
    return {name: each for name, each in experiments.items() if name not in OF_ONE_RUN}


@dataclass(frozen=True)
class FiguresConfig(CommonOptions):
    """Draw the figures of chapter 3 that one trained G.pt suffices for. Repeating the command does what is missing."""

    model: Path = Path("runs/gpt")
    """the trained G.pt: a run folder, or a model file"""
    zoo: Path = Path("runs/zoo")
    """the zoo it was trained on"""
    task: str | None = None
    """the task that scores networks, if it is your own (file.py:NAME, which is run)"""
    out: Path = Path("runs/gpt-figures")
    """folder for a JSON file and a figure of each experiment"""
    experiments: tuple[str, ...] = ()
    """which, by default all: fig-3.3 (one step), fig-3.4 (optimisers' curves), fig-3.5 (prompts), fig-3.6 (initialisers),
    fig-3.8 (landscape), fig-3.9 (neighbours), audit (memorisation), sampler-steps, filters, film (of a cartpole)"""
    sampler: str = "ddpm"
    """ddpm as in the thesis, ddim, or a scheduler of diffusers by name, such as unipc"""
    num_inference_steps: int = 50
    """denoising steps of an update, evenly spaced over the thesis's 1000"""
    networks_at_once: int = 512
    """networks in a batch"""
    amounts: Amounts = field(default_factory=Amounts)

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.experiments if name not in offered()]:
            raise ValueError(f"experiments {', '.join(unknown)}: expected some of {', '.join(offered())}")
        self.settings  # noqa: B018 - checked at the door

    @property
    def settings(self) -> SamplerSettings:
        """How updates are sampled."""
        return SamplerSettings(self.sampler, self.num_inference_steps, self.networks_at_once)

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


def figures(config: FiguresConfig) -> dict[str, Any]:
    """Run the experiments that are missing; returns the verdict on each claim that they decide.

    Raises what opening model, task and zoo raises, and ValueError where the folder holds another model's results.
    """
    from triptych_thesis.chapter3.context import Context

    names = config.experiments or tuple(offered())
    context = Context(
        config.model, config.zoo, config.settings, config.amounts, config.seed, config.device, task=config.task
    )
    command, verdicts = shlex.join(["triptych", *sys.argv[1:]]), []
    with RunDirectory(config.out, context.identity()):
        for name in names:
            result = measure(offered()[name], context, config.out / f"{name}.json", config.out, command)
            verdicts += offered()[name].verdicts(result)
    decided = merged(verdicts)
    for claim, verdict in decided.items():
        echo(f"{claim}: {verdict.verdict} ({verdict.shown[0].line})")
    echo(f"wrote {len(names)} experiments, with figures, to {config.out}")
    return {"out": str(config.out), "claims": {claim: verdict.verdict for claim, verdict in decided.items()}}
