"""Losses of both networks: non-saturating, R1 and path lengths.

Every random choice of a sample (latent, class, style mixing, noise, augmentation) is a function of (seed, stream, counter).
[Karras et al. 2020, section 3; Karras et al. 2020, "Training GANs with Limited Data", ADA]
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from triptych_common import randomness
from triptych_common.images import from_uint8
from triptych_common.parallel import onto

from triptych_gangealing.stylegan2.augment import PRESETS as PIPELINES
from triptych_gangealing.stylegan2.augment import augment
from triptych_gangealing.stylegan2.data import TrainingImages
from triptych_gangealing.stylegan2.discriminator import Discriminator, grouped
from triptych_gangealing.stylegan2.generator import Generator, classes_of
from triptych_gangealing.stylegan2.train_config import GanTrainConfig

Images = Float[Tensor, "batch channels height width"]


class Objective:
    """Losses of a run, each a mean over the samples of some counters: a caller weights micro-batches by their share."""

    def __init__(
        self, config: GanTrainConfig, images: TrainingImages, generator: Generator, discriminator: Discriminator
    ) -> None:
        self.config, self.images = config, images
        self.generator, self.discriminator = generator, discriminator
        self.pipeline = PIPELINES[config.augment] if config.augment != "none" else None
        weight = next(generator.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def generated(self, stream: str, counters: Sequence[int]) -> tuple[Images, Tensor | None, Tensor, Tensor]:
        """Images of a stream's samples, their classes, their styles, and w before mixing."""
        seed, config = self.config.seed, self.config
        c = self._classes(stream, counters)
        z = self._latents(f"{stream}/z", counters)
        w = self.generator.mapping(z, c)
        ws = w.unsqueeze(1).repeat(1, self.generator.num_ws, 1)
        if config.style_mixing > 0:
            other = self.generator.mapping(self._latents(f"{stream}/z-mixed", counters), c)
            # From a random layer on, 1 to num_ws - 1, another latent's style: neighbouring layers must not rely on each other.
            layer = torch.arange(self.generator.num_ws)
            mixed = randomness.uniform(seed, f"{stream}/mixed", counters) < config.style_mixing
            cut = 1 + (randomness.uniform(seed, f"{stream}/cut", counters) * (len(layer) - 1)).long()
            replaced = mixed[:, None] & (layer >= cut[:, None])
            ws = torch.where(replaced.to(self.device)[:, :, None], other.unsqueeze(1), ws)
        synthesis = self.generator.synthesis
        noise = synthesis.noise(seed, f"{stream}/noise", counters) if config.noise else "none"
        return synthesis(ws, noise=noise), c, ws, w

    def real(self, counters: Sequence[int]) -> tuple[Images, Tensor | None]:
        """Training images of some counters in [-1, 1], and their classes; every epoch is in another order."""
        items = randomness.shuffled(self.config.seed, "order", counters, len(self.images))
        pixels = onto(self.device, self.images.batch(items))
        return from_uint8(pixels, self.dtype), classes_of(self.generator, counters, self.images.labels[items])

    def generator_loss(self, counters: Sequence[int], p: float) -> tuple[Tensor, Tensor]:
        """-log sigmoid D(G(z)), the mean; and the mean w, of which the caller keeps a running average."""
        counters = self._in_groups(counters)
        images, c, _, w = self.generated("generator", counters)
        logits = self._judged(images, c, "generator", counters, p)
        # -log sigmoid(x) is softplus(-x), and does not overflow.
        return F.softplus(-logits).mean(), w.detach().mean(dim=0)

    def discriminator_loss(self, counters: Sequence[int], p: float) -> tuple[Tensor, Tensor]:
        """-log(1 - sigmoid D(G(z))) - log sigmoid D(real), the mean; and the mean sign of D(real)."""
        counters = self._in_groups(counters)
        with torch.no_grad():
            images, c, _, _ = self.generated("discriminator", counters)
        fake = self._judged(images, c, "discriminator/fake", counters, p)
        real_images, real_c = self.real(counters)
        real = self._judged(real_images, real_c, "discriminator/real", counters, p)
        loss = F.softplus(fake).mean() + F.softplus(-real).mean()
        return loss, real.detach().sign().mean()

    def r1_penalty(self, counters: Sequence[int], p: float) -> Tensor:
        """|gradient of D at real images|^2, the mean; through the augmentation.  [Mescheder et al. 2018]"""
        counters = self._in_groups(counters)
        images, c = self.real(counters)
        images.requires_grad_(True)
        logits = self._judged(images, c, "discriminator/real", counters, p)
        # Images do not interact except in the minibatch deviation, so the gradient of the sum has each image's own.
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradient.square().sum(dim=(1, 2, 3)).mean()

    def path_length_penalty(self, counters: Sequence[int], mean: Tensor) -> tuple[Tensor, Tensor]:
        """(length - mean)^2, averaged, and the mean length: |J^T y| for a random image y, J the Jacobian by the styles.

        mean: running average of the lengths of earlier batches.  [Karras et al. 2020, eq. 4]
        """
        images, _, ws, _ = self.generated("path", counters)
        seed, shape = self.config.seed, tuple(images.shape[1:])
        y = randomness.normal(seed, "path/y", counters, shape, dtype=self.dtype, device=self.device)
        # Scaled by the number of pixels, so that lengths do not depend on the resolution.
        y = y / math.sqrt(shape[1] * shape[2])
        # The gradient of <G(w), y> is J^T y: no Jacobian is ever formed.
        (gradient,) = torch.autograd.grad((images * y).sum(), ws, create_graph=True)
        lengths = gradient.square().sum(dim=2).mean(dim=1).sqrt()
        return (lengths - mean).square().mean(), lengths.detach().mean()

    def _judged(self, images: Images, c: Tensor | None, stream: str, counters: Sequence[int], p: float) -> Tensor:
        if self.pipeline is not None and p > 0:
            images = augment(images, p, self.config.seed, f"{stream}/augment", counters, self.pipeline)
        return self.discriminator(images, c)

    def _in_groups(self, counters: Sequence[int]) -> list[int]:
        order = grouped(len(counters), self.discriminator.config.mbstd_group_size)
        return [counters[i] for i in order]

    def _latents(self, stream: str, counters: Sequence[int]) -> Float[Tensor, "batch z_dim"]:
        z_dim = self.generator.config.z_dim
        return randomness.normal(self.config.seed, stream, counters, (z_dim,), dtype=self.dtype).to(self.device)

    def _classes(self, stream: str, counters: Sequence[int]) -> Tensor | None:
        """Classes of randomly chosen training images, so that both have the same frequencies."""
        items = (randomness.uniform(self.config.seed, f"{stream}/class", counters) * len(self.images)).long()
        return classes_of(self.generator, counters, self.images.labels[items])
