"""What training, sampling and encoding cost on this machine: memory, computed, and time, measured."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from triptych_common.cost import MEASURED_SECONDS, available_bytes
from triptych_common.parallel import Execution, Ranks, prepare
from triptych_common.progress import duration
from triptych_common.randomness import generator

from triptych_dit.config import DiTConfig
from triptych_dit.flops import parameter_count
from triptych_dit.model import DiT
from triptych_dit.train_config import TrainConfig

SLACK = 1.15  # gradients of activations while they are computed, and what the allocator leaves unused
MEASURED_PARAMETERS = 100_000_000  # of larger models on a CPU, two blocks are measured


def activation_bytes(model: DiTConfig, *, checkpointing: bool = False, value_bytes: float = 4) -> float:
    """What the backward pass needs of the forward pass of one image, in bytes, to 5%."""
    tokens = model.grid[0] * model.grid[1]
    # Of each block and token: norms and modulated inputs, queries, keys and values, attention's output, two projections' results,
    # and the feed-forward's hidden values before and after its GELU.
    block = (13 + 2 * model.mlp_ratio) * tokens * model.hidden_size
    return value_bytes * (model.depth * tokens * model.hidden_size + block if checkpointing else model.depth * block)


def step_bytes(config: TrainConfig, ranks: int, micro_batch: int) -> float:
    """Memory of a training step on one rank: weights, gradients, average and AdamW's two slots, and activations."""
    images = min(micro_batch, max(1, config.batch_size // ranks))
    value = 8 if config.precision == "float64" else 4
    states = 5 * value * parameter_count(config.model) / (ranks if config.parallel == "fsdp" else 1)
    activation = activation_bytes(
        config.model, checkpointing=config.activation_checkpointing,
        value_bytes=2.5 if config.precision == "bf16" else value,
    )  # fmt: skip
    return states + SLACK * images * activation


def sampling_bytes(model: DiTConfig, images: int, *, value_bytes: int = 4) -> float:
    """Memory of the network and of a forward pass of so many images, without a backward pass: twice as many, if guided."""
    tokens = model.grid[0] * model.grid[1]
    # Most is alive around the GELU: its input and result, and the residual.
    widest = (2 * model.mlp_ratio + 1) * tokens * model.hidden_size
    return value_bytes * (parameter_count(model) + images * widest)


def encoding_bytes(channels: int, pixels: int, images: int, *, value_bytes: int = 4) -> float:
    """Memory of so many images in an encoder whose first resolution, the largest, has some channels."""
    return (
        value_bytes * 5 * channels * pixels * images
    )  # a residual block's input and result, and what it computes in between


def within_memory(config: TrainConfig, ranks: Ranks) -> Ranks:
    """The ranks. Raises ValueError for a batch whose step needs more memory than they have, with the micro-batch that fits."""
    refuse_beyond(
        config.micro_batch or config.batch_size, partial(step_bytes, config, ranks.world_size), ranks.device, "a training step",
        "--micro-batch", "choose a smaller model, --activation-checkpointing, or more GPUs with --parallel fsdp",
    )  # fmt: skip
    return ranks


def refuse_beyond(
    images: int, bytes_of: Callable[[int], float], device: torch.device, what: str, option: str, otherwise: str
) -> None:
    """Raise ValueError if so many images at once need more memory than there is, with the number that fits.

    bytes_of: memory for a number of images. what, option, otherwise: of the message; the last for where not even one fits.
    """
    needed, there = bytes_of(images), available_bytes(device)
    if needed <= there:
        return
    fits = int((0.8 * there - bytes_of(1)) / max(bytes_of(2) - bytes_of(1), 1)) + 1
    if fits > 0:
        otherwise = f"pass {option} {2 ** int(math.log2(fits))}, which changes no result but the last digits"
    machine = f"this {'GPU' if device.type == 'cuda' else 'machine'} has {there / 1e9:,.1f}"
    raise ValueError(f"{images} images at once: {what} takes about {needed / 1e9:,.1f} GB, {machine}; {otherwise}")


def kept_bytes(network: nn.Module, *inputs: Tensor) -> int:
    """What autograd keeps of a forward pass for the backward pass, besides the parameters: each storage once."""
    storages = {p.untyped_storage().data_ptr(): 0 for p in network.parameters()}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)  # or another tensor might take its place
        storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(*inputs)
    return sum(storages.values())


def passes(config: TrainConfig, device: torch.device) -> tuple[Callable[[int], None], float]:
    """A forward and backward pass of so many images, to be timed, and the share of the network that is in it."""
    model, share = config.model, 1.0
    if device.type == "cpu" and parameter_count(model) > MEASURED_PARAMETERS and model.depth > 2:
        model, share = replace(model, depth=2), 2 / model.depth
    network = DiT(model).to(device, config.dtype)
    prepare(network, Ranks(0, 1, device), Execution("ddp", config.arithmetic, config.activation_checkpointing))

    def run(images: int) -> None:
        x = torch.randn(images, model.in_channels, *model.input_size, generator=generator(0, "measured"))
        x, zeros = x.to(device, config.dtype), torch.zeros(images, dtype=torch.long, device=device)
        network(x, zeros, zeros).square().mean().backward()
        float(network.pos_embed.sum())  # waits for a GPU

    return run, share


def images_per_second(run: Callable[[int], None], most: int) -> float:
    """How many images are trained on in a second, measured for about a second; `run` is given at most so many at once."""
    images = 1
    while True:
        took = []
        for _ in range(2):  # the first one also prepares
            start = time.perf_counter()
            run(images)
            took.append(time.perf_counter() - start)
            if took[0] > 2 * MEASURED_SECONDS:
                break
        if took[-1] > MEASURED_SECONDS / 4 or images >= most:
            return images / took[-1]
        images = min(most, images * 4)


def estimate(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Memory of a step on each rank, and duration of the run; what is wrong, for a step that does not fit, as training refuses."""
    images = config.micro_batch or config.batch_size

    def rate() -> float:
        run, share = passes(config, ranks.device)
        return images_per_second(run, min(images, config.batch_size)) * share

    needed = step_bytes(config, ranks.world_size, images)
    return estimated(config.total_images, needed, lambda: within_memory(config, ranks), rate, ranks)


def estimated(
    total_images: int, needed: float, check: Callable[[], Any], rate: Callable[[], float], ranks: Ranks
) -> dict[str, Any]:
    """What --dry-run says. needed: bytes; check: raises ValueError for too many; rate: images a second on a rank."""
    memory = {
        "device": str(ranks.device), "gigabytes_of_a_step": round(needed / 1e9, 3),
        "gigabytes_there": round(available_bytes(ranks.device) / 1e9, 1),
    }  # fmt: skip
    try:
        check()
    except ValueError as error:  # not raised: the run may be meant for another machine
        return memory | {"refused": str(error)}
    speed = rate() * ranks.world_size
    return memory | {"images_per_second": float(f"{speed:.3g}"), "time": duration(total_images / speed)}
