"""Train a class-conditional DiT."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from triptych_common import data, randomness
from triptych_common.cli import CommonOptions, say
from triptych_common.parallel import Ranks, gradient_sync, ranks
from triptych_common.progress import Progress
from triptych_common.run import RunDirectory
from triptych_common.training import TrainState, steps

from triptych_dit.config import PRESETS, DiTConfig
from triptych_dit.flops import gflops, parameter_count
from triptych_dit.model import DiT
from triptych_dit.weights import FILE_NAME, make_diffusion, save_model


@dataclass(frozen=True)
class TrainConfig(CommonOptions):
    """Train a class-conditional DiT on a named data set. Repeating the command resumes it."""

    out: Path = Path("runs/dit")
    """run directory"""
    model: DiTConfig = field(default_factory=lambda: PRESETS["digits"])
    """shape of the network"""
    data: str = "mnist5k"
    """data set: mnist5k (embedded) or mnist"""
    total_images: int = 400_000
    """images to train on, repeats counted"""
    batch_size: int = 256
    """images per optimiser step, over all ranks"""
    micro_batch: int | None = None
    """images per backward pass and rank; smaller saves memory and accumulates gradients"""
    lr: float = 1e-4
    """AdamW's peak learning rate"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """constant, as in the thesis, or cosine decay to zero at the end"""
    warmup_images: int = 0
    """images over which the learning rate rises from zero"""
    adam_beta2: float = 0.999
    """AdamW's second decay rate"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    grad_clip: float | None = None
    """bound on the gradient's norm"""
    ema_half_life_images: int = 1_774_000
    """half-life of the weights' moving average; 1,774,000 is decay 0.9999 at batch 256, the thesis's setting"""
    ema_rampup: float | None = None
    """bound the half-life to this share of the images seen so far"""
    predict: Literal["noise", "sample"] = "noise"
    """what the network predicts"""
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    """how often each timestep is trained: equally, as in the thesis, or most around a third of the way to noise"""
    embedding_init: Literal["released", "unit"] = "released"
    """initial timestep and label embeddings: N(0, 0.02), or of unit variance, so that a short run feels them at once"""
    horizontal_flip: bool = False
    """mirror half of the images; never for digits"""
    precision: Literal["float32", "float64"] = "float32"
    """type of weights and arithmetic"""
    log_every: int = 50
    """steps between rows of metrics.jsonl"""
    checkpoint_every: int = 500
    """steps between checkpoints"""
    snapshots: tuple[int, ...] = ()
    """image counts at which the averaged model is kept, for looking at training afterwards"""
    tensorboard: bool = False
    """write TensorBoard events too (extra: tensorboard)"""

    def __post_init__(self) -> None:
        for name in ("total_images", "batch_size", "log_every", "checkpoint_every", "lr", "ema_half_life_images"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: expected a number above 0")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch {self.micro_batch}: expected at least 1")
        for name in ("grad_clip", "ema_rampup"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value}: expected a number above 0, or None for none")
        if any(not 0 < count <= self.total_images for count in self.snapshots):
            raise ValueError(f"snapshots {self.snapshots}: expected counts in 1..{self.total_images} (total_images)")
        if self.warmup_images < 0 or self.warmup_images > self.total_images:
            raise ValueError(f"warmup_images {self.warmup_images}: expected 0..{self.total_images} (total_images)")

    def identity(self) -> dict[str, Any]:
        """What decides the result: all but where it is written, and the device."""
        free = {"out", "device", "json", "dry_run", "micro_batch", "tensorboard"}
        return {key: value for key, value in asdict(self).items() if key not in free}

    def learning_rate(self, images_seen: int) -> float:
        """Learning rate of the step that starts after `images_seen` images."""
        warmup = min(1.0, (images_seen + self.batch_size) / self.warmup_images) if self.warmup_images else 1.0
        if self.lr_schedule == "constant":
            return self.lr * warmup
        return self.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(images_seen / self.total_images, 1.0)))

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints."""
        cost = gflops(self.model)
        return {
            "config": asdict(self) | {"out": str(self.out)},
            "parameters": parameter_count(self.model),
            "gflops_per_forward": round(cost, 6),
            "steps": math.ceil(self.total_images / self.batch_size),
            "training_gflops": round(cost * 3 * self.total_images, 1),
        }


_DIGITS = TrainConfig(  # a short run: what is constant in the thesis warms up, decays and is scaled to its length here
    model=PRESETS["digits"],
    total_images=288_000,
    batch_size=64,
    lr=5e-3,
    lr_schedule="cosine",
    warmup_images=3_200,
    adam_beta2=0.99,
    grad_clip=1.0,
    ema_half_life_images=15_000,
    ema_rampup=0.1,
    timesteps="logit_normal",
    embedding_init="unit",
    snapshots=(6_400, 25_600, 76_800, 160_000),
)

TRAIN_PRESETS: dict[str, TrainConfig] = {
    "digits": _DIGITS,
    "digits-smoke": replace(
        _DIGITS,
        model=PRESETS["digits-tiny"],
        total_images=16_000,
        warmup_images=1_280,
        ema_half_life_images=1_000,
        log_every=10,
        checkpoint_every=100,
        snapshots=(1_280, 6_400),
    ),
}


def train(config: TrainConfig) -> dict[str, Any]:
    """Train to the end, or resume; returns where the model is and the last metrics.

    Raises ValueError for a config that does not fit data, run directory or ranks, Interrupted after a signal.
    """
    train_set = data.load(config.data, "train")
    check_fits(config.model, train_set)
    with (
        ranks(config.device) as among,
        RunDirectory(config.out, config.identity(), is_main=among.is_main, tensorboard=config.tensorboard) as run,
    ):
        state = make_state(config, among)
        loss_of = make_loss(config, state, train_set, among)
        keep_snapshot = make_snapshots(config, run)
        plan = steps(
            state,
            run,
            total_samples=config.total_images,
            batch_size=config.batch_size,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            on_step=keep_snapshot,
        )
        with Progress("training", config.total_images, "img", enabled=among.is_main) as progress:
            for batch in plan:
                loss, mse, vb = 0.0, 0.0, 0.0
                for counters, last in batch.micro_batches(config.micro_batch):
                    share = len(counters) / len(batch.counters)
                    with gradient_sync(state.parallel_model, last):
                        losses = loss_of(counters)
                        (losses.total.mean() * share).backward()
                    loss, mse, vb = (
                        total + part.detach().mean() * share
                        for total, part in zip((loss, mse, vb), losses, strict=True)
                    )
                state.update(batch, {"loss": loss, "mse": mse, "vb": vb})
                progress.at(state.samples_seen)
        if among.is_main:
            save_model(run.path / FILE_NAME, state.ema, facts_of(config, state.samples_seen))
            say(f"model: {run.path / FILE_NAME}")
        rows = run.metrics()
        return {
            "model": str(run.path / FILE_NAME),
            "metrics": str(run.metrics_path),
            "last": rows[-1] if rows else None,
        }


def check_fits(model: DiTConfig, dataset: data.ImageDataset) -> None:
    """Raises ValueError unless the model takes this data set's images and classes."""
    shape = tuple(dataset.images.shape[1:])
    expected = (model.in_channels, *model.input_size)
    if shape != expected:
        raise ValueError(
            f"data set {dataset.name} has images of {shape}, the model takes {expected}; "
            f"set --model.in-channels {shape[0]} --model.input-size {shape[1]} {shape[2]}"
        )
    if model.num_classes < dataset.num_classes:
        raise ValueError(
            f"data set {dataset.name} has labels 0..{dataset.num_classes - 1}, the model num_classes="
            f"{model.num_classes}; pass --model.num-classes {dataset.num_classes}"
        )


def make_state(config: TrainConfig, among: Ranks) -> TrainState:
    """A freshly initialised model, its average and AdamW."""
    dtype = getattr(torch, config.precision)
    model = DiT(config.model)
    model.initialize_weights(randomness.generator(config.seed, "init"), embeddings=config.embedding_init)
    model = model.to(among.device, dtype)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.lr, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay, fused=True
    )
    return TrainState(
        model,
        optimizer,
        among,
        ema_half_life=config.ema_half_life_images,
        ema_rampup=config.ema_rampup,
        grad_clip=config.grad_clip,
        learning_rate=config.learning_rate,
    )


def make_loss(
    config: TrainConfig, state: TrainState, train_set: data.ImageDataset, among: Ranks
) -> Callable[[range], Any]:
    """The loss of given sample counters: all that is random about a sample follows from its counter."""
    diffusion = make_diffusion(config.model, config.predict)
    dtype, seed = getattr(torch, config.precision), config.seed

    def loss_of(counters: range) -> Any:
        items = randomness.shuffled(seed, "order", counters, len(train_set))
        x_0 = train_set.scaled(items).to(among.device, dtype)
        if config.horizontal_flip:
            flip = randomness.uniform(seed, "flip", counters) < 0.5
            x_0 = torch.where(flip.to(among.device)[:, None, None, None], x_0.flip(-1), x_0)
        t = draw_timesteps(config, counters, len(diffusion.schedule))
        noise = randomness.normal(seed, "noise", counters, x_0.shape[1:], dtype=dtype).to(among.device)
        labels = state.model.drop_labels(train_set.labels[items], randomness.uniform(seed, "label-drop", counters))
        x_t = diffusion.q_sample(x_0, t, noise)
        output: Tensor = state.parallel_model(x_t, t.to(among.device), labels.to(among.device))
        return diffusion.loss(output, x_0, x_t, t, noise)

    return loss_of


def draw_timesteps(config: TrainConfig, counters: range, num_steps: int) -> Int[Tensor, " batch"]:
    """Timestep of each sample counter.

    "logit_normal": one in five uniform, the others num_steps * sigmoid(-0.6 + 0.8 z) with z normal; consecutive counters
    are spread evenly over the distribution.  [logit-normal: Esser et al. 2024, "Scaling Rectified Flow Transformers"]
    """
    if config.timesteps == "uniform":
        share = randomness.uniform(config.seed, "timestep", counters)
    else:
        u = randomness.evenly_spread(config.seed, "timestep", counters)
        peaked = torch.sigmoid(0.8 * torch.special.ndtri((u - 0.2) / 0.8) - 0.6)
        share = torch.where(u < 0.2, u / 0.2, peaked)
    return (share * num_steps).long().clamp(max=num_steps - 1)


def make_snapshots(config: TrainConfig, run: RunDirectory) -> Callable[[TrainState], None]:
    """A callback that keeps the averaged model whenever a count in `snapshots` is passed."""

    def keep(state: TrainState) -> None:
        before = state.samples_seen - config.batch_size
        for count in config.snapshots:
            if run.is_main and before < count <= state.samples_seen:
                save_model(snapshot_path(run.path, count), state.ema, facts_of(config, state.samples_seen))

    return keep


def snapshot_path(run: Path, images: int) -> Path:
    return run / "snapshots" / f"images-{images:09d}.safetensors"


def facts_of(config: TrainConfig, images_seen: int) -> dict[str, Any]:
    """What a model file says of its making."""
    return {"predict": config.predict, "data": config.data, "seed": config.seed, "images_seen": images_seen}
