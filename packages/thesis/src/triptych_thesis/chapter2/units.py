"""Units of a study's work: training runs, and samples with their scores, each a file that is made once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from triptych_common.parallel import process_group
from triptych_common.storage import checkpoint
from triptych_common.storage.run import RunDirectory
from triptych_dit.sample import SampleConfig, draw_missing, gather, identity, sample, write_grid
from triptych_dit.train import train
from triptych_dit.train_config import TrainConfig
from triptych_dit.weights import FILE_NAME

from triptych_thesis.chapter2.adm import AdmScorer
from triptych_thesis.chapter2.scoring import StudyScorer


@dataclass(frozen=True)
class Training:
    """A run to be trained; `cost` in any unit, for the order and the progress bar."""

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
    """Samples to be drawn and scored."""

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
