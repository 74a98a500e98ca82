"""What the experiments of chapter 2 measure: models by name, samples of them, and their scores, each made once."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from triptych_common.parallel import process_group
from triptych_common.storage import checkpoint
from triptych_common.storage.run import RunDirectory
from triptych_common.workers import on_gpu
from triptych_dit.flops import gflops
from triptych_dit.sample import SampleConfig, draw_missing, gather, identity, sample, write_grid
from triptych_dit.settings import SamplerSettings
from triptych_dit.train import snapshot_path, train
from triptych_dit.train_config import FORWARDS_PER_STEP, TrainConfig
from triptych_dit.weights import FILE_NAME

from triptych_thesis.chapter2.adm import AdmScorer
from triptych_thesis.chapter2.comparisons import Comparison, Score, SeedNoise, compare, seed_noise
from triptych_thesis.chapter2.scoring import METRICS, StudyScorer, score_of
from triptych_thesis.chapter2.sizes import Model, Size

FRECHET = "frechet"


@dataclass(frozen=True)
class SampleSet:
    """`n` samples of a model as it is after so many training images, drawn with some settings."""

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
        if self.unet:
            from triptych_thesis.chapter2.unet import train_unet

            train_unet(self.config)
        else:
            train(self.config)


@dataclass(frozen=True)
class Sampling:
    """A unit of work: one set of samples drawn and scored."""

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
        if self.unet:
            _sample_unet(self.config)
        else:
            sample(self.config)
        self.scorer(self.config.out / "samples.npz")


def _sample_unet(config: SampleConfig) -> None:
    from triptych_thesis.chapter2.unet import load_unet, sample_unet

    trained = load_unet(Path(config.checkpoint))
    classes = trained.model.config.num_embeddings - 1
    labels = torch.arange(config.num_samples) % classes
    weights = checkpoint.digest(trained.model.state_dict())
    request = identity(config, trained) | {"num_samples": config.num_samples, "model_sha256": weights}
    with process_group(config.device) as ranks, RunDirectory(config.out, request, is_main=ranks.is_main):
        trained.model.to(ranks.device)

        def draw(batch: range, step: Callable[[], None]) -> UInt8[Tensor, "batch channels height width"]:
            some = labels[batch.start : batch.stop]
            return sample_unet(trained, some, config, seed=config.seed, first_index=batch.start, vae=config.vae)

        if not (config.out / "samples.npz").exists():
            draw_missing(config, draw, 1, ranks)
        gather(config, labels)
        write_grid(config.out, classes)


class Context:
    """A study's folder: where its models and samples lie, what they cost, and how they score.

    Args:
        size: what is trained and measured.
        folder: where everything lies.
        everything: whether the grid has the models that take longest, too.
        data: what the models are trained on: a folder of images, or a cache of latents.
        vae: where the autoencoder of the latents lies, None for pixels.
        decoder: another autoencoder with the same encoder, to draw samples with.
        reference: an ADM reference file, for photographs; None for digits.
    """

    def __init__(
        self,
        size: Size,
        folder: Path,
        *,
        everything: bool,
        data: str,
        vae: str | None,
        reference: Path | None,
        seed: int,
        device: str,
        decoder: str | None = None,
    ) -> None:
        self.size, self.folder, self.data, self.vae, self.seed, self.device = size, folder, data, vae, seed, device
        self.decoder = decoder or vae
        self.grid = size.grid(everything)
        self.scorer: StudyScorer | AdmScorer = (
            StudyScorer(size.data, seed, size.repeats)
            if reference is None
            else AdmScorer(reference, device, seed, size.repeats)
        )

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
        settings = samples.settings
        config = SampleConfig(
            **{field.name: getattr(settings, field.name) for field in fields(SamplerSettings)},
            out=self.folder / "samples" / samples.folder,
            checkpoint=str(self.weights(samples.model, samples.images)),
            vae=self.decoder,
            num_samples=samples.n,
            seed=self.seed,
            device=self.device,
            batch_size=1000 if on_gpu(self.device) else 100,
        )
        passes = samples.n * settings.num_inference_steps * (1 + (settings.guidance_scale != 1))
        title = f"{samples.model.title}, {samples.folder.split('/')[1]}"
        cost = gflops(self.size.shape(samples.model)) * passes
        return Sampling(title, config, samples.model.unet, self.scorer, cost)

    def after(self, model: Model, stage: float = 1.0, n: int | None = None, **settings: Any) -> SampleSet:
        """Samples of a model after a stage of training, with the study's settings but for those given."""
        size = self.size
        return SampleSet(model, size.count(stage), replace(size.sampler, **settings), n or size.samples)

    def of_main(self, n: int, **settings: Any) -> SampleSet:
        """Samples of the main model at the end of its training."""
        main = Model(self.size.main)
        return SampleSet(main, self.size.images(main), replace(self.size.sampler, **settings), n)

    def path(self, samples: SampleSet) -> Path:
        return self.folder / "samples" / samples.folder / "samples.npz"

    def place(self, samples: SampleSet) -> str:
        """The path of samples within the study's folder."""
        return str(self.path(samples).relative_to(self.folder))

    def scores(self, samples: SampleSet) -> dict[str, Any]:
        return self.scorer(self.path(samples))

    def score(self, samples: SampleSet, metric: str = FRECHET) -> Score:
        return score_of(self.scores(samples), metric)

    def row(self, samples: SampleSet) -> dict[str, Any]:
        """A row of a table: what was sampled, what it cost, and every metric with its interval."""
        cost, scores, settings = gflops(self.size.shape(samples.model)), self.scores(samples), samples.settings
        return {
            "model": samples.model.title,
            "images": samples.images,
            "gflops": cost,
            "training_gflops": cost * samples.images * FORWARDS_PER_STEP,
            "sampler": settings.sampler,
            "steps": settings.num_inference_steps,
            "guidance": settings.guidance_scale,
            "n": samples.n,
            "samples": self.place(samples),
        } | {
            metric: score_of(scores, metric).estimate._asdict() for metric in (*METRICS, "accuracy") if metric in scores
        }

    def compare(
        self, better: SampleSet, worse: SampleSet, metric: str = FRECHET, *, seeds: bool = True, **about: Any
    ) -> Comparison:
        """Compare two sets of samples. seeds: whether their models were trained apart, so that the noise of training seeds
        counts, each side's at its own stage."""
        sides = (better, worse)
        noises = {"noises": tuple(self.noise(each.images, metric) for each in sides)} if seeds else {}
        pair = ((each.model.title, self.score(each, metric)) for each in sides)
        return compare(*pair, metric, **noises, **about)

    def noise(self, images: int, metric: str = FRECHET) -> SeedNoise:
        """The noise of training seeds after so many images, those of a stage."""
        pairs = [(self.score(one, metric), self.score(other, metric)) for one, other in self._seed_pairs[images]]
        return seed_noise(pairs, metric)

    def noises(self) -> list[dict[str, Any]]:
        """The noise of training seeds at every stage, as results.json holds it."""
        return [{"images": images, **self.noise(images)._asdict()} for images in self._seed_pairs]

    @cached_property
    def _seed_pairs(self) -> dict[int, list[tuple[SampleSet, SampleSet]]]:
        size = self.size
        return {
            size.count(stage): [
                (self.after(Model(n), stage), self.after(Model(n, seed=1), stage)) for n in size.repeated
            ]
            for stage in size.stages
        }

    def repeated(self) -> list[SampleSet]:
        """The samples that the noise of training seeds is measured on."""
        return [samples for pairs in self._seed_pairs.values() for pair in pairs for samples in pair]
