"""From noise to images by a trained DiT: every step of a batch, and images from latents."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn import functional as F
from triptych_common.randomness import SampleNoise
from triptych_common.sampler_settings import TIMESTEPS
from triptych_common.samplers import Denoise, Step, final, guided, sampling

from triptych_dit.labels import check
from triptych_dit.model import DiT
from triptych_dit.settings import SamplerSettings
from triptych_dit.weights import FETCH, TrainedModel

if TYPE_CHECKING:
    from triptych_dit.autoencoder.model import Autoencoder

# Classes (batch,), or mixtures of classes: float weights (batch, num_classes) of the label embeddings. None: unconditional.
Labels = Num[Tensor, "batch *classes"] | None
Images = Float[Tensor, "batch channels height width"]


def trajectory(
    trained: TrainedModel, labels: Labels, indices: Sequence[int], settings: SamplerSettings, *, seed: int = 0,
    noise: SampleNoise | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Sample a batch, step by step, in the model's space; `decoded` turns it into images.

    labels: classes (batch,), mixtures of them (batch, num_classes), or None for a model without classes.
    indices: number of each sample. Sample i's noise follows from (seed, i) alone, whatever the batch.
    noise: used instead of the noise that follows from seed and indices.

    Yields a `Step` with x and predicted x_0, each (batch, channels, height, width), for every step.
    Raises ValueError for a label outside the model's classes, or guidance that the model does not support.
    """
    config, weight = trained.model.config, trained.model.pos_embed
    settings.check(config)
    check_labels(labels, config.num_classes, trained.class_names)
    if noise is None:
        shape = (config.in_channels, *config.input_size)
        noise = SampleNoise(seed, indices, shape, device=weight.device, dtype=weight.dtype)
    denoise = bind(trained.model, labels, len(indices), settings)
    # Latents exceed [-1, 1], pixels do not.
    clip = settings.clip_x_0 if settings.clip_x_0 is not None else trained.of_pixels
    return sampling(settings, denoise, trained.diffusion, noise, clip_x_0=clip)


@dataclass(frozen=True)
class Conditions:
    """The distinct classes of a batch, and which of them each sample has.

    Sampling has one timestep for the whole batch, so whatever the network computes from timestep and class alone is the same
    for all samples of a class: `DiT` computes it once for each of these classes rather than once for each sample.
    """

    classes: Num[Tensor, "conditions *labels"] | None  # labels, or mixtures of them; None: of a model without classes
    condition_of: Int[Tensor, " batch"]  # for each sample, the index of its class in `classes`

    @classmethod
    def of(cls, model: DiT, labels: Labels, batch: int) -> "Conditions":
        """The conditions of a batch with these labels."""
        device = model.pos_embed.device
        if labels is None:
            return cls(None, torch.zeros(batch, dtype=torch.long, device=device))
        classes, condition_of = torch.unique(labels.cpu(), dim=0, return_inverse=True)
        if classes.is_floating_point() and model.config.null_label is not None:
            classes = F.pad(classes, (0, 1))  # mixtures have no share of the null label
        return cls(classes.to(device), condition_of.to(device))

    def with_null(self, null_label: int) -> "Conditions":
        """The same with the null label as a last condition, which no sample has yet. Raises ValueError without classes."""
        if self.classes is None:
            raise ValueError("a model without classes has no null label")
        null = torch.tensor([null_label], device=self.classes.device)
        if self.classes.is_floating_point():
            null = F.one_hot(null, null_label + 1).to(self.classes.dtype)
        return replace(self, classes=torch.cat([self.classes, null]))

    def __len__(self) -> int:
        return 1 if self.classes is None else len(self.classes)


def bind(model: DiT, labels: Labels, batch: int, settings: SamplerSettings) -> Denoise:
    """The model with its labels and guidance, as samplers call it: with one timestep for the whole batch.

    Raises ValueError for guidance by a model without a null label.
    """
    conditions, null_label = Conditions.of(model, labels, batch), model.config.null_label
    if settings.guidance_scale != 1 and null_label is not None:
        conditions = conditions.with_null(null_label)

    def network(x: Tensor, t: Tensor, condition_of: Int[Tensor, " batch"]) -> Tensor:
        return model(x, t[:1].expand(len(conditions)), conditions.classes, condition_of)

    everywhere = settings.guidance_interval == (0, TIMESTEPS - 1)
    return guided(
        network,
        conditions.condition_of,
        None if null_label is None else len(conditions) - 1,
        settings.guidance_scale,
        guidance_channels=settings.guidance_channels,
        interval=None if everywhere else settings.guidance_interval,
    )


@torch.inference_mode()
def sample_images(
    trained: TrainedModel, labels: Labels, settings: SamplerSettings | None = None, *, count: int | None = None,
    seed: int = 0, first_index: int = 0, noise: SampleNoise | None = None, vae: str | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Images:  # fmt: skip
    """Sample a batch of images, in [-1, 1].

        trained = load_model("runs/dit")
        images = sample_images(trained, torch.tensor([3, 7]), SamplerSettings(sampler="ddim", num_inference_steps=50))

    labels: one class for each image, or a mixture. count: number of images, for a model without classes.
    settings: sampler, number of steps, guidance; by default 250 steps of DDPM without guidance.
    first_index: number of the first image: image i is the same in every batch that holds it. seed, noise: as for `trajectory`.
    vae: autoencoder of a latent model, if it has moved since training, or is not known. progress: called after each step.
    Raises ValueError as `trajectory` and `decoded` do, and if the images come out as NaN.
    """
    count = len(labels) if labels is not None else count
    if count is None:
        raise ValueError("labels are missing: pass one for each image, or, to an unconditional model, a count")
    indices = range(first_index, first_index + count)
    settings = settings or SamplerSettings()
    x = final(trajectory(trained, labels, indices, settings, seed=seed, noise=noise), progress)
    if not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"sampling gave NaN or infinity (sampler {settings.sampler}, {settings.num_inference_steps} steps): use "
            "another --sampler or --num-inference-steps, or a model that did not diverge"
        )
    return decoded(trained, x, vae=vae)


def decoded(
    trained: TrainedModel, x: Images, *, vae: str | None = None
) -> Float[Tensor, "batch image_channels image_height image_width"]:
    """Samples as images: latents are decoded, pixels stay as they are. vae, and errors: as for `autoencoder_of`."""
    autoencoder = autoencoder_of(trained, x.device, vae)
    return x if autoencoder is None else autoencoder.decode(x)


def autoencoder_of(trained: TrainedModel, device: torch.device, vae: str | None = None) -> "Autoencoder | None":
    """The autoencoder of a model's latents, loaded once; None for a model of pixels.

    vae: a folder or a name on the hub; by default where training found the autoencoder.
    Raises ValueError for another autoencoder, for one given to a model of pixels, for latents of an unknown one, and whatever
    `load_autoencoder` raises.
    """
    space, channels = trained.space, trained.model.config.in_channels
    if trained.of_pixels:
        if vae is not None:
            raise ValueError(f"vae {vae}: this model generates pixels and needs none; leave --vae out")
        return None
    if space is None and vae is None:
        raise ValueError(
            f"the model's samples have {channels} channels, which are no picture's, and no autoencoder of theirs is known; "
            "pass --vae with its folder or hub name"
        )
    download = vae is not None or trained.facts.get(FETCH, False)
    found = _autoencoder(vae or (space.spec if space else ""), download, device)
    if found.latent_channels != channels:
        raise ValueError(f"autoencoder {found.spec}: has {found.latent_channels} latent channels, the model {channels}")
    hashed = space is not None and (space.sha256 or space.encoder_sha256)  # released checkpoints only name theirs
    if space and hashed and (difference := found.space.difference(replace(space, spec="the model's"))):
        raise ValueError(f"autoencoder {found.spec}: {difference}; {_REMEDY}")
    return found


_REMEDY = "pass --vae with the folder or hub name of the autoencoder that the model's latents are of"


@lru_cache(maxsize=1)
def _autoencoder(spec: str, download: bool, device: torch.device) -> "Autoencoder":
    from triptych_dit.autoencoder.model import load_autoencoder

    try:
        return load_autoencoder(spec, device=device, download=download)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; or {_REMEDY}") from error


def check_labels(labels: Labels, num_classes: int, names: Sequence[str] = ()) -> None:
    """Raise ValueError for a label outside 0 .. num_classes-1 or the names of classes, unneeded labels, and missing ones."""
    if (labels is None) == bool(num_classes):
        expected = "one a sample" if num_classes else "none, it is unconditional"
        raise ValueError(f"labels: the model has num_classes={num_classes} and takes {expected}")
    if labels is None:
        return
    if not labels.is_floating_point():
        check(labels.unique(sorted=False).tolist(), num_classes, names)
    elif labels.shape[1:] != (num_classes,):
        raise ValueError(f"mixtures {tuple(labels.shape)}: expected (batch, {num_classes}), a weight for each class")
