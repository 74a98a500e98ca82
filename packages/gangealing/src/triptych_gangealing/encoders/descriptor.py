"""A descriptor of what an image shows, invariant to pose and colours: clusters of objects, rather than of poses, start from it.

The perceptual distance must see poses, so before alignment it groups images by pose. `groups` trains a copy of its encoder,
without labels, to recognise samples in views that are turned, scaled, sheared, moved and recoloured, and groups its outputs by
k-means.
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

# Not in the thesis, whose objects are all upright: there clusters start from the perceptual distance.
HIDDEN, DIM = 128, 64

Images = Float[Tensor, "n 3 height width"]


class Descriptor(nn.Module):
    """Images in [-1, 1] to unit vectors, from the means of an encoder's feature maps."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.trunk = Encoder(config)
        channels = sum(config.widths[-config.compared :])
        hidden = nn.Linear(channels, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()
        self.head = nn.Sequential(*hidden, nn.Linear(HIDDEN, DIM))

    def forward(self, images: Images) -> Float[Tensor, "n dim"]:
        return F.normalize(self.head(torch.cat([level.mean((2, 3)) for level in self.trunk(images)], dim=1)))


class Groups(nn.Module):
    """Images to logits of clusters: minus the distance of a centre from their description.

    size: height and width to which images are resized, those of the samples it was trained on.
    """

    centres: Float[Tensor, "clusters dim"]

    def __init__(self, config: EncoderConfig, size: int, clusters: int) -> None:
        super().__init__()
        self.size, self.descriptor = size, Descriptor(config)
        self.register_buffer("centres", torch.zeros(clusters, DIM))

    def forward(self, images: Images) -> Float[Tensor, "n clusters"]:
        return -torch.cdist(self.descriptor(reduced(images, self.size)), self.centres)

    def shape(self) -> dict[str, Any]:
        """The argument of `from_shape`, as JSON holds it."""
        return {"encoder": asdict(self.descriptor.trunk.config), "size": self.size, "clusters": len(self.centres)}

    @classmethod
    def from_shape(cls, shape: Mapping[str, Any]) -> "Groups":
        """A network of random weights with this shape. Raises KeyError or TypeError for anything else."""
        return cls(EncoderConfig.from_json(shape["encoder"]), shape["size"], shape["clusters"])
