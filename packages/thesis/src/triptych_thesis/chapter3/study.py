"""Chapter 3 end to end: collect a zoo, train a G.pt on it, prompt it, audit it, report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from triptych_common.storage.run import RunDirectory
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.zoo.collect_config import IDENTITY, CollectConfig

from triptych_thesis.chapter3.sizes import CARTPOLE, MNIST, SIZES, Size
from triptych_thesis.study.experiment import Opening, Study
from triptych_thesis.study.runner import Stopwatch
from triptych_thesis.study.verdicts import Verdict

if TYPE_CHECKING:
    from triptych_common.workers import Unit

    from triptych_thesis.chapter3.context import Context

CLAIMS = {  # those that speak of policies have a row of their own in the ledger
    claim: f"{claim}-{CARTPOLE}" for claim in ("gpt.fig-3.3", "gpt.fig-3.4", "gpt.fig-3.5", "gpt.fig-3.9")
}
TITLES = {MNIST: "A network is prompted into being", CARTPOLE: "A policy is prompted into acting"}


@dataclass(frozen=True)
class Chapter3(Study):
    """Reproduce chapter 3: collect checkpoints, train G.pt on them, prompt, audit, report. Repeating the command resumes it."""

    chapter: ClassVar[int] = 3
    results_folder: ClassVar[str] = "evaluation"
    decisive: ClassVar = ("task",)

    out: Path = Path("runs/ch3")
    """everything goes to OUT/SIZE, OUT/report.html is the latest finished size; of cartpole in OUT/cartpole"""
    task: str = MNIST
    """what the networks do: mnist (classify images), or cartpole (balance a pole, learned by PPO, prompted for returns)"""
    size: str = "laptop"
    """smoke (a minute), laptop (two cores, under twenty minutes), gpu (one GPU, resumable slices), paper (the thesis's settings;
    train under torchrun first); of mnist also gpu-cifar10 and paper-cifar10"""
    all: bool = False
    """also what takes longer: the figures left out, and models trained to compare (scaling, ablations)"""

    def __post_init__(self) -> None:
        if self.task not in SIZES:
            raise ValueError(f"task {self.task!r}: expected one of {', '.join(SIZES)}")
        super().__post_init__()

    @property
    def sizes(self) -> Mapping[str, Size]:
        return SIZES[self.task]

    @property
    def sized(self) -> Size:
        """What the size trains and measures."""
        return self.sizes[self.size]

    @property
    def home(self) -> Path:
        return self.out if self.task == MNIST else self.out / self.task

    @property
    def target(self) -> str:
        return super().target + (f" TASK={self.task}" if self.task != MNIST else "")

    def collect_config(self) -> CollectConfig:
        """How the zoo is collected."""
        return replace(self.sized.collect, out=self.folder / "zoo", seed=self.seed, device=self.device)

    def train_config(self) -> GptTrainConfig:
        """How the model is trained."""
        preset, zoo = self.sized.train, self.folder / "zoo"
        return replace(preset, zoo=zoo, out=self.folder / "gpt", seed=self.seed, device=self.device)

    def identity(self) -> dict[str, Any]:
        collected = self.collect_config()
        zoo = {name: getattr(collected, name) for name in ("task", "runs", "data", "epochs", "early", *IDENTITY)}
        if collected.iterations is not None:  # left out otherwise, as in folders that are older than the setting
            zoo["iterations"] = collected.iterations
        return {"size": self.size, "seed": self.seed, "zoo": zoo, "train": self.train_config().identity()}

    def resolved(self) -> dict[str, Any]:
        size = self.sized
        return {
            "collect": asdict(self.collect_config()),
            "train": asdict(self.train_config()),
            "experiments": self.chosen,
            "sampler": {"sampler": size.sampler, "num_inference_steps": size.num_inference_steps},
            "amounts": asdict(size.amounts),
            "further models": asdict(size.variants) if "fig-3.7" in self.chosen else None,
        }

    def context(self) -> "Context":
        from triptych_gpt.settings import SamplerSettings

        from triptych_thesis.chapter3.context import Context

        size = self.sized
        settings = SamplerSettings(size.sampler, size.num_inference_steps, networks_at_once=512)
        training = self.train_config()
        return Context(
            model=training.out, zoo=training.zoo, settings=settings, amounts=size.amounts, seed=self.seed, device=self.device,
            folder=self.folder, training=training, variants=size.variants,
        )  # fmt: skip

    def prepare(self, context: "Context", clock: Stopwatch) -> None:
        """Collect the zoo and train the model. Raises ValueError for a folder with results of another model or amounts."""
        from triptych_gpt.train import train
        from triptych_gpt.zoo.collect import collect

        with clock("collecting"):
            collect(self.collect_config())
        with clock("training"):
            train(self.train_config())
        with RunDirectory(self.folder / self.results_folder, context.identity()):
            pass

    def units(self, context: "Context", needs: Sequence["Unit"]) -> Mapping[str, Sequence["Unit"]]:
        return {"further models": needs}

    def judged(self, verdict: Verdict) -> Verdict | None:
        if self.task == MNIST:
            return verdict
        return replace(verdict, claim=CLAIMS[verdict.claim]) if verdict.claim in CLAIMS else None

    def facts(self, context: "Context") -> dict[str, Any]:
        trained, zoo = context.trial.trained, context.trial.zoo
        parameters = sum(p.numel() for p in trained.model.parameters())
        return {
            "zoo": {"task": zoo.task, "runs": zoo.splits, "checkpoints": zoo.checkpoints, "parameters": zoo.layout.size,
                    "bytes": zoo.manifest.bytes},
            "model": {"parameters": parameters, "scale": trained.scale, "metric": trained.metric,
                      "kept": trained.facts.get("validation"), "trained_range": trained.trained_range},
            "training": self.train_config().identity(),
            "sampler": asdict(context.settings),
        }  # fmt: skip

    def opening(self, results: Mapping[str, Any]) -> Opening:
        from triptych_thesis.chapter3.context import named

        zoo, model, sampler = results["zoo"], results["model"], results["sampler"]
        made = (
            f"{model['parameters']:,} parameters, trained on {results['training']['total_pairs']:,} pairs of checkpoints from "
            f"{zoo['runs'].get('train', 0):,} runs of {zoo['task']} ({zoo['parameters']:,} parameters each), sampled by "
            f"{sampler['sampler']} in {sampler['num_inference_steps']} steps"
        )
        title, metric = TITLES[self.task], named(model["metric"])
        if "fig-3.5" not in results["experiments"]:
            return Opening(title, f"A G.pt of {made}.", [])
        alignment = results["experiments"]["fig-3.5"]["alignment"]
        r2 = {name: alignment[name]["r2"]["value"] for name in ("G.pt", "identity", "retrieval")}
        # What a copy explains is said first: only networks that are no copies make G.pt's number worth something.
        copying = f"copying the training network nearest in it scores R² {r2['retrieval']:.2f}"
        claim = "this G.pt does not yet give it to networks that it never saw"
        if r2["G.pt"] > 0.5:
            claim = "G.pt turns networks that it never saw into networks that have it"
        nothing = f"and doing nothing {r2['identity']:.2f}"
        headline = f"Prompted for a {metric}, {copying} {nothing}; {claim}: R² {r2['G.pt']:.2f}."
        caption = f"One update of each unseen network, beside updates that learn nothing. The model: {made}."
        return Opening(title, headline, [self.figure("fig-3.5", caption)])
