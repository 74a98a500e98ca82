"""Training and scoring of many networks at once, by one path on any device."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from triptych_gpt.tasks.optimizers import OptimizerSettings
from triptych_gpt.tasks.stack import Stack, computes

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


_GAP = 4  # fewer columns in a row are not worth a copy of their own


class Folding:
    """Which input features of a network vary over some items, and the same network on those alone.

    Does nothing unless inputs are flat and the network begins with a Linear that has a bias.
    """

    def __init__(self, network: nn.Module, parts: Sequence[Tensor]) -> None:
        self.layer = _first_linear(network) if all(part.ndim == 2 for part in parts) else None
        if self.layer is None:
            return
        first = parts[0][0]
        varies = torch.stack([(part != first).any(0) for part in parts]).any(0)
        self._spans = _spans(varies.nonzero().flatten().tolist())
        kept = torch.zeros_like(varies)
        for start, stop in self._spans:
            kept[start:stop] = True
        self._constants = first.masked_fill(kept, 0)[:, None]

    def inputs(self, inputs: Float[Tensor, "items *shape"]) -> Tensor:
        """The features that vary, laid out as a product of weights and inputs reads them."""
        if self.layer is None:
            return inputs
        return self._kept(inputs).T.contiguous().T

    def parameters(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters [networks, *shape] for these inputs: the first bias takes over what the others contribute."""
        parameters = dict(parameters)
        if self.layer is not None:
            weight, bias = f"{self.layer}.weight".lstrip("."), f"{self.layer}.bias".lstrip(".")
            full = parameters[weight]
            parameters[bias] = parameters[bias] + (full @ self._constants.to(full.dtype)).squeeze(-1)
            parameters[weight] = self._kept(full)
        return parameters

    def _kept(self, values: Tensor) -> Tensor:
        return torch.cat([values[..., start:stop] for start, stop in self._spans], -1)


def _first_linear(network: nn.Module) -> str | None:
    """Name of the layer that meets the inputs, where it is a Linear with a bias."""
    path = []
    while isinstance(network, nn.Sequential) and computes(network, nn.Sequential) and len(network):
        name, network = next(iter(network.named_children()))
        path.append(name)
    plain = isinstance(network, nn.Linear) and computes(network, nn.Linear)
    return ".".join(path) if plain and network.bias is not None else None


def _spans(columns: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges that cover the columns, gaps of a few included."""
    spans: list[tuple[int, int]] = []
    for column in columns or [0]:
        if spans and column - spans[-1][1] < _GAP:
            spans[-1] = (spans[-1][0], column + 1)
        else:
            spans.append((column, column + 1))
    return spans
