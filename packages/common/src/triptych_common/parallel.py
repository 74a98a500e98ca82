"""One process or many: torchrun set-up and distributed data parallelism, applied from outside the models."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, on every rank."""
        if self.world_size > 1:
            tensor = tensor.to(self.device, copy=True)
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set, the same answer on every rank."""
        return (self.world_size > 1 and bool(self.sum(torch.tensor(float(flag))) > 0)) or flag

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def share(self, items: range) -> range:
        """This rank's contiguous part of a range that is divisible by the number of ranks."""
        size = len(items) // self.world_size
        return items[self.rank * size : (self.rank + 1) * size]


@contextmanager
def ranks(device: str = "auto") -> Iterator[Ranks]:
    """Join the process group that torchrun announced, or stand alone.

    device: "auto" is the GPU of this local rank where there is one, else the CPU.
    Raises ValueError for a device this machine lacks.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if world_size == 1:
        yield Ranks(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world_size, chosen)
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        if chosen.type == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError
            if chosen.index is None:
                chosen = torch.device("cuda", local_rank)
            torch.cuda.set_device(chosen)
        else:
            torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r}: not available here; use --device cpu, or auto") from error
    return chosen


def distributed(model: nn.Module, among: Ranks) -> nn.Module:
    """`model` with gradients averaged over ranks; the model itself where there is one rank.

    State dicts come from the inner model, never from what this returns.
    """
    if among.world_size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[among.device] if among.device.type == "cuda" else None)


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager:
    """Context of one forward and backward pass: gradients are averaged over ranks in the last of several only."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
