"""Training and scoring of many networks at once, by one path on any device."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triptych_gpt.tasks.folding import Folding
from triptych_gpt.tasks.optimizers import OptimizerSettings
from triptych_gpt.tasks.stack import Stack

Measure = Callable[[Tensor, Tensor], Tensor]
"""(outputs [networks, items, out], targets [items] or [networks, items]) -> one number an item: [networks, items]."""


def train_networks(
    stack: Stack,
    theta: Float[Tensor, "networks D"],
    minibatches: Iterable[tuple[Tensor, Tensor]],
    rates: Sequence[float],
    loss: Measure,
    optimizer: OptimizerSettings,
    record: Int[Tensor, "networks checkpoints"],
    out: Float[Tensor, "networks checkpoints D"],
    *,
    shared: bool = True,
) -> Float[Tensor, "networks checkpoints"]:
    """Train networks from theta, one optimiser step a minibatch at that step's learning rate.

    record: after how many steps each network's checkpoints are taken, ascending; they are written to `out`. Returns the
    mean loss of each checkpoint's last minibatch, before its step (its first one for step 0).
    """
    parameters = {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in stack.layout.unflatten(theta).items()
    }
    trained = [parameters[name].requires_grad_() for name in stack.trainable]
    steps = optimizer.make(trained)
    due = _by_step(record)
    losses = torch.zeros(record.shape, dtype=theta.dtype, device=theta.device)
    _take(due.get(0), parameters, stack, out)
    for step, (inputs, targets) in enumerate(minibatches, start=1):
        for group in steps.param_groups:
            group["lr"] = rates[step - 1]
        outputs = stack(parameters, inputs, shared=shared, training=True)
        each = loss(outputs, targets).mean(1)
        gradients = torch.autograd.grad(each.sum(), trained, allow_unused=True)  # None: left alone
        for parameter, gradient in zip(trained, gradients, strict=True):
            # fused optimisers read memory in order, and gradients of channels-last inputs come in another
            parameter.grad = None if gradient is None else gradient.contiguous()
        steps.step()
        for at in (due.get(0), due.get(1)) if step == 1 else (due.get(step),):
            if at is not None:
                losses[at] = each.detach()[at[0]]
        _take(due.get(step), parameters, stack, out)
    return losses


_At = tuple[Tensor, Tensor]  # networks, and which of their checkpoints


def _by_step(record: Tensor) -> dict[int, _At]:
    """For each step, the networks with a checkpoint after it, and which one."""
    steps, order = record.flatten().sort()
    values, counts = steps.unique_consecutive(return_counts=True)
    per_network = record.shape[1]
    return {
        step: (at.div(per_network, rounding_mode="floor"), at % per_network)
        for step, at in zip(values.tolist(), order.split(counts.tolist()), strict=True)
    }


def _take(at: _At | None, parameters: Mapping[str, Tensor], stack: Stack, out: Tensor) -> None:
    """Copy some networks' parameters into their checkpoints, whole rows at a time."""
    if at is None:
        return
    networks, checkpoints = at
    taken = [parameters[name].detach().index_select(0, networks).flatten(1) for name in stack.layout.names]
    rows = networks * out.shape[1] + checkpoints
    out.view(-1, out.shape[-1]).index_copy_(0, rows, torch.cat(taken, 1))


class Scored(NamedTuple):
    """Items and what to measure on them."""

    inputs: Tensor
    targets: Tensor
    measures: Mapping[str, Measure]


def score_networks(
    stack: Stack,
    theta: Float[Tensor, "n D"],
    parts: Sequence[Scored],
    *,
    networks_at_once: int,
    items_at_once: int,
) -> dict[str, Float[Tensor, " n"]]:
    """Mean of each measure over all items of its part, for each network, on theta's device."""
    totals = {
        name: torch.zeros(len(theta), dtype=torch.float64, device=theta.device) for p in parts for name in p.measures
    }
    with torch.inference_mode():  # the totals, made outside, stay ordinary tensors
        folding = Folding(stack.network, [part.inputs for part in parts])
        blocks = [
            (folding.inputs(inputs), targets, part.measures, len(part.inputs))
            for part in parts
            for inputs, targets in zip(part.inputs.split(items_at_once), part.targets.split(items_at_once), strict=True)
        ]
        for first in range(0, len(theta), networks_at_once):
            here = slice(first, first + networks_at_once)
            views = folding.parameters(stack.layout.unflatten(theta[here]))
            parameters = {name: value.contiguous() for name, value in views.items()}
            for inputs, targets, measures, count in blocks:
                outputs = stack(parameters, inputs)
                for name, measure in measures.items():
                    totals[name][here] += measure(outputs, targets).sum(1, dtype=torch.float64) / count
    return {name: total.to(theta.dtype) for name, total in totals.items()}
