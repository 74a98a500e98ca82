"""Pairs of checkpoints of one run, as G.pt trains on them: theta and a later theta*, with the metrics of both.

They are sampled by a function of (seed, counters, number of runs, checkpoints of a run), a `Sampling`. Each pair depends on the
seed and its counter alone, so neither batch size nor interruptions change it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from triptych_common.randomness import shuffled, uniform

from triptych_gpt.zoo.zoo import Zoo


class Draw(NamedTuple):
    """The result of a sampling: 0 <= run < runs, and two of its checkpoints, start < target."""

    run: Int[Tensor, " n"]
    start: Int[Tensor, " n"]
    target: Int[Tensor, " n"]


Sampling = Callable[[int, Sequence[int], int, int], Draw]


def thesis(seed: int, counters: Sequence[int], runs: int, checkpoints: int) -> Draw:
    """A run uniformly, then one of its C(C-1)/2 pairs of checkpoints uniformly.  [thesis 3.2.2]"""
    run = _below(runs, seed, "pairs thesis run", counters)
    one = _below(checkpoints, seed, "pairs thesis one", counters)
    other = _below(checkpoints - 1, seed, "pairs thesis other", counters)
    other += other >= one  # any checkpoint but `one`
    return Draw(run, torch.minimum(one, other), torch.maximum(one, other))


def released(seed: int, counters: Sequence[int], runs: int, checkpoints: int) -> Draw:
    """As in the released code: runs in turn, reshuffled every epoch; a spacing uniformly in 1 .. C-1, then a start uniformly."""
    # The initialisation is thus the start sum(1/s for s in 1 .. C-1) times as often as in uniform starts: 5.9 times for C = 200.
    run = shuffled(seed, "pairs released run", counters, runs)
    spacing = 1 + _below(checkpoints - 1, seed, "pairs released spacing", counters)
    start = _below(checkpoints - spacing, seed, "pairs released start", counters)
    return Draw(run, start, start + spacing)


def ends(seed: int, counters: Sequence[int], runs: int, checkpoints: int) -> Draw:
    """A run uniformly, its first and its last checkpoint: the ablation of thesis 3.4.6."""
    run = _below(runs, seed, "pairs ends run", counters)
    return Draw(run, torch.zeros_like(run), torch.full_like(run, checkpoints - 1))


SAMPLINGS: dict[str, Sampling] = {"thesis": thesis, "released": released, "ends": ends}


def stratified(metric: Float[Tensor, "runs checkpoints"], better: str = "lower") -> Sampling:
    """A sampling of the whole range of a metric, and often of its good end.

    Three tenths of the pairs are what prompting needs: from the initialisation to the checkpoint whose metric is nearest to a value
    uniform between the run's best and worst. Half lead from the initialisation to one of the run's better half of checkpoints, a
    fifth are as in the thesis.
    """
    # Uniform pairs hardly ever have a bad target, since a run passes through its bad values in a few steps.
    low, high = metric.amin(1), metric.amax(1)
    later = metric[:, 1:].argsort(dim=1, descending=better == "higher", stable=True) + 1  # the best first
    good = max(1, later.shape[1] // 2)

    def draw(seed: int, counters: Sequence[int], runs: int, checkpoints: int) -> Draw:
        any_pair = thesis(seed, counters, runs, checkpoints)
        run, kind = any_pair.run, uniform(seed, "pairs stratified kind", counters)
        value = low[run] + (high - low)[run] * uniform(seed, "pairs stratified value", counters).float()
        nearest = 1 + (metric[run, 1:] - value[:, None]).abs().argmin(1)
        better_half = later[run, _below(good, seed, "pairs stratified rank", counters)]
        start = torch.where(kind < 0.8, 0, any_pair.start)
        target = torch.where(kind < 0.3, nearest, torch.where(kind < 0.8, better_half, any_pair.target))
        return Draw(run, start, target)

    return draw


class PairBatch(NamedTuple):
    """n pairs: theta at `checkpoints` of `runs`, theta_star at the later `checkpoints_star` of the same runs."""

    theta: Float[Tensor, "n D"]
    theta_star: Float[Tensor, "n D"]
    metrics: dict[str, Float[Tensor, " n"]]
    metrics_star: dict[str, Float[Tensor, " n"]]
    runs: Int[Tensor, " n"]  # their numbers
    places: Int[Tensor, " n"]  # their indices in `Pairs.rows`
    checkpoints: Int[Tensor, " n"]
    checkpoints_star: Int[Tensor, " n"]


class Pairs:
    """An endless sequence of pairs from the runs of one split of a zoo.

    sampling: a name in SAMPLINGS, or a function of that kind. runs: use only this many, the first ones. Raises ValueError for
    another name, or a split without runs.
    """

    def __init__(
        self,
        zoo: Zoo,
        split: str = "train",
        sampling: str | Sampling = "thesis",
        seed: int = 0,
        *,
        runs: int | None = None,
    ) -> None:
        if isinstance(sampling, str) and sampling not in SAMPLINGS:
            raise ValueError(f"sampling {sampling!r}: expected one of {', '.join(SAMPLINGS)}")
        self.zoo, self.split, self.seed = zoo, split, seed
        self.sampling: Sampling = SAMPLINGS[sampling] if isinstance(sampling, str) else sampling
        self.rows = torch.from_numpy(zoo.runs_in(split)[:runs])

    def draw(
        self, counters: Sequence[int], out: tuple[Float[Tensor, "n D"], Float[Tensor, "n D"]] | None = None
    ) -> PairBatch:
        """The pairs at these counters, on the CPU, thetas in `out` if given. Raises ValueError for a negative counter."""
        if len(counters) and min(counters) < 0:
            raise ValueError(f"counter {min(counters)}: expected 0 or more")
        run, start, target = self.sampling(self.seed, counters, len(self.rows), self.zoo.checkpoints)
        rows, (theta, theta_star) = self.rows[run], out or (None, None)
        metrics = {name: self.zoo.metrics(name) for name in self.zoo.metric_names}
        return PairBatch(
            theta=self.zoo.theta(rows, start, theta),
            theta_star=self.zoo.theta(rows, target, theta_star),
            metrics={name: values[rows, start] for name, values in metrics.items()},
            metrics_star={name: values[rows, target] for name, values in metrics.items()},
            runs=torch.from_numpy(self.zoo.runs.run)[rows],
            places=run,
            checkpoints=start,
            checkpoints_star=target,
        )


def _below(n: int | Int[Tensor, " n"], seed: int, stream: str, counters: Sequence[int]) -> Int[Tensor, " n"]:
    """An integer uniformly in 0 .. n-1 for each counter; n may differ between them."""
    return (uniform(seed, stream, counters) * n).long()
