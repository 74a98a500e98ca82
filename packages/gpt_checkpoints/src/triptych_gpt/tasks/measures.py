"""Measures of a network's outputs, one number for each item."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(
    outputs: Float[Tensor, "networks items classes"], targets: Int[Tensor, "*networks items"]
) -> Float[Tensor, "networks items"]:
    """Negative log-likelihood of the true class, in nats; targets are shared by all networks, or each network's own."""
    return F.cross_entropy(outputs.mT, targets.expand(outputs.shape[:2]), reduction="none")


def zero_one(
    outputs: Float[Tensor, "networks items classes"], targets: Int[Tensor, "*networks items"]
) -> Float[Tensor, "networks items"]:
    """0 if the true class scores higher than every other, else 1."""
    # Ties and NaN count as errors: a dead network, all of whose scores are equal, must not be right by the order of its outputs.
    scores, true = outputs.mT, targets.expand(outputs.shape[:2]).unsqueeze(1)
    others = scores.scatter(1, true, float("-inf")).amax(1)
    return (~(scores.gather(1, true).squeeze(1) > others)).to(outputs.dtype)
