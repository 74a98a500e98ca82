"""Chapter 2 (DiT) as a study: digits, block designs, scaling, guidance and samplers over models that are trained once."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NotRequired

from triptych_common.fields import Ge
from triptych_common.storage.files import rows
from typing_extensions import TypedDict

from triptych_thesis.chapter2.sizes import SIZES, Model, Size
from triptych_thesis.study.experiment import Opening, Picture, Study
from triptych_thesis.study.runner import Stopwatch, read_result
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, overall, sign

if TYPE_CHECKING:
    from triptych_thesis.chapter2.context import Context, SampleSet

MADE_BY = ("shards", "command", "commit", "versions", "hardware")  # of a cache: how it was made, not what it holds


@dataclass(frozen=True)
class Chapter2(Study):
    """Chapter 2 as a study: named experiments over shared models, and a report. Repeating the command resumes it."""

    chapter: ClassVar[int] = 2
    sizes: ClassVar[Mapping[str, Size]] = SIZES
    decisive: ClassVar = ("latents", "vae", "decoder", "reference")  # options of the paper sizes

    out: Path = Path("runs/ch2")
    """everything goes to OUT/SIZE; OUT/report.html is the latest finished size"""
    size: str = "laptop"
    """smoke (a minute), laptop (a quarter of an hour on two cores, half as long again on slow ones), in latents as the thesis
    is; smoke-pixels and laptop-pixels do without an autoencoder; gpu (MNIST in pixels, hours on one GPU, resumable at any time);
    paper and paper-512 (the thesis's settings on ImageNet latents: --dry-run prints what to run under torchrun, then repeat it
    without)"""
    only: tuple[str, ...] = ()
    """experiments to run: gallery, block-designs, scaling, compute, guidance, visual-scaling, unet, samplers; all by default"""
    all: bool = False
    """also the models of the grid that take longest"""
    latents: str | None = None
    """paper sizes: cache of ImageNet's latents; latents/imagenet-256 or -512 by default"""
    vae: str | None = None
    """paper sizes: its autoencoder, stabilityai/sd-vae-ft-mse by default as in Figure 2.9"""
    decoder: str | None = None
    """paper sizes: another autoencoder of the same encoder to draw samples with, such as stabilityai/sd-vae-ft-ema"""
    reference: Path | None = None
    """paper sizes: the ADM suite's reference file, by default VIRTUAL_imagenet256_labeled.npz or VIRTUAL_imagenet512.npz"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.at_paper_size:
            for name in self.decisive:
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} {getattr(self, name)}: for the paper sizes alone; leave --{name} out")

    @property
    def at_paper_size(self) -> bool:
        """Whether the study is of photographs, in latents that were made beforehand."""
        return SIZES[self.size].reference is not None

    @property
    def offered(self) -> tuple[str, ...]:
        return tuple(name for name in super().offered if name not in SIZES[self.size].left_out)

    def context(self) -> "Context":
        from triptych_thesis.chapter2.context import Context

        return Context(self)

    def identity(self) -> dict[str, Any]:
        """The size's settings, the seed, and at paper sizes what was made beforehand, which may be missing or damaged."""
        identity = {"size": self.size, "seed": self.seed, **self.settings()}
        if not self.at_paper_size:
            return identity
        from triptych_dit.autoencoder.cache import LatentCache
        from triptych_dit.autoencoder.encode import identity as identity_of

        context = self.context()
        facts = identity_of(LatentCache(Path(context.data)).facts)
        # Latents and reference are identified by content, autoencoder and decoder by name.
        latents = {name: value for name, value in facts.items() if name not in MADE_BY}
        reference = context.scorer.digest
        return identity | {"latents": latents, "vae": context.vae, "decoder": context.decoder, "reference": reference}

    def settings(self) -> dict[str, Any]:
        """The size, without what only decides where and how to run."""
        size = SIZES[self.size]
        base = {key: value for key, value in size.base.identity().items() if key not in ("model", "data", "seed")}
        return asdict(size) | {"base": base, "autoencoder": size.autoencoder and size.autoencoder.identity()}

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints: experiments, models with their cost, and at paper sizes the commands to run first."""
        from triptych_dit.flops import gflops, parameter_count

        from triptych_thesis.chapter2.plan import commands

        context = self.context()
        sets = list(dict.fromkeys(need for name in self.chosen for need in self.experiments[name].needs(context)))
        trainings, samplings = self.units(context, sets).values()
        models = {
            unit.title: {
                "gflops_per_forward": round(gflops(unit.config.model), 6), "parameters": parameter_count(unit.config.model),
                "images": unit.config.total_images, "done": unit.done,
            }
            for unit in trainings
        }  # fmt: skip
        plan = {
            "experiments": self.chosen, "models": models, "training_gflops": round(sum(3 * unit.cost for unit in trainings), 1),
            "sampling_gflops": round(sum(unit.cost for unit in samplings), 1), "sets_of_samples": len(sets),
            "settings": self.settings(),
        }  # fmt: skip
        return plan | ({"run_first": commands(context, trainings, samplings)} if self.at_paper_size else {})

    def check(self) -> None:
        super().check()
        if not self.at_paper_size:
            return
        from triptych_dit.autoencoder.cache import is_latent_cache

        from triptych_thesis.chapter2.plan import encode_command

        context = self.context()
        if not is_latent_cache(Path(context.data)):
            remedy = f"pass --latents, or make it: {encode_command(context)}"
            raise FileNotFoundError(f"{context.data}: no latent cache; {remedy}")
        if not context.scorer.path.exists():
            remedy = "fetch it from the ADM suite, pass --reference"
            raise FileNotFoundError(f"{context.scorer.path}: no such reference; {remedy}")

    def prepare(self, context: "Context", clock: Stopwatch) -> None:
        """Write the digits with a margin; train an autoencoder and encode them, where the size has one."""
        if self.at_paper_size:
            return
        from triptych_dit.autoencoder.encode import EncodeConfig, encode
        from triptych_dit.autoencoder.train import train_autoencoder

        from triptych_thesis.chapter2.digits import padded_digits

        size = SIZES[self.size]
        digits = padded_digits(self.folder / "digits32", size.data)
        if size.autoencoder is None:
            return
        autoencoder = replace(size.autoencoder, out=self.folder / "autoencoder", seed=self.seed, device=self.device)
        if not (autoencoder.out / "autoencoder.json").exists():
            with clock("autoencoder"):
                train_autoencoder(autoencoder)
        latents = EncodeConfig(source=str(digits), vae=str(autoencoder.out), image_size=size.side, flips=False, workers=0,
                               device=self.device)  # fmt: skip
        with clock("encoding", afresh=True):
            for split in ("train", "held_out"):
                encode(replace(latents, out=self.folder / "latents" / split, split=split))

    def units(self, context: "Context", needs: Sequence["SampleSet"]) -> Mapping[str, Sequence[Any]]:
        return {
            "training": [context.training(model) for model in dict.fromkeys(each.model for each in needs)],
            "sampling and scoring": [context.sampling(each) for each in needs],
        }

    def facts(self, context: "Context") -> dict[str, Any]:
        from triptych_dit.flops import gflops, parameter_count

        main, size, settings = Model(context.size.main), context.size, self.settings()
        training = context.train_config(main)
        logs = sorted(self.folder.glob("models/*/metrics.jsonl"))
        runs = [*self.folder.glob("models/*/config.json"), *self.folder.glob("samples/*/*/config.json")]
        return {
            "model": {"name": main.name, "config": asdict(training.model), "parameters": parameter_count(training.model),
                      "gflops_per_forward": gflops(training.model), "images": training.total_images},
            "space": "pixels" if context.vae is None else f"latents of {context.vae}" if size.reference else "latents",
            "decoder": context.decoder if size.reference else None,
            "training": settings["base"] | {"data": size.data},
            "autoencoder": settings["autoencoder"],
            "models": {log.parent.name: round(_seconds(log), 1) for log in logs},
            "commits": sorted({read_result(run)["made"]["commit"] for run in runs}),
        }  # fmt: skip

    def opening(self, results: Mapping[str, Any]) -> Opening:
        subject = "ImageNet" if self.at_paper_size else "digits"
        return Opening(f"Diffusion transformers on {subject}", self._headline(results), self._first_pictures(results))

    def _headline(self, results: Mapping[str, Any]) -> str:
        subject = "photographs" if self.at_paper_size else "handwritten digits"
        opening = f"Diffusion transformers learn to draw {subject} out of noise"
        if "scaling" not in results["experiments"]:
            return f"{opening}."
        comparisons = results["experiments"]["scaling"]["comparisons"]
        larger = [c for c in comparisons if c["about"]["grows"] == "model size"]
        last = max((c["about"]["images"] for c in larger), default=0)
        verdict = overall(sign(c["difference"]) for c in larger if c["about"]["images"] == last)
        endings = {
            CONFIRMED: "and the larger the model, the better it draws them",
            REFUTED: "but larger models do not always draw them better",
        }
        undecided = "but this run is too small to tell whether larger models draw them better"
        return f"{opening}, {endings.get(verdict, undecided)}."

    def _first_pictures(self, results: Mapping[str, Any]) -> list[Picture]:
        """Samples beside real digits; the grid of some samples, where the gallery has not run."""
        if (self.folder / "figures/opening-real.png").exists():
            captions = {"opening-drawn": "Drawn from noise, one class a column, nothing selected.",
                        "opening-real": "Real digits that no model has seen."}  # fmt: skip
            return [self.figure(name, caption, pixels=True) for name, caption in captions.items()]
        rows = [row for each in results["experiments"].values() for row in each.get("rows", []) if "samples" in row]
        for row in sorted(rows, key=lambda row: -row["images"]):
            grid = (self.folder / row["samples"]).with_name("grid.png")
            if grid.exists():
                caption = f"Samples of {row['model']} after {row['images']:,} images, nothing selected."
                return [Picture(grid.read_bytes(), caption, pixels=True)]
        return []


_Timed = TypedDict("_Timed", {"time/seconds": NotRequired[Annotated[float, Ge(0)]]})


def _seconds(log: Path) -> float:
    """Seconds of training in a run's log, without damaged rows."""
    return sum(row.get("time/seconds", 0.0) for row in rows(log, _Timed, damaged=[]))
