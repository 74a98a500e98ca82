"""Settings that training loops share. A package's own settings class derives from the one that fits its loop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from triptych_common import fields
from triptych_common.cli import CommonOptions, echo, option
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
    scaled: ClassVar[tuple[str, ...]] = ()  # further fields that count it, which `to_length` scales

    batch_size: Annotated[int, Gt(0)] = 64
    """images per optimiser step, over all ranks"""
    lr: Annotated[float, Gt(0)] = 1e-3
    """peak learning rate"""
    log_every: Annotated[int, Gt(0), FREE] = 50
    """steps between rows of metrics.jsonl"""
    checkpoint_every: Annotated[int, Gt(0), FREE] = 500
    """steps between checkpoints"""
    tensorboard: Annotated[bool, FREE] = False
    """write TensorBoard events too (extra: tensorboard)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Not an annotation, as the bound is another field.
        name = f"warmup_{self.unit}"
        if not 0 <= getattr(self, name, 0) <= self.total_samples:
            raise ValueError(f"{name} {getattr(self, name)}: expected 0..{self.total_samples} ({self.length})")

    def identity(self) -> dict[str, Any]:
        """The settings that decide a run's results: every field that is not marked `FREE`."""
        return fields.identity(self)

    @property
    def length(self) -> str:
        """The name of the field `total_samples`, which may grow when a run goes on."""
        return f"total_{self.unit}"

    @property
    def total_samples(self) -> int:
        """Number of samples to train on, counting repeats, in `unit`s."""
        return getattr(self, self.length)

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints: the settings, and the number of optimiser steps."""
        return super().resolved() | {"steps": math.ceil(self.total_samples / self.batch_size)}


Settings = TypeVar("Settings", bound=LoopSettings)
_LEAST_STEPS = 20  # between checkpoints of a shortened run: below, its previews would take a tenth of the time


def to_length(preset: Settings, argv: Sequence[str], scaled: Sequence[str] | None = None) -> Settings:
    """A preset at the length that a command line asks for, its warmup and the fields in `scaled` with it: for `Command.start`.

    A shorter run has as many checkpoints as the preset, and so previews, if that leaves some steps between them.

    A run that is there already goes on with its own; what is typed holds in any case, as it overrides this. scaled: in place of
    the preset's own.
    """
    typed, _ = option(argv, preset.length.replace("_", "-"))
    try:
        total = preset.total_samples if typed is None else int(typed)
    except ValueError:  # reported when the options are parsed
        return preset
    if total < 1:
        return preset
    begun = _begun(Path(option(argv, "out", str(preset.out))[0] or preset.out))
    values: dict[str, Any] = {}
    for name in (f"warmup_{preset.unit}", *(preset.scaled if scaled is None else scaled)):
        was = getattr(preset, name, None)
        if was is None:
            continue
        values[name] = _scaled(was, total, preset.total_samples)
        if name in begun and type(begun[name]) is type(was):
            values[name] = begun[name]
    every = preset.checkpoint_every
    values["checkpoint_every"] = min(every, max(_LEAST_STEPS, _scaled(every, total, preset.total_samples)))
    untyped = [name for name in values if option(argv, name.replace("_", "-"))[0] is None]
    changed = {name: values[name] for name in untyped if values[name] != getattr(preset, name)}
    if changed and not {"-h", "--help"} & set(argv):
        words = ", ".join(f"{name} {value} (was {getattr(preset, name)})" for name, value in changed.items())
        echo(f"scaled to {preset.length} {total:,}: {words}")
    try:
        return replace(preset, **{**values, preset.length: total})
    except ValueError:  # a run's warmup, say, that is longer than the length asked for
        return preset


def _scaled(value: Any, total: int, before: int) -> Any:
    """A count, or several, in proportion to the length; 0 stays 0, and nothing else becomes it."""
    if isinstance(value, tuple):
        return tuple(dict.fromkeys(_scaled(count, total, before) for count in value))
    return value and max(1, round(value * total / before))


def _begun(out: Path) -> dict[str, Any]:
    """The settings of the run in a folder; none where there is no run."""
    from triptych_common.storage.files import read_json

    try:
        found = read_json(out / "config.json", remedy="").get("config")
    except (OSError, ValueError):  # reported when the run is opened
        return {}
    return found if isinstance(found, dict) else {}


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
