"""The parts of a training loop that are easy to get wrong: accumulation, clipping, EMA, NaN policy, exact resume.

There is no trainer class. A package's loop stays a short flat `for`:

    with process_group(config.device) as ranks, open_run(config, ranks, {"data": digest}) as run:
        state = TrainState(model, optimizer, ranks, **config.state_options())
        for batch in training_steps(config, state, run):
            means = state.accumulate(batch, config.micro_batch, lambda counters: {"loss": loss_of(counters)})
            state.update(batch, means)

Randomness is a function of (seed, stream, sample counter), so a checkpoint needs only weights, optimiser and counters.
A resumed run equals the uninterrupted one bit for bit; on several ranks the logged means agree up to rounding.
"""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triptych_common import interrupts
from triptych_common.cli import Diverged, Interrupted, echo
from triptych_common.fields import defaults_of, free_names
from triptych_common.parallel import Ranks
from triptych_common.progress import Progress
from triptych_common.storage import checkpoint
from triptych_common.storage.run import RunDirectory
from triptych_common.throughput import peak_bytes, peak_flops
from triptych_common.training.settings import ExecutionSettings, LoopSettings
from triptych_common.training.state import Batch, TrainState

if TYPE_CHECKING:
    from triptych_common.data.contents import Contents

KEEP = 2  # checkpoints that remain
PATIENCE = 3  # non-finite steps in a row before a rollback
MAX_ROLLBACKS = 3


def open_run(
    config: LoopSettings, ranks: Ranks, facts: Mapping[str, Any] | None = None, *,
    contents: "Mapping[str, Contents] | None" = None, out: Path | None = None,
) -> RunDirectory:  # fmt: skip
    """The run directory of a training run, to be entered with `with`.

    facts: added to the settings' part of the run's identity, such as a digest of the data. contents: as in `RunDirectory`.
    out: by default `config.out`. Settings marked FREE may differ from the run's, and its length, which `training_steps` checks.
    Entering raises ValueError for a folder that holds another run or is in use, OSError for one that cannot be written.
    """
    # A switch of the whole process, unlike the other precisions, which `prepare` applies to a model.
    if isinstance(config, ExecutionSettings) and config.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    # A fact may have the name of a free setting: where the data lie may change, what they are may not.
    free = {*free_names(type(config)), config.length} - (facts or {}).keys()
    return RunDirectory(
        out or config.out, {**config.identity(), **(facts or {})}, contents=contents, free=free,
        defaults=defaults_of(type(config)), is_main=ranks.is_main, device=ranks.device.type, tensorboard=config.tensorboard,
    )  # fmt: skip


def training_steps(
    config: LoopSettings, state: TrainState, run: RunDirectory, *, total_samples: int | None = None,
    title: str = "training", on_step: Callable[[TrainState], None] = lambda state: None,
    flops_per_sample: float | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """Yield one batch of sample counters per optimiser step, from where the run stands to its end.

    It first restores the newest checkpoint and cuts metrics.jsonl back to it. It then writes a checkpoint every
    `config.checkpoint_every` steps and at the end and a metrics row every `config.log_every` steps; on SIGINT or SIGTERM it
    saves and raises `Interrupted`. After three non-finite steps in a row it rolls the weights (never the counters) back to
    the last scheduled checkpoint, or to the one before if that did not help.

    total_samples: by default `config.total_samples`. title: of the progress bar.
    on_step: called after every step, before its checkpoint is written.
    flops_per_sample: of a forward and a backward pass, counting a multiply-add as 2: six times the model's multiply-adds.
        Rows then hold `time/tflops`, summed over ranks, without what activation checkpointing recomputes, and for known
        devices `time/mfu`, the utilisation of all of them (0 to 1).

    A run may be lengthened, also after its end, and shortened to what it has trained on already.
    Raises ValueError if the batch does not divide over the ranks, the checkpoint does not fit or the run is longer than the
    config's, Diverged after three rollbacks.
    """
    ranks, batch_size = state.ranks, config.batch_size
    total = config.total_samples if total_samples is None else total_samples
    if batch_size % ranks.world_size:
        raise ValueError(f"batch_size {batch_size} does not divide over {ranks.world_size} ranks; use a multiple")
    state.total_steps = total_steps = math.ceil(total / batch_size)
    _restore(state, run)
    if state.step > total_steps:
        trained = f"{run.path} has trained on {state.samples_seen:,} already"
        raise ValueError(f"{config.length} {total:,}: {trained}; pass at least as many, or use another --out")
    if total_samples is None:
        _note_length(config, state, run)
    if 0 < state.step < total_steps:
        run.compare_hardware()
    window = time.perf_counter(), state.step
    unit = {"images": "img"}.get(config.unit, config.unit)
    progress = Progress(title, total, unit, enabled=ranks.is_main, note=state.losses_now)
    with progress, _Signals() as signals:
        while state.step < total_steps:
            counters = range(state.samples_seen, state.samples_seen + batch_size)
            yield Batch(state.step, batch_size, ranks.share(counters))
            progress.at(state.samples_seen)
            # Checkpoints that follow a non-finite step must not displace good ones.
            due = state.step % config.checkpoint_every == 0 and state.skipped_in_a_row == 0 and state.is_finite()
            if state.skipped_in_a_row >= PATIENCE:
                _roll_back(state, run)
            if state.step % config.log_every == 0 or state.step == total_steps:
                window = _log(config, state, run, window, flops_per_sample)
            on_step(state)
            # A signal may reach one rank only, and at another moment than the others: all of them stop at the same step.
            stop = ranks.any(signals.received is not None)
            # Saved after logging: the checkpoint holds the emptied meters, so that a resumed run repeats no row.
            if due or stop or state.step == total_steps:
                _save(state, run, extra=not due)
            if stop:
                signum = signals.received or signal.SIGTERM
                raise Interrupted(
                    f"stopped at step {state.step:,} of {total_steps:,}, saved in {run.path}; repeat the command to go on",
                    signum,
                )


def summary(run: RunDirectory, measured: str = "loss") -> dict[str, Any]:
    """The part of a training command's result that concerns metrics: their file, and the last row that has `measured`."""
    rows = [row for row in run.metrics() if measured in row]
    return {"metrics": str(run.metrics_path), "last": rows[-1] if rows else None}


def is_due(samples_seen: int, *, every: int, batch_size: int, total_samples: int) -> bool:
    """Whether the step that ended at `samples_seen` samples reached a multiple of `every`, or the end of the run."""
    before = samples_seen - batch_size
    return before // every != samples_seen // every or samples_seen >= total_samples


def _note_length(config: LoopSettings, state: TrainState, run: RunDirectory) -> None:
    """Where a run goes on with another length, record it, and report what that changes in its schedule."""
    before = run.recorded(config.length)
    if before in (None, config.total_samples):
        return
    run.record(config.length, config.total_samples)
    if state.step == 0:
        return
    changed, learning_rate = "", getattr(config, "learning_rate", None)
    if learning_rate is not None:
        shorter: Any = copy.copy(config)
        object.__setattr__(shorter, config.length, before)  # unchecked: warmup may be longer than that run
        was, becomes = shorter.learning_rate(state.samples_seen), learning_rate(state.samples_seen)
        if was != becomes:
            one = config.unit.removesuffix("s")
            changed = f": the learning rate of {one} {state.samples_seen + 1:,} becomes {becomes:.3g}, was {was:.3g}"
    echo(f"{config.length} is {config.total_samples:,} now, was {before:,}{changed}")


def _restore(state: TrainState, run: RunDirectory) -> None:
    # Every rank looks before any rank writes; otherwise one could mistake the new step-0 file for an old checkpoint.
    newest = state.ranks.gather(next(reversed(checkpoint.steps_in(run.checkpoints)), None))
    if newest[0] is None:
        _save(state, run)  # of step 0, so that there is always one to roll back to
        run.truncate_metrics(-1)
        return
    if any(path != newest[0] for path in newest):
        raise ValueError(f"{run.path}: ranks see different checkpoints in it; all machines must share its file system")
    tensors, counters = state.read(newest[0])
    try:
        state.load(tensors, counters)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{newest[0]}: does not fit this config ({error}); use the run's own config or another --out"
        ) from error
    run.truncate_metrics(state.step)
    if run.is_main:
        checkpoint.prune(run.checkpoints, KEEP)  # what a process left that was killed before it did


def _save(state: TrainState, run: RunDirectory, *, extra: bool = False) -> None:
    if state.ranks.world_size > 1:  # meters differ between ranks: the file keeps their mean, and so does every rank
        state.meters = {name: state.ranks.sum(v) / state.ranks.world_size for name, v in state.meters.items()}
    state.write(run.checkpoints, extra=extra)
    if run.is_main:
        # Rollbacks use scheduled checkpoints, so these must not depend on interruptions either.
        checkpoint.prune(run.checkpoints, KEEP)
    state.ranks.barrier()


def _roll_back(state: TrainState, run: RunDirectory) -> None:
    candidates = checkpoint.scheduled_in(run.checkpoints)
    last_good = candidates[max(-1 - state.rollbacks_in_a_row, -len(candidates))]
    if state.rollbacks >= MAX_ROLLBACKS:
        raise Diverged(
            f"loss not finite for {PATIENCE} steps in a row at step {state.step:,}, after {state.rollbacks} rollbacks "
            f"({state.skipped} steps skipped in all); lower --lr. Went back as far as {last_good}"
        )
    tensors, _ = state.read(last_good)
    state.load(tensors, counters=None)  # the same samples would only lead to the same place
    state.rollbacks += 1
    state.rollbacks_in_a_row += 1
    state.skipped_in_a_row = 0


def _log(
    config: LoopSettings,
    state: TrainState,
    run: RunDirectory,
    window: tuple[float, int],
    flops_per_sample: float | None,
) -> tuple[float, int]:
    """Log a row about the steps since `window`, a time and a step; returns the next window."""
    now, ranks = time.perf_counter(), state.ranks
    seconds = max(now - window[0], 1e-9)  # of a clock that stands still
    means = {name: value for name, value in state.read_meters().items() if math.isfinite(value)}
    rate = (state.step - window[1]) * config.batch_size / seconds
    speed = {"time/seconds": round(seconds, 3), f"time/{config.unit}_per_second": round(rate, 2)}
    if flops_per_sample is not None:
        speed["time/tflops"] = float(f"{rate * flops_per_sample / 1e12:.4g}")
        if (peak := peak_flops(ranks.device, state.execution.precision)) is not None:
            speed["time/mfu"] = float(f"{rate * flops_per_sample / (peak * ranks.world_size):.4g}")
    run.log({
        "step": state.step, config.unit: state.samples_seen, **means, "skipped": state.skipped,
        "rollbacks": state.rollbacks, **speed, "memory/peak_bytes": max(ranks.gather(peak_bytes(ranks.device))),
    })  # fmt: skip
    return now, state.step


class _Signals:
    """Records SIGINT and SIGTERM instead of dying from them.

    A second SIGINT raises KeyboardInterrupt. A second SIGTERM is ignored: a scheduler may send one to every process while
    torchrun forwards another.
    """

    def __init__(self) -> None:
        # One that came before, and that a library which imports what it can in a `try` has lost.
        self.received: int | None = interrupts.received()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: object) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum
