"""Hand-designed optimisers, tuned: what one update of a generative model is compared with.  [thesis 3.4.1, Fig 3.3, 3.4]

Every optimiser is tried at each point of a grid of learning rates and weight decays, at a constant rate. Points are chosen on
validation networks, and reported on others. All networks see the same minibatches, the task's own. A policy's step has the
gradient of PPO's objective on a rollout that the policy has just collected, whole; PPO itself stands beside the others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_gpt.evaluation.records import plain
from triptych_gpt.tasks.networks import train_networks
from triptych_gpt.tasks.optimizers import OptimizerSettings
from triptych_gpt.tasks.reinforcement.ppo import train_policies
from triptych_gpt.tasks.reinforcement.task import ReinforcementTask
from triptych_gpt.tasks.supervised import SupervisedTask
from triptych_gpt.tasks.task import Cohort, Task

OPTIMIZERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # by name: the class in torch.optim, and what is not tuned
    "SGD": ("SGD", {}),
    "Momentum": ("SGD", {"momentum": 0.9}),
    "Nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "Adam": ("Adam", {}),
    "AdamW": ("AdamW", {}),
    "RMSprop": ("RMSprop", {}),
    "Adagrad": ("Adagrad", {}),
    "NAdam": ("NAdam", {}),
    "Adadelta": ("Adadelta", {}),
}
PPO = "PPO"
OF_POLICIES = (
    " A policy's step follows PPO's objective on a rollout that the policy has just collected. PPO itself is not tuned: its steps "
    "are iterations of the task's recipe, a rollout and all epochs of minibatches on it, at the recipe's rate."
)
RATE_FACTORS = (0.1, 1.0, 10.0)  # times PyTorch's default learning rate
WEIGHT_DECAYS = (0.0, 5e-5, 5e-4)


class GridPoint(NamedTuple):
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Curve:
    """An optimiser's metric after `steps` updates of unseen networks, tuned on other networks; NaN where networks diverged."""

    optimizer: str
    metric: str
    better: str
    steps: tuple[int, ...]
    grid: tuple[GridPoint, ...]
    chosen: tuple[int, ...]  # points of the grid that are best at each step by `validation`
    tuned: Float[Tensor, "steps networks"]  # the metric at the point that is best after the last step
    envelope: Float[Tensor, "steps networks"]  # at the point that is best after exactly so many steps
    validation: Float[Tensor, "grid steps"]  # mean over validation networks

    def steps_to_reach(self, value: float) -> tuple[int | None, int]:
        """First scored step at which the envelope's mean is at this value or better, None for never, and the step before it."""
        after = 0
        for step, mean in zip(self.steps, self.envelope.double().mean(1).tolist(), strict=True):
            if mean <= value if self.better == "lower" else mean >= value:
                return step, after
            after = step
        return None, after

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: means and standard errors over networks; None for what is not finite."""
        scored = zip(self.grid, self.validation, strict=True)
        return {
            "optimizer": self.optimizer, "metric": self.metric, "networks": self.tuned.shape[1], "steps": list(self.steps),
            "tuned": {**self.grid[self.chosen[-1]]._asdict(), **_moments(self.tuned)},
            "envelope": {"points": [self.grid[i]._asdict() for i in self.chosen], **_moments(self.envelope)},
            "grid": [{**point._asdict(), "validation": plain(values)} for point, values in scored],
        }  # fmt: skip


def one_step(optimizer: str) -> str:
    """In running text."""
    return f"one {'iteration' if optimizer == PPO else 'step'} of {optimizer}"


def spaced_steps(last: int, ratio: float = 1.15) -> tuple[int, ...]:
    """1, 2, ... up to `last`, each at least one more than the one before and about `ratio` times it."""
    steps = [1]
    while steps[-1] < last:
        steps.append(min(last, max(steps[-1] + 1, round(steps[-1] * ratio))))
    return tuple(steps)


def grid_of(optimizer: str) -> tuple[GridPoint, ...]:
    """PyTorch's default learning rate and ten times less and more, with each weight decay.  [thesis 3.4.1]"""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
    default = signature(getattr(torch.optim, OPTIMIZERS[optimizer][0])).parameters["lr"].default
    return tuple(GridPoint(default * factor, decay) for factor in RATE_FACTORS for decay in WEIGHT_DECAYS)


def optimise(
    task: SupervisedTask | ReinforcementTask,
    optimizer: str,
    test: Float[Tensor, "networks D"],
    validation: Float[Tensor, "tuning D"],
    metric: str,
    steps: Sequence[int] = (1,),
    *,
    seed: int = 0,
) -> Curve:
    """Train networks with an optimiser of OPTIMIZERS at every point of its grid, scoring them after `steps` updates; or by PPO.

    test: networks that the curves are of; they choose nothing. validation: networks by whose mean grid points are chosen.
    Raises ValueError for an unknown optimiser or metric, or steps that are not ascending from 1.
    """
    steps, better = tuple(steps), {m.name: m.better for m in task.metrics}
    if metric not in better:
        raise ValueError(f"metric {metric!r}: task {task.name} has {', '.join(better)}")
    if not steps or steps[0] < 1 or list(steps) != sorted(set(steps)):
        raise ValueError(f"steps {steps}: expected ascending numbers of updates, the first at least 1")
    networks = torch.cat([test, validation])
    if optimizer == PPO and isinstance(task, ReinforcementTask):
        grid: tuple[GridPoint, ...] = (GridPoint(task.ppo.learning_rate, 0.0),)  # the recipe's own
        longer = max(task.ppo.iterations, steps[-1])
        trained = _policies(replace(task, ppo=replace(task.ppo, iterations=longer)), networks, steps, seed)[None]
    else:
        grid = grid_of(optimizer)
        trained = _trained(task, optimizer, grid, networks, steps, seed)
    # Points are chosen by the mean over validation networks alone, and diverged ones are never chosen.
    means = _scored(task, metric, trained[:, len(test) :]).mean(1)  # grid steps
    worst = math.inf if better[metric] == "lower" else -math.inf
    comparable = means.where(means.isfinite(), worst)
    chosen = comparable.argmin(0) if better[metric] == "lower" else comparable.argmax(0)
    tuned = trained[chosen[-1], : len(test)]
    envelope = trained[chosen, : len(test), torch.arange(len(steps))].transpose(0, 1)
    tuned, envelope = (_scored(task, metric, theta).T for theta in (tuned, envelope))
    return Curve(optimizer, metric, better[metric], steps, grid, tuple(chosen.tolist()), tuned, envelope, means)


def optimise_with_all(task: Task, *arguments: Any, **options: Any) -> list[Curve]:
    """`optimise` with every optimiser, policies by PPO too; no curves for a task that has neither data nor policies."""
    if not isinstance(task, SupervisedTask | ReinforcementTask):
        return []
    names = [*OPTIMIZERS, *[PPO] * isinstance(task, ReinforcementTask)]
    return [optimise(task, name, *arguments, **options) for name in names]


@dataclass(frozen=True)
class _GridSettings(OptimizerSettings):
    """One optimiser for equal shares of a stack of networks, each share at its own point of a grid."""

    # All points in one stack take a quarter of the time that they take one by one.
    grid: tuple[GridPoint, ...] = ()

    def make(self, parameters: Sequence[Tensor]) -> "_Shares":  # type: ignore[override]  # the loop calls nothing but step()
        # One parameter group a point: torch.optim then steps every share at its own rate and decay, in one call.
        shares = [[part.detach() for part in parameter.chunk(len(self.grid))] for parameter in parameters]
        optimizer = super().make([part for parts in shares for part in parts])
        (group,) = optimizer.param_groups
        optimizer.param_groups = [
            {**group, "params": list(parts), "lr": point.learning_rate, "weight_decay": point.weight_decay}
            for point, parts in zip(self.grid, zip(*shares, strict=True), strict=True)
        ]
        return _Shares(parameters, shares, optimizer)


@dataclass(frozen=True)
class _Shares:
    parameters: Sequence[Tensor]
    shares: Sequence[Sequence[Tensor]]  # views of the parameters: a step on them moves the stack
    optimizer: torch.optim.Optimizer
    param_groups: tuple[()] = ()  # whose rate the training loop would set

    def step(self) -> None:
        for parameter, parts in zip(self.parameters, self.shares, strict=True):
            gradients = [None] * len(parts) if parameter.grad is None else parameter.grad.chunk(len(parts))
            for part, gradient in zip(parts, gradients, strict=True):
                part.grad = gradient
        self.optimizer.step()


def _trained(
    task: SupervisedTask | ReinforcementTask, optimizer: str, grid: tuple[GridPoint, ...], initial: Tensor,
    steps: tuple[int, ...], seed: int,
) -> Float[Tensor, "grid networks steps D"]:  # fmt: skip
    name, fixed = OPTIMIZERS[optimizer]
    # networks of the stack: all networks at the first point, then all at the second, ...
    settings = _GridSettings(name, {**fixed, "lr": grid[0].learning_rate}, "constant", grid)
    start = initial.repeat(len(grid), 1)
    if isinstance(task, ReinforcementTask):
        whole = replace(task, ppo=replace(task.ppo, epochs=1, minibatches=1))
        return _policies(whole, start, steps, seed, len(initial), settings.make).unflatten(0, (len(grid), -1))
    out = start.new_empty(len(start), len(steps), start.shape[1])
    record = torch.tensor(steps, device=start.device).expand(len(start), -1)
    train, count = task.items["train"].to(start.device, start.dtype), steps[-1]
    longer = task
    if count > task.steps:
        longer = replace(task, epochs=math.ceil(count / task.steps_per_epoch), data=dict(task.items).__getitem__)
    batches = islice(longer.minibatches(train, Cohort(seed, 0, range(1)), range(1)), count)
    # The rates are the grid's own: the schedule's, one a step, are set on no parameter group.
    train_networks(task.stack, start, batches, [math.nan] * count, task.loss, settings, record, out)
    return out.unflatten(0, (len(grid), -1))


def _policies(
    task: ReinforcementTask,
    start: Float[Tensor, "policies D"],
    steps: tuple[int, ...],
    seed: int,
    runs: int | None = None,
    make_optimizer: Callable[[Sequence[Tensor]], Any] | None = None,
) -> Float[Tensor, "policies steps D"]:
    """Policies after `steps` iterations, with fresh critics; i and i + runs have the same critic, environments and noise."""
    count = runs or len(start)
    numbers = [i % count for i in range(len(start))]
    learner = task.learner(
        Cohort(seed, 0, range(count)), numbers, start.device, start.dtype, theta=start, make_optimizer=make_optimizer
    )
    out = start.new_empty(len(start), len(steps), start.shape[1])
    try:
        train_policies(learner, torch.tensor(steps, device=start.device).expand(len(start), -1), out)
    finally:
        learner.environments.close()
    return out


def _scored(task: Task, metric: str, theta: Float[Tensor, "*any D"]) -> Float[Tensor, "*any"]:
    return task.evaluate(theta.flatten(0, -2))[metric].view(theta.shape[:-1])


def _moments(values: Float[Tensor, "steps networks"]) -> dict[str, list[float | None]]:
    values = values.double()
    error = values.std(1) / math.sqrt(values.shape[1]) if values.shape[1] > 1 else torch.full((len(values),), math.nan)
    return plain({"mean": values.mean(1), "standard_error": error})
