"""Matching a network's units to those of a reference, by Git Re-Basin's weight matching.

Source: Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging models modulo permutation symmetries" (ICLR 2023), Algorithm 1.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from triptych_common import randomness

from triptych_gpt.symmetry.spec import PermutationSpec


def match(
    spec: PermutationSpec, theta: Float[Tensor, "*batch D"], reference: Float[Tensor, " D"], seed: int = 0
) -> dict[str, Int[Tensor, "*batch _"]]:
    """Permutations [*batch, units] of every group that, applied to each theta, bring it close to the reference.

    Coordinate ascent on their inner product: one group after another, in random order, takes its best permutation given the
    others (a linear assignment), until none improves. The result is a local optimum; the global one for a single group that no
    parameter has twice.
    Raises ValueError for vectors that are not of this spec or not finite.
    """
    for name, vectors in (("theta", theta), ("the reference", reference)):
        spec.layout.check(vectors)
        if not vectors.isfinite().all():
            raise ValueError(f"{name} has entries that are not finite; leave such networks out")
    reference = reference.detach().to("cpu", torch.float64)
    current = theta.detach().to("cpu", torch.float64).reshape(-1, spec.layout.size).clone()
    groups, rows = list(spec.groups), torch.arange(len(current))
    orders = {group: torch.arange(units).repeat(len(rows), 1) for group, units in spec.groups.items()}
    sweep = 0
    while len(rows):
        improved = torch.zeros(len(rows), dtype=torch.bool)
        for i in randomness.permutation(seed, "match", sweep, len(groups)).tolist():
            improved |= _improve(spec, groups[i], current, reference, orders, rows)
        rows, sweep = rows[improved], sweep + 1
    return {group: order.view(*theta.shape[:-1], -1) for group, order in orders.items()}


def canonicalise(
    spec: PermutationSpec, thetas: Float[Tensor, "n D"], reference: Float[Tensor, " D"], seed: int = 0
) -> Float[Tensor, "n D"]:
    """Permute each network's hidden units so that they match the reference's best; its function stays the same.

    thetas: flat parameters of n networks, of spec's layout, of any floating-point type and device; so is the result.
    reference: those of the network whose order of units all get.  [Ainsworth et al. 2022, Git Re-Basin]
    """
    return torch.cat([spec.apply(some, match(spec, some, reference, seed)) for some in thetas.split(256)])


def _improve(
    spec: PermutationSpec,
    group: str,
    current: Float[Tensor, "n D"],
    reference: Float[Tensor, " D"],
    orders: dict[str, Int[Tensor, "n _"]],
    rows: Int[Tensor, " active"],
) -> Bool[Tensor, " active"]:
    """Reorder a group's units in those rows of `current` and `orders` that it brings closer; returns which."""
    before = current[rows]
    order = _best_order(spec, group, before, reference)
    stay = {other: torch.arange(units).repeat(len(rows), 1) for other, units in spec.groups.items()}
    after = spec.apply(before, {**stay, group: order})
    # If a parameter has the group twice, the assignment is the best to first order only and may lose. The threshold keeps ties from
    # being reordered for ever by rounding.
    least = 1e-12 * before.norm(dim=1) * reference.norm()
    gains = (after - before) @ reference > least
    current[rows[gains]] = after[gains]
    orders[group][rows[gains]] = orders[group][rows[gains]].gather(1, order[gains])
    return gains


def _best_order(
    spec: PermutationSpec, group: str, current: Float[Tensor, "n D"], reference: Float[Tensor, " D"]
) -> Int[Tensor, "n units"]:
    """The assignment of current units to reference units with the largest inner product, all other groups fixed."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and most commands match nothing

    units = spec.groups[group]
    products = torch.zeros(len(current), units, units, dtype=current.dtype)
    for piece in spec.pieces:
        for dim, (name, _) in enumerate(piece.dims):
            if name == group:
                a = piece.view(reference).movedim(dim, 0).reshape(units, -1)
                b = piece.view(current).movedim(dim + 1, 1).reshape(len(current), units, -1)
                products += a @ b.mT
    return torch.from_numpy(np.stack([linear_sum_assignment(each, maximize=True)[1] for each in products.numpy()]))
