"""What training, sampling and encoding cost on this machine: memory, computed, and time, measured."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from triptych_common.cost import ROOM, StepCost, available_bytes
from triptych_common.parallel import Execution, Ranks, prepare
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


def step_cost(config: TrainConfig, ranks: Ranks, *, timed: bool = False) -> StepCost:
    """Of a training step on one rank: weights, gradients, average and AdamW's two slots, and activations.

    timed: for `estimate`, whose time is that of forward and backward passes; else the network is not built.
    """
    value = 8 if config.precision == "float64" else 4
    states = 5 * value * parameter_count(config.model) / (ranks.world_size if config.execution.sharded(ranks) else 1)
    activation = activation_bytes(
        config.model, checkpointing=config.activation_checkpointing,
        value_bytes=2.5 if config.precision == "bf16" else value,
    )  # fmt: skip
    fixed, each = (torch.tensor([number], dtype=torch.float64) for number in (states, SLACK * activation))
    return StepCost(
        [passes(config, ranks.device)] if timed else (), fixed, each, (1, 0.0),
        otherwise="choose a smaller model, --activation-checkpointing, or more GPUs with --parallel fsdp",
    )  # fmt: skip


def passes(config: TrainConfig, device: torch.device) -> tuple[Callable[[range], None], float]:
    """A forward and backward pass, which has been run once, and the share of the network that is in it."""
    model, share = config.model, 1.0
    if device.type == "cpu" and parameter_count(model) > MEASURED_PARAMETERS and model.depth > 2:
        model, share = replace(model, depth=2), 2 / model.depth
    network = DiT(model).to(device, config.dtype)
    prepare(network, Ranks(0, 1, device), Execution("ddp", config.arithmetic, config.activation_checkpointing))

    def run(counters: range) -> None:
        x = torch.randn(len(counters), model.in_channels, *model.input_size, generator=generator(0, "measured"))
        x, zeros = x.to(device, config.dtype), torch.zeros(len(counters), dtype=torch.long, device=device)
        network(x, zeros, zeros).square().mean().backward()

    run(range(1))
    return run, share


def sampling_bytes(model: DiTConfig, images: int, *, value_bytes: int = 4) -> float:
    """Memory of the network and of a forward pass of so many images, without a backward pass: twice as many, if guided."""
    tokens = model.grid[0] * model.grid[1]
    # Most is alive around the GELU: its input and result, and the residual.
    widest = (2 * model.mlp_ratio + 1) * tokens * model.hidden_size
    return value_bytes * (parameter_count(model) + images * widest)


def encoding_bytes(channels: int, pixels: int, images: int, *, value_bytes: int = 4) -> float:
    """Memory of so many images in an encoder whose first resolution, the largest, has some channels."""
    # Of a residual block: its input and result, and what it computes in between.
    return value_bytes * 5 * channels * pixels * images


def refuse_beyond(
    images: int, bytes_of: Callable[[int], float], device: torch.device, what: str, otherwise: str
) -> None:
    """Raise ValueError if so many images at once need more memory than there is, with the batch size that fits.

    bytes_of: memory for a number of images. what, otherwise: of the message; the last for where not even one fits.
    """
    needed, there = bytes_of(images), available_bytes(device)
    if needed <= there:
        return
    fits = int((ROOM * there - bytes_of(1)) / max(bytes_of(2) - bytes_of(1), 1)) + 1
    if fits > 0:
        otherwise = f"pass --batch-size {2 ** int(math.log2(fits))}, which changes no result but the last digits"
    machine = f"this {'GPU' if device.type == 'cuda' else 'machine'} has {there / 1e9:,.1f}"
    raise ValueError(f"{images} images at once: {what} takes about {needed / 1e9:,.1f} GB, {machine}; {otherwise}")
