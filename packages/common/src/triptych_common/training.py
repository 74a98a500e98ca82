"""What a training loop needs and is easily got wrong: accumulation, clipping, EMA, NaN policy, exact resume.

There is no trainer. A package's loop stays a short flat `for`:

    for batch in steps(state, run, among, total_images=..., batch_size=..., ...):
        for counters, last in batch.micro_batches(size):
            state.backward(loss_of(counters) * len(counters) / len(batch.counters), sync=last)
        state.update(batch, {"loss": ...})

Randomness comes from (seed, stream, sample counter), so a checkpoint is weights, optimiser and counters.
"""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from triptych_common import checkpoint
from triptych_common.errors import Diverged, Interrupted
from triptych_common.parallel import Ranks, distributed, gradient_sync
from triptych_common.run import RunDirectory

COUNTERS = ("samples_seen", "step", "skipped", "skipped_in_a_row", "rollbacks", "metered_steps")


@dataclass(frozen=True)
class Batch:
    """One optimiser step's worth of sample counters: `size` over all ranks, `counters` on this one."""

    step: int
    size: int
    counters: range

    def micro_batches(self, micro_batch: int | None = None) -> Iterator[tuple[range, bool]]:
        """Counters in parts of at most `micro_batch`, and whether a part is the last."""
        size = micro_batch or len(self.counters)
        for start in range(0, len(self.counters), size):
            yield self.counters[start : start + size], start + size >= len(self.counters)


@dataclass
class TrainState:
    """A model in training: weights, their exponential moving average, optimiser and counters.

    ema_half_life: samples after which an old weight's share in the average has halved; while fewer than
        half-life / ema_rampup samples have been seen, the half-life is ema_rampup times those seen, so that the average
        forgets its random start at any length of run.  [Karras et al. 2024, EDM; rampup None: constant]
    grad_clip: bound on the global gradient norm; None: none.
    learning_rate: of the samples seen before a step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    among: Ranks
    ema_half_life: float
    ema_rampup: float | None = 0.1
    grad_clip: float | None = 1.0
    learning_rate: Callable[[int], float] | None = None
    samples_seen: int = 0
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    metered_steps: int = 0
    meters: dict[str, Tensor] = field(default_factory=dict)
    ema: nn.Module = field(init=False)
    parallel_model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.parallel_model = distributed(self.model, self.among)

    def backward(self, loss: Tensor, *, sync: bool = True) -> None:
        """Accumulate the gradient of this rank's loss, averaging over ranks in the last part of a batch only."""
        with gradient_sync(self.parallel_model, sync):
            loss.backward()

    def update(self, batch: Batch, metered: Mapping[str, Tensor]) -> bool:
        """Finish a step: clip, optimise, average, count; True if weights moved.

        Non-finite gradients (the same on every rank, being averages) are thrown away and counted, and the samples that
        made them stay counted as seen: a replay would make them again.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.grad_clip or math.inf)
        finite = bool(torch.isfinite(norm))
        if finite:
            if self.learning_rate is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate(self.samples_seen)
            self.optimizer.step()
            self._average(batch.size)
            self._meter({**metered, "grad_norm": norm})
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.samples_seen += batch.size
        self.step += 1
        return finite

    @torch.no_grad()
    def _average(self, batch_size: int) -> None:
        half_life = self.ema_half_life
        if self.ema_rampup is not None:
            half_life = min(half_life, max(self.samples_seen, 1) * self.ema_rampup)
        decay = 0.5 ** (batch_size / half_life)
        theirs = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.ema.parameters()), theirs, 1 - decay)
        for mine, other in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            mine.copy_(other)

    def _meter(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            sums = self.meters.setdefault(name, torch.zeros((), dtype=torch.float64, device=value.device))
            sums += value.detach().double()
        self.metered_steps += 1

    def read_meters(self) -> dict[str, float]:
        """Means over ranks and over the steps since the last reading, skipped steps aside."""
        scale = 1 / (max(self.metered_steps, 1) * self.among.world_size)
        means = {name: float(self.among.sum(value)) * scale for name, value in self.meters.items()}
        self.meters, self.metered_steps = {}, 0
        return means

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds as tensors, by name."""
        out = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        out |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for name, slots in self._optimizer_slots().items():
            out |= {f"optimizer.{slot}.{name}": value for slot, value in slots.items()}
        return out | {f"meter.{name}": value for name, value in self.meters.items()}

    def counters(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in COUNTERS}

    def load(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int] | None) -> None:
        """Restore what `tensors` and `counters` saved; without counters only weights, average and optimiser.

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
        self.optimizer.state.clear()
        for key, value in parts["optimizer"].items():
            slot, name = key.split(".", 1)
            target = by_name[name]
            scalar = value.ndim == 0 and target.ndim != 0  # the step count, which AdamW keeps on the CPU
            self.optimizer.state[target][slot] = value if scalar else value.to(target.device)
        if counters is not None:
            self.meters = {name: value.to(self.among.device) for name, value in parts["meter"].items()}
            for name in COUNTERS:
                setattr(self, name, counters[name])

    def _optimizer_slots(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: dict(self.optimizer.state[p])
            for name, p in self.model.named_parameters()
            if p in self.optimizer.state
        }


def steps(
    state: TrainState,
    run: RunDirectory,
    *,
    total_samples: int,
    batch_size: int,
    checkpoint_every: int,
    log_every: int,
    keep: int = 2,
    on_step: Callable[[TrainState], None] = lambda state: None,
    patience: int = 3,
    max_rollbacks: int = 3,
) -> Iterator[Batch]:
    """Batches of sample counters from wherever the run stands to its end.

    Owns what surrounds a step: restores the newest checkpoint and cuts metrics.jsonl back to it, writes a checkpoint
    every `checkpoint_every` steps and at the end, a metrics row every `log_every`, saves and raises `Interrupted` on
    SIGINT or SIGTERM, and after `patience` non-finite steps in a row rolls weights (never counters) back to the last
    checkpoint. `on_step` is called after every step, before its checkpoint.

    Raises ValueError where sizes or checkpoint do not fit, Diverged after `max_rollbacks`.
    """
    among = state.among
    if batch_size % among.world_size:
        raise ValueError(f"batch_size {batch_size} does not divide over {among.world_size} ranks; use a multiple")
    _restore(state, run, keep)
    total_steps = math.ceil(total_samples / batch_size)
    window = time.perf_counter(), state.step
    with _Signals() as signals:
        while state.step < total_steps:
            counters = range(state.samples_seen, state.samples_seen + batch_size)
            yield Batch(state.step, batch_size, among.share(counters))
            healthy = state.skipped_in_a_row == 0  # what follows a bad step must not push good checkpoints out
            if state.skipped_in_a_row >= patience:
                _roll_back(state, run, patience, max_rollbacks)
            if state.step % log_every == 0 or state.step == total_steps:
                window = _log(state, run, batch_size, window)
            on_step(state)
            stop = among.any(signals.received is not None)
            if stop or state.step == total_steps or (healthy and state.step % checkpoint_every == 0):
                _save(state, run, keep)
            if stop:
                signum = signals.received or signal.SIGTERM
                raise Interrupted(
                    f"stopped at step {state.step:,} of {total_steps:,}, saved in {run.path}; repeat the command to go on",
                    signum,
                )


def _restore(state: TrainState, run: RunDirectory, keep: int) -> None:
    # The main rank decides, so that no rank takes the step-0 file another has just written for an old one.
    if not state.among.any(state.among.is_main and bool(checkpoint.steps_in(run.checkpoints))):
        _save(state, run, keep)
        run.truncate_metrics(-1)
        return
    paths = checkpoint.steps_in(run.checkpoints)
    tensors, counters = checkpoint.read(paths[-1])
    try:
        state.load(tensors, counters)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{paths[-1]}: does not fit this config ({error}); use the run's own config or another --out"
        ) from error
    run.truncate_metrics(state.step)


def _save(state: TrainState, run: RunDirectory, keep: int) -> None:
    if state.among.world_size > 1:  # meters differ by rank: keep their mean in the file, on every rank alike
        state.meters = {name: state.among.sum(v) / state.among.world_size for name, v in state.meters.items()}
    if run.is_main:
        checkpoint.write(checkpoint.step_path(run.checkpoints, state.step), state.tensors(), state.counters())
        checkpoint.prune(run.checkpoints, keep)
    state.among.barrier()


def _roll_back(state: TrainState, run: RunDirectory, patience: int, max_rollbacks: int) -> None:
    last_good = checkpoint.steps_in(run.checkpoints)[-1]
    if state.rollbacks >= max_rollbacks:
        raise Diverged(
            f"loss not finite for {patience} steps in a row at step {state.step:,}, after {state.rollbacks} rollbacks "
            f"({state.skipped} steps skipped in all); lower --lr. Last good checkpoint: {last_good}"
        )
    tensors, _ = checkpoint.read(last_good)
    state.load(tensors, counters=None)
    state.rollbacks += 1
    state.skipped_in_a_row = 0


def _log(state: TrainState, run: RunDirectory, batch_size: int, window: tuple[float, int]) -> tuple[float, int]:
    now = time.perf_counter()
    seconds = now - window[0]
    means = {name: value for name, value in state.read_meters().items() if math.isfinite(value)}
    run.log(
        {
            "step": state.step,
            "images": state.samples_seen,
            **means,
            "skipped": state.skipped,
            "rollbacks": state.rollbacks,
            "time/seconds": round(seconds, 3),
            "time/images_per_second": round((state.step - window[1]) * batch_size / seconds, 2),
        }
    )
    return now, state.step


def _check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{name} is missing")
        if found[name].shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
    if extra := found.keys() - expected.keys():
        raise ValueError(f"{min(extra)} is unexpected")


class _Signals:
    """Remembers SIGINT and SIGTERM instead of dying by them; a second one takes the usual way."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: object) -> None:
        self.received = signum
        self.__exit__()
