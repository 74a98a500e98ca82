"""Sample images from a generator: a grid, a PNG for each image, a film of walks through its styles."""

from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from triptych_common.cli import echo
from triptych_common.images import image_grid, to_uint8, write_png
from triptych_common.parallel import process_group
from triptych_common.progress import Progress
from triptych_common.video import course, ends, import_av, write_video

from triptych_gangealing.settings import GenerateConfig
from triptych_gangealing.stylegan2.generator import Generator, classes_of, latents_of, sample_images
from triptych_gangealing.stylegan2.weights import load_generator

GRID = 100  # most images in grid.png
VIDEO_SIDE = 4  # rows and columns of walks


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Write a grid, and images and a film where the config says so; returns the files.

    Raises ValueError for a file without a generator or a label out of range, ImportError where mp4 lacks its package.
    """
    if config.video == "mp4":
        import_av()
    with process_group(config.device) as ranks:
        generator = load_generator(config.generator).to(ranks.device)
        labels = labels_of(generator, config)
        images = sample_images(
            generator, range(config.num_samples), seed=config.seed, truncation_psi=config.truncation_psi,
            truncation_cutoff=config.truncation_cutoff, labels=labels, at_once=config.batch_size,
        )  # fmt: skip
        grid = config.out / "grid.png"
        write_png(grid, image_grid(images[:GRID], columns=10), scale=max(1, 64 // images.shape[-1]))
        written = {"grid": str(grid)}
        if config.images:
            for index, image in enumerate(images):
                write_png(config.out / "images" / f"{index:06d}.png", image)
            written["images"] = str(config.out / "images")
        if config.video != "none":
            video = config.out / f"walk.{config.video}"
            write_video(video, film(generator, config), fps=config.fps, loop=True)
            written["video"] = str(video)
    for what, path in written.items():
        echo(f"{what}: {path}")
    return written


def labels_of(generator: Generator, config: GenerateConfig) -> Tensor | None:
    """The label of every image, where the config has one."""
    if config.label is None:
        return None
    classes = generator.config.c_dim
    if not 0 <= config.label < classes:
        expected = f"0..{classes - 1}" if classes else "none, the generator is unconditional"
        raise ValueError(f"label {config.label}: expected {expected}")
    return torch.full((config.num_samples,), config.label)


@torch.inference_mode()
def film(generator: Generator, config: GenerateConfig) -> UInt8[Tensor, "frames channels height width"]:
    """Walks between the styles of latents, straight in w, with the same noise in every frame; the last leg leads back."""
    walks = VIDEO_SIDE**2
    count = walks * config.keyframes
    z = latents_of(generator, range(count), config.seed)
    numbers = None if config.label is None else torch.full((count,), config.label)
    c = classes_of(generator, range(count), numbers)
    psi: dict[str, Any] = {"truncation_psi": config.truncation_psi, "truncation_cutoff": config.truncation_cutoff}
    stops = generator.styles(z, c, **psi).unflatten(0, (config.keyframes, walks))
    legs = course(config.keyframes, config.frames, loop=True)
    frames = []
    with Progress("filming", len(legs), "frames") as progress:
        for leg in legs:
            (here,), (there,) = ends(stops, leg[None])
            share = float(leg[2])
            eased = share * share * (3 - 2 * share)  # slow at both ends
            images = to_uint8(generator.synthesis(torch.lerp(here, there, eased))).cpu()
            frames.append(image_grid(images, columns=VIDEO_SIDE))
            progress.advance()
    return torch.stack(frames)
