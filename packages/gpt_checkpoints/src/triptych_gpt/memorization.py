"""The memorisation audit: are generated networks new, or training networks with their units reordered and a little noise?

Distances are to the nearest training network under the best matching of hidden units. What they mean is told by two things
beside them: the same of real networks that no model saw (held-out runs), and of trivial ways to make "new" networks out of
training networks of the same metric: noise on their weights, averages of some of them, plain retrieval.
Source: Zeng et al., "Generalization or Memorization? Evaluating generative models of weights" (arXiv 2506.07998).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from triptych_common import randomness

from triptych_gpt.evaluation.baselines import nearest_in_metric, nearest_in_runs
from triptych_gpt.memorization_verdict import COPY_SIGMA, HELD_OUT, HELD_OUT_FINALS, SAMPLES, Group, verdict
from triptych_gpt.nearest import Nearest, Pool, nearest
from triptych_gpt.symmetry.matching import match
from triptych_gpt.symmetry.spec import PermutationSpec
from triptych_gpt.tasks.supervised import SupervisedTask
from triptych_gpt.tasks.task import Task
from triptych_gpt.zoo.zoo import Zoo

SIGMAS = (0.05, COPY_SIGMA)  # of noise, in normalised units
AVERAGED = (2, 4)  # training networks averaged


@dataclass(frozen=True)
class Audit:
    """Every group of networks, the samples first, and what their comparison says."""

    metric: str
    better: str
    groups: tuple[Group, ...]
    searched: str
    memorised: bool
    verdict: tuple[str, ...]

    def group(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)

    def as_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "better": self.better,
            "searched": self.searched,
            "memorised": self.memorised,
            "verdict": list(self.verdict),
            "groups": [group.as_dict() for group in self.groups],
        }


def audit(
    samples: Float[Tensor, "n D"],
    zoo: Zoo,
    task: Task,
    metric: str,
    targets: Float[Tensor, " n"],
    scale: float,
    *,
    seed: int = 0,
    every: int = 1,
    rows: Int[np.ndarray, " training"] | None = None,
) -> Audit:
    """Compare generated networks, prompted for `targets`, with the training networks of a zoo.

    samples: in the networks' own units; scale: normalised units to one of those. Baselines and held-out networks come as many
    as samples, each made for the same target. every: searches each k-th training checkpoint alone, counted back from finals.
    rows: of the runs that the model was trained on, all of the training split if left out.
    The samples should come from different initial networks: intervals take them to be independent. They take held-out runs to be
    so, too, though runs of one cohort share their minibatches: intervals are somewhat optimistic.
    Raises ValueError for samples that do not fit the zoo or are not finite, an unknown metric, or a zoo without a test split.
    """
    samples, targets = samples.detach().cpu().float(), targets.detach().cpu().double()
    if len(targets) != len(samples):
        raise ValueError(f"{len(targets)} targets for {len(samples)} samples; give one for each")
    if not scale > 0:
        raise ValueError(f"scale {scale}: expected a number above 0, normalised units to one raw unit")
    training = zoo.runs_in("train") if rows is None else rows
    networks = {
        SAMPLES: samples,
        **held_out(zoo, metric, targets),
        **made_of_training(zoo, task.symmetry, metric, targets, scale, seed, training),
    }
    retrieved = nearest_in_metric(zoo, metric, targets, rows=training)
    thetas, pool = torch.cat(list(networks.values())), Pool.of(zoo, training, every)
    sizes = [len(theta) for theta in networks.values()]
    everyone = _split(nearest(thetas, pool, task.symmetry), sizes)
    # a training network is its own nearest one: nothing to search for
    networks["retrieval"] = zoo.theta(*retrieved)
    numbers = torch.from_numpy(zoo.runs.run)[retrieved.rows]
    everyone.append(Nearest(torch.zeros(len(samples), dtype=torch.float64), numbers, retrieved.checkpoints))
    finals = nearest(torch.cat(list(networks.values())), Pool.of(zoo, training, zoo.checkpoints), task.symmetry)
    groups = tuple(
        _group(name, theta, zoo, task, found, final)
        for (name, theta), found, final in zip(
            networks.items(), everyone, _split(finals, [*sizes, len(samples)]), strict=True
        )
    )
    better = zoo.better[metric]
    memorised, lines = verdict(groups, metric, better, seed)
    searched = f"{len(pool):,} checkpoints of {len(training):,} training runs"
    if every > 1:
        searched += f", every {every}th of each run: nearest distances may be smaller"
    if not everyone[0].exact:
        searched += "; matched by coordinate ascent on a shortlist: distances are upper bounds"
    return Audit(metric, better, groups, searched, memorised, tuple(lines))


def held_out(zoo: Zoo, metric: str, targets: Float[Tensor, " n"]) -> dict[str, Float[Tensor, "_ D"]]:
    """Networks of test runs: final ones, one a run, and those whose metric is nearest to each target, a run after another."""
    rows = torch.from_numpy(zoo.runs_in("test"))
    finals = rows[: len(targets)]
    in_turn = rows[torch.arange(len(targets)) % len(rows)]
    return {
        HELD_OUT_FINALS: zoo.theta(finals, [zoo.checkpoints - 1] * len(finals)),
        HELD_OUT: zoo.theta(in_turn, nearest_in_runs(zoo, in_turn, metric, targets)),
    }


def made_of_training(
    zoo: Zoo,
    spec: PermutationSpec,
    metric: str,
    targets: Float[Tensor, " n"],
    scale: float,
    seed: int,
    rows: Int[np.ndarray, " training"] | None = None,
) -> dict[str, Float[Tensor, "n D"]]:
    """Training networks of randomly drawn runs, each run's nearest in metric to the target: noised, or averaged.

    rows: of the runs to draw from, all of the training split if left out.
    """
    training = torch.as_tensor(zoo.runs_in("train") if rows is None else rows)
    made, numbers = {}, range(len(targets))
    for sigma in SIGMAS:
        noise = randomness.normal(seed, f"audit noise {sigma}", numbers, (zoo.layout.size,))
        base = _drawn(zoo, training, metric, targets, 1, seed, f"audit noised {sigma}")[:, 0]
        made[f"noised {sigma}"] = base + noise * (sigma / scale)
    for count in AVERAGED:
        several = _drawn(zoo, training, metric, targets, count, seed, f"audit averaged {count}")
        made[f"mean of {count}"] = torch.stack([_mean(spec, each, seed) for each in several])
    return made


def _drawn(
    zoo: Zoo, training: Int[Tensor, " r"], metric: str, targets: Float[Tensor, " n"], count: int, seed: int, stream: str
) -> Float[Tensor, "n count D"]:
    if len(training) < count:
        raise ValueError(f"{zoo.path}: {len(training)} training runs, the audit averages {count}; collect more")
    rows = torch.stack(
        [training[randomness.permutation(seed, stream, i, len(training))[:count]] for i in range(len(targets))]
    ).flatten()
    checkpoints = nearest_in_runs(zoo, rows, metric, targets.repeat_interleave(count))
    return zoo.theta(rows, checkpoints).unflatten(0, (-1, count))


def _mean(spec: PermutationSpec, thetas: Float[Tensor, "count D"], seed: int) -> Float[Tensor, " D"]:
    first, others = thetas[0], thetas[1:]
    return torch.cat([first[None], spec.apply(others, match(spec, others, first, seed))]).mean(0)


def _split(found: Nearest, sizes: Sequence[int]) -> list[Nearest]:
    parts = zip(*(values.split(list(sizes)) for values in found[:3]), strict=True)
    return [Nearest(*part, found.exact) for part in parts]


def _group(name: str, theta: Float[Tensor, "n D"], zoo: Zoo, task: Task, found: Nearest, finals: Nearest) -> Group:
    agreement, overlap = None, None
    if _classifies(task):
        rows = [zoo.row_of(run) for run in found.run.tolist()]
        ours, theirs = predictions(task, theta), predictions(task, zoo.theta(rows, found.checkpoint))
        truth = task.items["test"].targets
        agreement, overlap = (ours == theirs).double().mean(1), error_overlap(ours, theirs, truth)
    metrics = {name: values.double() for name, values in task.evaluate(theta).items()}
    return Group(name, found, finals.distance, theta.double().norm(dim=1), metrics, agreement, overlap)


def _classifies(task: Task) -> bool:
    if not isinstance(task, SupervisedTask):
        return False
    targets = task.items["test"].targets
    return targets.ndim == 1 and not targets.is_floating_point()


def predictions(task: SupervisedTask, theta: Float[Tensor, "n D"]) -> Int[Tensor, "n items"]:
    """The class that each network gives each test item."""
    items = task.items["test"].to(theta.device, theta.dtype)
    at_once = max(1, (1 << 24) // (task.stack.widest(items.inputs[:1]) * len(items.inputs)))
    with torch.no_grad():
        return torch.cat(
            [task.stack(task.layout.unflatten(some), items.inputs).argmax(-1) for some in theta.split(at_once)]
        )


def error_overlap(
    ours: Int[Tensor, "n items"], theirs: Int[Tensor, "n items"], truth: Int[Tensor, " items"]
) -> Float[Tensor, " n"]:
    """Items that both networks get wrong over those that either does (intersection over union); 1 where neither errs."""
    wrong, also = ours != truth, theirs != truth
    either = (wrong | also).sum(1)
    return torch.where(either > 0, (wrong & also).sum(1).double() / either.clamp(min=1), 1.0)
