"""Guided DDPM sampling on this machine's CPU: our DiT and diffusers' with the same weights in the same sampler, which must
give the same images; diffusers' own pipeline; and the bare matrix products and attention calls of the same shapes.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DiTPipeline
from torch import Tensor, nn
from triptych_common.randomness import SampleNoise
from triptych_common.samplers import ddpm, final, guided
from triptych_dit.config import DiTConfig
from triptych_dit.sampling import SamplerSettings, trajectory
from triptych_dit.weights import TrainedModel, make_diffusion

from benchmarks.runner import Job
from benchmarks.suites.dit_models import Diffusers, config_of, floor, random_model

GUIDANCE = 1.5
PREDICT = "sample"  # predicted noise, which the first step multiplies by 157, would magnify differences of rounding


class Size(NamedTuple):
    """How much of a model's sampling one call does."""

    preset: str
    samples: int  # half of the batch
    steps: int
    repeats: int


SIZES = [
    Size("digits", 50, 4, 20),
    Size("digits-latent", 50, 4, 20),
    Size("DiT-S/4", 4, 2, 10),
    Size("DiT-S/2", 2, 2, 10),
]


def labels_of(config: DiTConfig, samples: int) -> Tensor:
    return torch.arange(samples) % config.num_classes


def ours(size: Size, context: Callable[[], Any] = torch.inference_mode) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare sampling as `triptych-dit sample` does it."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        config = config_of(size.preset)
        trained = TrainedModel(random_model(config, seed), make_diffusion(config, PREDICT), {})
        labels = labels_of(config, size.samples)
        settings = SamplerSettings(num_inference_steps=size.steps, guidance_scale=GUIDANCE, clip_x_0=True)
        return context()(lambda: final(trajectory(trained, labels, range(size.samples), settings, seed=seed)))

    return prepare


def diffusers_model(size: Size) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare the same sampling of diffusers' module, which has no other way than to embed each sample's condition."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        config = config_of(size.preset)
        model = Diffusers(random_model(config, seed))
        labels, diffusion = labels_of(config, size.samples), make_diffusion(config, PREDICT).respaced(size.steps)
        shape = (config.in_channels, *config.input_size)

        def once() -> Tensor:
            denoise = guided(model, labels, config.null_label, GUIDANCE)
            noise = SampleNoise(seed, range(size.samples), shape)
            return final(ddpm(denoise, diffusion, noise, clip_x_0=True))

        return torch.inference_mode()(once)

    return prepare


class NoDecoder(nn.Module):
    """Stands in for the pipeline's VAE: the comparison is about the transformer."""

    config = SimpleNamespace(scaling_factor=1.0)
    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latents)


def diffusers_pipeline(size: Size) -> Callable[[int], Callable[[], Any]]:
    """Prepare as many steps of diffusers' `DiTPipeline`, DDIM as it comes, without decoding."""

    def prepare(seed: int) -> Callable[[], Any]:
        config = config_of(size.preset)
        model = Diffusers(random_model(config, seed))
        pipeline = DiTPipeline(model.transformer, NoDecoder(), DDIMScheduler(num_train_timesteps=1000))
        pipeline.set_progress_bar_config(disable=True)
        labels = labels_of(config, size.samples).tolist()
        return lambda: pipeline(labels, GUIDANCE, num_inference_steps=size.steps, output_type="np")

    return prepare


def jobs() -> Sequence[Job]:
    listed = []
    for size in SIZES:
        name = size.preset
        bare, theirs, pipeline = f"{name}: floor", f"{name}: diffusers", f"{name}: DiTPipeline"
        prepare_floor = floor(config_of(name), 2 * size.samples, passes=size.steps, backward=False)
        for job, prepare, against, same_as in (
            (bare, prepare_floor, (), None),
            (theirs, diffusers_model(size), (bare,), None),
            (pipeline, diffusers_pipeline(size), (bare,), None),
            (f"{name}: ours, no_grad", ours(size, torch.no_grad), (bare,), theirs),
            (f"{name}: ours", ours(size), (bare, theirs, pipeline), theirs),
        ):
            listed.append(Job(job, prepare, size.samples * size.steps, "image_steps", against, same_as, size.repeats))
    return listed
