"""Training and scoring of many networks at once, by one path on any device."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.tasks.optimizers import OptimizerSettings
from triptych_gpt.tasks.stack import Stack, computes

Measure = Callable[[Tensor, Tensor], Tensor]
"""(outputs [networks, items, out], targets [items] or [networks, items]) -> one number for each item [networks, items]."""


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
    """Train networks from theta, one optimiser step for each minibatch, at that step's learning rate.

    record: numbers of steps after which each network's checkpoints are taken, ascending; they are written to `out`.
    Returns the mean loss of each checkpoint's last minibatch, before its step (of the first minibatch for step 0).
    """
    views, contiguous = stack.layout.unflatten(theta), torch.contiguous_format
    parameters = {name: value.clone(memory_format=contiguous) for name, value in views.items()}
    trained = [parameters[name].requires_grad_() for name in stack.trainable]
    steps = optimizer.make(trained)
    due = due_steps(record)
    losses = torch.zeros(record.shape, dtype=theta.dtype, device=theta.device)
    take_checkpoints(due.get(0), parameters, stack.layout, out)
    for step, (inputs, targets) in enumerate(minibatches, start=1):
        for group in steps.param_groups:
            group["lr"] = rates[step - 1]
        outputs = stack(parameters, inputs, shared=shared, training=True)
        each = loss(outputs, targets).mean(1)
        # The sum over networks: each network's gradient is what it would be alone.
        gradients = torch.autograd.grad(each.sum(), trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            # Fused optimisers read memory in order, and gradients of channels-last inputs have another.
            parameter.grad = None if gradient is None else gradient.contiguous()
        steps.step()
        for at in (due.get(0), due.get(1)) if step == 1 else (due.get(step),):
            if at is not None:
                losses[at] = each.detach()[at[0]]
        take_checkpoints(due.get(step), parameters, stack.layout, out)
    return losses


At = tuple[Tensor, Tensor]
"""Networks, and which of their checkpoints."""


def due_steps(record: Int[Tensor, "networks checkpoints"]) -> dict[int, At]:
    """For each step, the networks with a checkpoint after it, and which one."""
    steps, order = record.flatten().sort()
    values, counts = steps.unique_consecutive(return_counts=True)
    parts = zip(values.tolist(), order.split(counts.tolist()), strict=True)
    return {step: (at // record.shape[1], at % record.shape[1]) for step, at in parts}


def take_checkpoints(at: At | None, parameters: Mapping[str, Tensor], layout: ParameterLayout, out: Tensor) -> None:
    """Copy some networks' parameters into their checkpoints, whole rows at a time."""
    if at is None:
        return
    networks, checkpoints = at
    taken = [parameters[name].detach().index_select(0, networks).flatten(1) for name in layout.names]
    rows = networks * out.shape[1] + checkpoints
    out.view(-1, out.shape[-1]).index_copy_(0, rows, torch.cat(taken, 1))


class Scored(NamedTuple):
    """Items and what to measure on them."""

    inputs: Tensor
    targets: Tensor
    measures: Mapping[str, Measure]


def score_networks(
    stack: Stack, theta: Float[Tensor, "n D"], parts: Sequence[Scored], *, networks_at_once: int, items_at_once: int
) -> dict[str, Float[Tensor, " n"]]:
    """Mean of each measure over all items of its part, for each network, on theta's device."""
    names = [name for part in parts for name in part.measures]
    totals = {name: torch.zeros(len(theta), dtype=torch.float64, device=theta.device) for name in names}
    with torch.inference_mode():  # totals were made outside, and so stay ordinary tensors
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


_GAP = 4  # shorter gaps between columns are copied along


class Folding:
    """A network on those input features alone that vary over the items: border pixels of digits are the same in all.

    Does nothing unless inputs are flat and the network begins with a Linear that has a bias.
    """

    def __init__(self, network: nn.Module, parts: Sequence[Tensor]) -> None:
        self.layer = _first_linear(network) if all(part.ndim == 2 for part in parts) else None
        if self.layer is None:
            return
        first = parts[0][0]
        varies = torch.stack([(part != first).any(0) for part in parts]).any(0)
        self._spans = _spans(varies.nonzero().flatten().tolist())
        self._constants = first.clone()[:, None]
        for start, stop in self._spans:
            self._constants[start:stop] = 0

    def inputs(self, inputs: Shaped[Tensor, "items *shape"]) -> Tensor:
        """The features that vary, in the memory order in which a product of weights and inputs reads them."""
        return inputs if self.layer is None else self._varying(inputs).T.contiguous().T

    def parameters(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters [networks, *shape] for these inputs; the first bias takes over what constant features contribute."""
        parameters = dict(parameters)
        if self.layer is not None:
            weight, bias = f"{self.layer}.weight".lstrip("."), f"{self.layer}.bias".lstrip(".")
            full = parameters[weight]
            parameters[bias] = parameters[bias] + (full @ self._constants.to(full.dtype)).squeeze(-1)
            parameters[weight] = self._varying(full)
        return parameters

    def _varying(self, values: Tensor) -> Tensor:
        return torch.cat([values[..., start:stop] for start, stop in self._spans], -1)


def _first_linear(network: nn.Module) -> str | None:
    """Name of the layer that takes the inputs, if it is a Linear with a bias."""
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
