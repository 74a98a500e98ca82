"""One process or many: torchrun set-up, replicas or shards, precision and memory, applied from outside the models.

Nothing here changes the names in a model's state dict, and a model file knows nothing of it.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from triptych_common.fields import Checked, OneOf

# The backends' own limits, 10 and 30 minutes, are for steps of training; one rank may prepare something alone for longer while
# the others wait at a barrier: statistics of a million samples, a descriptor, a reference set.
LONGEST_WAIT = timedelta(hours=6)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


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

    def gather(self, item: Any) -> list[Any]:
        """A small object of every rank, on every rank."""
        items = [item] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def share(self, items: range) -> range:
        """This rank's contiguous part of a range that is divisible by the number of ranks."""
        size = len(items) // self.world_size
        return items[self.rank * size : (self.rank + 1) * size]


def onto(device: torch.device, value: Tensor) -> Tensor:
    """A CPU tensor on a device; on its way to a GPU the CPU does not wait for it."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


@contextmanager
def process_group(device: str = "auto") -> Iterator[Ranks]:
    """Join the process group that torchrun announced, on one machine or several, or stand alone.

    device: "auto" is the GPU of this local rank where there is one, else the CPU.
    Raises ValueError for a device this machine lacks, or too few for its ranks.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if world_size == 1:
        yield Ranks(0, 1, chosen)
        return
    if chosen.type == "cuda":  # bound to its GPU: NCCL would otherwise guess it from the global rank
        dist.init_process_group("nccl", device_id=chosen, timeout=LONGEST_WAIT)
    else:
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield Ranks(dist.get_rank(), world_size, chosen)
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int, local_ranks: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        if chosen.type == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError
            if chosen.index is not None and local_ranks > 1:
                raise ValueError(f"device {name!r}: one GPU for {local_ranks} ranks; use --device cuda")
            if chosen.index is None and local_ranks > torch.cuda.device_count():
                raise ValueError(
                    f"{local_ranks} ranks on a machine with {torch.cuda.device_count()} GPUs; "
                    f"start torchrun with --nproc-per-node={torch.cuda.device_count()}, or use --device cpu"
                )
            if chosen.index is None:
                chosen = torch.device("cuda", local_rank)
            torch.cuda.set_device(chosen)
        else:
            torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r}: not available here; use --device cpu, or auto") from error
    return chosen


@dataclass(frozen=True)
class Execution(Checked):
    """How a model is run: of its results this changes the rounding, and nothing else.

    parallel: over several ranks, "ddp" keeps a whole replica on each, "fsdp" a share of every weight, average and
        optimiser slot (FSDP2; each block is gathered while it works). One process is whole either way.
    precision: "float32" and "float64" are those of the weights as they come (in `weight_dtype`); "bf16" is autocast over
        float32 weights, average, optimiser and gradient reduction. Under "fsdp" the blocks' weights then also travel as bfloat16.
    activation_checkpointing: keep only the inputs of each block and compute its inside again in the backward pass.
    compile: `torch.compile` each block.
    blocks: names of the submodules that are one unit each; a ModuleList stands for its members.

    Raises ValueError for an unknown choice.
    """

    parallel: Annotated[str, OneOf(("ddp", "fsdp"))] = "ddp"
    precision: Annotated[str, OneOf(("float32", "bf16", "float64"))] = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    blocks: tuple[str, ...] = ("blocks",)

    @property
    def weight_dtype(self) -> torch.dtype:
        """What a model's weights must be before `prepare`."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def sharded(self, ranks: Ranks) -> bool:
        return self.parallel == "fsdp" and ranks.world_size > 1


def prepare(model: nn.Module, ranks: Ranks, execution: Execution) -> None:
    """Make `model` run as `execution` says, in place: on its device, in its precision, sharded where asked.

    Every rank must hold the same weights. A model to be sharded had better still be on the CPU: one block at a time
    moves to the GPU and leaves this rank's share there. Sharding makes new parameters: build the optimiser afterwards.

    Raises ValueError where the model lacks the blocks.
    """
    asks_for_blocks = execution.compile or execution.activation_checkpointing or execution.sharded(ranks)
    blocks = _blocks_of(model, execution.blocks) if asks_for_blocks else []
    _wrap_forward(blocks, lambda forward: _block_forward(forward, execution))
    if execution.precision == "bf16":
        _wrap_forward([model], lambda forward: _autocast_forward(forward, ranks.device.type))
    if execution.sharded(ranks):
        _shard(model, blocks, ranks, execution)
    else:
        model.to(ranks.device)


def _blocks_of(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for name in names:
        try:
            found = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"{type(model).__name__} has no submodule {name!r}: name its blocks") from error
        blocks += found if isinstance(found, nn.ModuleList) else [found]
    return blocks


def _wrap_forward(modules: list[nn.Module], wrap: Callable[[Callable], Callable]) -> None:
    """Replace the forward of modules by way of a subclass: unlike an attribute it survives deepcopy."""
    subclasses: dict[type, type] = {}  # one a class, so that all blocks share what is compiled
    for module in modules:
        base = type(module)
        if base not in subclasses:
            subclasses[base] = type(base.__name__, (base,), {"forward": wrap(base.forward)})
        module.__class__ = subclasses[base]


def _block_forward(forward: Callable, execution: Execution) -> Callable:
    if execution.compile:
        forward = torch.compile(forward, dynamic=False)
    if not execution.activation_checkpointing:
        return forward
    # Around what is compiled, not inside: DDP's graph splitter refuses the latter.
    return lambda self, *inputs, **options: recomputed(forward, self, *inputs, use_reentrant=False, **options)


def _autocast_forward(forward: Callable, device_type: str) -> Callable:
    def in_bfloat16(self: nn.Module, *inputs: Any, **options: Any) -> Tensor:
        with torch.autocast(device_type, torch.bfloat16):
            return forward(self, *inputs, **options).float()

    return in_bfloat16


def _shard(model: nn.Module, blocks: list[nn.Module], ranks: Ranks, execution: Execution) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Activations are autocast's affair, as in a replica, and what it computes in float32 keeps float32 weights: norms, and
    # what is outside of blocks.
    as_they_are = MixedPrecisionPolicy(cast_forward_inputs=False)
    in_bfloat16 = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixed = execution.precision == "bf16"
    norms = [m for m in model.modules() if isinstance(m, _NORMS) and next(m.parameters(), None) is not None]
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    # The root is resharded after the forward pass too, which is not the default: outside of passes parameters are then
    # always the shards, even after an evaluation without a backward pass.
    shard = functools.partial(fully_shard, mesh=mesh, reshard_after_forward=True)
    for norm in norms if mixed else ():
        shard(norm, mp_policy=as_they_are)
    for block in blocks:
        shard(block, mp_policy=in_bfloat16 if mixed else as_they_are)
    shard(model, mp_policy=as_they_are)


def distributed(model: nn.Module, ranks: Ranks) -> nn.Module:
    """`model` with gradients averaged over ranks; the model itself where there is one rank, or where it is sharded.

    State dicts come from the inner model, never from what this returns.
    """
    if ranks.world_size == 1 or _is_sharded(model):
        return model
    return DistributedDataParallel(model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None)


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager:
    """Context of one forward and backward pass: gradients are averaged over ranks in the last of several only."""
    if _is_sharded(model):
        sharded: Any = model
        # whole gradients are kept until the last pass: as much memory as a replica takes
        sharded.set_requires_gradient_sync(enabled)
        return nullcontext()
    if enabled or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def average_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Replace gradients by their mean over ranks, in one exchange; for passes that no wrapper of the model has seen."""
    if ranks.world_size > 1 and parameters:
        gradients = [p.grad for p in parameters if p.grad is not None]
        mean = ranks.sum(torch.cat([g.flatten() for g in gradients])) / ranks.world_size
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, or the whole of one that is not sharded. Shares memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is sharded; every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")  # by name: importing FSDP takes a second
