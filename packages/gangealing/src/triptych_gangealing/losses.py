"""What keeps a flow smooth and small, and how slowly the target of an alignment takes over.  [thesis 4.3.1]"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Delta = Float[Tensor, "n 2 height width"]


def total_variation(delta: Delta) -> Float[Tensor, " n"]:
    """L_TV of each image: mean Huber loss (threshold 1) of the steps between neighbouring cells, along x plus along y.

    delta: displacements in normalised units, of which a step is a difference: on a grid twice as fine the steps of the same flow
    are half as long, and the loss, quadratic below 1, a quarter. A grid of one cell along an axis has no steps along it.
    [thesis 4.3.1; weight 1000 with a self-supervised distance, 2500 with LPIPS]
    """
    return _huber(delta.diff(dim=3)) + _huber(delta.diff(dim=2))


def flow_identity(delta: Delta) -> Float[Tensor, " n"]:
    """L_I of each image: mean square of the displacements, in normalised units.  [thesis 4.3.1; weight 1]"""
    return delta.square().mean(dim=(1, 2, 3))


def psi_schedule(step: int | float, total: int | float) -> float:
    """How much of an image's own style its target's early layers keep: a cosine from 1 at step 0 to 0 at `total`, then 0.

    With `total` 0 the target is the learned mode from the first step. Raises ValueError for a negative total or step.
    """
    if total < 0 or step < 0:
        raise ValueError(f"psi at step {step} of {total}: expected numbers that are not negative")
    return 0.0 if step >= total else (1 + math.cos(math.pi * step / total)) / 2


def _huber(steps: Float[Tensor, "n 2 rows columns"]) -> Float[Tensor, " n"]:
    if not steps.numel():
        return steps.new_zeros(len(steps))
    return F.huber_loss(steps, torch.zeros_like(steps), reduction="none").mean(dim=(1, 2, 3))
