"""A descriptor of what an image shows, invariant to pose and colours: clusters of objects, rather than of poses, start from it.

The perceptual distance must see poses, so before anything is aligned it groups images by pose. A copy of its encoder is trained
to recognise samples in views that are turned, scaled, sheared, moved and recoloured, and k-means groups samples by its output,
both in `groups`. No label is used. This is not in the thesis, which starts from the perceptual distance: its objects all stand
upright.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from triptych_gangealing.config import EncoderConfig
from triptych_gangealing.encoders.perceptual import Encoder
from triptych_gangealing.spatial_transformer import reduced

HIDDEN, DIM = 128, 64

Images = Float[Tensor, "n 3 height width"]


class Descriptor(nn.Module):
    """Images in [-1, 1] to unit vectors, from the means of an encoder's feature maps."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.trunk = Encoder(config)
        channels = sum(config.widths[-config.compared :])
        self.head = nn.Sequential(
            nn.Linear(channels, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM)
        )

    def forward(self, images: Images) -> Float[Tensor, "n dim"]:
        return F.normalize(self.head(torch.cat([level.mean((2, 3)) for level in self.trunk(images)], dim=1)))


class Groups(nn.Module):
    """Images to logits of clusters: the nearer a centre is to their description, the higher.

    size: height and width that images are brought to, those of the samples it was trained on.
    """

    centres: Float[Tensor, "clusters dim"]

    def __init__(self, config: EncoderConfig, size: int, clusters: int) -> None:
        super().__init__()
        self.size, self.descriptor = size, Descriptor(config)
        self.register_buffer("centres", torch.zeros(clusters, DIM))

    def forward(self, images: Images) -> Float[Tensor, "n clusters"]:
        return -torch.cdist(self.descriptor(reduced(images, self.size)), self.centres)

    def shape(self) -> dict[str, Any]:
        """The shape for `from_shape`, as JSON holds it."""
        return {"encoder": asdict(self.descriptor.trunk.config), "size": self.size, "clusters": len(self.centres)}

    @classmethod
    def from_shape(cls, shape: Mapping[str, Any]) -> "Groups":
        """A network of random weights with this shape. Raises KeyError or TypeError for anything else."""
        encoder = EncoderConfig(**{**shape["encoder"], "widths": tuple(shape["encoder"]["widths"])})
        return cls(encoder, shape["size"], shape["clusters"])
