"""The spatial transformer: an image to the warp that brings it into alignment.  [thesis 4.3.1]

A similarity network looks at the image and turns, scales and shifts it; a flow network looks at the result and displaces each
point. Both are made of the blocks of StyleGAN2's discriminator and end in layers of zeros, so that training starts from the
identity.

Convention: that of `Warp`. Warps map output (aligned) to input coordinates; the networks see an oblong image squeezed to a
square, and a similarity acts on that square.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from triptych_gangealing.config import SMALLEST, SpatialTransformerConfig
from triptych_gangealing.stylegan2.layers import Conv2d, FullyConnected
from triptych_gangealing.warp import Affine, Flow, Warp

Images = Float[Tensor, "n channels height width"]
Delta = Float[Tensor, "n 2 rows columns"]


class Similarity(NamedTuple):
    """Rotation (radians), logarithm of the scale and shift (normalised units) of n similarities, output to input."""

    rotation: Float[Tensor, " n"]
    log_scale: Float[Tensor, " n"]
    shift: Float[Tensor, "n 2"]

    def affine(self) -> Affine:
        return Affine.similarity(self.rotation, self.log_scale, self.shift)

    def after(self, first: "Similarity") -> "Similarity":
        """The similarity that takes a point through `first`, then through this one: matrices self @ first."""
        # Rotations add up, and may exceed pi.
        x, y = first.shift.unbind(1)
        cos, sin = self.rotation.cos(), self.rotation.sin()
        turned = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=1)
        shift = self.log_scale.exp()[:, None] * turned + self.shift
        return Similarity(self.rotation + first.rotation, self.log_scale + first.log_scale, shift)


@dataclass(frozen=True)
class Aligned:
    """Warps of n images; or of n x heads, all heads of an image, then all of the next.

    similarity: all iterations of the similarity network together. delta: the flow network's displacements, in normalised units.
    Either is None where the transformer has no such network.
    """

    warp: Warp
    similarity: Similarity | None
    delta: Float[Tensor, "n 2 rows columns"] | None


class SpatialTransformer(nn.Module):
    """Predicts the warp that aligns each image; untrained, it predicts the identity.

    Images (n, 3, height, width), values in [-1, 1], of any size; returns `Aligned`, whose warp maps aligned coordinates to those of
    the image.  [thesis 4.3.1]
    """

    def __init__(self, config: SpatialTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.similarity = SimilarityNetwork(config) if "similarity" in config.transforms else None
        self.flow = FlowNetwork(config) if "flow" in config.transforms else None

    def forward(
        self, images: Images, *, iterations: int = 1, head: Int[Tensor, " n"] | None = None, with_flow: bool = True
    ) -> Aligned:
        """Warps of the images, by each image's `head`, or by all heads.

        iterations: how often the similarity network looks, each time at the original image as aligned so far. with_flow: whether
        flow follows; without a similarity network it always does. Raises ValueError for images of other channels, heads out of
        range, or several iterations without a similarity network.
        """
        self._check(images, iterations, head)
        heads, seen = self.config.heads, reduced(images, self.config.input_size)
        flow = self.flow if with_flow or self.similarity is None else None
        similarity = delta = None
        # Without `head` every image is repeated for all heads: head varies fastest.
        rows = torch.arange(heads, device=images.device).repeat(len(images)) if head is None else head
        if self.similarity is not None:
            similarity = self._similarity(chosen(self.similarity(seen), head))
            images = images.repeat_interleave(heads, dim=0) if head is None and heads > 1 else images
            for _ in range(iterations - 1):
                # The original is resampled by the composed warp: blur does not add up over iterations.
                seen = self._seen(images, similarity)
                # What it sees is already aligned: a point passes the new similarity first, then the earlier ones.
                similarity = similarity.after(self._similarity(chosen(self.similarity(seen), rows)))
            if flow is not None:
                seen = self._seen(images, similarity)
        if flow is not None:
            delta = flow(seen, rows if similarity is not None else head)
        # From output to input: the flow first, then the similarity.
        stages = (() if delta is None else (Flow(delta),)) + (() if similarity is None else (similarity.affine(),))
        return Aligned(Warp(stages), similarity, delta)

    def align_flips(
        self, images: Images, *, iterations: int = 1, head: Int[Tensor, " n"] | None = None
    ) -> tuple[Aligned, Bool[Tensor, " rows"]]:
        """Warps of the images or of their mirror images, whichever have the smoother flow, and which were mirrored.

        The warps lead to the original images either way; of a mirrored one, similarity and delta are of its mirror image.
        Raises as `forward`, and ValueError without a flow network.
        """
        if self.flow is None:
            raise ValueError("flips: without flow nothing measures which side is better; expected transforms with flow")
        plain, mirrored = (self(x, iterations=iterations, head=head) for x in (images, images.flip(3)))
        flipped = total_variation(mirrored.delta) < total_variation(plain.delta)

        def better(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(flipped.view(-1, *[1] * (a.ndim - 1)), a, b)

        similarity, delta = None, better(mirrored.delta, plain.delta)
        if self.similarity is not None:
            similarity = Similarity(*map(better, mirrored.similarity, plain.similarity))
        return _leading_back(similarity, delta, flipped), flipped

    def align_turned(
        self, images: Images, flipped: Bool[Tensor, " n"], *, iterations: int = 1, head: Int[Tensor, " n"] | None = None
    ) -> Aligned:
        """Warps of the images, or of the mirror images of those that are `flipped`; they lead to the originals either way.

        Of a mirrored one, similarity and delta are of its mirror image. Raises as `forward`.
        """
        turned = torch.where(flipped[:, None, None, None], images.flip(3), images)
        aligned = self(turned, iterations=iterations, head=head)
        return _leading_back(aligned.similarity, aligned.delta, flipped)

    def _seen(self, images: Images, similarity: Similarity) -> Float[Tensor, "n channels size size"]:
        size = (self.config.input_size, self.config.input_size)
        return Warp((similarity.affine(),)).sample(images, size, padding=self.config.padding)

    @staticmethod
    def _similarity(raw: Float[Tensor, "n 4"]) -> Similarity:
        return Similarity(math.pi * raw[:, 0].tanh(), raw[:, 1], raw[:, 2:])  # zeros are the identity

    def _check(self, images: Tensor, iterations: int, head: Tensor | None) -> None:
        config = self.config
        if images.shape[1] != config.image_channels:
            raise ValueError(f"images of {images.shape[1]} channels: expected {config.image_channels}")
        if iterations < 1 or (iterations > 1 and self.similarity is None):
            expected = "1, as the transformer has no similarity network" if self.similarity is None else "at least 1"
            raise ValueError(f"iterations {iterations}: expected {expected}")
        if head is not None and len(head) and not 0 <= int(head.min()) <= int(head.max()) < config.heads:
            raise ValueError(f"head {int(head.min())}..{int(head.max())}: expected 0 to {config.heads - 1}")


def _leading_back(similarity: Similarity | None, delta: Delta | None, flipped: Bool[Tensor, " n"]) -> Aligned:
    """The warps of images, or of mirror images where `flipped`, to the images themselves."""
    like = delta if delta is not None else similarity.shift if similarity is not None else None
    assert like is not None  # a transformer has one of them
    identity = torch.eye(2, 3, dtype=like.dtype, device=like.device).repeat(len(like), 1, 1)
    matrix = identity if similarity is None else similarity.affine().matrix
    # A mirror image's x is the original's -x: the first row changes its sign.
    signs = torch.where(flipped, -1.0, 1.0).to(like)
    matrix = matrix * torch.stack([signs, torch.ones_like(signs)], 1)[:, :, None]
    flow = () if delta is None else (Flow(delta),)
    return Aligned(Warp((*flow, Affine(matrix))), similarity, delta)


class ClusterClassifier(nn.Module):
    """Images to logits over classes, by a network like the transformer's similarity trunk; by default the config's classes."""

    def __init__(self, config: SpatialTransformerConfig, num_classes: int | None = None) -> None:
        super().__init__()
        self.config, channels = config, config.channels_at(SMALLEST)
        self.trunk = SimilarityTrunk(config, hidden=config.classifier_hidden)
        features = channels if config.classifier_hidden else channels * SMALLEST**2
        self.head = FullyConnected(features, config.classes if num_classes is None else num_classes)

    @classmethod
    def from_transformer(cls, transformer: SpatialTransformer, num_classes: int | None = None) -> "ClusterClassifier":
        """One that starts from a copy of a transformer's trunk; its last layer is random.  [thesis 4.3.2]

        Raises ValueError for a transformer without a similarity network.
        """
        if transformer.similarity is None:
            raise ValueError("classifier: the transformer has no similarity network to start from")
        classifier = cls(transformer.config, num_classes).to(next(transformer.parameters()))
        trunk = transformer.similarity.trunk.state_dict()
        classifier.trunk.load_state_dict({name: trunk[name] for name in classifier.trunk.state_dict()})
        return classifier

    def forward(self, images: Images) -> Float[Tensor, "n classes"]:
        return self.head(self.trunk(reduced(images, self.config.input_size)))


def reduced(images: Images, size: int) -> Float[Tensor, "n channels {size} {size}"]:
    """Images at `size` x `size`: reduced with an antialiasing tent filter, enlarged bilinearly, or unchanged."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)


def total_variation(delta: Delta) -> Float[Tensor, " n"]:
    """L_TV of each image: mean Huber loss (threshold 1) of the steps between neighbouring cells, along x plus along y.

    delta: displacements in normalised units. A grid of one cell along an axis has no steps along it.
    [thesis 4.3.1; weight 1000 with a self-supervised distance, 2500 with LPIPS]
    """
    # Not independent of resolution: on a grid twice as fine steps are half as long, and the loss, quadratic below 1, a quarter.
    return _huber(delta.diff(dim=3)) + _huber(delta.diff(dim=2))


def _huber(steps: Delta) -> Float[Tensor, " n"]:
    if not steps.numel():
        return steps.new_zeros(len(steps))
    return F.huber_loss(steps, torch.zeros_like(steps), reduction="none").mean(dim=(1, 2, 3))


# --- Networks


class Residual(nn.Module):
    """The residual block of StyleGAN2's discriminator; with "down" it halves height and width."""

    def __init__(self, channels: int, after: int, resample: Literal["same", "down"] = "down") -> None:
        super().__init__()
        self.conv0 = Conv2d(channels, channels, 3, activation="lrelu")
        self.conv1 = Conv2d(channels, after, 3, activation="lrelu", resample=resample)
        self.skip = Conv2d(channels, after, 1, bias=False, resample=resample)

    def forward(self, x: Float[Tensor, "n maps height width"]) -> Float[Tensor, "n new_maps new_height new_width"]:
        skip = self.skip(x, gain=math.sqrt(0.5))  # so that the sum of both branches has unit variance
        return skip + self.conv1(self.conv0(x), gain=math.sqrt(0.5))


def _down_to(size: int, config: SpatialTransformerConfig) -> list[nn.Module]:
    """From an image to feature maps of `size` pixels."""
    at, channels = config.input_size, config.channels_at(config.input_size)
    layers: list[nn.Module] = [Conv2d(config.image_channels, channels, 1, activation="lrelu")]
    while at > size:
        layers.append(Residual(config.channels_at(at), config.channels_at(at // 2)))
        at //= 2
    return layers


class SimilarityTrunk(nn.Sequential):
    """Images of `input_size` to features."""

    def __init__(self, config: SpatialTransformerConfig, *, hidden: bool = True) -> None:
        channels = config.channels_at(SMALLEST)
        # In this order, which decides what a seed initialises.
        layers = [*_down_to(SMALLEST, config), Conv2d(channels, channels, 3, activation="lrelu"), nn.Flatten()]
        if hidden:
            layers.append(FullyConnected(channels * SMALLEST**2, channels, activation="lrelu"))
        super().__init__(*layers)


class SimilarityNetwork(nn.Module):
    """Images of `input_size` to four numbers a head: rotation before its tanh, log scale, shift in x and in y."""

    def __init__(self, config: SpatialTransformerConfig) -> None:
        super().__init__()
        self.heads, self.trunk = config.heads, SimilarityTrunk(config)
        self.head = FullyConnected(config.channels_at(SMALLEST), 4 * config.heads)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Images) -> Float[Tensor, "n heads 4"]:
        return self.head(self.trunk(images)).unflatten(1, (self.heads, 4))


class FlowNetwork(nn.Module):
    """Images of `input_size` to displacements in normalised units: by one head for each image, or by all heads in turn."""

    def __init__(self, config: SpatialTransformerConfig) -> None:
        super().__init__()
        self.config, channels = config, config.channels_at(config.flow_size)
        self.trunk = nn.Sequential(
            *_down_to(config.flow_size, config),
            Residual(channels, channels, resample="same"),
            Conv2d(channels, channels, 3, activation="lrelu"),
        )
        # Zero displacements are upsampled to zeros whatever the mask, whose layers may therefore start at random.
        self.delta = _two_convolutions(channels, 2 * config.heads, config.flow_activation)
        nn.init.zeros_(self.delta.get_parameter("1.weight"))
        self.mask = _two_convolutions(channels, 9 * config.flow_upsampling**2 * config.heads, config.flow_activation)

    def forward(self, images: Images, head: Int[Tensor, " n"] | None) -> Float[Tensor, "rows 2 fine_height fine_width"]:
        config, x = self.config, self.trunk(images)
        delta = chosen(self.delta(x).unflatten(1, (config.heads, 2)), head)
        cells = (config.heads, 9, config.flow_upsampling, config.flow_upsampling)
        mask = chosen(self.mask(x).unflatten(1, cells), head)
        # The released code multiplies by the upsampling factor, 8, as RAFT does, whose units are cells; here they are normalised.
        return convex_upsample(delta, mask, config.flow_padding) * config.flow_unit_factor


def _two_convolutions(channels: int, out: int, activation: Literal["lrelu", "relu"]) -> nn.Sequential:
    return nn.Sequential(Conv2d(channels, channels, 3, activation=activation), Conv2d(channels, out, 3))


def convex_upsample(
    delta: Float[Tensor, "n 2 height width"],
    mask: Float[Tensor, "n 9 factor factor height width"],
    padding: Literal["replicate", "zeros"] = "replicate",
) -> Float[Tensor, "n 2 fine_height fine_width"]:
    """Displacements on a grid `factor` times finer: each a convex combination of the 3 x 3 coarse ones around, in their units.

    mask: logits of the neighbours' weights (row by row) for each of the finer points of a cell (row, column).
    [Teed and Deng 2020, "RAFT", 3.3]
    """
    (n, _, height, width), factor = delta.shape, mask.shape[2]
    framed = F.pad(delta, (1, 1, 1, 1), mode="replicate" if padding == "replicate" else "constant")
    neighbours = F.unfold(framed, 3).view(n, 2, 9, 1, 1, height, width)
    # n 2 9 factor factor height width, summed over 9 and reordered: n 2 height factor width factor
    fine = (neighbours * mask.softmax(dim=1)[:, None]).sum(dim=2).permute(0, 1, 4, 2, 5, 3)
    return fine.reshape(n, 2, height * factor, width * factor)


def chosen(values: Float[Tensor, "n heads *rest"], head: Int[Tensor, " n"] | None) -> Float[Tensor, "rows *rest"]:
    """The values of each image's head; without heads, of all heads in turn."""
    return values.flatten(0, 1) if head is None else values[torch.arange(len(values), device=values.device), head]
