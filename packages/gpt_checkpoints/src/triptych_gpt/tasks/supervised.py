"""Supervised tasks: a network, data, a loss and an optimiser."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property, partial
from itertools import islice, pairwise
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from triptych_common.fields import Checked, Ge
from triptych_common.randomness import generator, permutation
from triptych_common.storage.checkpoint import digest

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.symmetry.derivation import derive
from triptych_gpt.symmetry.spec import PermutationSpec, check_invariance, forward_of
from triptych_gpt.tasks.initialisers import INITIALISERS, initial_networks
from triptych_gpt.tasks.measures import cross_entropy, zero_one
from triptych_gpt.tasks.networks import Measure, Scored, score_networks, train_networks
from triptych_gpt.tasks.optimizers import OptimizerSettings, momentum_sgd
from triptych_gpt.tasks.stack import Stack
from triptych_gpt.tasks.task import Cohort, Metric, Prompts, Speed, Task, Trajectories


@dataclass(frozen=True)
class Items:
    """One part of a data set. Raises ValueError for inputs that are neither floating-point nor numbers of tokens, or not as many as
    targets."""

    inputs: Float[Tensor, "items *shape"] | Int[Tensor, "items *shape"]
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets) or not len(self.inputs):
            counts = f"{len(self.inputs)} inputs and {len(self.targets)} targets"
            raise ValueError(f"{counts}: expected as many, at least one")
        if not (self.inputs.is_floating_point() or self.inputs.dtype == torch.long):
            expected = "expected floating-point, normalised (.float()), or numbers of tokens (.long())"
            raise ValueError(f"inputs of {self.inputs.dtype}: {expected}")

    def spread(self, count: int) -> "Items":
        """At most `count` items, evenly spread over all."""
        count = min(count, len(self.inputs))
        chosen = torch.arange(count) * len(self.inputs) // count
        return Items(self.inputs[chosen], self.targets[chosen])

    def to(self, device: torch.device, dtype: torch.dtype) -> "Items":
        dtype = dtype if self.inputs.is_floating_point() else self.inputs.dtype
        return Items(self.inputs.to(device, dtype), self.targets.to(device))


def describe(thing: Any) -> str:
    """A callable as text, the same in every process: a function's name, or an object's type and settings.

    Raises ValueError for an object whose settings are unknown.
    """
    if isinstance(thing, partial):
        parts = [*map(describe, thing.args), *(f"{name}={describe(value)}" for name, value in thing.keywords.items())]
        return f"{describe(thing.func)}({', '.join(parts)})"
    if is_dataclass(thing) and not isinstance(thing, type):
        parts = [f"{part.name}={describe(getattr(thing, part.name))}" for part in fields(thing)]
        return f"{type(thing).__qualname__}({', '.join(parts)})"
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    if " at 0x" in repr(thing):
        raise ValueError(f"{type(thing).__name__} object: its settings are unknown; make it a dataclass or a function")
    return repr(thing)


@dataclass(frozen=True)
class Score(Checked):
    """A metric that is the mean of a measure over one part of the data."""

    metric: Metric
    part: Literal["train", "test"]
    measure: Measure


def classification(loss: Prompts | None = None, error: Prompts | None = None) -> tuple[Score, ...]:
    """The metrics of a classifier, with the prompts for its loss and its error."""
    return (
        Score(Metric("test_loss", "lower", loss, "mean cross-entropy of the test items, nats"), "test", cross_entropy),
        Score(Metric("test_error", "lower", error, "fraction of test items misclassified"), "test", zero_one),
        Score(
            Metric("train_loss", "lower", loss, "mean cross-entropy of training items, nats"), "train", cross_entropy
        ),
    )


Augment = Callable[[Tensor, torch.Generator], Tensor]
"""(inputs [items, *shape], generator) -> inputs as a network sees them this time."""


@dataclass(frozen=True)
class SupervisedTask(Checked, Task):
    """Networks trained by minibatches of labelled items.  [thesis 3.3, Algorithm 1]

    network: builds a freshly initialised one: best an `nn.Sequential` of known layers, which is fast, or any module whose forward
    pass takes a batch. permutations: its symmetry, if it is not to be derived. data: the "train" and "test"
    items. scored_train_items: number of training items, evenly spread over the set, that `train_loss` is the mean of.

    Raises ValueError, when used, for a batch larger than the data.
    """

    name: str
    network: Callable[[], nn.Module]
    data: Callable[[str], Items]
    epochs: Annotated[int, Ge(1)]  # each reshuffles the items and drops the last, smaller batch
    batch_size: Annotated[int, Ge(1)] = 128
    optimizer: OptimizerSettings = field(default_factory=momentum_sgd)
    loss: Measure = cross_entropy
    scores: tuple[Score, ...] = field(default_factory=classification)
    augment: Augment | None = None
    scored_train_items: Annotated[int, Ge(1)] = 500
    permutations: PermutationSpec | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [score.metric.name for score in self.scores]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"scores {', '.join(names) or 'missing'}: expected at least one, each of another name")

    @cached_property
    def stack(self) -> Stack:
        with torch.random.fork_rng(devices=[]):
            return Stack(self.network())

    @property
    def layout(self) -> ParameterLayout:
        return self.stack.layout

    @cached_property
    def symmetry(self) -> PermutationSpec:
        if self.permutations is not None:
            return self.permutations
        try:
            return derive(self.stack.network)
        except (
            ValueError
        ):  # not made of known layers: traced on the shape of an input, for which the data have to be loaded
            return derive(self.stack.network, self.items["train"].inputs[:2])

    def check_symmetry(self) -> None:
        """Raises ValueError if permuted networks compute something else on the task's own items."""
        # Derivation does not know the shape of inputs, and a spec declared by hand may be wrong.
        theta, inputs = self.initial(0, range(3)), self.items["test"].inputs[:8]
        difference = check_invariance(forward_of(self.stack.network), self.symmetry, theta, inputs)
        if not difference < 1e-8:
            problem = f"permuting hidden units changes outputs by {difference:.2g}"
            raise ValueError(f"task {self.name}: {problem}; declare permutations= that leave them as they are")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(score.metric for score in self.scores)

    @property
    def initialisers(self) -> tuple[str, ...]:
        return INITIALISERS

    @cached_property
    def items(self) -> Mapping[str, Items]:
        """Both parts of the data."""
        return {part: self.data(part) for part in ("train", "test")}

    @cached_property
    def scored(self) -> Mapping[str, Items]:
        """The items that networks are scored on."""
        return {"train": self.items["train"].spread(self.scored_train_items), "test": self.items["test"]}

    @property
    def steps_per_epoch(self) -> int:
        items = len(self.items["train"].inputs)
        if items < self.batch_size:
            raise ValueError(f"batch_size {self.batch_size}: task {self.name} has {items:,} training items; use fewer")
        return items // self.batch_size

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def recipe(self) -> dict[str, Any]:
        data = {"name": describe(self.data)}
        for part, items in self.items.items():
            data[part] = digest({"inputs": items.inputs.contiguous(), "targets": items.targets.contiguous()})[:16]
        return {
            "network": str(self.stack.network),
            "builder": describe(self.network),  # layers' names do not say how they are initialised
            "trained": list(self.stack.trainable),
            "layout": self.layout.to_json(),
            "data": data,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "loss": describe(self.loss),
            "metrics": {s.metric.name: f"{describe(s.measure)} of {s.part} items" for s in self.scores},
            "scored_train_items": self.scored_train_items,
            "augment": None if self.augment is None else describe(self.augment),
            **self.settings(),
        }

    def settings(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.name, "schedule": self.optimizer.schedule, **self.optimizer.arguments}

    def initial(self, seed: int, runs: Sequence[int], initialiser: str = "default") -> Float[Tensor, "runs D"]:
        return initial_networks(self.network, seed, runs, initialiser)

    def train_cohort(
        self, cohort: Cohort, device: torch.device, networks_at_once: int, dtype: torch.dtype = torch.float32
    ) -> Trajectories:
        train = self.items["train"].to(device, dtype)
        record = recorded_steps(cohort, self.steps)
        theta = torch.empty(len(cohort.runs), cohort.checkpoints, self.layout.size, dtype=dtype, device=device)
        losses = torch.empty(theta.shape[:2], dtype=dtype)
        rates = [self.optimizer.rate(s // self.steps_per_epoch, self.epochs) for s in range(self.steps)]
        for here in even_slices(len(cohort.runs), networks_at_once):
            runs = cohort.runs[here]
            start = self.initial(cohort.seed, runs, cohort.initialiser).to(device, dtype)
            batches = self.minibatches(train, cohort, runs)
            losses[here] = train_networks(
                self.stack, start, batches, rates, self.loss, self.optimizer, record[here].to(device), theta[here],
                shared=cohort.shared_batches,
            ).cpu()  # fmt: skip
        return Trajectories(theta.cpu(), record, {"minibatch_loss": losses})

    def minibatches(self, train: Items, cohort: Cohort, runs: range) -> Iterator[tuple[Tensor, Tensor]]:
        """The minibatches of some runs of a cohort, step by step: [items, ...] if shared, else [runs, items, ...]."""
        orders = [f"cohort-{cohort.number}"] if cohort.shared_batches else [f"run-{run}" for run in runs]
        for step in range(self.steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if batch == 0:
                shuffled = self._shuffled(cohort.seed, orders, epoch).to(train.targets.device)
            chosen = shuffled[:, batch * self.batch_size : (batch + 1) * self.batch_size]
            inputs = [train.inputs.index_select(0, rows) for rows in chosen]
            if self.augment is not None:
                sources = [generator(cohort.seed, f"augment/{order}", step) for order in orders]
                inputs = [self.augment(x, source) for x, source in zip(inputs, sources, strict=True)]
            if cohort.shared_batches:
                yield inputs[0], train.targets[chosen[0]]
            else:
                yield torch.stack(inputs), train.targets[chosen]

    def _shuffled(self, seed: int, orders: Sequence[str], epoch: int) -> Int[Tensor, "orders items"]:
        """The items of each order in an epoch, without the last, smaller batch."""
        # 32 bits, since a thousand runs may have a thousand orders of all items.
        shuffled = torch.empty(len(orders), self.steps_per_epoch * self.batch_size, dtype=torch.int32)
        for row, order in zip(shuffled, orders, strict=True):
            row.copy_(permutation(seed, f"batches/{order}", epoch, len(self.items["train"].inputs))[: len(row)])
        return shuffled

    def evaluate(self, theta: Float[Tensor, "n D"]) -> dict[str, Float[Tensor, " n"]]:
        parts = []
        for part, items in self.scored.items():
            items = items.to(theta.device, theta.dtype)
            measures = {score.metric.name: score.measure for score in self.scores if score.part == part}
            parts += [Scored(items.inputs, items.targets, measures)] if measures else []
        room = (1 << (20 if theta.device.type == "cpu" else 28)) // self.stack.widest(parts[0].inputs[:1])
        items_at_once = min(1000, max(16, room))
        at_once = max(1, room // items_at_once)
        scores = score_networks(self.stack, theta, parts, networks_at_once=at_once, items_at_once=items_at_once)
        return {metric.name: scores[metric.name] for metric in self.metrics}

    def measure(self, device: torch.device, cohort_runs: int, shared_batches: bool = True) -> Speed:
        """Time some steps of various numbers of networks, the cohort's at most, and the scoring of their first state."""
        train, theta = self.items["train"].to(device, torch.float32), self.initial(0, range(cohort_runs)).to(device)

        def take(networks: int, steps: int) -> None:
            cohort = Cohort(0, 0, range(networks), shared_batches=shared_batches)
            batches = islice(self.minibatches(train, cohort, cohort.runs), steps)
            record = torch.tensor([0, steps], device=device).expand(networks, 2)
            out = torch.empty(networks, 2, self.layout.size, device=device)
            few = (batches, [0.0] * steps, self.loss, self.optimizer, record, out)
            train_networks(self.stack, theta[:networks], *few, shared=shared_batches)
            out[0, 0, 0].item()  # waits for the device

        counts = candidate_counts(cohort_runs)
        timed = {count: seconds_each(partial(take, count), min(self.steps, 64)) / count for count in counts}
        best = min(timed, key=timed.__getitem__)
        score = seconds_each(lambda count: self.evaluate(theta[:count])[self.metrics[0].name].cpu(), len(theta))
        return Speed(best, timed[best] * self.steps, score)


def seconds_each(work: Callable[[int], object], most: int) -> float:
    """Seconds for one of several equal pieces of work, with as many done at once as fit into a quarter of a second."""
    work(1)  # warm-up

    def timed(count: int) -> float:
        began = time.perf_counter()
        work(count)
        return max(time.perf_counter() - began, 1e-9) / count

    one = timed(1)
    count = min(most, int(0.25 / one))
    return timed(count) if count > 1 else one


def candidate_counts(cohort_runs: int) -> list[int]:
    """Numbers of networks worth timing: the whole cohort and repeated halves down to eight."""
    counts = [cohort_runs]
    while counts[-1] > 8:
        counts.append(-(-counts[-1] // 2))
    return counts


def even_slices(total: int, at_most: int) -> list[slice]:
    """As few slices of 0 .. total-1 as the size permits, about equally long."""
    parts = -(-total // at_most)
    bounds = [total * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def recorded_steps(cohort: Cohort, steps: int) -> Int[Tensor, "runs checkpoints"]:
    """Numbers of steps after which each run is recorded: 0, random ones without replacement, and all.  [thesis 3.3]

    Every step in between is equally likely; with `cohort.early`, half of them (the smaller half of an odd number) are sampled with
    a probability that falls as 1 / step. Raises ValueError for fewer than two checkpoints, or more than the run has.
    """
    if not 2 <= cohort.checkpoints <= steps + 1:
        expected = f"2 to {steps + 1:,}, one before each of the {steps:,} steps and a last"
        raise ValueError(f"checkpoints {cohort.checkpoints}: expected {expected}")
    inner = [_inner_steps(cohort, run, steps, cohort.checkpoints - 2) for run in cohort.runs]
    ends = torch.tensor([0, steps]).expand(len(cohort.runs), 2)
    return torch.cat([ends, torch.stack(inner)], dim=1).sort(1).values


def _inner_steps(cohort: Cohort, run: int, steps: int, count: int) -> Int[Tensor, " count"]:
    order = torch.randperm(steps - 1, generator=generator(cohort.seed, "recorded", run)) + 1
    if not cohort.early or count == 0:
        return order[:count]
    # The largest of u^(1 / weight), u uniform, are a sample without replacement by weight (Efraimidis and Spirakis 2006). Here the
    # weight is 1 / step, so that log u is multiplied by the step.
    u = torch.rand(steps - 1, generator=generator(cohort.seed, "recorded early", run), dtype=torch.float64)
    first = (u.log() * torch.arange(1, steps)).topk(count // 2).indices + 1
    rest = order[~torch.isin(order, first)]
    return torch.cat([first, rest[: count - len(first)]])
