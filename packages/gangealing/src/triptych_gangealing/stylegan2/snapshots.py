"""Snapshots of a run: grids of samples, and distances to real images."""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_common import randomness
from triptych_common.images import image_grid, write_png
from triptych_common.metrics.distances import frechet_distance, kernel_distance
from triptych_common.parallel import Ranks
from triptych_common.storage.run import RunDirectory
from triptych_common.training import TrainState, is_due

from triptych_gangealing.stylegan2.data import TrainingImages
from triptych_gangealing.stylegan2.generator import AT_ONCE, Generator, sample_images
from triptych_gangealing.stylegan2.train_config import GanTrainConfig

FeatureNetwork = Callable[[Tensor], Float[Tensor, "n dim"]]
GRID = 80  # images in a grid


def feature_network(name: str, device: torch.device) -> FeatureNetwork:
    """Features of uint8 images (n, 3, h, w), by "digits32" or "inception". Raises OSError where Inception's weights are absent."""
    if name == "digits32":
        from triptych_gangealing.stylegan2.instrument import load_instrument

        return load_instrument().features
    from triptych_common.metrics.inception import load_inception

    inception = load_inception(device=device)
    return lambda images: torch.cat([inception(part)[0] for part in images.split(AT_ONCE)]).cpu()


class Scores:
    """Fréchet and kernel distance of a generator's images to as many of the training images."""

    def __init__(self, features: FeatureNetwork, config: GanTrainConfig, images: TrainingImages, ranks: Ranks) -> None:
        self.features, self.ranks, self.seed = features, ranks, config.seed
        self.n = min(config.score_images, len(images)) // ranks.world_size * ranks.world_size
        items = randomness.shuffled(config.seed, "score/real", range(self.n), len(images))
        self.real = self._gathered(images.batch(items[list(ranks.share(range(self.n)))]))

    def _gathered(self, images: Tensor) -> Float[Tensor, "n dim"]:
        return torch.cat(self.ranks.gather(self.features(images).cpu()))

    def __call__(self, generator: Generator) -> dict[str, float]:
        """Every rank must call it."""
        fake = self._gathered(sample_images(generator, self.ranks.share(range(self.n)), seed=self.seed))
        return {"score/frechet": frechet_distance(fake, self.real), "score/kernel": kernel_distance(fake, self.real)}


def make_snapshots(
    config: GanTrainConfig, run: RunDirectory, images: TrainingImages, ranks: Ranks
) -> Callable[[TrainState], None]:
    """A callback that draws a grid of the averaged generator's samples, always of the same latents, and logs scores.

    Raises OSError with a remedy where the scores' network is absent.
    """
    features = feature_network(config.scores, ranks.device) if config.scores != "none" else None
    scores: list[Scores] = []  # made with the first snapshot

    def snapshot(state: TrainState) -> None:
        sizes = {"batch_size": config.batch_size, "total_samples": config.total_images}
        if not is_due(state.samples_seen, every=config.snapshot_every, **sizes):
            return
        generator = cast(Generator, state.ema)
        if state.ranks.is_main:
            grid = image_grid(sample_images(generator, range(GRID), seed=config.seed), columns=10)
            write_png(run.path / "samples" / f"images-{state.samples_seen:09d}.png", grid, scale=2)
        if features is not None:
            if not scores:
                scores.append(Scores(features, config, images, state.ranks))
            run.log({"step": state.step, "images": state.samples_seen, **scores[0](generator)})

    return snapshot
