"""Trivial baselines that could fake a good score, with the signature of a model's update.

Each looks up or averages training networks, or returns its input, so that every evaluation runs on it as on a model.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from triptych_gpt.evaluation.prompted import Update
from triptych_gpt.symmetry.matching import canonicalise
from triptych_gpt.symmetry.spec import PermutationSpec
from triptych_gpt.zoo.zoo import Zoo


class Checkpoints(NamedTuple):
    """Checkpoints of a zoo: `checkpoints[i]` of the run at row `rows[i]`."""

    rows: Int[Tensor, " n"]
    checkpoints: Int[Tensor, " n"]


def nearest_in_metric(
    zoo: Zoo, metric: str, targets: Float[Tensor, " n"], rows: Int[np.ndarray, " runs"] | None = None
) -> Checkpoints:
    """The training checkpoint whose metric is nearest to each target; of equals, that of the lowest run, then checkpoint.

    rows: of the runs to search, by default all training runs. Raises ValueError for a metric that is not recorded.
    """
    chosen = torch.as_tensor(zoo.runs_in("train") if rows is None else rows)
    values = zoo.metrics(metric)[chosen].flatten().double()
    values = values.where(values.isfinite(), math.inf)
    # argmin may return any of several equal entries; this takes the first.
    off = torch.stack([(values - target).abs().eq((values - target).abs().min()).byte().argmax() for target in targets])
    return Checkpoints(chosen[off // zoo.checkpoints], off % zoo.checkpoints)


def nearest_in_runs(zoo: Zoo, rows: Int[Tensor, " n"], metric: str, targets: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The checkpoint of each given run whose metric is nearest to that run's target; the first of equals."""
    off = (zoo.metrics(metric)[rows].double() - targets.double().cpu()[:, None]).abs()
    off = off.where(off.isfinite(), math.inf)
    return off.eq(off.amin(1, keepdim=True)).byte().argmax(1)


def identity() -> Update:
    """Returns every network unchanged."""

    def update(theta: Tensor, metric: Tensor, target: Tensor, indices: Sequence[int]) -> Tensor:
        return theta.clone()

    return update


def retrieval(zoo: Zoo, metric: str, rows: Int[np.ndarray, " runs"] | None = None) -> Update:
    """Returns the training checkpoint whose metric is nearest to the prompt, whatever the network given.

    rows: of the runs to search, such as those that a model was trained on; by default all training runs.
    """

    def update(theta: Tensor, metric_now: Tensor, target: Tensor, indices: Sequence[int]) -> Tensor:
        return zoo.theta(*nearest_in_metric(zoo, metric, target.detach().cpu(), rows)).to(theta)

    return update


def mean_of_finals(
    zoo: Zoo, spec: PermutationSpec | None = None, rows: Int[np.ndarray, " runs"] | None = None
) -> Update:
    """Returns the average of training runs' final checkpoints, whatever the prompt.

    spec: the symmetry under which units are first matched to those of the first run. rows: of the runs, by default all of training.
    """
    chosen = torch.as_tensor(zoo.runs_in("train") if rows is None else rows)
    reference = zoo.theta(chosen[:1], [zoo.checkpoints - 1])[0]
    total = torch.zeros(zoo.layout.size, dtype=torch.float64)
    for some in chosen.split(256):
        finals = zoo.theta(some, [zoo.checkpoints - 1] * len(some))
        total += (finals if spec is None else canonicalise(spec, finals, reference)).double().sum(0)
    mean: Float[Tensor, " D"] = total / len(chosen)

    def update(theta: Tensor, metric: Tensor, target: Tensor, indices: Sequence[int]) -> Tensor:
        return mean.to(theta).expand_as(theta).clone()

    return update
