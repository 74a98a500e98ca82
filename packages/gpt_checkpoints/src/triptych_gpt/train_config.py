"""Settings of a G.pt's training, and presets of the published runs."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from triptych_common.fields import FREE, Ge, Gt, Interval
from triptych_common.training.settings import TransformerSettings


@dataclass(frozen=True)
class GptTrainConfig(TransformerSettings):
    """Train a G.pt on a zoo of checkpoints. Repeating the command resumes it."""

    unit: ClassVar[str] = "pairs"

    out: Path = Path("runs/gpt")
    """run directory"""
    zoo: Annotated[Path, FREE] = Path("runs/zoo")
    """folder of the zoo, as triptych-gpt collect makes it"""
    task: Annotated[str | None, FREE] = None
    """the zoo's task if the zoo does not name it: a name, or file.py:NAME"""
    init_from: str | None = None
    """a G.pt of the same networks and tokens to start from, with its scales: a run's folder, a checkpoint, or a model file"""
    metric: str | None = None
    """what the model is prompted with; default: the zoo's first metric"""
    tokenizer: Literal["layer", "chunk", "neuron"] = "neuron"
    """a token for each parameter tensor (published), chunk of one, or hidden unit"""
    chunk_size: int | None = None
    """most parameters of a token (chunk only)"""
    width: Annotated[int, Gt(0)] = 256
    """hidden size of the transformer"""
    depth: Annotated[int, Gt(0)] = 4
    """blocks of the transformer"""
    num_heads: Annotated[int, Gt(0)] = 4
    """attention heads of each block"""
    scalars: Literal["raw", "normalised"] = "normalised"
    """how metrics and timestep are scaled before their frequencies: not, as released, or over the zoo's range"""
    metric_factor: Annotated[float, Gt(0)] = 1.0
    """multiplies metrics first: 100 made the released error models' per cent of our fractions"""
    pairs: Literal["stratified", "thesis", "released", "ends"] = "stratified"
    """how checkpoints are paired: evenly over the metric's range, uniformly, as released, or first and last only"""
    augment: Literal["auto", "on", "off"] = "auto"
    """permute hidden units; auto: for layer and chunk tokens, not for neuron tokens, which do not depend on the order"""
    canonicalise: bool = False
    """bring each run's units into the order of one reference network (Git Re-Basin)"""
    runs: Annotated[int | None, Ge(1)] = None
    """train only on this many training runs, the first ones"""
    total_pairs: Annotated[int, Gt(0)] = 320_000
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
    weight_decay: float = 0.1
    """AdamW's weight decay, of linear weights"""
    grad_clip: float | None = 1.0
    ema_half_life_pairs: Annotated[int, Gt(0)] = 1_774_000
    """half-life of the weights' moving average, at most"""
    ema_rampup: float | None = 0.1
    """bound the half-life to this share of the pairs seen so far"""
    precision: Literal["float32", "tf32", "bf16", "float64"] = "float32"
    """arithmetic of the network; bf16 keeps weights, average and loss in float32"""
    validation_every: Annotated[int, Ge(0, "a number of steps, or 0 for none"), FREE] = 2500
    """steps between validations, which decide which model is saved; 0: none, the last is saved"""
    validation_networks: Annotated[int, Gt(0)] = 16
    """untrained networks of validation runs to prompt"""
    validation_inference_steps: Annotated[int, Interval(ge=1, le=1000)] = 25
    """denoising steps of their updates"""

    def learning_rate(self, samples_seen: int) -> float:
        """Learning rate of the step that starts after `samples_seen` pairs: linear warmup, then half a cosine to zero."""
        if samples_seen < self.warmup_pairs:
            return super().learning_rate(samples_seen)
        past = (samples_seen - self.warmup_pairs) / max(1, self.total_pairs - self.warmup_pairs)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(past, 1.0)))


# The released code: AdamW (0.9, 0.999), decay 0.1 on linear weights, EMA 0.9999 a step, cosine, plain pairs.
_RELEASED = GptTrainConfig(
    tokenizer="chunk", scalars="raw", pairs="released", depth=12, num_heads=16, adam_beta2=0.999, ema_rampup=None,
    log_every=100, checkpoint_every=5_000, validation_every=5_000, validation_inference_steps=1000,
)  # fmt: skip


def _released(
    metric: str, runs: int, pairs_a_run: int, epochs: int, warmup_epochs: int, **settings: Any
) -> GptTrainConfig:
    """A released run; pairs_a_run: taken from each training run in one of its epochs."""
    batch, epoch = settings["batch_size"], runs * pairs_a_run
    half_life = round(math.log(0.5) / math.log(0.9999) * batch)  # of an average that decays by 0.9999 every step
    return replace(
        _RELEASED, metric=metric, total_pairs=epoch * epochs, warmup_pairs=epoch * warmup_epochs,
        ema_half_life_pairs=half_life, **settings,
    )  # fmt: skip


_MNIST: dict[str, Any] = {
    "runs": 10_228, "pairs_a_run": 9, "epochs": 2000, "warmup_epochs": 5, "lr": 4e-4, "width": 1536, "chunk_size": 1000,
    "grad_clip": 0.75,
}  # fmt: skip
_CIFAR: dict[str, Any] = {
    "runs": 54_790, "pairs_a_run": 1, "epochs": 15_000, "warmup_epochs": 5, "lr": 4e-4, "width": 2048, "chunk_size": 576,
    "grad_clip": 0.1, "batch_size": 550,
}  # fmt: skip
_CARTPOLE: dict[str, Any] = {
    "runs": 47_976, "pairs_a_run": 16, "epochs": 2000, "warmup_epochs": 10, "lr": 2e-4, "width": 1536, "tokenizer": "layer",
    "num_heads": 12, "grad_clip": None, "batch_size": 8192,
}  # fmt: skip

TRAIN_PRESETS = {
    "laptop": GptTrainConfig(),
    "smoke": GptTrainConfig(
        width=208, depth=1, num_heads=4, total_pairs=12_800, batch_size=128, warmup_pairs=1_280, log_every=20,
        checkpoint_every=50, validation_every=50, validation_networks=4, validation_inference_steps=10,
    ),
    "cartpole_small": GptTrainConfig(metric="return", width=128, total_pairs=256_000, batch_size=128, lr=2e-3),
    "mnist_loss": _released("test_loss", batch_size=1024, **_MNIST),
    "mnist_error": _released("test_error", batch_size=512, metric_factor=100.0, **_MNIST),
    "cifar10_loss": _released("test_loss", **_CIFAR),
    "cifar10_error": _released("test_error", metric_factor=100.0, **_CIFAR),
    "cartpole": _released("train_return", **_CARTPOLE),
}  # fmt: skip
