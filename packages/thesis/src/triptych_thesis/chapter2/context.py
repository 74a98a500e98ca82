"""What every experiment works on: models by name, samples of them, their scores, each made once."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from triptych_common.workers import on_gpu
from triptych_dit.flops import gflops
from triptych_dit.sample import SampleConfig
from triptych_dit.sampling import SamplerSettings
from triptych_dit.train import snapshot_path
from triptych_dit.train_config import FORWARDS_PER_STEP, TrainConfig
from triptych_dit.weights import FILE_NAME

from triptych_thesis.chapter2.adm import AdmScorer
from triptych_thesis.chapter2.scoring import METRICS, StudyScorer, score_of
from triptych_thesis.chapter2.sizes import Model, Size
from triptych_thesis.chapter2.statistics import Comparison, Score, SeedNoise, compare, seed_noise
from triptych_thesis.chapter2.units import Sampling, Training

FRECHET = "frechet"


@dataclass(frozen=True)
class Draw:
    """So many samples of a model as it is after so many images, drawn with some settings."""

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


class Bench:
    """A study's folder: where its models and samples lie, what they cost, what they score.

    grid: names of the models that are compared, with their shapes. data: what they are trained on; vae: where the autoencoder of
    their latents lies, None for pixels; decoder: another with the same encoder, to draw samples with.
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
        if reference is None:
            self.scorer = StudyScorer(size.data, seed, size.repeats)
        else:
            self.scorer = AdmScorer(reference, device, seed, size.repeats)

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
        config = self.train_config(model)
        return config.out / FILE_NAME if images == config.total_images else snapshot_path(config.out, images)

    def sampling(self, draw: Draw) -> Sampling:
        config = SampleConfig(
            **{field.name: getattr(draw.settings, field.name) for field in fields(SamplerSettings)},
            out=self.folder / "samples" / draw.folder,
            checkpoint=str(self.weights(draw.model, draw.images)),
            vae=self.decoder,
            num_samples=draw.n,
            seed=self.seed,
            device=self.device,
            batch_size=1000 if on_gpu(self.device) else 100,
        )
        passes = draw.n * draw.settings.num_inference_steps * (1 + (draw.settings.guidance_scale != 1))
        cost = gflops(self.size.shape(draw.model)) * passes
        return Sampling(f"{draw.model.title}, {draw.folder.split('/')[1]}", config, draw.model.unet, self.scorer, cost)

    def draw(self, model: Model, stage: float = 1.0, n: int | None = None, **settings: Any) -> Draw:
        """With the study's settings, but for those given."""
        size = self.size
        return Draw(model, size.count(stage), replace(size.sampler, **settings), n or size.samples)

    def of_main(self, n: int, **settings: Any) -> Draw:
        """Of the main model at its end."""
        main = Model(self.size.main)
        return Draw(main, self.size.images(main), replace(self.size.sampler, **settings), n)

    def samples(self, draw: Draw) -> Path:
        return self.folder / "samples" / draw.folder / "samples.npz"

    def scores(self, draw: Draw) -> dict[str, Any]:
        return self.scorer(self.samples(draw))

    def score(self, draw: Draw, metric: str = FRECHET) -> Score:
        return score_of(self.scores(draw), metric)

    def row(self, draw: Draw) -> dict[str, Any]:
        """A table's row: what was drawn, what it cost, and every metric with its interval."""
        cost, scores = gflops(self.size.shape(draw.model)), self.scores(draw)
        return {
            "model": draw.model.title,
            "images": draw.images,
            "gflops": cost,
            "training_gflops": cost * draw.images * FORWARDS_PER_STEP,
            "sampler": draw.settings.sampler,
            "steps": draw.settings.num_inference_steps,
            "guidance": draw.settings.guidance_scale,
            "n": draw.n,
            "samples": str(self.samples(draw).relative_to(self.folder)),
        } | {
            metric: score_of(scores, metric).estimate._asdict() for metric in (*METRICS, "accuracy") if metric in scores
        }

    def compare(
        self, better: Draw, worse: Draw, metric: str = FRECHET, *, seeds: bool = True, **about: Any
    ) -> Comparison:
        """seeds: whether the two are different trainings, so that the noise of seeds counts, each side's at its own stage."""
        noises = {"noises": tuple(self.noise(draw.images, metric) for draw in (better, worse))} if seeds else {}
        pair = ((draw.model.title, self.score(draw, metric)) for draw in (better, worse))
        return compare(*pair, metric, **noises, **about)

    def noise(self, images: int, metric: str = FRECHET) -> SeedNoise:
        """Of training seeds after so many images, a stage's."""
        pairs = [tuple(self.score(draw, metric) for draw in pair) for pair in self._seed_pairs[images]]
        return seed_noise(pairs, metric)

    def noises(self) -> list[dict[str, Any]]:
        """Of every stage, for a report."""
        return [{"images": images, **self.noise(images)._asdict()} for images in self._seed_pairs]

    @cached_property
    def _seed_pairs(self) -> dict[int, list[tuple[Draw, Draw]]]:
        size = self.size
        return {
            size.count(stage): [(self.draw(Model(n), stage), self.draw(Model(n, seed=1), stage)) for n in size.repeated]
            for stage in size.stages
        }

    def repeated(self) -> Sequence[Draw]:
        """What the noise of seeds is measured on."""
        return [draw for pairs in self._seed_pairs.values() for pair in pairs for draw in pair]
