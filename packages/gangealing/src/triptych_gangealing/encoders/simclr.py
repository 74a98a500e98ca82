"""Train a small encoder on a generator's own samples, without labels: SimCLR.  [Chen et al. 2020]

Views of one sample should have similar features, those of two samples different ones. Views differ in colour, polarity, blur and a
slight crop. They are never rotated, mirrored or moved far: these are what the encoder must see when it judges an alignment.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from triptych_common.cli import echo
from triptych_common.images import from_uint8
from triptych_common.parallel import Ranks, process_group
from triptych_common.randomness import generator as source_of
from triptych_common.randomness import normal, shuffled, uniform
from triptych_common.storage import checkpoint
from triptych_common.storage.run import RunDirectory
from triptych_common.throughput import keep_freed_memory
from triptych_common.training import TrainState, open_run, summary, training_steps

from triptych_gangealing.encoders.perceptual import (
    ENCODER_FILE,
    Encoder,
    facts_of,
    read_encoder,
    unit_length,
    write_encoder,
)
from triptych_gangealing.encoders.train_config import EncoderTrainConfig
from triptych_gangealing.stylegan2.generator import Generator, sample_images

MAX_BLUR = 1 / 32  # standard deviation, of the image's height

Images = Float[Tensor, "n 3 height width"]
LossAndShare = tuple[Float[Tensor, ""], Float[Tensor, ""]]


def nt_xent(first: Float[Tensor, "n dim"], second: Float[Tensor, "n dim"], temperature: float) -> LossAndShare:
    """NT-Xent: the cross-entropy of choosing each view's other view out of 2n - 1, by cosine; and how often it is the nearest.

    [Chen et al. 2020, eq. 1]
    """
    z = F.normalize(torch.cat([first, second]))
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -math.inf)
    other = torch.arange(len(z), device=z.device).roll(len(first))  # row i of one half belongs to row i of the other
    return F.cross_entropy(logits, other), (logits.argmax(1) == other).to(z.dtype).mean()


def contrast_maps(encoder: nn.Module, first: Images, second: Images, temperature: float) -> LossAndShare:
    """Mean over feature maps of `nt_xent`. A map's features have length 1 at each pixel: its cosine is 1 - distance / 2."""
    # Feature maps are compared, as in `PerceptualDistance`, not projections of their mean as in the paper: such a head would lose
    # positions, and would learn the invariance to colour that the maps themselves should learn.
    images = torch.cat([first, second]).contiguous(memory_format=torch.channels_last)
    maps = [unit_length(x).flatten(1).chunk(2) for x in encoder(images)]
    losses, found = zip(*(nt_xent(one, other, temperature) for one, other in maps), strict=True)
    return torch.stack(losses).mean(), torch.stack(found).mean()


def make_views(images: Images, config: EncoderTrainConfig, indices: Sequence[int]) -> Images:
    """A view of each image: cropped, resized, blurred, recoloured, by a function of (seed, index) alone."""

    def draw(quantity: str) -> Tensor:
        return uniform(config.seed, f"simclr/{quantity}", indices).to(images)

    def choose(quantity: str, share: float) -> Tensor:
        return draw(f"whether {quantity}") < share

    height, width = images.shape[-2:]
    side = (1 - (1 - config.crop_scale) * draw("crop")).sqrt()
    blur_px = torch.where(choose("blur", config.blur), draw("blur") * MAX_BLUR * height, 0)
    rows = _resampling(height, side, draw("top"), blur_px)
    columns = _resampling(width, side, draw("left"), blur_px)
    views = rows[:, None] @ images @ columns[:, None].mT
    # A random 3 x 3 matrix mixes colours, and may turn light into dark; gray uses its first row for all channels.
    numbers = normal(config.seed, "simclr/colours", indices, (3, 4)).to(images)
    mix, place = numbers[:, :, :3], torch.special.ndtr(numbers[:, :, 3]) * 2 - 1
    gray = choose("gray", config.gray)[:, None]
    mix, place = torch.where(gray[:, None], mix[:, :1], mix), torch.where(gray, place[:, :1], place)
    changed = choose("recolour", config.recolour)[:, None, None, None]
    return torch.where(changed, recoloured(views, mix, 0.3 + 0.7 * draw("contrast"), place), views)


def _resampling(
    size: int, side: Float[Tensor, " n"], place: Float[Tensor, " n"], blur_px: Float[Tensor, " n"]
) -> Float[Tensor, "n size size"]:
    """Matrices that crop lines to a share `side` at `place` (0: start, 1: end), enlarge them linearly and blur them."""
    pixels = torch.arange(size, device=side.device, dtype=side.dtype)
    start = place * (1 - side) * size
    at = (start[:, None] + (pixels + 0.5) * side[:, None] - 0.5).clamp(0, size - 1)
    linear = (1 - (at[:, :, None] - pixels).abs()).clamp_min(0)
    distances = (pixels[:, None] - pixels) / blur_px.clamp_min(0.05)[:, None, None]
    return torch.softmax(-distances.square() / 2, dim=2) @ linear


def recoloured(
    images: Images, mix: Float[Tensor, "n 3 3"], contrast: Float[Tensor, " n"], place: Float[Tensor, "n 3"]
) -> Images:
    """Colours mapped by `mix`, then scaled together and shifted one by one, into [-1, 1].

    contrast: share of [-1, 1] that the channel of the widest range fills; place: of each channel in it, from -1 (darkest) to 1.
    """
    mixed = torch.einsum("nij,njhw->nihw", mix, images)
    low, high = mixed.amin((2, 3)), mixed.amax((2, 3))
    gain = contrast / ((high - low).amax(1) / 2).clamp_min(1e-3)
    room = 1 - (high - low) / 2 * gain[:, None]
    offset = place * room - (high + low) / 2 * gain[:, None]
    return mixed * gain[:, None, None, None] + offset[:, :, None, None]


def run(config: EncoderTrainConfig) -> dict[str, Any]:
    """Train to the end, or resume; returns where the encoder is and the last metrics.

    Raises ValueError or OSError for what is no generator, and as `train_encoder`.
    """
    from triptych_gangealing.stylegan2.weights import load_generator

    train_encoder(load_generator(config.generator), config)
    path = config.out / ENCODER_FILE
    echo(f"encoder: {path}")
    return {"encoder": str(path), **summary(RunDirectory(config.out, {}))}


def train_encoder(generator: Generator, config: EncoderTrainConfig) -> Encoder:
    """An encoder trained on the generator's samples, frozen, on the CPU; written to `config.out`, where a run is resumed.

    The generator is moved to the config's device. Raises ValueError for a run directory with another config or generator, too
    small images, or several ranks, since contrasted samples must be in one process. Interrupted after a signal.
    """
    keep_freed_memory()
    channels, size = generator.config.image_channels, generator.config.resolution
    least = Encoder(config.encoder()).least
    if channels != 3 or size < least:
        expected = f"expected 3 channels, and at least {least} pixels for {len(config.widths)} stages (widths)"
        raise ValueError(f"images of {channels} x {size} x {size}: {expected}")
    origin = {"generator_sha256": checkpoint.digest(generator.state_dict())}
    with process_group(config.device) as ranks:
        if ranks.world_size > 1:
            raise ValueError(f"{ranks.world_size} ranks: the encoder trains in one process; start it without torchrun")
        with open_run(config, ranks, origin) as directory:
            of_this_length = directory.recorded(config.length) == config.total_images
            if not of_this_length or not checkpoint.is_whole(config.out / ENCODER_FILE):
                generator, psi = generator.to(ranks.device), config.truncation_psi
                pool = sample_images(generator, range(config.pool_images), seed=config.seed, truncation_psi=psi)
                encoder = make_encoder(config)
                fit(config, directory, pool, ranks, encoder, make_views, contrast_maps)
                write_encoder(config.out / ENCODER_FILE, encoder, {**origin, "trained": config.identity()})
    return read_encoder(config.out).encoder


def make_encoder(config: EncoderTrainConfig) -> Encoder:
    """An untrained encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source_of(config.seed, "simclr/init").initial_seed())
        return Encoder(config.encoder())


def fit(
    config: EncoderTrainConfig,
    directory: RunDirectory,
    pool: UInt8[Tensor, "n 3 height width"],
    ranks: Ranks,
    network: nn.Module,
    views: Callable[[Images, EncoderTrainConfig, list[int]], Images],
    contrast: Callable[[nn.Module, Images, Images, float], LossAndShare],
) -> None:
    """Train a network on two views of each of a pool's images, resuming the run; frozen in the end.

    views: images at some indices to their views. contrast: loss of two views, and the share that is recognised.
    """
    network.to(ranks.device).to(memory_format=torch.channels_last)
    adamw = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    # The average is not used: the learning rate ends at 0.
    state = TrainState(network, adamw, ranks, ema_half_life=config.batch_size, learning_rate=config.learning_rate)
    if isinstance(network, Encoder):
        state.describe = lambda: {"model": facts_of(network)}
    for batch in training_steps(config, state, directory):
        items = shuffled(config.seed, "simclr/order", batch.counters, len(pool))
        images = from_uint8(pool[items].to(ranks.device))
        # Two views of sample c are number 2c and 2c + 1.
        one, other = (views(images, config, [2 * c + which for c in batch.counters]) for which in (0, 1))
        loss, found = contrast(state.parallel_model, one, other, config.temperature)
        loss.backward()
        state.update(batch, {"loss": loss, "found": found})
    network.requires_grad_(False).eval()
