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


class Choice(NamedTuple):
    """The cluster of each image, and whether it is the mirror image that belongs there."""

    cluster: Int[Tensor, " n"]
    flipped: Bool[Tensor, " n"]

    def turned(self, images: Images) -> Images:
        """Each image as it belongs there."""
        return torch.where(self.flipped[:, None, None, None], images.flip(3), images)


class Terms(NamedTuple):
    """Of each image: distance to its target, total variation and mean square of its flow."""

    distance: Float[Tensor, " n"]
    tv: Float[Tensor, " n"]
    identity: Float[Tensor, " n"]


class Objective:
    """Samples of a frozen generator as functions of (seed, stream, counter), and the loss of aligning them."""

    def __init__(self, config: AlignTrainConfig, generator: Generator, distance: PerceptualDistance) -> None:
        if config.cutoff > generator.num_ws:
            raise ValueError(
                f"cutoff {config.cutoff}: expected 0 to {generator.num_ws}, the number of the generator's styles"
            )
        if generator.config.image_channels != 3:
            raise ValueError(
                f"generator {config.generator}: its images have {generator.config.image_channels} channels, expected 3; train one "
                "on RGB images"
            )
        if generator.config.resolution < config.input_size:
            raise ValueError(
                f"input_size {config.input_size}: the generator's images have {generator.config.resolution} pixels; "
                f"pass --input-size {generator.config.resolution} or less"
            )
        self.config, self.generator, self.distance = config, generator, distance
        self.groups: nn.Module | None = None  # with `assignment` "descriptor"; found where training starts

    @torch.no_grad()
    def samples(self, counters: Sequence[int], stream: str = "align") -> tuple[Float[Tensor, "n w"], Images]:
        """Styles and images, unaligned."""
        weight, seed = next(self.generator.parameters()), self.config.seed
        z = randomness.normal(seed, f"{stream}/z", counters, (self.generator.config.z_dim,)).to(weight)
        w = self.generator.mapping(z, classes_of(self.generator, counters))
        ws = w[:, None].expand(-1, self.generator.num_ws, -1)
        return w, self._images(ws, counters, f"{stream}/noise")

    def targets(
        self,
        w: Float[Tensor, "n w"],
        c: Float[Tensor, "n w"],
        psi: float,
        counters: Sequence[int],
        stream: str = "align",
    ) -> Images:
        """Targets: the pose of c, or of a point on the way to it, with the appearance of w, reduced to the input size.

        Noise is drawn anew: if it were shared with the input, it would betray where things lay.
        """
        ws = mixed(w, c, num_ws=self.generator.num_ws, cutoff=self.config.cutoff, psi=psi)
        return reduced(self._images(ws, counters, f"{stream}/target-noise"), self.config.input_size)

    def terms(
        self,
        transformer: SpatialTransformer,
        mode: Mode,
        w: Float[Tensor, "n w"],
        images: Images,
        choice: Choice,
        psi: float,
        counters: Sequence[int],
        stream: str = "align",
    ) -> Terms:
        """Loss terms of aligning images to the clusters chosen for them."""
        images = choice.turned(images)
        aligned = transformer(images, iterations=self.config.iterations, head=choice.cluster)
        size = (self.config.input_size, self.config.input_size)
        warped = aligned.warp.sample(images, size, padding=self.config.padding)
        distance = self.distance(warped, self.targets(w, mode(choice.cluster), psi, counters, stream))
        if aligned.delta is None:
            return Terms(distance, torch.zeros_like(distance), torch.zeros_like(distance))
        return Terms(distance, total_variation(aligned.delta), flow_identity(aligned.delta))

    @torch.no_grad()
    def choose(
        self,
        transformer: SpatialTransformer,
        mode: Mode,
        w: Float[Tensor, "n w"],
        images: Images,
        psi: float,
        counters: Sequence[int],
        stream: str = "align",
    ) -> Choice:
        """The cluster and side (mirrored or not) to which each image comes nearest: the minimum in equation 4.6.

        Up to rounding, the distances are those of `terms` for every cluster in turn; what they share is computed once. With
        `assignment` "similarity" they are distances without the flow, with "descriptor" those of the images' descriptions to the
        centres of groups.
        """
        n, clusters, config = len(images), self.config.clusters, self.config
        sides = (images, images.flip(3)) if config.flips else (images,)
        if clusters * len(sides) == 1:
            return Choice(*(torch.zeros(n, dtype=kind, device=images.device) for kind in (torch.long, torch.bool)))
        if self.groups is not None:
            cluster = self.groups(images.float()).argmax(1)
            return Choice(cluster, torch.zeros_like(cluster, dtype=torch.bool))
        size = (config.input_size, config.input_size)
        centres = mode(torch.arange(clusters, device=images.device)).repeat(n, 1)
        again = [counter for counter in counters for _ in range(clusters)]
        targets = self.targets(w.repeat_interleave(clusters, 0), centres, psi, again, stream)
        with_flow, distances = config.assignment == "whole", []
        for side in sides:
            warp = transformer(side, iterations=config.iterations, with_flow=with_flow).warp
            warped = warp.sample(side.repeat_interleave(clusters, 0), size, padding=config.padding)
            distances.append(self.distance(warped, targets).view(n, clusters))
        best = (torch.cat(distances, 1) * mode.handicap.exp().repeat(len(sides))).argmin(1)
        return Choice(best % clusters, best >= clusters)

    def loss(
        self, transformer: SpatialTransformer, mode: Mode, counters: Sequence[int], images_seen: int
    ) -> dict[str, Tensor]:
        """Mean "loss" over some samples, to be differentiated; its terms; and the samples' shares of the clusters."""
        psi = psi_schedule(images_seen, self.config.psi_images)
        w, images = self.samples(counters)
        choice = self.choose(transformer, mode, w, images, psi, counters)
        terms = self.terms(transformer, mode, w, images, choice, psi, counters)
        distance, tv, identity = (term.mean() for term in terms)
        shares = torch.bincount(choice.cluster, minlength=self.config.clusters) / len(counters)
        return {
            "loss": distance + self.config.tv_weight * tv + self.config.identity_weight * identity,
            "distance": distance,
            "tv": tv,
            "identity": identity,
            "cluster_shares": shares,
        }

    def _images(self, ws: Float[Tensor, "n num_ws w"], counters: Sequence[int], stream: str) -> Images:
        noise = self.generator.synthesis.noise(self.config.seed, stream, counters)
        return self.generator.synthesis(ws, noise=noise)


def flow_identity(delta: Delta) -> Float[Tensor, " n"]:
    """L_I of each image: mean square of the displacements, in normalised units.  [thesis 4.3.1; weight 1]"""
    return delta.square().mean(dim=(1, 2, 3))


def psi_schedule(step: float, total: float) -> float:
    """How much of an image's own style its target's early layers keep: a cosine from 1 at step 0 to 0 at `total`, then 0.

    With `total` 0 the target is the learned mode from the first step. Raises ValueError for a negative total or step.
    """
    if total < 0 or step < 0:
        raise ValueError(f"psi at step {step} of {total}: expected numbers that are not negative")
    return 0.0 if step >= total else (1 + math.cos(math.pi * step / total)) / 2
