"""What a network's outputs are scored by, item by item."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(
    outputs: Float[Tensor, "networks items classes"], targets: Int[Tensor, "*networks items"]
) -> Float[Tensor, "networks items"]:
    """Negative log-likelihood of the true class, in nats; targets are shared by all networks, or each has its own."""
    return F.cross_entropy(outputs.mT, targets.expand(outputs.shape[:2]), reduction="none")


def zero_one(
    outputs: Float[Tensor, "networks items classes"], targets: Int[Tensor, "*networks items"]
) -> Float[Tensor, "networks items"]:
    """1 unless the true class scores higher than every other, so ties and NaN count as errors; else 0."""
    scores, true = outputs.mT, targets.expand(outputs.shape[:2]).unsqueeze(1)
    others = scores.scatter(1, true, float("-inf")).amax(1)
    return (~(scores.gather(1, true).squeeze(1) > others)).to(outputs.dtype)
