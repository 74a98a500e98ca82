"""Settings of sampling, walks, evaluation and export. Imports no torch, so that --help is quick."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from triptych_common import sampler_settings
from triptych_common.cli import CommonOptions
from triptych_common.fields import Ge, Interval, OneOf
from triptych_common.sampler_settings import TIMESTEPS

from triptych_dit.config import CheckpointOptions, DiTConfig

FORMATS = ("mp4", "gif")
_SCALE = Interval(ge=0, lt=math.inf, wanted="a number of at least 0; 1 is no guidance")


@dataclass(frozen=True)
class SamplerSettings(sampler_settings.SamplerSettings):
    """Sampler and guidance."""

    guidance_scale: Annotated[float, _SCALE] = 1.0
    """classifier-free guidance; 1: none"""
    guidance_channels: int | Literal["all"] = "all"
    """channels that guidance acts on; the released DiT used 3 of 4"""
    guidance_interval: tuple[int, int] = (0, TIMESTEPS - 1)
    """first and last timestep at which guidance acts"""
    clip_x_0: bool | None = None
    """clip the predicted clean image to [-1, 1] at every step; None: for pixels but not for latents"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_channels != "all" and self.guidance_channels < 1:
            raise ValueError(f"guidance_channels {self.guidance_channels}: expected 'all' or at least 1")
        first, last = self.guidance_interval
        if not 0 <= first <= last < TIMESTEPS:
            raise ValueError(f"guidance_interval {first} {last}: expected two timesteps, 0 <= first <= last <= 999")

    def check(self, model: DiTConfig) -> None:
        """Raise ValueError for guidance that this model does not support."""
        if self.guidance_scale != 1 and model.null_label is None:
            untrained = "was trained without label dropout and has no null label"
            reason = untrained if model.num_classes else "is unconditional (num_classes=0)"
            raise ValueError(f"guidance_scale {self.guidance_scale}: this model {reason}; use 1.0")
        if self.guidance_channels != "all" and self.guidance_channels > model.in_channels:
            raise ValueError(
                f"guidance_channels {self.guidance_channels}: expected 'all' or at most {model.in_channels}, the model's"
            )


@dataclass(frozen=True)
class ModelOptions(CheckpointOptions):
    """Which model, and how it is run."""

    checkpoint: str = "runs/dit"
    """a model file, the folder of a finished training run, a released checkpoint or its name (DiT-XL/2@256), or a folder of
    diffusers"""
    precision: Literal["float32", "bf16", "float64"] | None = None
    """arithmetic of the network; by default that of the model file. bf16 is for GPUs"""
    compile_blocks: bool = False
    """torch.compile each block: pays on a GPU for thousands of images"""


@dataclass(frozen=True)
class SampleConfig(CommonOptions, SamplerSettings, ModelOptions):
    """Sample images from a trained model. Repeating the command resumes it."""

    out: Path = Path("runs/samples")
    """where to write samples.npz (arr_0: NHWC uint8, arr_1: labels) and grid.png"""
    num_samples: Annotated[int, Ge(1)] = 100
    """images to make"""
    labels: tuple[int | str, ...] = ()
    """classes, by number or name ("tabby cat"), repeated in turn; all classes in turn by default"""
    images: bool = False
    """write each image to OUT/images too, as 000123-CLASS.png"""
    batch_size: Annotated[int, Ge(1)] = 100
    """images at once on each rank; changes speed, not results"""


@dataclass(frozen=True)
class WalkConfig(CommonOptions, SamplerSettings, ModelOptions):
    """Film a walk: between noises at one class or blend of classes, or between several classes with the noise fixed."""

    out: Path = Path("runs/walk")
    """where to write walk.mp4, walk.png (a strip of frames) and walk.npz (all frames)"""
    sampler: str = "ddim"
    """ddim: deterministic, so that neighbouring frames are alike; also ddpm, and a scheduler of diffusers by its name"""
    num_inference_steps: int = 50
    """denoising steps of each frame, evenly spaced over the 1000"""
    labels: tuple[int | str, ...] = ()
    """one class, by number or name: walk between noises; several: walk from class to class. By default class 0"""
    blend: tuple[str, ...] = ()
    """walk between noises at a mixture of classes instead: LABEL:WEIGHT for each, such as 3:0.5 8:0.5 or cat:1 dog:3"""
    noises: Annotated[tuple[int, ...], Ge(0, "numbers of samples, from 0")] = ()
    """noises to walk between, numbered like the samples of triptych-dit sample; 0 1 2 3 by default, 0 from class to class"""
    frames: Annotated[int, Ge(1)] = 24
    """frames from one stop of the walk to the next"""
    loop: bool = False
    """walk back to the first stop, and let a GIF repeat"""
    fps: Annotated[int, Ge(1)] = 24
    """frames a second"""
    format: Annotated[str, OneOf(FORMATS)] = "mp4"
    """mp4 (extra: video) or gif"""
    batch_size: Annotated[int, Ge(1)] = 50
    """frames at once; changes speed, not results"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels and self.blend:
            raise ValueError("labels and blend: pass one of them, a blend is a class too")
        if len(self.labels) > 1 and len(self.noises) > 1:
            raise ValueError(f"{len(self.labels)} labels and {len(self.noises)} noises: walk between one or the other")
        if len(self.labels) < 2 and len(self.noises) == 1:
            raise ValueError("one label and one noise: nothing to walk between; pass more of one")
        blended(self.blend)


@dataclass(frozen=True)
class EvaluateConfig(CommonOptions):
    """Score REFERENCE SAMPLES, in this order, or --samples against --reference, by FID, sFID, IS, precision and recall as the
    ADM suite does.

    Without any of these: score --samples, digits, against held-out real ones, on the CPU.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="REFERENCE SAMPLES")] = ()
    """npz files with arr_0 (NHWC uint8), statistics (mu, sigma, mu_s, sigma_s), or both; or folders of pictures, which are
    cropped to the size of the other's images"""
    reference: Path | None = None
    """a reference for --samples, such as the folder of pictures that the model was trained on"""
    out: Path = Path("runs/scores")
    """where to write scores.json"""
    samples: Path = Path("runs/samples/samples.npz")
    """npz file with arr_0 (NHWC uint8) and, for class accuracy, arr_1 (labels)"""
    data: str = "mnist5k"
    """digits: data set the model was trained on; its held-out split is the reference"""
    inception: Path | None = None
    """ADM suite: Inception weights of torch-fidelity; None: from the cache, or downloaded there"""
    batch_size: Annotated[int, Ge(1)] = 64
    """ADM suite: images per forward pass of Inception"""
    repeats: int = 100
    """ADM suite: bootstrap repeats of the 95% intervals, 0: no intervals"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.files) not in (0, 2):
            raise ValueError(
                f"files given: {len(self.files)}, expected REFERENCE.npz SAMPLES.npz, or --samples for digits"
            )
        others: tuple[str, ...] = ("inception", "batch_size", "repeats")
        if self.files or self.reference:
            others = ("samples", "reference", "data") if self.files else ("data",)
        for name in others:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                pair = "--reference" if self.reference and not self.files else "REFERENCE.npz SAMPLES.npz"
                case = f"without {pair}" if self.files or self.reference else f"with {pair}"
                raise ValueError(f"--{name.replace('_', '-')} has a meaning only {case}; see --help")
        if self.repeats < 0 or self.repeats == 1:
            raise ValueError(f"repeats {self.repeats}: expected at least 2, or 0 for no intervals")


@dataclass(frozen=True)
class ExportConfig(CommonOptions, CheckpointOptions):
    """Write a model, wherever it comes from, in the format of triptych, of the released DiT or of diffusers."""

    checkpoint: str = "runs/dit"
    """a model file or run folder; a released .pt or "DiT-XL/2@256", "DiT-XL/2@512"; a folder or hub repository of diffusers"""
    format: Literal["diffusers", "released", "triptych"] = "diffusers"
    """a folder for DiTPipeline; model.pt as facebookresearch/DiT reads it; model.safetensors for sample and train"""
    out: Path = Path("runs/export")
    """folder to write"""
    vae: str | None = None
    """autoencoder of the model's latents, a folder or hub repository; in diffusers' format it is put beside the model"""
    scheduler: str | None = None
    """diffusers: a scheduler by name; DDIMScheduler by default"""
    labels_file: Path | None = None
    """diffusers: JSON object of labels and names, {"0": "tench, Tinca tinca", ...}; by default the names of the data"""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("scheduler", "labels_file") if getattr(self, name) is not None]
        if self.format != "diffusers" and given:
            option = f"--{given[0].replace('_', '-')}"
            raise ValueError(f"{option} is for --format diffusers, not {self.format}; leave it out")


def blended(blend: Sequence[str]) -> dict[str, float]:
    """LABEL:WEIGHT words as weights of labels or names, scaled to add up to 1. Raises ValueError for anything else."""
    weights: dict[str, float] = {}
    for word in blend:
        label, _, weight = word.rpartition(":")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not label or not (math.isfinite(value) and value > 0) or label in weights:
            raise ValueError(
                f"blend {word!r}: expected LABEL:WEIGHT, weights above 0 and each label once, as in 3:0.5 8:0.5"
            )
        weights[label] = value
    total = sum(weights.values())
    return {label: weight / total for label, weight in weights.items()}
