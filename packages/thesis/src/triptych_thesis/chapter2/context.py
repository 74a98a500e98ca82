"""What the experiments of chapter 2 measure: models by name, samples of them, and their scores, each made once."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych_common.workers import on_gpu
from triptych_dit.flops import gflops
from triptych_dit.sample import SampleConfig, sample
from triptych_dit.settings import SamplerSettings
from triptych_dit.train import snapshot_path, train
from triptych_dit.train_config import FORWARDS_PER_STEP, TrainConfig
from triptych_dit.weights import FILE_NAME

from triptych_thesis.chapter2.adm import AdmScorer
from triptych_thesis.chapter2.comparisons import NO_NOISES, Score, SeedNoise, compare, seed_noise
from triptych_thesis.chapter2.scoring import METRICS, StudyScorer, score_of
from triptych_thesis.chapter2.sizes import SIZES, Model
from triptych_thesis.chapter2.unet import sample_unet_file, train_unet

if TYPE_CHECKING:
    from triptych_thesis.chapter2.study import Chapter2

FRECHET = "frechet"
PAPER_VAE = "stabilityai/sd-vae-ft-mse"


@dataclass(frozen=True)
class SampleSet:
    """`n` samples of a model as it is after so many training images, with some settings of the sampler."""

    model: Model
    images: int
    settings: SamplerSettings
    n: int

    @property
    def folder(self) -> str:
        s = self.settings
        guidance = "" if s.guidance_scale == 1 else f"-cfg{s.guidance_scale:g}"
        channels = "" if s.guidance_channels == "all" else f"-{s.guidance_channels}-channels"
        return f"{self.model.folder}/{self.images}-{s.sampler}{s.num_inference_steps}{guidance}{channels}-n{self.n}"


@dataclass(frozen=True)
class Training:
    """A unit of work: one training run. `cost`, in GFLOPs of forward passes, decides the order and the progress bar."""

    title: str
    config: TrainConfig
    unet: bool
    cost: float

    @property
    def done(self) -> bool:
        return (self.config.out / FILE_NAME).exists()

    def __call__(self) -> None:
        (train_unet if self.unet else train)(self.config)


@dataclass(frozen=True)
class Sampling:
    """A unit of work: one set of samples, drawn under torchrun or here, and scored."""

    title: str
    config: SampleConfig
    unet: bool
    scorer: StudyScorer | AdmScorer
    cost: float

    @property
    def drawn(self) -> bool:
        return (self.config.out / "samples.npz").exists()

    @property
    def done(self) -> bool:
        return self.drawn and (self.config.out / "scores.json").exists()

    def __call__(self) -> None:
        (sample_unet_file if self.unet else sample)(self.config)
        self.scorer(self.config.out / "samples.npz")


class Context:
    """A study's models and samples: their files, what they cost, and how they score."""

    def __init__(self, study: "Chapter2") -> None:
        self.study, self.folder, self.seed, self.device = study, study.folder, study.seed, study.device
        self.size = size = SIZES[study.size]
        self.grid = size.grid(study.all)
        # The data that models are trained on, and the autoencoder of their latents: None for pixels.
        self.data, self.vae = str(self.folder / "digits32"), None
        self.scorer: Any = StudyScorer(size.data, self.seed, size.repeats)
        if size.reference is not None:
            self.data, self.vae = study.latents or size.data, study.vae or PAPER_VAE
            self.scorer = AdmScorer(study.reference or Path(size.reference), self.device, self.seed, size.repeats)
        elif size.autoencoder is not None:
            self.data, self.vae = str(self.folder / "latents/train"), str(self.folder / "autoencoder")
        self.decoder = study.decoder or self.vae

    def train_config(self, model: Model) -> TrainConfig:
        size, images = self.size, self.size.images(model)
        kept = {size.count(stage) for stage in size.stages} | (set(size.kept) if model == Model(size.main) else set())
        return replace(
            size.base, model=size.shape(model), data=self.data, out=self.folder / "models" / model.folder,
            total_images=images, snapshots=tuple(sorted(kept - {images})), seed=self.seed + model.seed, device=self.device,
        )  # fmt: skip

    def training(self, model: Model) -> Training:
        config = self.train_config(model)
        return Training(model.title, config, model.unet, gflops(config.model) * config.total_images)

    def weights(self, model: Model, images: int) -> Path:
        """The file of a model's weights after so many images."""
        config = self.train_config(model)
        return config.out / FILE_NAME if images == config.total_images else snapshot_path(config.out, images)

    def sampling(self, samples: SampleSet) -> Sampling:
        settings, path = samples.settings, self.path(samples)
        config = SampleConfig(
            **{field.name: getattr(settings, field.name) for field in fields(SamplerSettings)},
            out=path.parent, checkpoint=str(self.weights(samples.model, samples.images)), vae=self.decoder, num_samples=samples.n,
            seed=self.seed, device=self.device, batch_size=1000 if on_gpu(self.device) else 100,
        )  # fmt: skip
        # A guided step is two passes: with the class and without.
        passes = samples.n * settings.num_inference_steps * (1 + (settings.guidance_scale != 1))
        title, cost = f"{samples.model.title}, {path.parent.name}", gflops(self.size.shape(samples.model)) * passes
        return Sampling(title, config, samples.model.unet, self.scorer, cost)

    def after(self, model: Model, stage: float = 1.0, n: int | None = None, **settings: Any) -> SampleSet:
        """Samples of a model after a stage of training, with the study's settings but for those given."""
        size = self.size
        return SampleSet(model, size.count(stage), replace(size.sampler, **settings), n or size.samples)

    def over_training(self, models: Sequence[Model]) -> list[SampleSet]:
        """Samples of every model after every stage."""
        return [self.after(model, stage) for model in models for stage in self.size.stages]

    def of_main(self, n: int, **settings: Any) -> SampleSet:
        """Samples of the main model at the end of its training."""
        main = Model(self.size.main)
        return SampleSet(main, self.size.images(main), replace(self.size.sampler, **settings), n)

    def path(self, samples: SampleSet) -> Path:
        return self.folder / "samples" / samples.folder / "samples.npz"

    def place(self, samples: SampleSet) -> str:
        """The path of samples within the study's folder."""
        return str(self.path(samples).relative_to(self.folder))

    def score(self, samples: SampleSet, metric: str = FRECHET) -> Score:
        return score_of(self.scorer(self.path(samples)), metric)

    def row(self, samples: SampleSet) -> dict[str, Any]:
        """A row of a table: what was sampled, what it cost, and every metric with its interval."""
        cost, settings = gflops(self.size.shape(samples.model)), samples.settings
        scores = self.scorer(self.path(samples))
        return {
            "model": samples.model.title, "images": samples.images, "gflops": cost,
            "training_gflops": cost * samples.images * FORWARDS_PER_STEP,
            "sampler": settings.sampler, "steps": settings.num_inference_steps, "guidance": settings.guidance_scale,
            "n": samples.n, "samples": self.place(samples),
            **{name: score_of(scores, name).estimate._asdict() for name in (*METRICS, "accuracy") if name in scores},
        }  # fmt: skip

    def compare(
        self, better: SampleSet, worse: SampleSet, metric: str = FRECHET, *, seeds: bool = True, **about: Any
    ) -> dict[str, Any]:
        """Compare two sets of samples. seeds: whether their models were trained apart, so that training noise counts."""
        noises = (self.noise(better.images, metric), self.noise(worse.images, metric)) if seeds else NO_NOISES
        ours, theirs = ((each.model.title, self.score(each, metric)) for each in (better, worse))
        return compare(ours, theirs, metric, noises, **about)

    def compare_stages(self, better: Model, worse: Model, **about: Any) -> list[dict[str, Any]]:
        """Compare two models after equally many images, stage by stage."""
        pairs = zip(self.over_training([better]), self.over_training([worse]), strict=True)
        return [self.compare(ours, theirs, **about, images=ours.images) for ours, theirs in pairs]

    def noise(self, images: int, metric: str = FRECHET) -> SeedNoise:
        """The noise of training seeds after so many images, those of a stage."""
        pairs = [(self.score(one, metric), self.score(other, metric)) for one, other in self._seed_pairs[images]]
        return seed_noise(pairs, metric)

    def noises(self) -> list[dict[str, Any]]:
        """The noise of training seeds at every stage, as results.json holds it."""
        return [{"images": images, **self.noise(images)._asdict()} for images in self._seed_pairs]

    @cached_property
    def _seed_pairs(self) -> dict[int, list[tuple[SampleSet, SampleSet]]]:
        """By images seen, samples of each repeated model and of its second seed."""
        models = [(Model(name), Model(name, seed=1)) for name in self.size.repeated]
        return {
            self.size.count(stage): [(self.after(one, stage), self.after(other, stage)) for one, other in models]
            for stage in self.size.stages
        }

    def repeated(self) -> list[SampleSet]:
        """The samples that the noise of training seeds is computed from."""
        return [samples for pairs in self._seed_pairs.values() for pair in pairs for samples in pair]
