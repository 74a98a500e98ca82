"""Running a model on one process or many: torchrun set-up, replicas or shards, precision, activation checkpointing.

All of it is applied to models from outside: names in their state dicts and model files do not change.
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

# The backends' defaults of 10 and 30 minutes suit training steps. Here one rank may prepare something for longer while the
# others wait at a barrier: statistics of a million samples, a descriptor, a reference set.
LONGEST_WAIT = timedelta(hours=6)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Ranks:
    """This process's place in the process group, and its device. With one process, every method is local."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over ranks, on every rank; the argument does not change."""
        if self.world_size > 1:
            tensor = tensor.to(self.device, copy=True)
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set; the same answer on every rank."""
        return (self.world_size > 1 and bool(self.sum(torch.tensor(float(flag))) > 0)) or flag

    def gather(self, item: Any) -> list[Any]:
        """The (small, picklable) items of all ranks, in order, on every rank."""
        items = [item] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.world_size > 1:
            dist.barrier()

    def share(self, items: range) -> range:
        """This rank's contiguous part of a range whose length is a multiple of the number of ranks."""
        size = len(items) // self.world_size
        return items[self.rank * size : (self.rank + 1) * size]


def onto(device: torch.device, value: Tensor) -> Tensor:
    """Move a CPU tensor to a device; the CPU does not wait for a copy to a GPU."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


@contextmanager
def process_group(device: str = "auto") -> Iterator[Ranks]:
    """Join torchrun's process group, on one machine or several; without torchrun, yield a single rank.

    device: a torch device; "auto" is the GPU of this local rank if there is one, else the CPU.
    Raises ValueError for a device that this machine lacks, or fewer GPUs than ranks on it.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if world_size == 1:
        yield Ranks(0, 1, chosen)
        return
    on_gpu = chosen.type == "cuda"  # without device_id NCCL would guess the GPU from the global rank
    backend, device_id = ("nccl", chosen) if on_gpu else ("gloo", None)
    dist.init_process_group(backend, device_id=device_id, timeout=LONGEST_WAIT)
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
    """How a model is run; its results do not depend on this, up to rounding.

    parallel: over several ranks, "ddp" keeps a replica on each, "fsdp" a shard of every weight, average and optimiser
        slot (FSDP2, which gathers each block while it computes). With one process they are the same.
    precision: "float32" and "float64" compute in the weights' own type; "bf16" is autocast with weights, average, optimiser
        and gradient reduction in float32. Under "fsdp" blocks are then also gathered in bfloat16.
    activation_checkpointing: keep only the inputs of each block, and recompute its activations in the backward pass.
    compile: `torch.compile` each block.
    blocks: names of the submodules that are one block each; a ModuleList stands for its members.
    """

    parallel: Annotated[str, OneOf(("ddp", "fsdp"))] = "ddp"
    precision: Annotated[str, OneOf(("float32", "bf16", "float64"))] = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    blocks: tuple[str, ...] = ("blocks",)

    def sharded(self, ranks: Ranks) -> bool:
        """Whether weights are sharded: "fsdp" on more than one rank."""
        return self.parallel == "fsdp" and ranks.world_size > 1


def prepare(model: nn.Module, ranks: Ranks, execution: Execution) -> None:
    """Make `model` run as `execution` specifies, in place: move it to the rank's device, wrap its blocks, shard it.

    Every rank must hold the same weights. Leave a model that will be sharded on the CPU, so that one block at a time moves
    to the GPU, where only this rank's shard remains. Sharding makes new parameters: build the optimiser afterwards.

    Raises ValueError if the model lacks the blocks.
    """
    needs_blocks = execution.compile or execution.activation_checkpointing or execution.sharded(ranks)
    blocks = _blocks_of(model, execution.blocks) if needs_blocks else []
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
    """Replace the modules' forward methods by subclassing, which, unlike setting an attribute, survives deepcopy."""
    subclasses: dict[type, type] = {}  # one per class, so that all blocks share their compiled code
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
    # Checkpointing wraps the compiled function: DDP's graph splitter rejects it inside.
    return lambda self, *inputs, **options: recomputed(forward, self, *inputs, use_reentrant=False, **options)


def _autocast_forward(forward: Callable, device_type: str) -> Callable:
    def in_bfloat16(self: nn.Module, *inputs: Any, **options: Any) -> Tensor:
        with torch.autocast(device_type, torch.bfloat16):
            return forward(self, *inputs, **options).float()

    return in_bfloat16


def _shard(model: nn.Module, blocks: list[nn.Module], ranks: Ranks, execution: Execution) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Autocast casts activations, as in a replica. What it computes in float32 keeps float32 weights: norms, and everything
    # outside of blocks.
    as_they_are = MixedPrecisionPolicy(cast_forward_inputs=False)
    in_bfloat16 = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixed = execution.precision == "bf16"
    norms = [m for m in model.modules() if isinstance(m, _NORMS) and next(m.parameters(), None) is not None]
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    # By default the root is not resharded after the forward pass. Here it is, so that outside of passes parameters are always
    # shards, even after an evaluation without a backward pass.
    shard = functools.partial(fully_shard, mesh=mesh, reshard_after_forward=True)
    for norm in norms if mixed else ():
        shard(norm, mp_policy=as_they_are)
    for block in blocks:
        shard(block, mp_policy=in_bfloat16 if mixed else as_they_are)
    shard(model, mp_policy=as_they_are)


def distributed(model: nn.Module, ranks: Ranks) -> nn.Module:
    """`model` wrapped so that gradients are averaged over ranks; the model itself if there is one rank or it is sharded.

    Take state dicts from `model`, not from the wrapper, which adds a prefix to names.
    """
    if ranks.world_size == 1 or _is_sharded(model):
        return model
    return DistributedDataParallel(model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None)


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager:
    """Context of a forward and backward pass in which gradients are averaged over ranks only if `enabled`.

    When gradients accumulate over several passes, only the last needs it.
    """
    if _is_sharded(model):
        sharded: Any = model
        # until the last pass every rank keeps unsharded gradients: as much memory as in a replica
        sharded.set_requires_gradient_sync(enabled)
        return nullcontext()
    if enabled or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def average_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Replace gradients by their mean over ranks, in one exchange: for models that `distributed` does not wrap."""
    if ranks.world_size > 1 and parameters:
        gradients = [p.grad for p in parameters if p.grad is not None]
        mean = ranks.sum(torch.cat([g.flatten() for g in gradients])) / ranks.world_size
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor itself if it is not sharded; shares its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if it is sharded; every rank must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")  # by name: importing FSDP takes a second
