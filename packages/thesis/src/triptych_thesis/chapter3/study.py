"""Chapter 3 end to end: collect a zoo, train a G.pt on it, prompt it, audit it, report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from triptych_common.storage.run import RunDirectory
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.zoo.collect_config import IDENTITY, CollectConfig

from triptych_thesis.chapter3.sizes import SIZES, Size
from triptych_thesis.study.experiment import Opening, Study
from triptych_thesis.study.runner import Stopwatch

if TYPE_CHECKING:
    from triptych_common.workers import Unit

    from triptych_thesis.chapter3.context import Context


@dataclass(frozen=True)
class Chapter3(Study):
    """Reproduce chapter 3: collect checkpoints, train G.pt on them, prompt, audit, report. Repeating the command resumes it."""

    chapter: ClassVar[int] = 3
    sizes: ClassVar[Mapping[str, Size]] = SIZES
    results_folder: ClassVar[str] = "evaluation"

    out: Path = Path("runs/ch3")
    """everything goes to OUT/SIZE; OUT/report.html is the latest finished size"""
    size: str = "laptop"
    """smoke (a minute), laptop (two cores, under twenty minutes), gpu or gpu-cifar10 (one GPU, resumable slices), paper or
    paper-cifar10 (the thesis's settings; train under torchrun first)"""
    all: bool = False
    """also what takes longer: the figures left out, and models trained to compare (scaling, ablations)"""

    def collect_config(self) -> CollectConfig:
        """How the zoo is collected."""
        return replace(SIZES[self.size].collect, out=self.folder / "zoo", seed=self.seed, device=self.device)

    def train_config(self) -> GptTrainConfig:
        """How the model is trained."""
        preset, zoo = SIZES[self.size].train, self.folder / "zoo"
        return replace(preset, zoo=zoo, out=self.folder / "gpt", seed=self.seed, device=self.device)

    def identity(self) -> dict[str, Any]:
        collected = self.collect_config()
        zoo = {name: getattr(collected, name) for name in ("task", "runs", "data", "epochs", "early", *IDENTITY)}
        return {"size": self.size, "seed": self.seed, "zoo": zoo, "train": self.train_config().identity()}

    def resolved(self) -> dict[str, Any]:
        size = SIZES[self.size]
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

        size = SIZES[self.size]
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
        title, metric = "A network is prompted into being", named(model["metric"])
        if "fig-3.5" not in results["experiments"]:
            return Opening(title, f"A G.pt of {made}.", [])
        alignment = results["experiments"]["fig-3.5"]["alignment"]
        r2 = {name: alignment[name]["r2"]["value"] for name in ("G.pt", "identity", "retrieval")}
        beside = (
            f"against {r2['identity']:.2f} for doing nothing and {r2['retrieval']:.2f} for copying trained networks"
        )
        claim = "this G.pt does not yet give it to networks that it never saw"
        if r2["G.pt"] > 0.5:
            claim = "G.pt turns networks that it never saw into networks that have it"
        headline = f"Prompted for a {metric}, {claim}: R² {r2['G.pt']:.2f} between prompted and achieved, {beside}."
        caption = f"One update of each unseen network, beside updates that learn nothing. The model: {made}."
        return Opening(title, headline, [self.figure("fig-3.5", caption)])
