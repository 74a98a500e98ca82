"""The landscape around samples of one start, over a plane of principal components.  [thesis 3.4.5, Fig. 3.8]"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from triptych_gpt.evaluation.prompted import Update, measured, prompted, starting_metrics
from triptych_gpt.evaluation.records import plain
from triptych_gpt.tasks.task import Metric, Task

from triptych_thesis.chapter3.diversity import low_prompt


@dataclass(frozen=True)
class Plane:
    """The plane through `origin` along two orthonormal axes, float64 on the CPU; explained: share of variance along each."""

    origin: Float[Tensor, " D"]
    axes: Float[Tensor, "2 D"]
    explained: Float[Tensor, " 2"]

    @classmethod
    def through(cls, thetas: Float[Tensor, "n D"]) -> "Plane":
        """The plane of the first two principal components of some networks; the largest entry of an axis is positive.

        Raises ValueError for networks that do not span a plane.
        """
        thetas = thetas.detach().to("cpu", torch.float64)
        origin = thetas.mean(0)
        _, sizes, axes = torch.linalg.svd(thetas - origin, full_matrices=False)
        if len(sizes) < 2 or not sizes[1] > 1e-9 * thetas.norm(dim=1).max():
            raise ValueError(f"{len(thetas)} networks that span no plane; give three or more that differ")
        axes = axes[:2]
        signs = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
        return cls(origin, axes * signs, sizes[:2].square() / sizes.square().sum())

    def coordinates(self, theta: Float[Tensor, "n D"]) -> Float[Tensor, "n 2"]:
        """Where networks project to."""
        return (theta.detach().to("cpu", torch.float64) - self.origin) @ self.axes.T

    def at(self, coordinates: Float[Tensor, "n 2"]) -> Float[Tensor, "n D"]:
        """The networks at points of the plane."""
        return self.origin + coordinates.double() @ self.axes

    def share(self, theta: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        """How much of a network's squared distance from the origin lies in the plane, 0 to 1; 1 at the origin."""
        gap = (theta.detach().to("cpu", torch.float64) - self.origin).square().sum(1)
        inside = self.coordinates(theta).square().sum(1)
        return torch.where(gap > 0, (inside / gap.clamp(min=1e-300)).clamp(max=1), 1.0)


@dataclass(frozen=True)
class Landscape:
    """A metric over a plane, and the samples of one start that lie about it. Lengths are in the networks' own units.

    explained: share of the variance of the networks that span the plane, along each axis. x, y, values: the grid, values[i][j] at
    (x[j], y[i]). samples: where they project to, with their own metric, the metric of their projection, and the share of their
    squared distance from the plane's origin that it keeps. accurate: the projection's metric is off by at most a tenth of what
    the sample improved on its start. curvature: second difference quotients of the metric at the samples themselves, along both
    axes at distances `step`; convex: share of samples where both are positive. non_finite samples are left out.
    """

    metric: str
    better: str
    prompt: float | int
    start_metric: float
    explained: Float[Tensor, " 2"]
    x: Float[Tensor, " columns"]
    y: Float[Tensor, " rows"]
    values: Float[Tensor, "rows columns"]
    samples: Float[Tensor, "n 2"]
    sample_metric: Float[Tensor, " n"]
    projected_metric: Float[Tensor, " n"]
    share: Float[Tensor, " n"]
    accurate: Bool[Tensor, " n"]
    curvature: Float[Tensor, "n 2"]
    step: Float[Tensor, " 2"]
    convex: float
    non_finite: int

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, tensors as lists: JSON-able."""
        return plain(self)


def landscape(
    update: Update,
    task: Task,
    metric: Metric,
    theta: Float[Tensor, " D"],
    *,
    prompt: float | int | None = None,
    samples: int = 16,
    spanning: Float[Tensor, "n D"] | None = None,
    side: int = 31,
    networks_at_once: int = 256,
    first_index: int = 0,
) -> Landscape:
    """Draw samples of one start that differ in noise alone, and map the metric over a plane around them.

    prompt: the metric's best where left out. spanning: networks whose principal components are the plane, such as training
    checkpoints; the samples themselves where left out, of which three lie in their plane exactly. side: points of the grid along
    each axis, which reaches half the samples' extent beyond them. Sample j draws the noise of index first_index + j. Raises
    ValueError for a metric without prompts, a start that is not finite, or networks that span no plane.
    """
    prompt, at_once = low_prompt(metric, prompt), {"networks_at_once": networks_at_once}
    start = starting_metrics(task, theta[None], metric, **at_once)[metric.name]
    target = torch.full((samples,), float(prompt), dtype=torch.float64)
    indices = range(first_index, first_index + samples)
    new = prompted(update, task, theta.expand(samples, -1), start.expand(samples), target, indices, **at_once)
    own = new.metrics[metric.name]
    kept = ~own.isnan()
    drawn, own = new.theta[kept.to(theta.device)], own[kept]
    plane = Plane.through(drawn if spanning is None else spanning)
    places = plane.coordinates(drawn)

    def scored(thetas: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        return measured(task, thetas.to(theta), **at_once)[metric.name]

    x, y = (_axis(places[:, axis], side) for axis in (0, 1))
    grid = torch.cartesian_prod(y, x).flip(1)  # rows of y, and x runs fastest
    projected = scored(plane.at(places))
    step = torch.stack([(x[-1] - x[0]) / 12, (y[-1] - y[0]) / 12])
    curvature = _curvature(scored, drawn, own, plane, step, metric.better)
    return Landscape(
        metric=metric.name,
        better=metric.better,
        prompt=prompt,
        start_metric=float(start),
        explained=plane.explained,
        x=x,
        y=y,
        values=scored(plane.at(grid)).view(side, side),
        samples=places,
        sample_metric=own,
        projected_metric=projected,
        share=plane.share(drawn),
        accurate=(projected - own).abs() <= 0.1 * (start - own).abs(),
        curvature=curvature,
        step=step,
        convex=float((curvature > 0).all(dim=1).double().mean()),
        non_finite=int((~kept).sum()),
    )


def _axis(places: Float[Tensor, " n"], side: int) -> Float[Tensor, " side"]:
    low, high = places.min(), places.max()
    room = torch.clamp(0.5 * (high - low), min=1e-6)
    return torch.linspace(float(low - room), float(high + room), side, dtype=torch.float64)


def _curvature(
    scored: Callable[[Tensor], Tensor],
    drawn: Float[Tensor, "n D"],
    own: Float[Tensor, " n"],
    plane: Plane,
    step: Float[Tensor, " 2"],
    better: str,
) -> Float[Tensor, "n 2"]:
    """(f(theta + h a) - 2 f(theta) + f(theta - h a)) / h^2 for both axes a, positive where theta is locally best along it."""
    theta = drawn.detach().to("cpu", torch.float64)
    moves = step[:, None] * plane.axes
    quotients = [
        (scored(theta + move) - 2 * own + scored(theta - move)) / h**2 for move, h in zip(moves, step, strict=True)
    ]
    return torch.stack(quotients, dim=1) * (1 if better == "lower" else -1)
