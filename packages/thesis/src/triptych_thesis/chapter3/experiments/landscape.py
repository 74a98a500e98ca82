"""Samples of one start over the landscape of the metric, and how far samples lie apart.  [thesis 3.4.5, Fig. 3.8]"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from triptych_common.plots import INK, ORANGE, numbers, panels
from triptych_gpt.evaluation import plots
from triptych_gpt.evaluation.prompted import Update, Updated, measured, prompted, starting_metrics
from triptych_gpt.evaluation.records import plain
from triptych_gpt.symmetry.matching import canonicalise
from triptych_gpt.symmetry.spec import PermutationSpec
from triptych_gpt.tasks.task import Metric, Task

from triptych_thesis.chapter3.context import Context, named, shown
from triptych_thesis.study.estimates import number
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, UNDECIDED, Evidence, Verdict, overall

CLAIM = "gpt.fig-3.8"
BARRIER = 0.1  # of what samples improved on their start: what separates two regions, and what a projection may be off


def spread(spec: PermutationSpec, thetas: Float[Tensor, "n D"]) -> dict[str, float]:
    """Mean Euclidean distance over all pairs of networks: "raw", and "matched" where hidden units are; NaN for fewer than two."""
    thetas = thetas.detach().to("cpu", torch.float64)
    raw = [(thetas[:i] - thetas[i]).norm(dim=1) for i in range(1, len(thetas))]
    matched = [(canonicalise(spec, thetas[:i], thetas[i]) - thetas[i]).norm(dim=1) for i in range(1, len(thetas))]
    distances = {"raw": raw, "matched": matched}
    return {kind: float(torch.cat(parts).mean()) if parts else torch.nan for kind, parts in distances.items()}


def _sample(
    update: Update, task: Task, metric: Metric, theta: Tensor, prompt: float, samples: int, first_index: int = 0
) -> tuple[Float[Tensor, " starts"], Updated]:
    """The starts' metric, and `samples` updates of every start; sample j of start i has index first_index + i * samples + j."""
    start = starting_metrics(task, theta, metric)[metric.name]
    count = len(theta) * samples
    target = torch.full((count,), float(prompt), dtype=torch.float64)
    repeated, indices = theta.repeat_interleave(samples, dim=0), range(first_index, first_index + count)
    return start, prompted(update, task, repeated, start.repeat_interleave(samples), target, indices)


def diversity(
    update: Update, task: Task, metric: Metric, theta: Float[Tensor, "starts D"], prompt: float, samples: int
) -> dict[str, Any]:
    """How far finite samples for one prompt lie apart. Raises ValueError for starts that are not finite."""
    _, new = _sample(update, task, metric, theta, prompt, samples)
    groups = new.theta.detach().cpu().view(len(theta), samples, -1)  # starts samples D
    usable = groups.isfinite().all(dim=2)
    kept = [group[finite] for group, finite in zip(groups, usable, strict=True)]
    of_each = [spread(task.symmetry, group) for group in kept]
    firsts = [group[0] for group in kept if len(group)]
    kinds = ("raw", "matched")
    noise = {kind: float(torch.tensor([one[kind] for one in of_each], dtype=torch.float64).nanmean()) for kind in kinds}
    return {
        "metric": metric.name,
        "prompt": prompt,
        "noise": noise,  # of samples of one start, averaged over starts
        # of samples of different starts, one each
        "starts": spread(task.symmetry, torch.stack(firsts)) if firsts else dict.fromkeys(kinds, torch.nan),
        "before": spread(task.symmetry, theta),  # of the starts themselves
        "metric_mean": float(new.metrics[metric.name].view(len(theta), samples).nanmean()),
        "non_finite": int((~usable).sum()),
    }


@dataclass(frozen=True)
class Plane:
    """A plane along two orthonormal axes, float64 on the CPU, and the share of the networks' variance along each."""

    origin: Float[Tensor, " D"]
    axes: Float[Tensor, "2 D"]
    explained: Float[Tensor, " 2"]

    @classmethod
    def through(cls, thetas: Float[Tensor, "n D"]) -> "Plane":
        """The plane of the first two principal components. Raises ValueError for networks that do not span one."""
        thetas = thetas.detach().to("cpu", torch.float64)
        origin = thetas.mean(0)
        _, sizes, axes = torch.linalg.svd(thetas - origin, full_matrices=False)
        if len(sizes) < 2 or not sizes[1] > 1e-9 * thetas.norm(dim=1).max():
            raise ValueError(f"{len(thetas)} networks that span no plane; give three or more that differ")
        axes = axes[:2]
        # The singular value decomposition leaves signs open: the largest entry of an axis is made positive.
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


def landscape(
    update: Update,
    task: Task,
    metric: Metric,
    theta: Float[Tensor, " D"],
    prompt: float,
    samples: int,
    *,
    side: int = 31,
    first_index: int = 0,
) -> dict[str, Any]:
    """Samples of one start that differ in noise alone, and the metric over the plane of their first two principal components.

    side: points of the grid along each axis. Returns tensors and numbers, lengths in the networks' own units. Raises ValueError for
    a start that is not finite, or samples that span no plane.
    """
    start, new = _sample(update, task, metric, theta[None], prompt, samples, first_index)
    own = new.metrics[metric.name]
    kept = ~own.isnan()
    sampled, own = new.theta[kept.to(theta.device)], own[kept]
    plane = Plane.through(sampled)
    places = plane.coordinates(sampled)

    def scored(thetas: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        return measured(task, thetas.to(theta))[metric.name]

    x, y = (_axis(places[:, axis], side) for axis in (0, 1))
    grid = torch.cartesian_prod(y, x).flip(1)  # rows of y, and x runs fastest
    projected = scored(plane.at(places))
    step = torch.stack([(x[-1] - x[0]) / 12, (y[-1] - y[0]) / 12])
    # (f(theta + h a) - 2 f(theta) + f(theta - h a)) / h^2 along both axes a, positive where theta is locally best
    theta_64 = sampled.detach().to("cpu", torch.float64)
    moves = zip(step[:, None] * plane.axes, step, strict=True)
    quotients = [(scored(theta_64 + move) - 2 * own + scored(theta_64 - move)) / h**2 for move, h in moves]
    curvature = torch.stack(quotients, dim=1) * (1 if metric.better == "lower" else -1)  # samples axes
    return {
        "metric": metric.name, "better": metric.better, "prompt": prompt, "start_metric": float(start),
        # values[i][j] is the metric at (x[j], y[i])
        "explained": plane.explained, "x": x, "y": y, "values": scored(plane.at(grid)).view(side, side),
        # share: of the squared distance from the samples' mean that the projection keeps
        "samples": places, "sample_metric": own, "projected_metric": projected, "share": plane.share(sampled),
        "accurate": (projected - own).abs() <= BARRIER * (start - own).abs(),
        "curvature": curvature, "step": step, "convex": float((curvature > 0).all(dim=1).double().mean()),
        "non_finite": int((~kept).sum()),
    }  # fmt: skip


def _axis(places: Float[Tensor, " n"], side: int) -> Float[Tensor, " side"]:
    """Points along an axis that reach half the samples' extent beyond them."""
    low, high = places.min(), places.max()
    room = torch.clamp(0.5 * (high - low), min=1e-6)
    return torch.linspace(float(low - room), float(high + room), side, dtype=torch.float64)


def measure(context: Context) -> Result:
    """Landscapes around samples of two starts, and the diversity of samples of up to eight."""
    trial, samples = context.trial, context.amounts.samples
    starts = trial.starts("test", min(8, len(trial.zoo.runs_in("test"))))
    method, options = (trial.update, trial.task, trial.metric), (trial.best_prompt, samples)
    lands = [landscape(*method, theta, *options, first_index=i * samples) for i, theta in enumerate(starts[:2])]
    return plain({"landscapes": lands, "diversity": diversity(*method, starts, *options)})


def regions(data: Result) -> list[list[int]]:
    """The samples of a landscape by region of the plane, connected by straight lines on which the metric is nowhere much worse."""
    sign = 1.0 if data["better"] == "lower" else -1.0
    values, (x, y) = sign * numbers(data["values"]), (numbers(data[axis]) for axis in ("x", "y"))
    places, own, start = numbers(data["samples"]), sign * numbers(data["projected_metric"]), sign * data["start_metric"]
    # Only samples that improved on their start, and score alike in the plane, have a place there.
    kept = [i for i, accurate in enumerate(data["accurate"]) if accurate and own[i] < start]
    groups = [[i] for i in kept]
    for a, b in combinations(kept, 2):
        line = places[a] + np.linspace(0, 1, 2 * len(x))[:, None] * (places[b] - places[a])
        columns, rows = (np.abs(axis - line[:, [i]]).argmin(axis=1) for i, axis in enumerate((x, y)))
        # One region: nowhere on the line, read from the grid, is the metric worse than at both of its ends by more than a tenth
        # of what they improved on their start.
        worse_end = max(own[a], own[b])
        if np.nanmax(values[rows, columns]) - worse_end <= BARRIER * (start - worse_end):
            one, other = (next(group for group in groups if i in group) for i in (a, b))
            if one is not other:
                one += other
                groups.remove(other)
    return groups


def verdicts(result: Result) -> list[Verdict]:
    """Whether samples of one start fall into distinct regions of low metric, and starts vary them more than noise does."""
    # Regions: confirmed where each landscape has two or more, refuted where none has, undecided otherwise, and where a landscape
    # has fewer than two samples to compare.
    counts = [(len(groups), sum(map(len, groups))) for groups in map(regions, result["landscapes"])]
    apart = UNDECIDED
    if all(samples >= 2 for _, samples in counts):
        several = {count > 1 for count, _ in counts}
        apart = UNDECIDED if len(several) > 1 else CONFIRMED if several == {True} else REFUTED
    # Starts: the mean distance between samples of different starts against that of samples of one start, as networks are and with
    # hidden units matched. The means have no interval, so both must agree. The identity returns each start and has no distance
    # between samples of one: starting networks' own distances stand beside.
    spreads = result["diversity"]
    pairs = [(spreads["starts"][kind], spreads["noise"][kind]) for kind in ("matched", "raw")]
    larger = [None if None in pair else pair[0] - pair[1] > 0 for pair in pairs]
    varied = CONFIRMED if larger == [True, True] else REFUTED if larger == [False, False] else UNDECIDED
    regions_text = " and ".join(f"{count} (of {samples} samples)" for count, samples in counts)
    matched = {name: number(spreads[name]["matched"], ".2f") for name in ("noise", "starts", "before")}
    evidence = [
        Evidence("regions of good networks in the plane, for each of two starts", regions_text),
        Evidence("mean distance of samples of different starts, units matched", matched["starts"], "",
                 f"{matched['noise']} of one start", [f"{matched['before']} of the starts themselves (the identity)"]),
    ]  # fmt: skip
    return [Verdict(CLAIM, overall([apart, varied]), evidence)]


def figure(data: Sequence[Result]) -> Figure:
    """Contours of the metric over a plane with the samples on it, a panel for each start.  [Fig. 3.8]

    Filled dots are samples whose projection scores as they do, hollow ones the others. data: `landscape` of each start.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = panels(len(data), size=(4.4 * len(data) + 0.6, 3.9))
    metric = data[0]["metric"]
    values = [numbers(one["values"]) for one in data]
    levels = MaxNLocator(20).tick_values(min(np.nanmin(v) for v in values), max(np.nanmax(v) for v in values))
    best_bright = "viridis_r" if data[0]["better"] == "lower" else "viridis"
    for start, (one, grid, panel) in enumerate(zip(data, values, axes, strict=True), start=1):
        filled = panel.contourf(one["x"], one["y"], grid, levels=levels, cmap=best_bright)
        panel.contour(one["x"], one["y"], grid, levels=levels[::2], colors="white", linewidths=0.4, alpha=0.6)
        samples, accurate = numbers(one["samples"]), np.array(one["accurate"], dtype=bool)
        for which, face, label in ((accurate, ORANGE, "scores alike"), (~accurate, "none", "scores otherwise")):
            if which.any():
                x, y = samples[which].T
                panel.scatter(x, y, s=28, facecolors=face, edgecolors=INK, linewidths=1, zorder=3,
                              label=f"sample whose projection {label}")  # fmt: skip
        axis_names = [f"component {i}, {share:.0%} of variance" for i, share in enumerate(one["explained"], start=1)]
        panel.set(xlabel=axis_names[0], ylabel=axis_names[1])
        panel.set_title(f"start {start}, prompted for {shown(metric, one['prompt'])}", fontsize=9)
        panel.grid(False)
    bar = figure.colorbar(filled, ax=axes, label=plots.words(metric), shrink=0.9)
    plots.measure(bar.ax.yaxis, metric)
    dots = {label: dot for one in axes for dot, label in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.legend(dots.values(), dots.keys(), frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def figures(result: Result) -> dict[str, Figure]:
    return {"fig-3.8": figure(result["landscapes"])}


def section(study: Study, result: Result) -> Section:
    spreads = result["diversity"]
    groups = {
        "noise": "samples of one start",
        "starts": "samples of different starts",
        "before": "the starts themselves",
    }
    rows = [
        (what, *(number(spreads[name][kind], ".2f") for kind in ("raw", "matched"))) for name, what in groups.items()
    ]
    lands = [
        (i, number(land["start_metric"]), len(land["samples"]), sum(land["accurate"]), len(regions(land)),
         number(land["convex"], ".0%"))
        for i, land in enumerate(result["landscapes"], start=1)
    ]  # fmt: skip
    metric = named(spreads["metric"])
    return Section(
        "Landscape and diversity (Figure 3.8)",
        [study.figure("fig-3.8", "Samples of one start over the plane of their principal components")],
        [
            Table(("start", f"{metric} before", "samples", "scoring alike in the plane", "regions", "locally best"), lands,
                  f"Regions: samples with a rise of {metric} between them. Locally best: samples at which {metric} gets worse "
                  "along both axes of the plane."),
            Table(("mean distance between", "as they are", "hidden units matched"), rows,
                  f"All prompted for {metric} {spreads['prompt']:.3g}; they achieve {number(spreads['metric_mean'])} on average."),
        ],
    )  # fmt: skip


EXPERIMENT = Experiment("fig-3.8", 9, measure, section, verdicts, figures, kept=True, extra=True)
