"""What training takes of a machine: memory of a step and time of a sample, measured on a few samples."""

import math
import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from triptych_common.parallel import Ranks, local
from triptych_common.progress import duration
from triptych_common.training.settings import AccumulatingSettings
from triptych_common.training.state import TrainState

MEASURED_SECONDS = 1.0  # a measurement of time lasts about so long
ROOM = 0.8  # share of the memory that a suggested micro-batch may take


def available_bytes(device: torch.device) -> float:
    """Memory of the GPU, or this process's share of the machine's, which a container may bound; infinity if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return math.inf
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).is_file() else ""
        found += [float(text)] if text.isdecimal() else []
    return min(found) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class Memory(TorchDispatchMode):
    """The bytes of tensors that were made within it and are still there, each time that one has been made: `history`."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.history = 0, [0]
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.history.append(self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size


def state_bytes(state: TrainState) -> float:
    """Bytes on this rank of a run's weights and buffers, of their average, and of Adam's two slots for what is trained."""
    tensors = [x for part in (state.model, state.ema) for x in (*part.parameters(), *part.buffers())]
    tensors += 2 * [p for p in state.model.parameters() if p.requires_grad]
    return float(sum(local(tensor.detach()).nbytes for tensor in tensors))


@dataclass(frozen=True)
class StepCost:
    """Of a training step on one rank.

    passes: forwards and backwards over the samples at some counters, without keeping gradients, and how many steps come between
    two times of each. fixed, each: bytes that do not depend on the number of samples, and bytes of a sample, at each moment of a
    step. measured: samples, and seconds that a step took with them. multiple: micro-batches are multiples of it. otherwise: what
    to do if no micro-batch fits.
    """

    passes: Sequence[tuple[Callable[[range], object], int | float]]
    fixed: Float[Tensor, " moments"]
    each: Float[Tensor, " moments"]
    measured: tuple[int, float] = (0, 0.0)
    multiple: int = 1
    otherwise: str = "choose a smaller model"

    @classmethod
    def of(
        cls,
        passes: Sequence[tuple[Callable[[range], object], int | float]],
        states: float,
        few: int = 1,
        multiple: int = 1,
    ) -> "StepCost":
        """Measure passes over few and twice as many samples. states: bytes that are there in any case, such as weights'."""
        histories, seconds = [], _step_seconds(passes, few)  # what is computed once is no part of a step
        for count in (few, 2 * few):
            with Memory() as memory:
                seconds = _step_seconds(passes, count)
            histories.append(torch.tensor(memory.history, dtype=torch.float64))
        one, two = histories
        if len(one) != len(two):  # moments that do not correspond
            one, two = one.max()[None], two.max()[None]
        # More samples make every moment grow by what it has of each, and the peak may come at another moment.
        each = (two - one) / few
        return cls(passes, states + one - few * each, each, (2 * few, seconds), multiple)

    def step_bytes(self, samples: int) -> float:
        """Memory of a step that takes so many samples at once."""
        return float((self.fixed + self.each * samples).max())

    def check(self, config: AccumulatingSettings, ranks: Ranks) -> None:
        """Raises ValueError for a batch whose step needs more memory than there is, with the micro-batch that fits."""
        needed, there = self.step_bytes(at_once(config, ranks)), available_bytes(ranks.device)
        if needed <= there:
            return
        share = max(1, config.batch_size // ranks.world_size)
        divisors = [n for n in range(self.multiple, share, self.multiple) if share % n == 0]
        parts = [n for n in divisors if self.step_bytes(n) <= ROOM * there]
        remedy = f"pass --micro-batch {max(parts)}, which computes the same step in parts" if parts else self.otherwise
        where = "GPU" if ranks.device.type == "cuda" else "machine"
        what = f"a step takes about {needed / 1e9:,.1f} GB, this {where} has {there / 1e9:,.1f}"
        raise ValueError(f"batch_size {config.batch_size}: {what}; {remedy}")

    def estimate(self, config: AccumulatingSettings, ranks: Ranks) -> dict[str, Any]:
        """Memory of a step and duration of the run; what is wrong, for a step that does not fit, as training refuses it."""
        samples = at_once(config, ranks)
        found = {
            "device": str(ranks.device), "gigabytes_of_a_step": float(f"{self.step_bytes(samples) / 1e9:.3g}"),
            "gigabytes_there": round(available_bytes(ranks.device) / 1e9, 1),
        }  # fmt: skip
        try:
            self.check(config, ranks)
        except ValueError as error:  # not raised: the run may be meant for another machine
            return found | {"refused": str(error)}
        if not self.passes:
            return found
        rate = self._samples_per_second(samples) * ranks.world_size
        took = duration(config.total_samples / rate)
        return found | {f"{config.unit}_per_second": float(f"{rate:.3g}"), "time": took}

    def _samples_per_second(self, most: int) -> float:
        samples, seconds = self.measured
        if seconds > 4 * MEASURED_SECONDS:  # beside which what counting took is nothing
            return samples / seconds
        while True:
            seconds = _step_seconds(self.passes, samples)
            if seconds > MEASURED_SECONDS / 4 or samples == most:
                return samples / seconds
            samples = min(most, 4 * samples)


def _step_seconds(passes: Sequence[tuple[Callable[[range], object], int | float]], samples: int) -> float:
    total = 0.0
    for run, steps in passes:
        began = time.perf_counter()
        run(range(samples))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        total += (time.perf_counter() - began) / steps
    return total


def at_once(config: AccumulatingSettings, ranks: Ranks) -> int:
    """Samples of a rank's batch that are computed together."""
    share = max(1, config.batch_size // ranks.world_size)
    return min(config.micro_batch or share, share)
