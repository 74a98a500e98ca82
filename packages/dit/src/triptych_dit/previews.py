"""Grids of images on the way of a training run: the same noise and classes at every checkpoint, so that one sees them grow."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from triptych_common.cli import echo
from triptych_common.images import image_grid, to_uint8, write_png
from triptych_common.samplers import final
from triptych_common.storage.run import RunDirectory
from triptych_common.training import TrainState

from triptych_dit.objective import TrainingData
from triptych_dit.sampling import decoded, trajectory
from triptych_dit.settings import SamplerSettings
from triptych_dit.train_config import TrainConfig
from triptych_dit.weights import TrainedModel, make_diffusion

SETTINGS = SamplerSettings(sampler="ddim", num_inference_steps=20)


def make_previews(config: TrainConfig, run: RunDirectory, training_data: TrainingData) -> Callable[[TrainState], None]:
    """The callback that writes a grid of the averaged model's images with every scheduled checkpoint and at the end.

    Latents are decoded by the autoencoder that encoded them; if it is not at hand, that is reported and there are no grids.
    """
    n, classes = config.preview_images, config.model.num_classes
    diffusion, impossible = make_diffusion(config.model, config.predict), list[Exception]()
    labels = torch.arange(n) * classes // n if 0 < n < classes else torch.arange(n) % max(1, classes)

    @torch.no_grad()  # inference mode would forbid to gather sharded weights
    def preview(state: TrainState) -> None:
        due = state.step % config.checkpoint_every == 0 or state.samples_seen >= config.total_images
        if not n or not due or impossible:
            return
        trained: TrainedModel = TrainedModel(state.ema, diffusion, training_data.facts)  # type: ignore[arg-type]
        here = labels.to(state.ranks.device) if classes else None
        x = final(trajectory(trained, here, range(n), SETTINGS, seed=config.seed))
        if not state.ranks.is_main or not bool(x.isfinite().all()):
            return
        try:
            images = decoded(trained, x)
        except (ValueError, OSError, ImportError) as error:
            impossible.append(error)
            echo(f"no previews: {error}")
            return
        write(run, state.samples_seen, images)

    return preview


def write(run: RunDirectory, images_seen: int, images: Tensor) -> None:
    """Write a grid; small images are enlarged."""
    grid = image_grid(to_uint8(images).cpu(), columns=math.ceil(math.sqrt(len(images))))
    scale = max(1, 64 // images.shape[-1])
    write_png(run.path / "previews" / f"images-{images_seen:09d}.png", grid, scale=scale)
