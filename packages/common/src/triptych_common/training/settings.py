"""Settings that training loops share. A package's own settings class derives from the one that fits its loop."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from triptych_common import fields
from triptych_common.cli import CommonOptions
from triptych_common.fields import FREE, Ge, Gt, Interval

if TYPE_CHECKING:
    import torch

    from triptych_common.parallel import Execution


@dataclass(frozen=True)
class LoopSettings(CommonOptions):
    """Settings of every training loop. A subclass declares `total_images`, or the total of whatever `unit` it counts in:

        @dataclass(frozen=True)
        class Settings(LoopSettings):
            total_images: Annotated[int, Gt(0)] = 60_000
            lr: float = 3e-4

    Raises ValueError, naming field, value and expectation, for a value that violates a constraint.
    """

    unit: ClassVar[str] = "images"  # what the loop counts; fields named after it: total_, warmup_, ema_half_life_

    batch_size: Annotated[int, Gt(0)] = 64
    """images per optimiser step, over all ranks"""
    lr: Annotated[float, Gt(0)] = 1e-3
    """peak learning rate"""
    log_every: Annotated[int, Gt(0)] = 50
    """steps between rows of metrics.jsonl"""
    checkpoint_every: Annotated[int, Gt(0)] = 500
    """steps between checkpoints"""
    tensorboard: Annotated[bool, FREE] = False
    """write TensorBoard events too (extra: tensorboard)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Not an annotation, as the bound is another field.
        name = f"warmup_{self.unit}"
        if not 0 <= getattr(self, name, 0) <= self.total_samples:
            raise ValueError(f"{name} {getattr(self, name)}: expected 0..{self.total_samples} (total_{self.unit})")

    def identity(self) -> dict[str, Any]:
        """The settings that decide a run's results: every field that is not marked `FREE`."""
        return fields.identity(self)

    @property
    def total_samples(self) -> int:
        """Number of samples to train on, counting repeats, in `unit`s."""
        return getattr(self, f"total_{self.unit}")

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints: the settings, and the number of optimiser steps."""
        return super().resolved() | {"steps": math.ceil(self.total_samples / self.batch_size)}


@dataclass(frozen=True)
class AccumulatingSettings(LoopSettings):
    """Settings of a loop that can compute a batch in parts."""

    micro_batch: Annotated[int | None, Ge(1), FREE] = None
    """images per backward pass and rank; smaller saves memory and accumulates gradients"""


@dataclass(frozen=True)
class AdamWSettings(AccumulatingSettings):
    """Settings of a loop over one model with AdamW, gradient clipping and an average of the weights.

    Subclasses declare `ema_half_life_images` and `warmup_images`, or the like for another `unit`.
    """

    adam_beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.999
    """AdamW's second decay rate"""
    grad_clip: Annotated[float | None, Gt(0)] = None
    """bound on the gradient's norm"""
    ema_rampup: Annotated[float | None, Gt(0)] = None
    """limit the half-life to this multiple of the images seen so far"""

    def learning_rate(self, samples_seen: int) -> float:
        """Learning rate of the step that starts after `samples_seen` samples: linear warmup, then constant."""
        warmup = getattr(self, f"warmup_{self.unit}")
        # Counted to the end of this step, so that the first one does not have a learning rate of 0.
        return self.lr * (min(1.0, (samples_seen + self.batch_size) / warmup) if warmup else 1.0)

    def state_options(self) -> dict[str, Any]:
        """Keyword arguments for `TrainState`."""
        return {
            "ema_half_life": getattr(self, f"ema_half_life_{self.unit}"),
            "ema_rampup": self.ema_rampup,
            "grad_clip": self.grad_clip,
            "learning_rate": self.learning_rate,
        }


@dataclass(frozen=True)
class WeightPrecision:
    """Settings with a choice between weights in single and double precision."""

    precision: Literal["float32", "float64"] = "float32"
    """type of weights"""

    @property
    def dtype(self) -> "torch.dtype":
        """Type of the weights."""
        import torch

        return torch.float64 if self.precision == "float64" else torch.float32


@dataclass(frozen=True)
class ExecutionSettings(WeightPrecision):
    """Settings of how a network of blocks is run: see `triptych_common.parallel.Execution`."""

    precision: Literal["float32", "tf32", "bf16", "float64"] = "float32"  # type: ignore[assignment]
    """arithmetic of the network; tf32 rounds the inputs of a GPU's float32 products, bf16 keeps weights, average and loss
    in float32"""
    parallel: Annotated[Literal["ddp", "fsdp"], FREE] = "ddp"
    """under torchrun: a whole model on every rank, or sharded weights, average and optimiser (FSDP2)"""
    activation_checkpointing: Annotated[bool, FREE] = False
    """recompute each block in the backward pass: less memory, a third more arithmetic"""
    compile_blocks: Annotated[bool, FREE] = False
    """torch.compile each block: pays on a GPU or in runs of an hour"""

    @property
    def arithmetic(self) -> str:
        """`precision` as `Execution` takes it: tf32 is a way of computing float32."""
        return "float32" if self.precision == "tf32" else self.precision

    @property
    def execution(self) -> "Execution":
        """The `Execution` that `TrainState` takes."""
        from triptych_common.parallel import Execution

        return Execution(self.parallel, self.arithmetic, self.activation_checkpointing, self.compile_blocks)


@dataclass(frozen=True)
class TransformerSettings(AdamWSettings, ExecutionSettings):
    """Settings of a loop over a transformer: AdamW, and every way of running its blocks."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """AdamW's weight decay"""

    def state_options(self) -> dict[str, Any]:
        """Keyword arguments for `TrainState`."""
        return super().state_options() | {"execution": self.execution}
