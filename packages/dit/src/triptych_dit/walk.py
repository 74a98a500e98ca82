"""Films of a walk through a model's samples: between noises at a fixed class, or between classes with the noise fixed."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from triptych_common.cli import echo
from triptych_common.images import image_grid, to_uint8, write_png
from triptych_common.parallel import process_group
from triptych_common.progress import Progress
from triptych_common.randomness import SampleNoise
from triptych_common.samplers import evaluations
from triptych_common.storage import checkpoint
from triptych_common.storage.run import RunDirectory
from triptych_common.video import course, ends, import_av, write_video

from triptych_dit.interop import load_any
from triptych_dit.labels import resolved
from triptych_dit.sample import drop_damaged, identity, place, read_npz, write_npz
from triptych_dit.sampling import sample_images
from triptych_dit.settings import WalkConfig, blended
from triptych_dit.weights import TrainedModel

STRIP_LENGTH = 10


def walk(config: WalkConfig) -> dict[str, Any]:
    """Write walk.mp4 (or walk.gif), walk.png and walk.npz to `config.out`, from the frames of walk.npz if it exists.

    Raises ValueError for a request that does not fit the model, or what `out` already holds, and under torchrun.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("walk is for one process")
    if config.format == "mp4":
        import_av()  # before the work, not after it
    trained = load_any(config.checkpoint, **config.loading())
    config.check(trained.model.config)
    noises = config.noises or ((0,) if len(config.labels) > 1 else (0, 1, 2, 3))
    mixtures = stops_between_classes(config, trained)
    request = identity(config, trained) | {
        "labels": list(config.labels), "blend": list(config.blend), "noises": list(noises), "frames": config.frames,
        "loop": config.loop, "model_sha256": checkpoint.digest(trained.model.state_dict()),
    }  # fmt: skip
    steps = evaluations(config, trained.diffusion)
    drop_damaged(config.out / "walk.npz")
    finished = (config.out / "walk.npz").exists()
    with process_group(config.device) as ranks:
        if not finished or config.vae is not None:
            request |= place(trained, ranks, config, config.frames * max(len(noises), len(config.labels)))
        with RunDirectory(config.out, request) as run:
            if not finished:
                images = film(trained, config, noises, mixtures, steps)
                write_npz(run.path / "walk.npz", [images], len(images))
            result = show(run.path, config)
    for file in result.values():
        echo(f"wrote {file}")
    return result


def show(out: Path, config: WalkConfig) -> dict[str, Any]:
    """Write film and strip of the frames in OUT/walk.npz; returns the paths of all three."""
    images, _ = read_npz(out / "walk.npz")
    video, strip = out / f"walk.{config.format}", out / "walk.png"
    write_video(video, images, fps=config.fps, loop=config.loop)
    shown = images[torch.linspace(0, len(images) - 1, min(STRIP_LENGTH, len(images))).round().long()]
    write_png(strip, image_grid(shown, columns=len(shown)), scale=max(1, 128 // max(images.shape[2:])))
    return {"video": str(video), "strip": str(strip), "frames": str(out / "walk.npz")}


def stops_between_classes(config: WalkConfig, trained: TrainedModel) -> Float[Tensor, "stops classes"] | None:
    """The classes of the walk, or its one class or blend, as weights of all classes; None for a model without classes.

    Raises ValueError for labels that the model does not have.
    """
    blend, num_classes = blended(config.blend), trained.model.config.num_classes
    words: Sequence[int | str] = list(blend) or config.labels or [0]
    if not num_classes:
        if config.labels or blend:
            raise ValueError(f"labels {list(words)}: this model is unconditional (num_classes=0); leave them out")
        return None
    labels = resolved(words, num_classes, trained.class_names)
    stops = F.one_hot(torch.tensor(labels), num_classes).double()
    return torch.tensor([list(blend.values())]).double() @ stops if blend else stops


def film(
    trained: TrainedModel, config: WalkConfig, noises: Sequence[int], mixtures: Float[Tensor, "stops classes"] | None,
    steps: int,
) -> UInt8[Tensor, "frames channels height width"]:  # fmt: skip
    """Sample the frames of the walk.

    noises: numbers of the samples whose x_T the walk passes through. mixtures: the classes it passes through, as weights of all
    classes. steps: evaluations of the model for one frame.
    """
    weight = trained.model.pos_embed
    shape = (trained.model.config.in_channels, *trained.model.config.input_size)
    x_T = SampleNoise(config.seed, noises, shape).draw()
    between_classes = mixtures if mixtures is not None and len(mixtures) > 1 else None
    stops = len(noises) if between_classes is None else len(between_classes)
    legs = course(stops, config.frames, loop=config.loop)
    images = []
    with Progress("walking", len(legs) * steps, "frame steps") as progress:
        for start in range(0, len(legs), config.batch_size):
            leg = legs[start : start + config.batch_size]
            if between_classes is None:
                labels = None if mixtures is None else mixtures.expand(len(leg), -1)
                x = slerp(*ends(x_T, leg), leg[:, 2])
            else:
                here, there = ends(between_classes, leg)
                labels, x = here + leg[:, 2:] * (there - here), x_T.expand(len(leg), *shape)
            noise = FrameNoise(x, config.seed, noises[0], device=weight.device, dtype=weight.dtype)
            drawn = sample_images(
                trained, labels, config, count=len(leg), noise=noise, vae=config.vae,
                progress=partial(progress.advance, len(leg)),
            )  # fmt: skip
            images.append(to_uint8(drawn).cpu())
    return torch.cat(images)


class FrameNoise(SampleNoise):
    """Noise of frames: a given x_T for each; what a sampler adds later is that of one sample, the same for every frame."""

    def __init__(self, x_T: Float[Tensor, "frames *shape"], seed: int, index: int, **kwargs: Any) -> None:
        super().__init__(seed, [index] * len(x_T), x_T.shape[1:], **kwargs)
        self.x_T: Tensor | None = x_T

    def draw(self) -> Float[Tensor, "frames *shape"]:
        drawn, x_T = super().draw(), self.x_T
        self.x_T = None
        return drawn if x_T is None else x_T.to(drawn)


def slerp(
    a: Float[Tensor, "n *shape"], b: Float[Tensor, "n *shape"], share: Float[Tensor, " n"]
) -> Float[Tensor, "n *shape"]:
    """Interpolate along the arc from each a to its b.  [Shoemake 1985]"""
    # A straight line would leave the shell on which Gaussian noise lies: its midpoint is too short by a factor of sqrt(2).
    x, y = a.double().flatten(1), b.double().flatten(1)
    angle = torch.acos(F.cosine_similarity(x, y).clamp(-1, 1))[:, None]
    share = share.double()[:, None]
    near = angle < 1e-6  # the same stop twice
    safe = torch.where(near, 1.0, angle)
    weight_a = torch.where(near, 1 - share, torch.sin((1 - share) * safe) / torch.sin(safe))
    weight_b = torch.where(near, share, torch.sin(share * safe) / torch.sin(safe))
    return (weight_a * x + weight_b * y).view_as(a)
