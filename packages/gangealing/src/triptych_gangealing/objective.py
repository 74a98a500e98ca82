"""What GANgealing minimises: how far a warped sample is from its target, and how rough its flow.  [thesis 4.3]"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from triptych_common import randomness

from triptych_gangealing.encoders.perceptual import PerceptualDistance
from triptych_gangealing.modes import Mode, mixed
from triptych_gangealing.spatial_transformer import Delta, SpatialTransformer, reduced, total_variation
from triptych_gangealing.stylegan2.generator import Generator, classes_of
from triptych_gangealing.train_config import AlignTrainConfig

Images = Float[Tensor, "n 3 height width"]


class Samples(NamedTuple):
    """Samples of a frozen generator, number `counters` of a stream: styles and unaligned images."""

    w: Float[Tensor, "n w"]
    images: Images
    counters: Sequence[int]
    stream: str


class Choice(NamedTuple):
    """The cluster of each image, and whether its mirror image fits better there."""

    cluster: Int[Tensor, " n"]
    flipped: Bool[Tensor, " n"]

    def turned(self, images: Images) -> Images:
        """Each image, mirrored where that fits better."""
        return torch.where(self.flipped[:, None, None, None], images.flip(3), images)


class Terms(NamedTuple):
    """Loss terms of each image: distance to its target, total variation and mean square of its flow."""

    distance: Float[Tensor, " n"]
    tv: Float[Tensor, " n"]
    identity: Float[Tensor, " n"]


class Objective:
    """Samples of a frozen generator as functions of (seed, stream, counter), and the loss of aligning them."""

    def __init__(self, config: AlignTrainConfig, generator: Generator, distance: PerceptualDistance) -> None:
        channels, resolution = generator.config.image_channels, generator.config.resolution
        if config.cutoff > generator.num_ws:
            raise ValueError(f"cutoff {config.cutoff}: expected 0 to {generator.num_ws}, the generator's styles")
        if channels != 3:
            found = f"generator {config.generator}: its images have {channels} channels"
            raise ValueError(f"{found}, expected 3; train one on RGB images")
        if resolution < config.input_size:
            found = f"input_size {config.input_size}: the generator's images have {resolution} pixels"
            raise ValueError(f"{found}; pass --input-size {resolution} or less")
        self.config, self.generator, self.distance = config, generator, distance
        self.groups: nn.Module | None = None  # with `assignment` "descriptor", set when training starts

    @torch.no_grad()
    def samples(self, counters: Sequence[int], stream: str = "align") -> Samples:
        """Samples number `counters` of a stream."""
        weight, seed = next(self.generator.parameters()), self.config.seed
        z = randomness.normal(seed, f"{stream}/z", counters, (self.generator.config.z_dim,)).to(weight)
        w = self.generator.mapping(z, classes_of(self.generator, counters))
        ws = w[:, None].expand(-1, self.generator.num_ws, -1)
        return Samples(w, self._images(ws, counters, f"{stream}/noise"), counters, stream)

    def targets(self, samples: Samples, c: Float[Tensor, "n w"], psi: float) -> Images:
        """Targets: the pose of c, or of a point on the way to it, with the appearance of w, reduced to the input size."""
        # With gradients, unlike the samples: through its targets c is learned.
        # Fresh noise: shared with the input, its fixed pattern would give away where things were.
        ws = mixed(samples.w, c, num_ws=self.generator.num_ws, cutoff=self.config.cutoff, psi=psi)
        images = self._images(ws, samples.counters, f"{samples.stream}/target-noise")
        return reduced(images, self.config.input_size)

    def terms(self, transformer: SpatialTransformer, mode: Mode, samples: Samples, choice: Choice, psi: float) -> Terms:
        """Loss terms of aligning samples to the clusters chosen for them."""
        # A mirrored sample is aligned to a target that is not mirrored: its pose is the mode's either way.
        images = choice.turned(samples.images)
        aligned = transformer(images, iterations=self.config.iterations, head=choice.cluster)
        size = (self.config.input_size, self.config.input_size)
        warped = aligned.warp.sample(images, size, padding=self.config.padding)
        distance = self.distance(warped, self.targets(samples, mode(choice.cluster), psi))
        if aligned.delta is None:
            return Terms(distance, torch.zeros_like(distance), torch.zeros_like(distance))
        return Terms(distance, total_variation(aligned.delta), flow_identity(aligned.delta))

    @torch.no_grad()
    def choose(self, transformer: SpatialTransformer, mode: Mode, samples: Samples, psi: float) -> Choice:
        """The cluster and side (mirrored or not) to which each image comes nearest: the minimum in equation 4.6.

        Up to rounding, the distances are those of `terms` for every cluster in turn. With `assignment` "similarity" they leave
        the flow out; with "descriptor" they are those of the images' descriptions to the centres of groups.
        """
        images, clusters, config = samples.images, self.config.clusters, self.config
        sides = (images, images.flip(3)) if config.flips else (images,)
        if clusters * len(sides) == 1:
            cluster = torch.zeros(len(images), dtype=torch.long, device=images.device)
            return Choice(cluster, cluster.bool())
        if self.groups is not None:
            cluster = self.groups(images.float()).argmax(1)
            return Choice(cluster, torch.zeros_like(cluster, dtype=torch.bool))
        size = (config.input_size, config.input_size)
        # Rows are images x clusters, all clusters of an image together, as the transformer orders its heads.
        centres = mode(torch.arange(clusters, device=images.device)).repeat(len(images), 1)
        again = [counter for counter in samples.counters for _ in range(clusters)]
        repeated = samples._replace(w=samples.w.repeat_interleave(clusters, 0), counters=again)
        targets = self.targets(repeated, centres, psi)
        with_flow, distances = config.assignment == "whole", []
        for side in sides:
            warp = transformer(side, iterations=config.iterations, with_flow=with_flow).warp
            warped = warp.sample(side.repeat_interleave(clusters, 0), size, padding=config.padding)
            distances.append(self.distance(warped, targets).view(-1, clusters))
        # Columns: clusters of the plain side, then of the mirrored one.
        best = (torch.cat(distances, 1) * mode.handicap.exp().repeat(len(sides))).argmin(1)
        return Choice(best % clusters, best >= clusters)

    def loss(
        self, transformer: SpatialTransformer, mode: Mode, counters: Sequence[int], images_seen: int
    ) -> dict[str, Tensor]:
        """Mean "loss" over some samples, to be differentiated; its terms; and each cluster's share of the samples."""
        psi = psi_schedule(images_seen, self.config.psi_images)
        samples = self.samples(counters)
        # The minimum over clusters is found without gradients; only the winner is computed again, with them.
        choice = self.choose(transformer, mode, samples, psi)
        distance, tv, identity = (term.mean() for term in self.terms(transformer, mode, samples, choice, psi))
        shares = torch.bincount(choice.cluster, minlength=self.config.clusters) / len(counters)
        loss = distance + self.config.tv_weight * tv + self.config.identity_weight * identity
        return {"loss": loss, "distance": distance, "tv": tv, "identity": identity, "cluster_shares": shares}

    def _images(self, ws: Float[Tensor, "n num_ws w"], counters: Sequence[int], stream: str) -> Images:
        noise = self.generator.synthesis.noise(self.config.seed, stream, counters)
        return self.generator.synthesis(ws, noise=noise)


def flow_identity(delta: Delta) -> Float[Tensor, " n"]:
    """L_I of each image: mean square of the displacements, in normalised units.  [thesis 4.3.1; weight 1]"""
    return delta.square().mean(dim=(1, 2, 3))


def psi_schedule(step: float, total: float) -> float:
    """The share of its own style that an image's target keeps in early layers: a cosine from 1 at step 0 to 0 at `total`, then 0.

    With `total` 0 the target is the mode from the first step. Raises ValueError for a negative total or step.
    """
    if total < 0 or step < 0:
        raise ValueError(f"psi at step {step} of {total}: expected numbers that are not negative")
    return 0.0 if step >= total else (1 + math.cos(math.pi * step / total)) / 2
