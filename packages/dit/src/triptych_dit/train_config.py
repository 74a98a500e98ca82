"""Settings of a training run, and their presets: one row per published run."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from triptych_common.fields import FREE, Ge, Gt
from triptych_common.training.settings import TransformerSettings

from triptych_dit.config import PRESETS, CheckpointOptions, DiTConfig

FORWARDS_PER_STEP = 3  # a backward pass is two forward passes' worth of products


@dataclass(frozen=True)
class TrainConfig(TransformerSettings, CheckpointOptions):
    """Train a DiT on a data set, a folder of images or cached latents. Repeating the command resumes it."""

    scaled: ClassVar[tuple[str, ...]] = ("snapshots",)

    out: Path = Path("runs/dit")
    """run directory"""
    model: DiTConfig = field(default_factory=lambda: PRESETS["digits"])
    """shape of the network"""
    data: str = "mnist5k"
    """a named data set (mnist5k is embedded), a folder of images with one subfolder a class, or a cache of latents"""
    total_images: Annotated[int, Gt(0)] = 400_000
    """images to train on, repeats counted"""
    batch_size: int = 256
    lr: float = 1e-4
    """AdamW's peak learning rate"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """constant, as published, or cosine decay to zero at the end"""
    warmup_images: int = 0
    """images over which the learning rate rises from zero"""
    ema_half_life_images: Annotated[int, Gt(0)] = 1_774_000
    """half-life of the weights' moving average; 1,774,000 is decay 0.9999 at batch 256, the published setting"""
    predict: Literal["noise", "sample"] = "noise"
    """what the network predicts; by default noise, or what that of init_from does"""
    timesteps: Literal["uniform", "uniform_spread", "logit_normal"] = "uniform"
    """how often each timestep is trained: equally, as published; equally, consecutive samples spread evenly over all; or
    most around a third of the way to noise"""
    embedding_init: Literal["released", "unit"] = "released"
    """initial timestep and label embeddings: N(0, 0.02), or of unit variance, so that a short run uses them at once"""
    preview_images: Annotated[int, Ge(0), FREE] = 16
    """images in the grid that each scheduled checkpoint leaves in OUT/previews, always of the same noise; 0: none. Costs 20
    forward passes of so many images: 0.3% of the time with a checkpoint every 500 steps of 64"""
    strict: Annotated[bool, FREE] = False
    """stop at the first picture that is damaged or too small, rather than list such pictures and leave them out"""
    horizontal_flip: bool = False
    """mirror half of the images; never for digits"""
    init_from: str | None = None
    """fine-tune: a model file, run folder, released checkpoint or diffusers folder to start from"""
    new_class_table: bool = False
    """with init_from: initialise all class embeddings, even if the number of classes is the same"""
    new_latents: bool = False
    """with init_from: start although the data are not of the autoencoder, or not the pixels, that the model is of"""
    continue_optimizer: bool = False
    """with init_from, a training checkpoint with `opt`: go on with its weights, average and AdamW's moments"""
    validation_data: Annotated[str | None, FREE] = None
    """data to validate the averaged weights on, as `data`; by default the held-out part of a named data set"""
    validation_every: Annotated[int, Ge(0, "a number of steps, or 0 for none"), FREE] = 0
    """steps between validations, always on the same images, noise and timesteps; 0: none"""
    validation_images: Annotated[int, Gt(0), FREE] = 1_000
    """images to validate on"""
    snapshots: Annotated[tuple[int, ...], FREE] = ()
    """image counts at which the averaged model is saved, to study training afterwards"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not 0 < count <= self.total_images for count in self.snapshots):
            raise ValueError(f"snapshots {self.snapshots}: expected counts in 1..{self.total_images} (total_images)")
        for name in ("new_class_table", "new_latents", "continue_optimizer", *CheckpointOptions.__dataclass_fields__):
            if self.init_from is None and name != "predict" and getattr(self, name) not in (None, False):
                raise ValueError(f"{name} is for fine-tuning: pass --init-from too")
        if self.continue_optimizer and (self.new_class_table or self.parallel == "fsdp" or self.weights):
            raise ValueError(
                "continue_optimizer: not with --new-class-table, --weights or --parallel fsdp; leave one out"
            )

    def learning_rate(self, samples_seen: int) -> float:
        """Learning rate of the step that starts after `samples_seen` images: linear warmup times the schedule."""
        rate = super().learning_rate(samples_seen)
        if self.lr_schedule == "constant":
            return rate
        return rate * 0.5 * (1 + math.cos(math.pi * min(samples_seen / self.total_images, 1.0)))

    @property
    def flops_per_image(self) -> float:
        """Cost of a training step per image, in floating-point operations: two per multiply-add."""
        from triptych_dit.flops import gflops

        return 2e9 * FORWARDS_PER_STEP * gflops(self.model)

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints."""
        from triptych_dit.flops import gflops, parameter_count

        cost = gflops(self.model)
        return super().resolved() | {
            "parameters": parameter_count(self.model), "gflops_per_forward": round(cost, 6),
            "training_gflops": round(cost * FORWARDS_PER_STEP * self.total_images, 1),
        }  # fmt: skip


_IMAGENET = (
    TrainConfig(  # thesis 2.4: flips, and the defaults: AdamW, constant rate, no decay, warmup or clipping, EMA 0.9999
        data="latents/imagenet-256",
        total_images=400_000 * 256,
        horizontal_flip=True,
        log_every=100,
        checkpoint_every=5_000,
    )
)
_IMAGENET_STEPS = {  # thesis 2.5: twelve models and three more designs for 400,000 steps; 2.5.1: the best go on
    **{f"DiT-{size}/{patch}": 400_000 for size in ("S", "B", "L", "XL") for patch in (8, 4, 2)},
    **{f"DiT-XL/2-{design}": 400_000 for design in ("in-context", "cross-attention", "adaln")},
    "DiT-XL/2": 7_000_000,
    "DiT-XL/2@512": 3_000_000,
}

_DIGITS = TrainConfig(  # a short run: what is constant in the thesis warms up, decays and is scaled to its length here
    total_images=288_000, batch_size=64, lr=5e-3, lr_schedule="cosine", warmup_images=3_200, adam_beta2=0.99, grad_clip=1.0,
    ema_half_life_images=15_000, ema_rampup=0.1, timesteps="logit_normal", embedding_init="unit",
    snapshots=(6_400, 25_600, 76_800, 160_000),
)  # fmt: skip
_SMOKE = replace(
    _DIGITS, model=PRESETS["digits-tiny"], total_images=16_000, warmup_images=1_280, ema_half_life_images=1_000,
    log_every=10, checkpoint_every=100, snapshots=(1_280, 6_400),
)  # fmt: skip

TRAIN_PRESETS: dict[str, TrainConfig] = {
    "digits": _DIGITS,
    "digits-smoke": _SMOKE,
    # On latents of an autoencoder trained on the digits, shorter by the time that its training takes.
    "digits-latent": replace(_DIGITS, model=PRESETS["digits-latent"], total_images=240_000),
    "digits-latent-smoke": replace(_SMOKE, model=PRESETS["digits-latent-tiny"]),
}
for _name, _steps in _IMAGENET_STEPS.items():
    _data = "latents/imagenet-512" if _name.endswith("@512") else _IMAGENET.data
    TRAIN_PRESETS[_name] = replace(_IMAGENET, model=PRESETS[_name], total_images=256 * _steps, data=_data)
