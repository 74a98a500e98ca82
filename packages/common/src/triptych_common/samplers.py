"""Samplers, which turn noise into data with a diffusion model.

A sampler is a generator of `Step`s; `final` runs one to its end and returns the samples:

    denoise = guided(model, labels, null=10, scale=1.5)
    samples = final(ddim(denoise, diffusion.respaced(50), SampleNoise(seed, range(16), (1, 28, 28))))

`denoise(x_t, t)` is a function of the current sample and the original timesteps, with conditions already bound.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from triptych_common.diffusion import GaussianDiffusion, NoiseSchedule, gather
from triptych_common.randomness import SampleNoise
from triptych_common.sampler_settings import SamplerSettings
from triptych_common.schedulers import is_ddpm, make_scheduler

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t, timesteps of training) -> output of the network
GuidanceChannels = int | Literal["all"]


class Step(NamedTuple):
    """State after one reverse step: the new sample x, and the model's estimate x_0 of the clean data."""

    index: int  # type: ignore[assignment]  # counts down from S - 1 to 0; hides the method of tuples
    x: Tensor
    x_0: Tensor


def ddpm(
    denoise: Denoise, diffusion: GaussianDiffusion, noise: SampleNoise, *, clip_x_0: bool = False
) -> Iterator[Step]:
    """Ancestral sampling over every step of `diffusion`, which must be respaced first for fewer.  [DDPM, algorithm 2]

    No noise is added at the last step. clip_x_0: clip each estimate of the clean data to [-1, 1].
    """
    x = noise.draw()
    for index in reversed(range(len(diffusion.schedule))):
        p, _ = _reverse(denoise, diffusion, x, index, clip_x_0)
        x = p.mean if index == 0 else p.mean + torch.exp(0.5 * p.log_variance) * noise.draw()
        yield Step(index, x, p.x_0)


def ddim(
    denoise: Denoise, diffusion: GaussianDiffusion, noise: SampleNoise, *, eta: float = 0.0, clip_x_0: bool = False
) -> Iterator[Step]:
    """Denoising diffusion implicit models: deterministic at eta = 0, the DDPM posterior's variance at eta = 1.

    A learned variance is ignored.  [Song et al. 2021, eq. 12 and 16]
    """
    x = noise.draw()
    schedule = diffusion.schedule
    for index in reversed(range(len(schedule))):
        p, t = _reverse(denoise, diffusion, x, index, clip_x_0)
        # Recomputed from x_0: it differs from the network's prediction if the estimate was clipped.
        epsilon = diffusion.noise_from_x_0(x, t, p.x_0)
        previous = gather(schedule.alpha_bar_prev, t, x)
        sigma = eta * gather(schedule.posterior_variance.sqrt(), t, x)
        x = previous.sqrt() * p.x_0 + (1 - previous - sigma**2).clamp(min=0).sqrt() * epsilon
        if eta > 0 and index > 0:
            x = x + sigma * noise.draw()
        yield Step(index, x, p.x_0)


def diffusers_steps(
    denoise: Denoise, diffusion: GaussianDiffusion, noise: SampleNoise, scheduler: Any, *, clip_x_0: bool = False
) -> Iterator[Step]:
    """Sample with a scheduler from `make_scheduler`, which keeps state and so serves for one call only.

    `Step.x` is scaled as the model's input is. Timesteps between two trained ones stay fractional, as in diffusers. Only
    DDPM schedulers use a learned variance. The noise that a scheduler draws comes from each sample's own generator.
    """
    keywords = {"generator": noise.generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    learned_too = diffusion.variance == "learned_range" and is_ddpm(type(scheduler))
    timesteps = scheduler.timesteps
    alpha_bars = _alpha_bar_at(diffusion.schedule, timesteps)
    x = noise.draw() * scheduler.init_noise_sigma
    x_t = scheduler.scale_model_input(x, timesteps[0])
    for i, (t, alpha_bar) in enumerate(zip(timesteps, alpha_bars, strict=True)):
        output, learned = diffusion.split(denoise(x_t, t.expand(len(x_t))), x_t)
        signal, deviation = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        x_0 = output if diffusion.predict == "sample" else (x_t - deviation * output) / signal
        if clip_x_0:
            x_0 = x_0.clamp(-1, 1)
        # Schedulers take the noise; where the network predicts it and nothing was clipped, without a round trip by x_0.
        exact = diffusion.predict == "noise" and not clip_x_0
        epsilon = output if exact else (x_t - signal * x_0) / deviation
        given = torch.cat([epsilon, cast(Tensor, learned)], dim=1) if learned_too else epsilon
        x = scheduler.step(given, t, x, **keywords).prev_sample
        last = i + 1 == len(timesteps)
        x_t = x if last else scheduler.scale_model_input(x, timesteps[i + 1])
        yield Step(len(timesteps) - 1 - i, x_t, x_0)


def sampling(
    settings: SamplerSettings,
    denoise: Denoise,
    diffusion: GaussianDiffusion,
    noise: SampleNoise,
    *,
    clip_x_0: bool = False,
) -> Iterator[Step]:
    """The sampler that the settings name, ready to run: one of ours on a respaced process, or a diffusers scheduler.

    diffusion: the process used in training, not respaced.
    Raises ValueError for a number of steps that the scheduler does not support.
    """
    if settings.is_own:
        sampler = {"ddpm": ddpm, "ddim": ddim}[settings.sampler]
        return sampler(denoise, diffusion.respaced(settings.num_inference_steps), noise, clip_x_0=clip_x_0)
    scheduler = make_scheduler(settings.sampler, diffusion, settings.num_inference_steps, device=noise.device)
    return diffusers_steps(denoise, diffusion, noise, scheduler, clip_x_0=clip_x_0)


def evaluations(settings: SamplerSettings, diffusion: GaussianDiffusion) -> int:
    """How often `sampling` evaluates the model: some schedulers do so twice for each of `num_inference_steps`."""
    if settings.is_own:
        return settings.num_inference_steps
    return len(make_scheduler(settings.sampler, diffusion, settings.num_inference_steps).timesteps)


def _reverse(denoise: Denoise, diffusion: GaussianDiffusion, x: Tensor, index: int, clip_x_0: bool):
    t = torch.full((len(x),), index, dtype=torch.long)
    # The network takes the timesteps it was trained on; t counts those that the respaced process visits.
    timesteps = diffusion.schedule.timesteps[t].to(x.device)
    return diffusion.p_params(denoise(x, timesteps), x, t, clip_x_0=clip_x_0), t


def final(steps: Iterator[Step], progress: Callable[[], None] = lambda: None) -> Float[Tensor, "batch *shape"]:
    """Run a sampler to its end and return the last sample; `progress` is called after every step."""
    for step in steps:
        x = step.x
        progress()
    return x


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    condition: Int[Tensor, " batch"],
    null: int | None,
    scale: float = 1.0,
    *,
    guidance_channels: GuidanceChannels = "all",
    interval: tuple[int, int] | None = None,
) -> Denoise:
    """Bind each sample's condition to `model(x, t, condition)`, with classifier-free guidance u + scale * (c - u).

    condition: for each sample a number that `model` understands: a class label, or an index into conditions it holds.
    null: the condition that stands for none. scale: 1 means no guidance and a single evaluation of the model.
    guidance_channels: how many of the data's first channels are guided. interval: first and last timestep at which guidance
        acts; None: at all of them.
    Raises ValueError for guidance on a model without a null label.  [thesis 2.3.1; Ho and Salimans 2021, eq. 6]
    """
    if scale == 1.0:
        return lambda x, t: model(x, t, condition)
    if null is None:
        raise ValueError(
            f"guidance_scale {scale}: this model was trained without label dropout and has no null label; use 1.0"
        )
    both = torch.cat([condition, torch.full_like(condition, null)])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if interval is not None and not interval[0] <= float(t[0]) <= interval[1]:
            return model(x, t, condition)
        output = model(torch.cat([x, x]), torch.cat([t, t]), both)  # one batch of both halves
        conditional, unconditional = output.chunk(2)
        # The released DiT guides only the first three of its four latent channels, as if they were RGB. What is not guided,
        # the variance's channels included, stays conditional.
        n = x.shape[1] if guidance_channels == "all" else guidance_channels
        mixed = unconditional[:, :n] + scale * (conditional[:, :n] - unconditional[:, :n])
        return torch.cat([mixed, conditional[:, n:]], dim=1)

    return denoise


def _alpha_bar_at(schedule: NoiseSchedule, timesteps: torch.Tensor) -> Sequence[float]:
    """alpha_bar at possibly fractional timesteps."""
    # sigma = sqrt(1 / alpha_bar - 1) is linear between trained timesteps, as in diffusers' own schedulers.
    sigmas = (1 / schedule.alpha_bar - 1).sqrt().numpy()
    between = np.interp(timesteps.cpu().double().numpy(), np.arange(len(sigmas)), sigmas)
    return (1 / (between**2 + 1)).tolist()
