"""What a training run costs on this machine: memory of a step, computed, and time, measured."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from triptych_common.cost import MEASURED_SECONDS, available_bytes, check_memory
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


def step_bytes(config: TrainConfig, ranks: int, micro_batch: int | None = None) -> float:
    """Memory of a training step on one rank: weights, gradients, average and AdamW's two slots, and activations."""
    images = min(micro_batch or config.micro_batch or config.batch_size, max(1, config.batch_size // ranks))
    value = 8 if config.precision == "float64" else 4
    states = 5 * value * parameter_count(config.model) / (ranks if config.parallel == "fsdp" else 1)
    activation = activation_bytes(
        config.model, checkpointing=config.activation_checkpointing,
        value_bytes=2.5 if config.precision == "bf16" else value,
    )  # fmt: skip
    return states + SLACK * images * activation


def within_memory(config: TrainConfig, ranks: Ranks) -> Ranks:
    """The ranks. Raises ValueError for a batch whose step needs more memory than they have, with the micro-batch that fits."""
    otherwise = "choose a smaller model, --activation-checkpointing, or more GPUs with --parallel fsdp"
    needed = partial(step_bytes, config, ranks.world_size)
    check_memory(config, ranks, needed, available_bytes(ranks.device), otherwise=otherwise)
    return ranks


def images_per_second(config: TrainConfig, device: torch.device) -> float:
    """How many images a rank trains on in a second, measured by forward and backward passes for about a second."""
    model, share = config.model, 1.0
    if device.type == "cpu" and parameter_count(model) > MEASURED_PARAMETERS and model.depth > 2:
        model, share = replace(model, depth=2), 2 / model.depth
    network = DiT(model).to(device, config.dtype)
    prepare(network, Ranks(0, 1, device), Execution("ddp", config.arithmetic, config.activation_checkpointing))
    images, seconds = 1, 0.0
    most = min(config.micro_batch or config.batch_size, config.batch_size)
    while True:
        seconds = _seconds(network, model, images, config)
        if seconds > MEASURED_SECONDS / 4 or images >= most:
            return images / seconds * share
        images = min(most, images * 4)


def _seconds(network: DiT, model: DiTConfig, images: int, config: TrainConfig) -> float:
    device = network.pos_embed.device
    x = torch.randn(images, model.in_channels, *model.input_size, generator=generator(0, "measured"))
    x, zeros = x.to(device, config.dtype), torch.zeros(images, dtype=torch.long, device=device)
    took = []
    for _ in range(2):  # the first one also prepares
        start = time.perf_counter()
        network(x, zeros, zeros).square().mean().backward()
        float(network.pos_embed.sum())  # waits for a GPU
        took.append(time.perf_counter() - start)
        if took[0] > 2 * MEASURED_SECONDS:
            break
    return took[-1]


def estimate(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Memory of a step on each rank, and duration of the run; what is wrong, for a step that does not fit, as training refuses."""
    memory = {
        "device": str(ranks.device), "gigabytes_of_a_step": round(step_bytes(config, ranks.world_size) / 1e9, 3),
        "gigabytes_there": round(available_bytes(ranks.device) / 1e9, 1),
    }  # fmt: skip
    try:
        within_memory(config, ranks)
    except ValueError as error:  # not raised: the run may be meant for another machine
        return memory | {"refused": str(error)}
    rate = images_per_second(config, ranks.device) * ranks.world_size
    return memory | {"images_per_second": float(f"{rate:.3g}"), "time": duration(config.total_images / rate)}
