"""The state of a model in training, and one optimiser step of it.

A package's loop uses it through `triptych_common.training`.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych_common.parallel import (
    Execution,
    Ranks,
    average_gradients,
    distributed,
    gradient_sync,
    local,
    prepare,
    whole,
)
from triptych_common.storage import checkpoint

COUNTERS = ("samples_seen", "step", "skipped", "skipped_in_a_row", "rollbacks", "rollbacks_in_a_row", "metered_steps")


@dataclass(frozen=True)
class Batch:
    """The sample counters of one optimiser step: `size` of them over all ranks, `counters` on this rank."""

    step: int
    size: int
    counters: range

    def micro_batches(self, micro_batch: int | None = None) -> Iterator[tuple[range, bool]]:
        """Parts of at most `micro_batch` counters (all by default), each with whether it is the last."""
        size = micro_batch or len(self.counters)
        for start in range(0, len(self.counters), size):
            yield self.counters[start : start + size], start + size >= len(self.counters)


@dataclass
class TrainState:
    """A model in training: weights, their exponential moving average (EMA), optimiser and counters.

        with process_group() as ranks:
            state = TrainState(model, AdamW, ranks, ema_half_life=500_000)  # samples
            batch = Batch(step=0, size=64, counters=range(64))
            state.update(batch, state.accumulate(batch, 16, lambda counters: {"loss": loss_of(counters)}))

    A training step calls `parallel_model`, whose gradients are averaged over ranks; `ema` is called directly, without
    gradients.

    optimizer: an optimiser, or a function that makes one from the trainable parameters, which a sharded run requires.
    ema_half_life: number of samples after which an old weight's share in the average has halved.
    ema_rampup: limits the half-life to this multiple of the samples seen; None: no limit.  [Karras et al. 2022, EDM]
    grad_clip: bound on the global gradient norm; None: no clipping.
    learning_rate: maps the samples seen before a step to its learning rate, which a parameter group may scale by `lr_factor`.
    execution: how `model` and `ema` are run. Leave a model that will be sharded on the CPU. All ranks must then call the
        models, and every method except `counters`, together.
    averaged_part: name of the submodule whose moving average is kept; by default the whole model.
    several_passes: a step has more than one forward and backward pass, or differentiates twice, as in adversarial training.
        The loop then calls `model`, `optimise` after each pass, and `count` at the end.

    describe: facts for checkpoints, by which they can be used as model files, as JSON can hold them: for "ema", and any other
        part of a checkpoint that is a model by itself, what `ModelFormat.facts_of` returns. Called by the main rank.
    total_steps: of the whole run, which checkpoints record.

    Raises ValueError if the model lacks the blocks that `execution` needs, or if a sharded one comes with a finished
    optimiser, an averaged part or several passes.
    """

    model: nn.Module
    optimizer: Any  # an optimizer or the function that makes it; after construction always an optimizer
    ranks: Ranks
    ema_half_life: float
    ema_rampup: float | None = 0.1
    grad_clip: float | None = 1.0
    learning_rate: Callable[[int], float] | None = None
    execution: Execution = field(default_factory=Execution)
    averaged_part: str = ""
    several_passes: bool = False
    describe: Callable[[], Mapping[str, Any]] | None = None
    total_steps: int | None = None
    samples_seen: int = 0
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    rollbacks_in_a_row: int = 0  # without a finite step in between
    metered_steps: int = 0
    meters: dict[str, Tensor] = field(default_factory=dict)
    _shown: str = field(default="", init=False, repr=False)
    ema: nn.Module = field(init=False)
    parallel_model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        made = isinstance(self.optimizer, torch.optim.Optimizer)
        if made and self.sharded:
            raise ValueError("sharding replaces parameters: pass the function that makes the optimizer from them")
        if self.sharded and (self.several_passes or self.averaged_part):
            raise ValueError("parallel 'fsdp' is not for training in several passes: use 'ddp'")
        # Copied before `prepare`, which wraps and shards each of the two for itself.
        self.ema = copy.deepcopy(self.model.get_submodule(self.averaged_part)).requires_grad_(False).eval()
        prepare(self.model, self.ranks, self.execution)
        prepare(self.ema, self.ranks, replace(self.execution, activation_checkpointing=False, compile=False))
        self.parallel_model = self.model if self.several_passes else distributed(self.model, self.ranks)
        if not made:
            self.optimizer = self.optimizer([p for p in self.model.parameters() if p.requires_grad])

    @property
    def sharded(self) -> bool:
        """Whether weights, average and optimiser state are sharded over ranks."""
        return self.execution.sharded(self.ranks)

    def accumulate(
        self, batch: Batch, micro_batch: int | None, losses: Callable[[range], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Accumulate gradients of the mean "loss" over this rank's part of a batch, at most `micro_batch` samples at a time.

        losses: maps sample counters to their mean "loss" and other scalar means to report.
        Returns those means over the whole part, detached.
        """
        totals: dict[str, Tensor] = {}
        for counters, last in batch.micro_batches(micro_batch):
            # Weighted by size: the last part may be smaller, and the sum must be the mean of the whole batch.
            share = len(counters) / len(batch.counters)
            with gradient_sync(self.parallel_model, last):
                means = losses(counters)
                (means["loss"] * share).backward()
            for name, value in means.items():
                totals[name] = totals.get(name, 0.0) + value.detach() * share
        return totals

    def update(self, batch: Batch, metered: Mapping[str, Tensor]) -> bool:
        """Finish a step: clip, optimise, update the average, count. Returns whether the gradients were finite and so used.

        metered: scalars to log, averaged until the next row.
        """
        norm, finite = self.optimise()
        self.count(batch, {**metered, "grad_norm": norm}, finite)
        return finite

    def optimise(self) -> tuple[Tensor, bool]:
        """Clip the gradients, let the optimiser use them if they are finite, and clear them.

        Returns their global norm before clipping and whether it is finite, both the same on every rank. Parameters without a
        gradient stay unchanged.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.several_passes:
            average_gradients(parameters, self.ranks)
        bound = math.inf if self.grad_clip is None else self.grad_clip
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, bound))
        # The norm is finite only if every gradient is, and equal on all ranks: they use or skip a step together.
        finite = bool(torch.isfinite(norm))
        if finite:
            if self.learning_rate is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate(self.samples_seen) * group.get("lr_factor", 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def count(self, batch: Batch, metered: Mapping[str, Tensor], finite: bool) -> None:
        """Count a step; if all its gradients were `finite`, also update the average and meter its numbers."""
        if finite:
            self._average(batch.size)
            self._meter(metered)
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.rollbacks_in_a_row = 0 if finite else self.rollbacks_in_a_row
        # Those of a skipped step too: replaying them would give the same non-finite gradients.
        self.samples_seen += batch.size
        self.step += 1

    @torch.no_grad()
    def _average(self, batch_size: int) -> None:
        half_life = self.ema_half_life
        # At sample n the average then spans a fixed share of the run so far, so the random start fades like a power of n
        # rather than being remembered for a whole half-life.
        if self.ema_rampup is not None:
            half_life = min(half_life, max(self.samples_seen, 1) * self.ema_rampup)
        decay = 0.5 ** (batch_size / half_life)  # in samples, so that the batch size does not change the average
        part = self.model.get_submodule(self.averaged_part)
        theirs = [local(p.detach()) for p in part.parameters()]
        torch._foreach_lerp_([local(p) for p in self.ema.parameters()], theirs, 1 - decay)
        # Buffers, such as the statistics of a batch norm, are averages already.
        for mine, other in zip(self.ema.buffers(), part.buffers(), strict=True):
            mine.copy_(other)

    def _meter(self, values: Mapping[str, Tensor]) -> None:
        # Sums stay on the device until a row is written: reading a number every step would make the GPU wait.
        for name, value in values.items():
            sums = self.meters.setdefault(name, torch.zeros((), dtype=torch.float64, device=value.device))
            sums += value.detach().double()
        self.metered_steps += 1

    def read_meters(self) -> dict[str, float]:
        """Means over ranks and over the steps since the last reading, without skipped steps; resets the meters."""
        scale = 1 / (max(self.metered_steps, 1) * self.ranks.world_size)
        means = {name: float(self.ranks.sum(value)) * scale for name, value in self.meters.items()}
        self._show(means)
        self.meters, self.metered_steps = {}, 0
        return means

    def is_finite(self) -> bool:
        """Whether weights and their average are free of NaN and infinity; the same answer on every rank."""
        values = [local(p.detach()) for p in (*self.model.parameters(), *self.ema.parameters())]
        return not self.ranks.any(not torch.stack([torch.isfinite(value).all() for value in values]).all())

    def averaged(self) -> dict[str, Tensor]:
        """The averaged model's state dict: unsharded and on the CPU on the main rank, empty on the others.

        It is gathered tensor by tensor, so that no GPU holds a second unsharded model.
        """
        tensors = ((name, whole(value)) for name, value in self.ema.state_dict().items())
        return {name: value.cpu() for name, value in tensors if self.ranks.is_main}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name."""
        out = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        out |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for name, p in self.model.named_parameters():  # by name: positions would depend on how parameters are grouped
            slots = self.optimizer.state.get(p, {})
            out |= {f"optimizer.{slot}.{name}": value for slot, value in slots.items()}
        return out | {f"meter.{name}": value for name, value in self.meters.items()}

    def counters(self) -> dict[str, int]:
        """All counters of a checkpoint, by name."""
        return {name: getattr(self, name) for name in COUNTERS}

    def losses_now(self) -> str:
        """The losses in words, as this rank knows them: means over the steps since the last row, or the ones before it."""
        if self.metered_steps:
            self._show({name: float(value) / self.metered_steps for name, value in self.meters.items()})
        return self._shown

    def _show(self, means: Mapping[str, float]) -> None:
        names = [name for name in means if name.startswith("loss")] or list(means)[:1]
        self._shown = ", ".join(f"{name} {means[name]:.3g}" for name in names)

    def write(self, folder: Path, *, extra: bool) -> None:
        """Write this step's checkpoint: one file, by the main rank, or for a sharded run a folder, by all ranks.

        extra: the checkpoint is not a scheduled one. Raises OSError when the disk refuses.
        """
        path = checkpoint.step_path(folder, self.step, extra=extra, sharded=self.sharded)
        known: dict[str, Any] = {**self.counters()}
        if self.ranks.is_main and self.describe is not None:
            known |= {"total_steps": self.total_steps, "models": dict(self.describe())}
        if self.sharded:
            from triptych_common.storage import sharded  # takes a second to import

            sharded.write(path, self.tensors(), known, self.ranks)
        elif self.ranks.is_main:
            checkpoint.write(path, self.tensors(), known)

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and counters of a checkpoint, for `load`, whatever the layout and number of ranks that wrote it.

        Raises ValueError for a damaged checkpoint.
        """
        if not self.sharded:
            return checkpoint.read(path)
        from triptych_common.storage import sharded

        weights = self.model.state_dict()

        def like(name: str) -> Tensor | None:
            part, rest = name.split(".", 1)
            return weights.get(rest.split(".", 1)[1] if part == "optimizer" else rest)

        return sharded.read_like(path, like, self.ranks)

    def load(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int] | None) -> None:
        """Restore what `read` returned; with counters None, only the weights, their average and the optimiser.

        Raises ValueError when the tensors do not fit this model.
        """
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}, "meter": {}}
        for name, value in tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = value
        for module, part in ((self.model, "model"), (self.ema, "ema")):
            _check_fit(module.state_dict(), parts[part])
            module.load_state_dict(parts[part])
        by_name = dict(self.model.named_parameters())
        everything = [p for group in self.optimizer.param_groups for p in group["params"]]
        position = {id(p): i for i, p in enumerate(everything)}
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            slot, name = key.split(".", 1)
            slots.setdefault(position[id(by_name[name])], {})[slot] = _laid_out_as(by_name[name], value)
        # Groups of this optimiser: learning rates and the like come from this run's settings, not from the file.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})  # it knows which slots go where
        if counters is not None:
            self.meters = {name: value.to(self.ranks.device) for name, value in parts["meter"].items()}
            for name in COUNTERS:
                setattr(self, name, counters[name])


def _laid_out_as(parameter: nn.Parameter, slot: Tensor) -> Tensor:
    """An optimiser slot with the parameter's strides, which fused CPU optimisers assume without checking."""
    if slot.shape != parameter.shape or slot.stride() == parameter.stride():
        return slot
    return torch.empty_like(parameter, dtype=slot.dtype, device=slot.device).copy_(slot)


def _check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{name} is missing")
        if found[name].shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
    if extra := found.keys() - expected.keys():
        raise ValueError(f"{min(extra)} is unexpected")
