"""Settings of a G.pt's training, and their presets."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from triptych_common.cli import CommonOptions

from triptych_gpt.zoo.pairs import SAMPLINGS

SAMPLING_NAMES = ("stratified", *SAMPLINGS)


@dataclass(frozen=True)
class GptTrainConfig(CommonOptions):
    """Train a G.pt on a zoo of checkpoints. Repeating the command resumes it."""

    out: Path = Path("runs/gpt")
    """run directory"""
    zoo: Path = Path("runs/zoo")
    """folder of the zoo, as triptych-gpt collect makes it"""
    task: str | None = None
    """the zoo's task where it cannot tell itself: a name, or file.py:NAME"""
    metric: str | None = None
    """what the model is prompted with; default: the zoo's first metric"""
    tokenizer: Literal["layer", "chunk", "neuron"] = "neuron"
    """a token a parameter tensor (thesis), a chunk of one, or a hidden unit"""
    chunk_size: int | None = None
    """most parameters of a token (chunk only)"""
    width: int = 256
    """hidden size of the transformer"""
    depth: int = 4
    """blocks of the transformer"""
    num_heads: int = 4
    """attention heads of each block"""
    scalars: Literal["raw", "normalised"] = "normalised"
    """how metrics and timestep are scaled before their frequencies: not, as released, or over the zoo's range"""
    metric_factor: float = 1.0
    """multiplies metrics first: 100 made the released error models' per cent of our fractions"""
    pairs: Literal["stratified", "thesis", "released", "ends"] = "stratified"
    """how checkpoints are paired: evenly over the metric's range, uniformly, as released, or first and last only"""
    augment: Literal["auto", "on", "off"] = "auto"
    """permute hidden units; auto: for layer and chunk tokens, neuron tokens know no order"""
    canonicalise: bool = False
    """bring each run's units into the order of one reference network (Git Re-Basin)"""
    runs: int | None = None
    """train on the first so many training runs only"""
    total_pairs: int = 320_000
    """pairs of checkpoints to train on"""
    batch_size: int = 64
    """pairs per optimiser step, over all ranks"""
    micro_batch: int | None = None
    """pairs per backward pass and rank; smaller saves memory and accumulates gradients"""
    lr: float = 3e-3
    """AdamW's peak learning rate"""
    warmup_pairs: int = 25_600
    """pairs over which the learning rate rises from zero; a cosine then takes it back to zero at the end"""
    adam_beta2: float = 0.99
    """AdamW's second decay rate"""
    weight_decay: float = 0.1
    """AdamW's weight decay, of linear weights"""
    grad_clip: float | None = 1.0
    """bound on the gradient's norm"""
    ema_half_life_pairs: int = 1_774_000
    """half-life of the weights' moving average, at most"""
    ema_rampup: float | None = 0.1
    """bound the half-life to this share of the pairs seen so far"""
    precision: Literal["float32", "tf32", "bf16", "float64"] = "float32"
    """arithmetic of the network; bf16 keeps weights, average and loss in float32"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """under torchrun: a whole model on every rank, or sharded weights, average and optimiser (FSDP2)"""
    activation_checkpointing: bool = False
    """recompute each block in the backward pass: less memory, a third more arithmetic"""
    compile_blocks: bool = False
    """torch.compile each block: pays on a GPU or in runs of an hour"""
    log_every: int = 50
    """steps between rows of metrics.jsonl"""
    checkpoint_every: int = 500
    """steps between checkpoints"""
    validation_every: int = 2500
    """steps between validations, which decide what model is kept; 0: none, the last is kept"""
    validation_networks: int = 16
    """untrained networks of validation runs to prompt"""
    validation_inference_steps: int = 25
    """denoising steps of their updates"""
    tensorboard: bool = False
    """write TensorBoard events too (extra: tensorboard)"""

    def __post_init__(self) -> None:
        for name in (
            "total_pairs", "batch_size", "log_every", "checkpoint_every", "lr", "ema_half_life_pairs", "width", "depth",
            "num_heads", "metric_factor", "validation_networks",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: expected a number above 0")
        for name in ("micro_batch", "runs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        for name in ("grad_clip", "ema_rampup"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value}: expected a number above 0, or None for none")
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2 {self.adam_beta2}: expected at least 0 and below 1")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay {self.weight_decay}: expected at least 0")
        if self.validation_every < 0:
            raise ValueError(f"validation_every {self.validation_every}: expected a number of steps, or 0 for none")
        if not 1 <= self.validation_inference_steps <= 1000:
            raise ValueError(f"validation_inference_steps {self.validation_inference_steps}: expected 1..1000")
        if not 0 <= self.warmup_pairs <= self.total_pairs:
            raise ValueError(f"warmup_pairs {self.warmup_pairs}: expected 0..{self.total_pairs} (total_pairs)")

    def identity(self) -> dict[str, Any]:
        """What decides the result: all but where things lie, and how fast it goes. The zoo's own content is added to it."""
        free = {
            "out", "zoo", "task", "device", "json", "dry_run", "micro_batch", "tensorboard", "parallel",
            "activation_checkpointing", "compile_blocks",
        }  # fmt: skip
        return {key: value for key, value in asdict(self).items() if key not in free}

    @property
    def augmented(self) -> bool:
        return self.augment == "on" or (self.augment == "auto" and self.tokenizer != "neuron")

    @property
    def arithmetic(self) -> str:
        """`precision` as `Execution` knows it: tf32 is a way of computing float32."""
        return "float32" if self.precision == "tf32" else self.precision

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def learning_rate(self, pairs_seen: int) -> float:
        """Learning rate of the step that starts after `pairs_seen` pairs: linear warmup, then half a cosine to zero."""
        if pairs_seen < self.warmup_pairs:
            return self.lr * min(1.0, (pairs_seen + self.batch_size) / self.warmup_pairs)
        past = (pairs_seen - self.warmup_pairs) / max(1, self.total_pairs - self.warmup_pairs)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(past, 1.0)))

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints."""
        from triptych_gpt.objective import plan  # opens the zoo

        return plan(self)


_RELEASED = GptTrainConfig(  # reference: AdamW (0.9, 0.999), decay 0.1 on linear weights, EMA 0.9999, cosine, plain pairs
    tokenizer="chunk", scalars="raw", pairs="released", depth=12, num_heads=16, adam_beta2=0.999, ema_rampup=None,
    log_every=100, checkpoint_every=5_000, validation_every=5_000, validation_inference_steps=1000,
)  # fmt: skip


def _released(
    metric: str, runs: int, pairs_a_run: int, epochs: int, warmup_epochs: int, **settings: Any
) -> GptTrainConfig:
    """A released run: an epoch there takes so many pairs from each training run."""
    batch, epoch = settings["batch_size"], runs * pairs_a_run
    half_life = round(math.log(0.5) / math.log(0.9999) * batch)
    return replace(
        _RELEASED, metric=metric, total_pairs=epoch * epochs, warmup_pairs=epoch * warmup_epochs,
        ema_half_life_pairs=half_life, **settings,
    )  # fmt: skip


_MNIST = {"runs": 10_228, "pairs_a_run": 9, "epochs": 2000, "warmup_epochs": 5, "lr": 4e-4, "width": 1536, "chunk_size": 1000,
          "grad_clip": 0.75}  # fmt: skip
_CIFAR = {"runs": 54_790, "pairs_a_run": 1, "epochs": 15_000, "warmup_epochs": 5, "lr": 4e-4, "width": 2048, "chunk_size": 576,
          "grad_clip": 0.1, "batch_size": 550}  # fmt: skip
_CARTPOLE = {"runs": 47_976, "pairs_a_run": 16, "epochs": 2000, "warmup_epochs": 10, "lr": 2e-4, "width": 1536,
             "tokenizer": "layer", "num_heads": 12, "grad_clip": None, "batch_size": 8192}  # fmt: skip

TRAIN_PRESETS = {
    "laptop": GptTrainConfig(),
    "smoke": GptTrainConfig(
        width=208, depth=1, num_heads=4, total_pairs=12_800, batch_size=128, warmup_pairs=1_280, log_every=20,
        checkpoint_every=50, validation_every=50, validation_networks=4, validation_inference_steps=10,
    ),
    "mnist_loss": _released("test_loss", batch_size=1024, **_MNIST),
    "mnist_error": _released("test_error", batch_size=512, metric_factor=100.0, **_MNIST),
    "cifar10_loss": _released("test_loss", **_CIFAR),
    "cifar10_error": _released("test_error", metric_factor=100.0, **_CIFAR),
    "cartpole": _released("train_return", **_CARTPOLE),
}  # fmt: skip
