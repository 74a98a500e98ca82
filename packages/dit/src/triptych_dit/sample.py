"""Sample from a trained DiT."""

import io
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from triptych_common import checkpoint
from triptych_common.cli import CommonOptions, say
from triptych_common.images import image_grid, to_uint8, write_png
from triptych_common.parallel import Ranks, ranks
from triptych_common.progress import Progress
from triptych_common.randomness import SampleNoise
from triptych_common.run import RunDirectory, write_bytes, write_json
from triptych_common.samplers import Step, ddim, ddpm, final, guided

from triptych_dit.weights import TrainedModel, load_model, model_path

SAMPLERS = {"ddpm": ddpm, "ddim": ddim}


@dataclass(frozen=True)
class SamplerSettings:
    """How to turn noise into images."""

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """ancestral sampling with the learned variance, or deterministic DDIM"""
    num_inference_steps: int = 250
    """denoising steps, evenly spaced over the 1000"""
    guidance_scale: float = 1.0
    """classifier-free guidance; 1: none"""
    guidance_channels: int | Literal["all"] = "all"
    """channels that guidance acts on; the released DiT used 3 of 4"""
    guidance_interval: tuple[int, int] = (0, 999)
    """first and last timestep at which guidance acts"""
    clip_x_0: bool = True
    """clip the predicted clean image to [-1, 1] at every step: right for pixels, wrong for latents"""

    def __post_init__(self) -> None:
        if not 1 <= self.num_inference_steps <= 1000:
            raise ValueError(f"num_inference_steps {self.num_inference_steps}: expected 1..1000")
        if not math.isfinite(self.guidance_scale) or self.guidance_scale < 0:
            raise ValueError(f"guidance_scale {self.guidance_scale}: expected a number of at least 0; 1 is no guidance")
        if self.guidance_channels != "all" and self.guidance_channels < 1:
            raise ValueError(f"guidance_channels {self.guidance_channels}: expected 'all' or at least 1")


@dataclass(frozen=True)
class SampleConfig(CommonOptions, SamplerSettings):
    """Sample images from a trained model. Repeating the command resumes it."""

    out: Path = Path("runs/samples")
    """where to write samples.npz (arr_0: NHWC uint8, arr_1: labels) and grid.png"""
    checkpoint: Path = Path("runs/dit")
    """a model file, or the folder of a finished training run"""
    num_samples: int = 100
    """images to make"""
    labels: tuple[int, ...] = ()
    """classes, repeated in turn; all classes in turn by default"""
    batch_size: int = 100
    """images at once on each rank; changes speed, not results"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


def trajectory(
    trained: TrainedModel,
    labels: Int[Tensor, " batch"],
    indices: Sequence[int],
    settings: SamplerSettings,
    *,
    seed: int = 0,
) -> Iterator[Step]:
    """Every step of sampling a batch; sample i's noise follows from (seed, i) alone.

    Raises ValueError for a label outside the model's classes, or guidance it cannot do.
    """
    model = trained.model
    weight = model.pos_embed
    check_labels(labels, model.config.num_classes)
    if settings.guidance_channels != "all" and settings.guidance_channels > model.config.in_channels:
        raise ValueError(f"guidance_channels {settings.guidance_channels}: the model has {model.config.in_channels}")
    denoise = guided(
        model,
        labels.to(weight.device),
        model.config.null_label,
        settings.guidance_scale,
        guidance_channels=settings.guidance_channels,
        interval=settings.guidance_interval,
    )
    shape = (model.config.in_channels, *model.config.input_size)
    noise = SampleNoise(seed, indices, shape, device=weight.device, dtype=weight.dtype)
    diffusion = trained.diffusion.respaced(settings.num_inference_steps)
    return SAMPLERS[settings.sampler](denoise, diffusion, noise, clip_x_0=settings.clip_x_0)


@torch.inference_mode()
def sample_images(
    trained: TrainedModel,
    labels: Int[Tensor, " batch"],
    settings: SamplerSettings | None = None,
    *,
    seed: int = 0,
    first_index: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Float[Tensor, "batch channels height width"]:
    """Sample one image for each label, in [-1, 1]; `first_index` numbers the first of them."""
    indices = range(first_index, first_index + len(labels))
    return final(trajectory(trained, labels, indices, settings or SamplerSettings(), seed=seed), progress)


def check_labels(labels: Int[Tensor, " batch"], num_classes: int) -> None:
    """Raises ValueError for a label outside 0 .. num_classes-1."""
    for label in labels.tolist():
        if not 0 <= label < num_classes:
            raise ValueError(f"label {label} is outside 0..{num_classes - 1} (num_classes={num_classes})")


def sample(config: SampleConfig) -> dict[str, Any]:
    """Write samples.npz, grid.png and samples.json to `config.out`, in parts that any rank can resume.

    Raises ValueError for a model or request that does not fit what `out` already holds.
    """
    path = model_path(config.checkpoint)
    trained = load_model(path)
    classes = config.labels or tuple(range(trained.model.config.num_classes))
    labels = torch.tensor([classes[i % len(classes)] for i in range(config.num_samples)])
    check_labels(labels, trained.model.config.num_classes)
    request = {key: value for key, value in asdict(config).items() if key in SETTING_NAMES} | {
        "seed": config.seed, "labels": list(classes), "num_samples": config.num_samples,
        "model_sha256": checkpoint.content_sha256(path),
    }  # fmt: skip
    with (
        ranks(config.device) as among,
        RunDirectory(config.out, request, is_main=among.is_main) as run,
    ):
        among.barrier()  # the main rank has checked the folder
        trained.model.to(among.device)
        _sample_missing(trained, labels, config, among)
        among.barrier()
        result = {"samples": str(run.path / "samples.npz"), "grid": str(run.path / "grid.png")}
        if among.is_main:
            images = _gather(config, labels)
            write_png(run.path / "grid.png", image_grid(images[:100], columns=min(10, len(classes), len(images))))
            write_json(run.path / "samples.json", {**request, **result})
            for file in result.values():
                say(f"wrote {file}")
        return result


SETTING_NAMES = frozenset(SamplerSettings.__dataclass_fields__)


def _sample_missing(trained: TrainedModel, labels: Tensor, config: SampleConfig, among: Ranks) -> None:
    """Make what no part file holds yet; ranks take turns at batches of consecutive indices."""
    done = {index for start, end, _ in _parts(config.out) for index in range(start, end)}
    if (config.out / "samples.npz").exists():
        done = set(range(config.num_samples))
    missing = [index for index in range(config.num_samples) if index not in done]
    batches = list(_consecutive(missing, config.batch_size))
    among.barrier()  # every rank has listed the folder before any adds to it
    mine = batches[among.rank :: among.world_size]
    total = sum(map(len, mine)) * config.num_inference_steps
    with Progress("sampling", total, "image steps", enabled=among.is_main) as progress:
        for batch in mine:
            images = sample_images(
                trained, labels[batch.start : batch.stop], config, seed=config.seed, first_index=batch.start,
                progress=partial(progress.advance, len(batch)),
            )  # fmt: skip
            _write_npz(config.out / "parts" / f"{batch.start:08d}-{batch.stop:08d}.npz", arr_0=to_uint8(images))


def _consecutive(indices: Sequence[int], size: int) -> Iterator[range]:
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        members = [index for _, index in run]
        for start in range(members[0], members[-1] + 1, size):
            yield range(start, min(start + size, members[-1] + 1))


def _parts(out: Path) -> list[tuple[int, int, Path]]:
    return [(*map(int, path.stem.split("-")), path) for path in sorted((out / "parts").glob("*-*.npz"))]


def _gather(config: SampleConfig, labels: Tensor) -> UInt8[Tensor, "n channels height width"]:
    """All parts as one file; the parts are removed once it stands."""
    path = config.out / "samples.npz"
    if not path.exists():
        parts = {start: read_npz(part)[0] for start, _, part in _parts(config.out)}
        _write_npz(path, arr_0=torch.cat([parts[start] for start in sorted(parts)]), arr_1=labels)
    shutil.rmtree(config.out / "parts", ignore_errors=True)
    return read_npz(path)[0]


def _write_npz(path: Path, arr_0: Tensor, arr_1: Tensor | None = None) -> None:
    buffer = io.BytesIO()
    arrays = {"arr_0": arr_0.permute(0, 2, 3, 1).cpu().numpy()}
    if arr_1 is not None:
        arrays["arr_1"] = arr_1.numpy()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_npz(path: Path) -> tuple[UInt8[Tensor, "n channels height width"], Int[Tensor, " n"] | None]:
    """Images and, where present, labels of a samples file: arr_0 NHWC uint8, arr_1 labels.

    Raises ValueError for a file that is not one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such samples file; make one with triptych-dit sample")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["arr_0"]
            labels = arrays.get("arr_1")
    except (ValueError, OSError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an npz file with arr_0, or a damaged one ({error}); make it again") from error
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"{path}: arr_0 is {images.dtype} {images.shape}, expected uint8 (n, height, width, channels)")
    return (
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
    )
