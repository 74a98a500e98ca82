"""What a run shows of itself on the way: grids of samples, and distances to real images."""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from triptych_common import randomness
from triptych_common.images import image_grid, to_uint8, write_png
from triptych_common.metrics.distances import frechet_distance, kernel_distance
from triptych_common.parallel import Ranks
from triptych_common.storage.run import RunDirectory
from triptych_common.training import TrainState, is_due

from triptych_gangealing.stylegan2.data import TrainingImages
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.train_config import GanTrainConfig

GRID = 80  # images in a grid
AT_ONCE = 64


@torch.inference_mode()
def sample_images(
    generator: Generator,
    indices: range,
    *,
    seed: int = 0,
    truncation_psi: float | int = 1.0,
    truncation_cutoff: int | None = None,
    labels: Tensor | None = None,
    at_once: int = AT_ONCE,
) -> UInt8[Tensor, "n channels height width"]:
    """Images that belong to indices of the samples of a seed, on the CPU; classes in turn unless `labels` says which."""
    out = []
    for start in range(0, len(indices), at_once):
        part = indices[start : start + at_once]
        z = latents_of(generator, part, seed)
        c = classes_of(generator, part, None if labels is None else labels[start : start + at_once])
        noise = generator.synthesis.noise(seed, "sample/noise", part)
        ws = generator.styles(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        out.append(to_uint8(generator.synthesis(ws, noise=noise)).cpu())
    return torch.cat(out)


def latents_of(generator: Generator, indices: range, seed: int) -> Float[Tensor, "n z_dim"]:
    """Latents that belong to indices of the samples of a seed, where the generator's weights are."""
    return randomness.normal(seed, "sample/z", indices, (generator.config.z_dim,)).to(next(generator.parameters()))


def classes_of(generator: Generator, indices: range, labels: Tensor | None = None) -> Float[Tensor, "n c_dim"] | None:
    """One-hot classes of images for a conditional generator: those of `labels`, or all in turn."""
    classes = generator.config.c_dim
    if not classes:
        return None
    numbers = torch.tensor(indices) % classes if labels is None else labels
    return F.one_hot(numbers, classes).to(next(generator.parameters()))


def feature_network(name: str, device: torch.device) -> Callable[[Tensor], Float[Tensor, "n dim"]]:
    """Features of uint8 images (n, 3, h, w): of "digits32", or "inception", which asks for its weights.

    Raises OSError with a remedy where these are absent.
    """
    if name == "digits32":
        from triptych_gangealing.instrument import load_instrument

        return load_instrument().features
    from triptych_common.metrics.inception import load_inception

    inception = load_inception(device=device)
    return lambda images: torch.cat([inception(part)[0] for part in images.split(AT_ONCE)]).cpu()


class Scores:
    """Fréchet and kernel distance of a generator's images to as many of the training images."""

    def __init__(
        self, features: Callable[[Tensor], Tensor], config: GanTrainConfig, images: TrainingImages, ranks: Ranks
    ) -> None:
        self.features, self.ranks, self.seed = features, ranks, config.seed
        self.n = min(config.score_images, len(images)) // ranks.world_size * ranks.world_size
        items = randomness.shuffled(config.seed, "score/real", range(self.n), len(images))
        self.real = self._gathered(images.batch(items[list(ranks.share(range(self.n)))]))

    def _gathered(self, images: Tensor) -> Float[Tensor, "n dim"]:
        return torch.cat(self.ranks.gather(self.features(images).cpu()))

    def __call__(self, generator: Generator) -> dict[str, float]:
        """Every rank must call it."""
        fake = self._gathered(sample_images(generator, self.ranks.share(range(self.n)), seed=self.seed))
        return {
            "score/frechet": frechet_distance(fake, self.real),
            "score/kernel": kernel_distance(fake, self.real),
        }


def make_snapshots(
    config: GanTrainConfig, run: RunDirectory, images: TrainingImages, ranks: Ranks
) -> Callable[[TrainState], None]:
    """A callback that draws a grid of the averaged generator's samples, always of the same latents, and logs scores.

    Raises OSError with a remedy where the scores' network is absent.
    """
    features = feature_network(config.scores, ranks.device) if config.scores != "none" else None
    made: list[Scores] = []

    def snapshot(state: TrainState) -> None:
        sizes = {"batch_size": config.batch_size, "total_samples": config.total_images}
        if not is_due(state.samples_seen, every=config.snapshot_every, **sizes):
            return
        if state.ranks.is_main:
            grid = image_grid(sample_images(state.ema, range(GRID), seed=config.seed), columns=10)
            write_png(run.path / "samples" / f"images-{state.samples_seen:09d}.png", grid, scale=2)
        if features is not None:
            if not made:
                made.append(Scores(features, config, images, state.ranks))
            run.log({"step": state.step, "images": state.samples_seen, **made[0](state.ema)})

    return snapshot
