"""DiT-XL/2 at 256 pixels on one GPU, bfloat16, each block compiled: training from cached latents, and guided sampling.

Reference points for training on an A100: 107 images/s, about 25% MFU, by fast-DiT with mixed precision, cached latents and
activation checkpointing. One guided image of 250 steps is 119 TFLOP.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from triptych_common.parallel import Execution, Ranks, prepare
from triptych_common.randomness import SampleNoise
from triptych_common.samplers import ddpm, final, guided
from triptych_common.training.state import Batch
from triptych_dit.autoencoder.cache import LatentData
from triptych_dit.config import PRESETS
from triptych_dit.flops import gflops
from triptych_dit.objective import Objective, prefetch
from triptych_dit.sampling import SamplerSettings, trajectory
from triptych_dit.train import make_state
from triptych_dit.train_config import FORWARDS_PER_STEP, TrainConfig
from triptych_dit.weights import TrainedModel, make_diffusion

from benchmarks.runner import Job
from benchmarks.suites.dit_loading import latents
from benchmarks.suites.dit_models import Diffusers, config_of, random_model

XL = PRESETS["DiT-XL/2"]
BATCH = 64  # activations of about 0.5 GB an image, on 80 GB beside two models and their optimisers
SAMPLES, STEPS, GUIDANCE = 16, 250, 1.5
FORWARD_FLOPS = 2e9 * gflops(XL)  # 2 a multiply-add


def training(compiled: bool) -> Callable[[int], Callable[[], None]]:
    """Prepare steps as `triptych-dit train` does them: latents from the cache a batch ahead, loss, AdamW, average."""

    def prepared(seed: int) -> Callable[[], None]:
        torch.set_float32_matmul_precision("high")
        folder = TemporaryDirectory()
        data = LatentData(latents(Path(folder.name), seed))
        config = TrainConfig(
            model=XL, data=data.name, batch_size=BATCH, horizontal_flip=True, precision="bf16", compile_blocks=compiled
        )
        ranks = Ranks(0, 1, torch.device("cuda"))
        state = make_state(config, ranks)
        objective = Objective(config, data)
        drawn = prefetch((range(start, start + BATCH) for start in count(0, BATCH)), objective.draw)

        def once(_folder: TemporaryDirectory = folder) -> None:  # which lives as long as this function
            counters = range(state.samples_seen, state.samples_seen + BATCH)
            loss = objective.loss(state.parallel_model, next(drawn), ranks.device).total.mean()
            loss.backward()
            state.update(Batch(state.step, BATCH, counters), {"loss": loss})

        return once

    return prepared


def sampling(seed: int) -> Callable[[], Tensor]:
    """Prepare guided DDPM sampling of a batch of latents."""
    model = random_model(XL, seed)
    prepare(model, Ranks(0, 1, torch.device("cuda")), Execution(precision="bf16", compile=True))
    trained = TrainedModel(model, make_diffusion(XL, "noise"), {})
    settings = SamplerSettings(num_inference_steps=STEPS, guidance_scale=GUIDANCE, clip_x_0=True)
    labels = torch.arange(SAMPLES)
    return torch.inference_mode()(lambda: final(trajectory(trained, labels, range(SAMPLES), settings, seed=seed)))


def diffusers_sampling(seed: int) -> Callable[[], Tensor]:
    """Prepare the same of diffusers' module, bfloat16 and compiled whole."""
    config, device = config_of("DiT-XL/2"), torch.device("cuda")
    model = Diffusers(random_model(config, seed)).to(device, torch.bfloat16)
    network = torch.compile(model)
    labels = torch.arange(SAMPLES, device=device)
    diffusion = make_diffusion(config, "noise").respaced(STEPS)

    def in_bfloat16(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return network(x.bfloat16(), t, y).float()

    def once() -> Tensor:
        denoise = guided(in_bfloat16, labels, config.null_label, GUIDANCE)
        noise = SampleNoise(seed, range(SAMPLES), (config.in_channels, *config.input_size), device=device)
        return final(ddpm(denoise, diffusion, noise, clip_x_0=True))

    return torch.inference_mode()(once)


def jobs() -> Sequence[Job]:
    skip = None if torch.cuda.is_available() else "no GPU here: torch.cuda.is_available() is false"
    flops = FORWARDS_PER_STEP * FORWARD_FLOPS
    eager, theirs = "XL/2 training, not compiled", "XL/2 sampling, diffusers"
    listed = [
        Job(eager, training(False), BATCH, "images", flops=flops),
        Job("XL/2 training", training(True), BATCH, "images", (eager,), flops=flops),
        Job(theirs, diffusers_sampling, SAMPLES, "images", repeats=3),
        Job("XL/2 sampling", sampling, SAMPLES, "images", (theirs,), repeats=3, flops=2 * STEPS * FORWARD_FLOPS),
    ]
    return [replace(job, gpu=True, skip=skip) for job in listed]
