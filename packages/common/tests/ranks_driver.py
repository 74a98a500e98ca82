"""Tiny training runs on any number of ranks: `torchrun ranks_driver.py OUT JOB...` runs the jobs one after another.

The test beside it imports this file for the same runs on one process.
"""

import functools
import json
import math
import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from triptych_common import randomness
from triptych_common.cli import Interrupted
from triptych_common.parallel import Execution, Ranks, gradient_sync, process_group
from triptych_common.storage import checkpoint, sharded
from triptych_common.storage.run import RunDirectory
from triptych_common.training import TrainState, loop, training_steps
from triptych_common.training.settings import LoopSettings
from triptych_common.transformer import Block

ALONE = Ranks(0, 1, torch.device("cpu"))
STEPS, BATCH = 10, 12


@dataclass(frozen=True)
class Settings(LoopSettings):
    total_images: int = STEPS * BATCH
    batch_size: int = BATCH
    checkpoint_every: int = 4
    log_every: int = 3


class Tiny(nn.Module):
    """A transformer that is awkward to shard: a frozen parameter, a buffer, sizes that ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 6), requires_grad=False)
        self.table = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(Block(6, 2, affine_norm=True) for _ in range(3))
        self.out = nn.Linear(6, 1)
        self.register_buffer("scale", torch.tensor(0.5))
        rng = torch.Generator().manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=rng)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x + self.pos_embed + self.table(y)[:, None]
        for block in self.blocks:
            x = block(x)
        return self.out(x).mean(1)[:, 0] * self.scale


def weight_dtype(execution: Execution) -> torch.dtype:
    return torch.float64 if execution.precision == "float64" else torch.float32


def make_state(ranks: Ranks, execution: Execution, **options) -> TrainState:
    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=0.01, fused=True)

    model = Tiny().to(weight_dtype(execution))
    return TrainState(model, adamw, ranks, ema_half_life=40.0, execution=execution, **options)


def inputs(state: TrainState, counters: range) -> tuple[torch.Tensor, torch.Tensor]:
    x = randomness.normal(0, "x", counters, (5, 6), dtype=weight_dtype(state.execution))
    return x, randomness.shuffled(0, "y", counters, 7)


def run(out, ranks=ALONE, execution=None, *, micro=None, stop_at=(), spoil=(), total=STEPS, **options) -> TrainState:
    """Train to the end or to a signal at a step of `stop_at`; `spoil`: steps whose loss is not a number."""
    state = make_state(ranks, execution or Execution(precision="float64"), **options)
    fastest = patch.object(loop, "peak_flops", lambda device, precision: 1e12)
    with fastest, RunDirectory(out, {"test": 1}, is_main=ranks.is_main) as folder:
        try:
            settings = Settings(total_images=total * BATCH)
            for batch in training_steps(settings, state, folder, flops_per_sample=1e6):
                total_loss = 0.0
                for counters, last in batch.micro_batches(micro):
                    with gradient_sync(state.parallel_model, last):
                        x, y = inputs(state, counters)
                        error = (state.parallel_model(x, y) - x.sum((1, 2)) / 5) ** 2
                        loss = error.sum() / len(batch.counters) * (math.nan if batch.step in spoil else 1)
                        loss.backward()
                    total_loss = total_loss + loss.detach()
                state.update(batch, {"loss": total_loss})
                if state.step in stop_at and ranks.rank == ranks.world_size - 1:  # the signal reaches only one rank
                    os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted:
            return state
    with torch.no_grad():
        predictions = state.ema(*inputs(state, range(4)))
    averaged = state.averaged()
    if ranks.is_main:
        checkpoint.write(out / "averaged.safetensors", {**averaged, "predictions": predictions}, {})
    return state


def resumed(out, ranks, execution, *, then=None, **options) -> None:
    """A run stopped twice, once after a scheduled checkpoint, and then finished, possibly with another execution."""
    for stop_at in ((3,), (6,)):
        run(out, ranks, execution, stop_at=stop_at, **options)
    run(out, ranks, then or execution, **options)


def full_disk(out: Path, ranks: Ranks) -> None:
    state = make_state(ranks, FSDP)
    state.write(out, extra=False)
    state.step += 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        state.write(out, extra=False)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        (out / f"reported-{ranks.rank}.json").write_text(json.dumps(str(error)))


def reshard(out: Path, ranks: Ranks) -> None:
    """Read checkpoints of other ranks, in either layout, and write them again in these ranks' layout."""
    for name in ("fsdp", "ddp"):
        state = make_state(ranks, FSDP)
        state.load(*state.read(checkpoint.steps_in(out / name / "checkpoints")[-1]))
        state.write(out / f"{name}-again", extra=False)


def killed(out: Path, ranks: Ranks) -> None:
    """Rank 1 dies in the middle of writing step 8's shard."""
    real_save, calls = sharded.save_file, []

    def save_half_and_die(tensors, path):
        calls.append(path)
        real_save(tensors, path)
        if ranks.rank == 1 and len(calls) == 3:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    sharded.save_file = save_half_and_die
    run(out, ranks, FSDP)


def precisely(execution: Execution, **options) -> Execution:
    return Execution(**{**execution.__dict__, **options})


DDP = Execution("ddp", "float64")
FSDP = Execution("fsdp", "float64")
SPOILED = (5, 6, 7)
JOBS = {
    "ddp": lambda out, ranks: run(out, ranks, DDP),
    "fsdp": lambda out, ranks: run(out, ranks, FSDP),
    "ddp-resumed": lambda out, ranks: resumed(out, ranks, DDP),
    "fsdp-resumed": lambda out, ranks: resumed(out, ranks, FSDP),
    "ddp-to-fsdp": lambda out, ranks: resumed(out, ranks, DDP, then=FSDP),
    "fsdp-to-ddp": lambda out, ranks: resumed(out, ranks, FSDP, then=DDP),
    "fsdp-parts": lambda out, ranks: run(out, ranks, precisely(FSDP, activation_checkpointing=True), micro=4),
    "ddp-compiled": lambda out, ranks: run(
        out, ranks, precisely(DDP, activation_checkpointing=True, compile=True), micro=4
    ),
    "fsdp-compiled": lambda out, ranks: run(
        out, ranks, precisely(FSDP, activation_checkpointing=True, compile=True), micro=4
    ),
    "ddp-spoiled": lambda out, ranks: run(out, ranks, DDP, spoil=SPOILED),
    "fsdp-spoiled": lambda out, ranks: run(out, ranks, FSDP, spoil=SPOILED),
    "ddp-bf16": lambda out, ranks: run(out, ranks, Execution("ddp", "bf16")),
    "fsdp-bf16": lambda out, ranks: run(out, ranks, Execution("fsdp", "bf16")),
    "fsdp-bf16-resumed": lambda out, ranks: resumed(out, ranks, Execution("fsdp", "bf16")),
    "full-disk": full_disk,
    "killed": killed,
    "resumed-on-these": lambda out, ranks: run(out.parent / "killed", ranks, FSDP),
    "reshard": lambda out, ranks: reshard(out.parent, ranks),
}

if __name__ == "__main__":
    torch.compile = functools.partial(torch.compile, backend="eager")  # the test is about the nesting, not the compiler
    with process_group("cpu") as ranks:
        for job in sys.argv[2:]:
            JOBS[job](Path(sys.argv[1]) / job, ranks)
            ranks.barrier()
