"""Recursive prompting of networks from initialisers that the zoo does not have.  [thesis 3.4.3, Fig. 3.6]"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate
from triptych_common.plots import MARKERS, PALETTE, legend, numbers, panels
from triptych_gpt.evaluation import plots
from triptych_gpt.evaluation.prompted import Update, advanced, starting_metrics
from triptych_gpt.evaluation.records import plain
from triptych_gpt.tasks.task import Metric, Task

from triptych_thesis.chapter3.context import Context, named
from triptych_thesis.study.estimates import interval, mean_estimate, number
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.verdicts import UNDECIDED, Evidence, Verdict, better, overall, sign

CLAIM = "gpt.fig-3.6"
UNSEEN_SEED = 1_000_003  # of networks that no zoo began with
WITHIN = 10  # updates: the thesis's "ten or fewer"


def recursive_prompting(
    update: Update,
    task: Task,
    metric: Metric,
    starts: Mapping[str, Float[Tensor, "networks D"]],
    prompt: float,
    *,
    known: str = "default",
    updates: int = 10,
    within: float = 0.1,
    networks_at_once: int = 256,
) -> dict[str, Any]:
    """Prompt each network `updates` times, from its last result and the metric that this has.

    starts: networks by initialiser, including `known`, which the update was trained on. within: how near to the known initialiser's
    mean after one update a mean must come, as a fraction of it. Raises ValueError for starts without `known`, or networks that are
    not finite.
    """
    if known not in starts:
        raise ValueError(
            f"initialiser {known!r}: expected one of {', '.join(starts)}; its first update is the reference"
        )
    curves: dict[str, dict[str, Any]] = {}
    for name, theta in starts.items():
        current: Mapping[str, Tensor] = starting_metrics(task, theta, metric, networks_at_once=networks_at_once)
        history, rejected, networks = [current], 0, len(theta)
        # Update k = 0, 1, ... of network i samples the noise of index k * networks + i, whatever its initialiser.
        for first in range(0, updates * networks, networks):
            indices = range(first, first + networks)
            theta, current, usable = advanced(
                update, task, theta, current, metric.name, prompt, indices, networks_at_once=networks_at_once
            )
            history.append(current)
            # A network whose update is not finite stays as it was.
            rejected += int((~usable).sum())
        metrics = {key: torch.stack([one[key] for one in history], dim=1) for key in current}  # networks updates+1
        values = metrics[metric.name]
        mean = values.mean(0)
        error = values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.full_like(mean, torch.nan)
        curves[name] = {"metrics": metrics, "mean": mean, "standard_error": error, "rejected": rejected}
    one_update = float(curves[known]["metrics"][metric.name][:, 1].mean())
    for curve in curves.values():
        behind = curve["mean"] - one_update if metric.better == "lower" else one_update - curve["mean"]
        reached = (behind <= within * abs(one_update)).nonzero()
        curve["updates_to_reach"] = int(reached[0]) if len(reached) else None  # None: more than `updates`
    return {
        "metric": metric.name, "better": metric.better, "prompt": prompt, "known": known, "one_update": one_update,
        "within": within, "curves": curves,
    }  # fmt: skip


def measure(context: Context) -> Result:
    """Recursion of untrained networks of every initialiser of the task, towards the best prompt."""
    trial, amounts = context.trial, context.amounts
    starts = {
        name: trial.task.initial(UNSEEN_SEED, range(amounts.recursion_networks), name).to(trial.trained.device)
        for name in trial.task.initialisers
    }
    known = trial.zoo.facts.get("recipe", {}).get("initialiser", "default")
    recursion = recursive_prompting(
        trial.update, trial.task, trial.metric, starts, trial.best_prompt, known=known, updates=amounts.updates,
        networks_at_once=trial.settings.networks_at_once,
    )  # fmt: skip
    return plain(recursion)


def verdicts(result: Result) -> list[Verdict]:
    """Whether one update does worse from foreign initialisers, and whether up to ten bring the test error down.

    Of the test error where the task has one, of the prompted metric otherwise; both intervals by Student's t over networks.
    """
    curves = result["curves"]
    has_error = "test_error" in curves[result["known"]]["metrics"]
    metric, direction = ("test_error", "lower") if has_error else (result["metric"], result["better"])
    foreign = [name for name in curves if name != result["known"]]
    last = min(WITHIN, len(curves[result["known"]]["mean"]) - 1)
    start, after_one, after_last = (
        {name: _at(curve, metric, i) for name, curve in curves.items()} for i in (0, 1, last)
    )
    known = f"{interval(after_one[result['known']], '.3f')} from the zoo's own"
    what = f"{named(metric)} after one update from"
    parts, evidence = [], []
    for name in foreign:
        # Worse: than the zoo's own initialiser after one update. Down: the mean improvement, network by network, from the first
        # update to the tenth or the last before, is positive.
        change = _improvement(curves[name], metric, last, direction)
        parts += [better(after_one[result["known"]], after_one[name], direction), sign(change) if change else UNDECIDED]
        others = [f"{interval(after_last[name], '.3f')} after {last}",
                  f"{interval(start[name], '.3f')} before any (the identity)"]  # fmt: skip
        evidence.append(Evidence(f"{what} {named(name)}", interval(after_one[name], ".3f"), "", known, others))
    ranges = [_range([means[name] for name in foreign]) for means in (after_one, after_last)]
    summary = f"{what} {len(foreign)} initialisers that the zoo does not have"
    evidence.insert(0, Evidence(summary, ranges[0], "", known, [f"{ranges[1]} after {last}"]))
    why = "" if parts else "the task has no other initialiser"
    return [Verdict(CLAIM, overall(parts), evidence, why)]


def _at(curve: Result, metric: str, update: int) -> dict[str, float | None]:
    """The mean over networks after an update, with its interval; None for all three where no network is finite."""
    values = [row[update] for row in curve["metrics"][metric] if row[update] is not None]
    return mean_estimate(values)._asdict() if values else dict.fromkeys(Estimate._fields)


def _range(estimates: Sequence[Mapping[str, float | None]]) -> str:
    """The least and the greatest of several means."""
    values = [each["value"] for each in estimates if each["value"] is not None]
    return f"{min(values):.3f} to {max(values):.3f}" if values else number(None)


def _improvement(curve: Result, metric: str, last: int, direction: str) -> Estimate | None:
    """The mean gain of networks from the first update to the last; None where there is no later one, or no finite network."""
    rows = [row for row in curve["metrics"][metric] if row[1] is not None and row[last] is not None]
    if last < 2 or not rows:
        return None
    return mean_estimate([(row[1] - row[last]) * (1 if direction == "lower" else -1) for row in rows])


def figure(data: Result, *, metric: str | None = None) -> Figure:
    """Mean and standard error over networks after each update, a curve for each initialiser.  [Fig. 3.6]

    data: `recursive_prompting`, as JSON holds it. metric: another of the task's than the prompted one.
    """
    metric = metric or data["metric"]
    figure, (axes,) = panels()
    values = {name: numbers(curve["metrics"][metric]) for name, curve in data["curves"].items()}
    for (name, curve), color, marker in zip(values.items(), PALETTE, MARKERS, strict=False):
        mean, counts = curve.mean(axis=0), np.arange(curve.shape[1])
        error = curve.std(axis=0, ddof=1) / len(curve) ** 0.5 if len(curve) > 1 else np.zeros_like(mean)
        label, width, order = named(name), 1.2, 2
        if name == data["known"]:
            label, width, order = f"{label} (the zoo’s own)", 2, 3
        axes.errorbar(counts, mean, error, color=color, marker=marker, linewidth=width, markersize=4, label=label,
                      capsize=2, elinewidth=0.8, zorder=order)  # fmt: skip
    if metric == data["metric"]:
        label = "one update, the zoo’s own initialiser"
        axes.axhline(data["one_update"], color=PALETTE[0], linestyle="--", linewidth=1, label=label)
    everything = np.concatenate([curve.mean(axis=0) for curve in values.values()])
    if data.get("better") != "higher" and everything.min() > 0 and everything.max() > 3 * everything.min():
        axes.set_yscale("log")
    axes.set(xlabel="updates", ylabel=plots.words(metric))
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    plots.measure(axes.yaxis, metric)
    legend(axes, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _drawn(result: Result) -> list[str]:
    """The prompted metric, and the test error where there is one."""
    metrics = result["curves"][result["known"]]["metrics"]
    return list(dict.fromkeys(metric for metric in (result["metric"], "test_error") if metric in metrics))


def figures(result: Result) -> dict[str, Figure]:
    return {f"fig-3.6-{metric}": figure(result, metric=metric) for metric in _drawn(result)}


def section(study: Study, result: Result) -> Section:
    known, drawn = result["curves"][result["known"]], _drawn(result)
    networks, last, rows = len(known["metrics"][result["metric"]]), len(known["mean"]) - 1, []
    for name, curve in result["curves"].items():
        cells = [interval(_at(curve, metric, i), ".3f") for metric in drawn for i in (0, 1, last)]
        reached = curve["updates_to_reach"]
        rows.append((named(name), *cells, "never" if reached is None else reached, curve["rejected"]))
    whens = ("before", "after one update", f"after {last}")
    columns = [f"{named(metric)} {when}" for metric in drawn for when in whens]
    caption = (
        f"Every initialiser in numbers. Means over {networks} networks, prompted for {named(result['metric'])} "
        f"{result['prompt']:.3g} every time. Updates needed: until the mean is within "
        f"{result['within']:.0%} of the zoo's own initialiser's after one. Rejected: updates that were not finite."
    )
    shown = {metric: f"{named(metric)}: mean and standard error over networks".capitalize() for metric in drawn}
    return Section(
        "Other initialisers, update after update (Figure 3.6)",
        [study.figure(f"fig-3.6-{metric}", words) for metric, words in shown.items()],
        [Table(("initialiser", *columns, "updates needed", "rejected"), rows, caption, folded=True)],
        note="The zoo has networks of one initialiser; the others are new to the model. Each network is prompted again and again, "
        "every time from its last result and the metric that this has.",
    )


EXPERIMENT = Experiment("fig-3.6", 4, measure, section, verdicts, figures, kept=True)
