"""Train a small autoencoder for latents: a variational `AutoencoderKL` of diffusers, on images in memory.

The thesis uses Stable Diffusion's autoencoder; digits of 28 x 28 need a smaller one. Its loss is a pixel distance and a KL
divergence. There is no perceptual loss: the only network for digits is the one that scores them.
"""

import copy
import json
import math
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NotRequired

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from triptych_common import data, randomness
from triptych_common.cli import echo
from triptych_common.cost import StepCost
from triptych_common.data.decoding import read_image
from triptych_common.images import image_grid, to_uint8, write_png
from triptych_common.parallel import Ranks, process_group
from triptych_common.storage.files import open_ended, read_json, write_bytes, write_json
from triptych_common.storage.provenance import provenance
from triptych_common.training import TrainState, open_run, summary, training_steps
from typing_extensions import TypedDict

from triptych_dit.autoencoder.config import AutoencoderTrainConfig
from triptych_dit.autoencoder.model import (
    CHECKPOINT,
    WEIGHTS,
    Autoencoder,
    import_autoencoder_kl,
    load_autoencoder,
    scaled_sample,
)
from triptych_dit.fitting import look_over

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

FOLDER = "vae"  # below the run's: where a diffusers pipeline has its own
MEASURED, PICTURE = "autoencoder.json", "reconstructions.png"
LARGEST = 64  # side that pictures are cropped to for training on a laptop
SOME = 64  # images of which checkpoints measure the scale factor


class Reconstruction(nn.Module):
    """Autoencoder and loss in one forward pass, so that gradients of all of it are averaged over ranks."""

    def __init__(self, vae: "AutoencoderKL") -> None:
        super().__init__()
        self.vae = vae

    def forward(
        self, images: Float[Tensor, "batch channels height width"], noise: Float[Tensor, "batch latent_channels h w"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean squared error of a pixel for one sample of the posterior, and mean KL divergence of a latent value to the
        standard normal, in nats.  [Kingma & Welling 2014]
        """
        # With the channels last in memory, convolutions are faster.
        posterior = self.vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(reconstruction, images), kl


def train_autoencoder(config: AutoencoderTrainConfig) -> dict[str, Any]:
    """Train to the end, or resume, and write OUT/vae, OUT/autoencoder.json and OUT/reconstructions.png.

    Returns the autoencoder's path, its facts (such as the scale factor), and its error on held-out images.
    Raises ValueError for settings that do not fit the data, the run directory or the ranks; Interrupted after a signal.
    """
    unusable: list[data.UnreadableImage] = []
    train_set = load_images(config, unusable)
    contents = None if config.data in data.DATASETS else {"data": data.contents_of(train_set)}
    with process_group(config.device) as ranks, ExitStack() as stack:
        step_cost(config, train_set, ranks).check(config, ranks)
        run = stack.enter_context(open_run(config, ranks, contents=contents))
        if ranks.is_main:
            data.write_unusable(unusable, run.path)
        model = Reconstruction(make_vae(config, train_set)).to(ranks.device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=(0.9, config.adam_beta2), weight_decay=0.0, fused=True
        )
        state = TrainState(model, optimizer, ranks, **config.state_options())
        state.describe = lambda: {"ema.vae": checkpoint_facts(config, state, train_set)}
        height, width = latent_size(config, train_set)

        def losses(counters: range) -> dict[str, Tensor]:
            images = train_set.scaled(randomness.shuffled(config.seed, "order", counters, len(train_set)))
            noise = randomness.normal(config.seed, "noise", counters, (config.latent_channels, height, width))
            error, kl = state.parallel_model(images.to(ranks.device), noise.to(ranks.device))
            return {"loss": error + config.kl_weight * kl, "mse": error, "kl": kl}

        for batch in training_steps(config, state, run):
            means = state.accumulate(batch, config.micro_batch, losses)
            state.update(batch, {"mse": means["mse"], "kl": means["kl"]})
        facts: dict[str, Any] = {}
        if ranks.is_main:
            facts = finish(config, state.ema.vae, train_set, ranks)
            echo(f"autoencoder: {config.out / FOLDER}")
        return {"vae": str(config.out / FOLDER), **facts, **summary(run, "mse")}


def preview(config: AutoencoderTrainConfig) -> dict[str, Any]:
    """What --dry-run prints: the settings, the data, and what a step takes in memory and the whole run in time."""
    train_set = load_images(config, [])
    described = {"examples": len(train_set), "shape": list(train_set.images.shape[1:])}
    with process_group(config.device) as ranks:
        found = step_cost(config, train_set, ranks).estimate(config, ranks)
    return config.resolved() | {"data": described, "estimate": found}


def step_cost(config: AutoencoderTrainConfig, train_set: data.ImageDataset, ranks: Ranks) -> StepCost:
    """What a training step takes, measured on one and two images."""
    model = Reconstruction(make_vae(config, train_set)).to(ranks.device)

    def run(counters: range) -> None:
        noise = torch.zeros(len(counters), config.latent_channels, *latent_size(config, train_set))
        images = torch.zeros(len(counters), *train_set.images.shape[1:])
        model(images.to(ranks.device), noise.to(ranks.device))[0].backward()
        model.zero_grad(set_to_none=True)

    states = 4 * sum(p.nbytes for p in model.parameters())  # weights, average and AdamW's slots; gradients are measured
    return StepCost.of([(run, 1)], states)


def latent_size(config: AutoencoderTrainConfig, train_set: data.ImageDataset) -> tuple[int, int]:
    """Height and width of latents."""
    height, width = train_set.images.shape[2:]
    return height // config.downsampling, width // config.downsampling


def load_images(config: AutoencoderTrainConfig, unusable: list[data.UnreadableImage]) -> data.ImageDataset:
    """The images to train on, of which those that cannot be used are left out, unless `strict`, reported and appended."""
    if config.data in data.DATASETS:
        found = data.load(config.data, "train")
        check_fits(config, found)
        return found
    source = data.open_source(config.data, unconditional=True)
    look = look_over(source)
    side = config.image_size or look.usable(config.downsampling, LARGEST) // config.downsampling * config.downsampling
    echo(f"from {config.data}: {len(source):,} pictures, --image-size {side}, channels {look.channels} ({look})")
    images = data.in_memory(source, side, channels=look.channels, unusable=None if config.strict else unusable)
    data.report_unusable(unusable, len(source), config.out)
    check_fits(config, images)
    return images


def held_out_images(config: AutoencoderTrainConfig, train_set: data.ImageDataset) -> data.ImageDataset | None:
    """Images that training has not seen; None of a folder that is not divided into train/ and val/."""
    if config.data in data.DATASETS:
        return data.load(config.data, "held_out")
    try:
        source = data.open_source(config.data, "held_out", unconditional=True)
    except ValueError:
        return None
    _, channels, *size = train_set.images.shape
    return data.in_memory(source, (size[0], size[1]), channels=channels, split="held_out", unusable=[])


def checkpoint_facts(config: AutoencoderTrainConfig, state: TrainState, train_set: data.ImageDataset) -> dict[str, Any]:
    """What makes a checkpoint's average an autoencoder: its config, with the scale factor of its latents so far."""
    vae: Any = copy.deepcopy(state.ema.vae)
    images = some_images(train_set, config.seed)[:SOME]
    scale_to_unit(Autoencoder(vae, "", device=state.ranks.device), images, config.seed)
    return CHECKPOINT.facts_of(json.loads(vae.to_json_string()), {})


def scale_to_unit(autoencoder: Autoencoder, images: Tensor, seed: int) -> Float[Tensor, "images channels height width"]:
    """Set the scale factor to one over the standard deviation of all values of latents sampled for some images, which are
    returned unscaled.
    """
    # As for Stable Diffusion's 0.18215: diffusion assumes data of about unit variance.  [Rombach et al. 2022, D.1]
    latents = draw_latents(autoencoder, images, seed) / autoencoder.space.scale_factor
    std = float(latents.std())
    autoencoder.module.register_to_config(scaling_factor=1 / std if std > 0 and math.isfinite(std) else 1.0)
    return latents


def check_fits(config: AutoencoderTrainConfig, dataset: data.ImageDataset) -> None:
    """Raise ValueError unless the images' sides can be halved as often as the autoencoder halves them."""
    height, width = dataset.images.shape[2:]
    if height % config.downsampling or width % config.downsampling:
        raise ValueError(
            f"data set {dataset.name} has images of {height}x{width}, which {len(config.block_out_channels)} resolutions "
            f"do not halve evenly; expected multiples of {config.downsampling}: use fewer --block-out-channels"
        )


def make_vae(config: AutoencoderTrainConfig, dataset: data.ImageDataset) -> "AutoencoderKL":
    """A freshly initialised autoencoder for a data set's images."""
    _, channels, height, width = dataset.images.shape
    depth = len(config.block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.generator(config.seed, "init").initial_seed())
        return import_autoencoder_kl()(
            in_channels=channels, out_channels=channels, down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth, block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block, latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups, sample_size=max(height, width),
            mid_block_add_attention=config.mid_block_attention,
        )  # fmt: skip


def finish(
    config: AutoencoderTrainConfig, vae: "AutoencoderKL", dataset: data.ImageDataset, ranks: Ranks
) -> dict[str, Any]:
    """Set the scale factor, write the autoencoder, and measure how well held-out images are reconstructed.

    Returns what was measured, by an earlier end of the run if its files are whole: on other threads, the scale factor's last
    digits might change, and caches of latents are of one scale factor.
    """
    folder = config.out / FOLDER
    raw = Autoencoder(vae, str(folder), device=ranks.device)
    if (before := measured_before(config, raw)) is not None:
        return before
    latents = scale_to_unit(raw, some_images(dataset, config.seed), config.seed)
    write_vae(folder, vae)
    autoencoder = load_autoencoder(str(folder), device=ranks.device)
    held_out = held_out_images(config, dataset)
    images = some_images(held_out or dataset, config.seed)
    back = autoencoder.decode(draw_latents(autoencoder, images, config.seed)).cpu()
    write_png(config.out / PICTURE, side_by_side(to_uint8(images), to_uint8(back)), scale=2)
    facts = {
        "autoencoder": autoencoder.facts(),
        "latent_std": (latents.std(dim=(0, 2, 3)) * autoencoder.space.scale_factor).tolist(),
        "held_out" if held_out else "training": {"images": len(images), "mse": float(F.mse_loss(back, images))},
    }
    write_json(config.out / MEASURED, facts | provenance())
    return facts


@open_ended
class _Measured(TypedDict):
    autoencoder: dict[str, Any]
    latent_std: list[float]
    held_out: NotRequired[dict[str, Any]]
    training: NotRequired[dict[str, Any]]


def measured_before(config: AutoencoderTrainConfig, vae: Autoencoder) -> dict[str, Any] | None:
    """What OUT/autoencoder.json says, if it is of these weights and every file beside it is whole."""
    with suppress(OSError, ValueError):
        facts = read_json(config.out / MEASURED, _Measured, remedy="")
        read_image(config.out / PICTURE)
        written = load_autoencoder(str(config.out / FOLDER)).facts()
        same = written == {**facts["autoencoder"], "spec": written["spec"]}
        if same and written["sha256"] == vae.sha256:
            return {name: facts[name] for name in _Measured.__annotations__ if name in facts}
    return None


def some_images(dataset: data.ImageDataset, seed: int) -> Float[Tensor, "images channels height width"]:
    """Up to 1,000 images for measurements, all classes mixed."""
    return dataset.scaled(randomness.permutation(seed, "measured", 0, len(dataset))[:1000])


def draw_latents(autoencoder: Autoencoder, images: Tensor, seed: int) -> Float[Tensor, "images channels height width"]:
    """Scaled latents: a sample from each image's posterior."""
    moments = torch.cat([autoencoder.moments(part).cpu() for part in images.split(256)])
    noise = randomness.normal(seed, "measuring", range(len(images)), (moments.shape[1] // 2, *moments.shape[2:]))
    return scaled_sample(moments, noise, autoencoder.space)


def write_vae(folder: Path, vae: "AutoencoderKL") -> None:
    """Write a folder that diffusers opens. config.json is written last: if it is there, the weights are complete."""
    with TemporaryDirectory() as temporary:
        vae.save_pretrained(temporary)
        for name in (WEIGHTS[0], "config.json"):
            write_bytes(folder / name, (Path(temporary) / name).read_bytes())


def side_by_side(images: Tensor, back: Tensor) -> UInt8[Tensor, "channels grid_height grid_width"]:
    """Three rows of ten uint8 images, each above its reconstructions."""
    rows = [part for pair in zip(images[:30].split(10), back[:30].split(10), strict=True) for part in pair]
    return image_grid(torch.cat(rows), columns=10)
