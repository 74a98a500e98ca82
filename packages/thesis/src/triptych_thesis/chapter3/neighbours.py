"""The nearest-neighbour score: whose checkpoints lie nearer to a generated network, its own run's or the training set's?

[thesis 3.5, Fig 3.9] counts runs whose sample is nearer to one of the run's own checkpoints than to any training checkpoint.
The identity scores 100% on that definition, and so may a constant, such as the mean of all training runs' finals, which is
small and so nearest to where the run began. Hence the score is also given among checkpoints whose metric is near the prompt;
and, since hidden units have no order, both are also given under the best matching of units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate, bootstrap_rate
from triptych_gpt.evaluation.prompted import Update
from triptych_gpt.nearest import Nearest, Pool, nearest
from triptych_gpt.symmetry.spec import PermutationSpec
from triptych_gpt.zoo.zoo import Zoo


@dataclass(frozen=True)
class NeighbourScore:
    """One prompt's score of one kind: raw or matched, among all checkpoints or among those near the prompt.

    score: share of the counted runs, with its 95% interval over runs; None where none counts. A run counts where its sample is
    finite and both its own and the training checkpoints have candidates. non_finite: samples that are not, whose distances are
    infinite. exact: otherwise distances, both alike, are upper bounds.
    """

    target: float
    matched: bool
    near_prompt: bool
    score: Estimate | None
    counted: int
    own: Float[Tensor, " runs"]  # distance to the nearest of its own run's checkpoints
    training: Float[Tensor, " runs"]
    exact: bool
    non_finite: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; distances are medians over the runs that count."""
        finite = self.own.isfinite() & self.training.isfinite()
        return {
            "target": self.target,
            "matched": self.matched,
            "near_prompt": self.near_prompt,
            "score": None if self.score is None else self.score._asdict(),
            "counted": self.counted,
            "runs": len(self.own),
            "non_finite": self.non_finite,
            "median_distance_own": float(self.own[finite].median()) if finite.any() else None,
            "median_distance_training": float(self.training[finite].median()) if finite.any() else None,
            "exact": self.exact,
        }


def nearest_neighbour_scores(
    update: Update,
    zoo: Zoo,
    spec: PermutationSpec,
    metric: str,
    prompts: Sequence[float | int],
    *,
    tolerance: float | int,
    rows: Int[np.ndarray, " runs"] | None = None,
    every: int = 1,
    training: Int[np.ndarray, " training"] | None = None,
) -> list[NeighbourScore]:
    """Update the initial network of each run to each prompt, and score: four kinds for each prompt, in its order.

    rows: of the zoo's runs to start from, all of the test split if left out. tolerance: how far from the prompt, in the
    metric's units, a checkpoint may be and still count as near. every: searches each k-th training checkpoint alone, which
    favours the run's own, of which all are searched (and no longer finds each checkpoint that retrieval returns). Sample
    r + p * runs is run r's to prompt p. training: rows of the runs that the model was trained on, all of the training split if
    left out. Samples that are not finite are left out of the counted runs.
    """
    rows = zoo.runs_in("test") if rows is None else rows
    theta = zoo.theta(rows, [0] * len(rows))
    start = zoo.metrics(metric)[torch.as_tensor(rows), 0]
    samples = [
        update(theta, start, torch.full_like(start, prompt), range(p * len(rows), (p + 1) * len(rows))).detach().cpu()
        for p, prompt in enumerate(prompts)
    ]
    samples = torch.cat(samples)
    finite = samples.isfinite().all(1)
    targets = torch.tensor(prompts, dtype=torch.float64).repeat_interleave(len(rows))[finite]
    repeated = np.tile(np.asarray(rows), len(prompts))[finite.numpy()]
    scores = []
    for matched in (False, True):
        for near in (False, True):
            narrowing = (metric, targets, tolerance) if near else None
            found = compare(
                samples[finite],
                zoo,
                repeated,
                spec if matched else None,
                narrowing=narrowing,
                every=every,
                training=training,
            )
            distances = torch.full((2, len(samples)), math.inf, dtype=torch.float64)
            distances[:, finite] = torch.stack([one.distance for one in found])
            for p, (own, theirs) in enumerate(distances.view(2, len(prompts), -1).unbind(1)):
                bad = int((~finite).view(len(prompts), -1)[p].sum())
                scores.append((p, _score(float(prompts[p]), matched, near, own, theirs, found[0].exact, bad)))
    return [score for _, score in sorted(scores, key=lambda pair: pair[0])]


def compare(
    samples: Float[Tensor, "n D"],
    zoo: Zoo,
    rows: Int[np.ndarray, " n"],
    spec: PermutationSpec | None = None,
    *,
    narrowing: tuple[str, Tensor, float | int] | None = None,
    every: int = 1,
    training: Int[np.ndarray, " training"] | None = None,
) -> tuple[Nearest, Nearest]:
    """The nearest checkpoint of each sample's own run, at `rows[i]`, and the nearest training checkpoint.

    narrowing: (metric, target of each sample, tolerance) leaves only checkpoints with the metric that near. training: rows of
    training runs, all of the split if left out. Raises ValueError for samples that are not finite.
    """
    metric, target, tolerance = narrowing or (None, None, 0.0)
    pool = Pool.of(zoo, zoo.runs_in("train") if training is None else training, every, metric)
    among_training = nearest(samples, pool, spec, target=target, tolerance=tolerance)
    own = Nearest(*(torch.empty_like(values) for values in among_training[:3]), among_training.exact)
    for row in np.unique(rows):
        here = torch.from_numpy(np.nonzero(rows == row)[0])
        pool = Pool.of(zoo, np.array([row]), 1, metric)
        found = nearest(samples[here], pool, spec, target=None if target is None else target[here], tolerance=tolerance)
        for values, of_run in zip(own[:3], found[:3], strict=True):
            values[here] = of_run
    return own, among_training


def _score(
    target: float,
    matched: bool,
    near: bool,
    own: Float[Tensor, " runs"],
    training: Float[Tensor, " runs"],
    exact: bool,
    non_finite: int,
) -> NeighbourScore:
    counts = own.isfinite() & training.isfinite()
    hits = (own < training)[counts]
    score = bootstrap_rate(hits) if len(hits) else None
    return NeighbourScore(target, matched, near, score, len(hits), own, training, exact, non_finite)
