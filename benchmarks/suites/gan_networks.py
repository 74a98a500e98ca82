"""StyleGAN2's generator and discriminator on this machine's CPU, half the published width, beside their bare convolutions; and
whole training steps of the small generator of digits.

The floor does every convolution of the network on ready-made tensors, and its gradients: no filters, styles, noise, biases,
activations, mapping or sums. A round of training is as many steps as pass until both lazy penalties are due together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from triptych_common.data import ImageDataset
from triptych_common.parallel import Ranks
from triptych_common.throughput import keep_freed_memory
from triptych_common.training import Batch
from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.data import TrainingImages
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.objective import Objective
from triptych_gangealing.stylegan2.train import adversarial_step, make_state
from triptych_gangealing.stylegan2.train_config import PRESETS, GanTrainConfig

from benchmarks.runner import Job

Network = Generator | Discriminator


class Size(NamedTuple):
    """Images of a resolution, and how many at once."""

    resolution: int
    batch: int
    repeats: int
    channel_base: int = 16384
    channel_max: int = 512


SIZES = [Size(32, 16, 10), Size(64, 8, 10), Size(128, 4, 10), Size(256, 4, 5)]


def configs(size: Size) -> tuple[GeneratorConfig, DiscriminatorConfig]:
    shape = {"resolution": size.resolution, "channel_base": size.channel_base, "channel_max": size.channel_max}
    return GeneratorConfig(**shape), DiscriminatorConfig(**shape)


class Convolution(NamedTuple):
    """One of a network's convolutions: channels, size of kernel and input, and stride, negative for a transposed one."""

    inputs: int
    outputs: int
    kernel: int
    side: int
    stride: int = 1


def generator_convolutions(config: GeneratorConfig) -> list[Convolution]:
    """Of the skip design, from low to high resolution."""
    found = []
    for r in config.resolutions:
        maps = config.channels_at(r)
        if r > 4:
            found.append(Convolution(config.channels_at(r // 2), maps, 3, r // 2, -2))
        found += [Convolution(maps, maps, 3, r), Convolution(maps, config.image_channels, 1, r)]
    return found


def discriminator_convolutions(config: DiscriminatorConfig) -> list[Convolution]:
    """Of the residual design, the two fully connected layers at the end included."""
    found = [Convolution(config.image_channels, config.channels_at(config.resolution), 1, config.resolution)]
    for r in config.resolutions[:0:-1]:
        maps, after = config.channels_at(r), config.channels_at(r // 2)
        found += [Convolution(maps, maps, 3, r), Convolution(maps, after, 3, r, 2), Convolution(maps, after, 1, r // 2)]
    last = config.channels_at(4)
    return [*found, Convolution(last + 1, last, 3, 4), Convolution(16 * last, last, 1, 1), Convolution(last, 1, 1, 1)]


def floor(
    convolutions: Sequence[Convolution], batch: int, device: torch.device, *, backward: bool
) -> Callable[[int], Callable[[], None]]:
    """Prepare the bare convolutions, forward or with gradients of inputs and weights."""

    def prepare(seed: int) -> Callable[[], None]:
        keep_freed_memory()
        rng = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=rng).to(device, memory_format=torch.channels_last)
            return x.requires_grad_(backward)

        def convolved(one: Convolution, x: Tensor, weight: Tensor) -> Tensor:
            if one.stride < 0:
                return F.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=1)
            return F.conv2d(x, weight, stride=one.stride, padding=one.kernel // 2)

        ready = []
        for one in convolutions:
            channels = (one.inputs, one.outputs) if one.stride < 0 else (one.outputs, one.inputs)
            x, weight = drawn(batch, one.inputs, one.side, one.side), drawn(*channels, one.kernel, one.kernel)
            ready.append((one, x, weight, torch.randn_like(convolved(one, x, weight))))

        def once() -> None:
            for one, x, weight, gradient in ready:
                out = convolved(one, x, weight)
                if backward:
                    torch.autograd.grad(out, (x, weight), gradient)

        return once if backward else torch.inference_mode()(once)

    return prepare


def passes(
    network_of: Callable[[], Network], inputs: tuple[int, ...], device: torch.device, *, backward: bool
) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare a network on random inputs, forward or with the gradients of all weights."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        keep_freed_memory()
        torch.manual_seed(seed)
        network: nn.Module = network_of().to(device, memory_format=torch.channels_last)
        x = torch.randn(inputs, generator=torch.Generator().manual_seed(seed)).to(device)
        if not backward:
            return torch.inference_mode()(lambda: network(x))
        weights = list(network.parameters())

        def once() -> Tensor:
            out = network(x)
            torch.autograd.grad(out.sum(), weights)
            return out.detach()

        return once

    return prepare


def noise(resolution: int) -> TrainingImages:
    """Sixty-four pictures of noise: enough for a run to have something to read."""
    pixels = torch.randint(256, (64, 3, resolution, resolution), generator=torch.Generator().manual_seed(0))
    source = ImageDataset("noise", "train", pixels.to(torch.uint8), torch.zeros(64, dtype=torch.long), 1)
    return TrainingImages(source, lambda items: source.images[items], resolution)


def round_of(config: GanTrainConfig) -> int:
    """Steps until both lazy penalties are due together."""
    return math.lcm(config.r1_every, config.path_length_every)


def training(config: GanTrainConfig, device: torch.device) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare rounds of training: both networks, both penalties in their turn, Adam, average, augmentation, on one device."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        keep_freed_memory()
        images = noise(config.resolution)
        state = make_state(replace(config, seed=seed), Ranks(0, 1, device), images)
        objective = Objective(config, images, state.model["generator"], state.model["discriminator"])

        def once() -> Tensor:
            for _ in range(round_of(config)):
                counters = range(state.samples_seen, state.samples_seen + config.batch_size)
                adversarial_step(state, objective, Batch(state.step, config.batch_size, counters))
            return state.model["generator"].mapping.w_avg.clone()

        return once

    return prepare


def jobs_of(size: Size, device: torch.device, *, bf16: bool = False) -> Iterator[Job]:
    """Both networks, forward, and forward and backward."""
    generator, discriminator = configs(size)

    def mixed(network: Network) -> Network:
        part = network.synthesis if isinstance(network, Generator) else network
        part.bf16_resolutions = 4 if bf16 else 0
        return network

    side = size.resolution
    kinds = {
        f"generator {side}": (
            lambda: mixed(Generator(generator)),
            (size.batch, generator.z_dim),
            generator_convolutions(generator),
        ),
        f"discriminator {side}": (
            lambda: mixed(Discriminator(discriminator)),
            (size.batch, discriminator.image_channels, side, side),
            discriminator_convolutions(discriminator),
        ),
    }
    for name, (network_of, inputs, convolutions) in kinds.items():
        for backward in (False, True):
            label = f"{name}, {'both' if backward else 'forward'}"
            bare = f"{label}: floor"
            prepared = floor(convolutions, size.batch, device, backward=backward)
            yield Job(bare, prepared, size.batch, "images", repeats=size.repeats)
            prepared = passes(network_of, inputs, device, backward=backward)
            yield Job(f"{label}: ours", prepared, size.batch, "images", (bare,), repeats=size.repeats)


def jobs() -> Sequence[Job]:
    device, digits = torch.device("cpu"), replace(PRESETS["digits32"], data="noise")
    listed = [job for size in SIZES for job in jobs_of(size, device)]
    images = round_of(digits) * digits.batch_size
    return [*listed, Job("training, digits32", training(digits, device), images, "images", repeats=3)]
