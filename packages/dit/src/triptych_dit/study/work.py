"""Units of a study's work: training runs, and samples with their scores, each a file that is made once."""

from dataclasses import dataclass
from pathlib import Path

import torch
from triptych_common.parallel import ranks

from triptych_dit.sample import SampleConfig, sample
from triptych_dit.samples_file import write_npz
from triptych_dit.study.adm import AdmScorer
from triptych_dit.study.scoring import StudyScorer
from triptych_dit.train import train
from triptych_dit.train_config import TrainConfig
from triptych_dit.weights import FILE_NAME


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
            from triptych_dit.study.unet import train_unet

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
    from triptych_dit.study.unet import load_unet, sample_unet

    path = config.out / "samples.npz"
    if path.exists():
        return
    trained = load_unet(Path(config.checkpoint))
    labels = torch.arange(config.num_samples) % (trained.model.config.num_embeddings - 1)
    with ranks(config.device) as among:
        trained.model.to(among.device)
        batches = (
            sample_unet(trained, part, config, seed=config.seed, first_index=config.batch_size * i, vae=config.vae)
            for i, part in enumerate(labels.split(config.batch_size))
        )
        write_npz(path, batches, config.num_samples, labels)
