"""Recursive prompting of networks from initialisers that the zoo does not have.  [thesis 3.4.3, Fig. 3.6]"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate
from triptych_common.plots import MARKERS, PALETTE, figure_png, legend, numbers, panels
from triptych_gpt.evaluation.plots import measure, words
from triptych_gpt.evaluation.prompted import Update, advanced, starting_metrics
from triptych_gpt.evaluation.records import plain
from triptych_gpt.tasks.task import Metric, Task

from triptych_thesis.chapter3.context import Context, prompt_of
from triptych_thesis.chapter3.naming import named
from triptych_thesis.study.estimates import interval, mean_estimate, number
from triptych_thesis.study.experiment import Experiment, Result, Section, Table
from triptych_thesis.study.runner import Study
from triptych_thesis.study.verdicts import UNDECIDED, Evidence, Verdict, better, overall, sign

CLAIM = "gpt.fig-3.6"
UNSEEN_SEED = 1_000_003  # of networks that no zoo began with
WITHIN = 10  # updates: the thesis's "ten or fewer"


def new_networks(
    task: Task, seed: int, networks: int, initialisers: Sequence[str] | None = None
) -> dict[str, Float[Tensor, "networks D"]]:
    """Untrained networks of every initialiser of the task, its default first; unseen where `seed` is not the zoo's."""
    return {name: task.initial(seed, range(networks), name) for name in initialisers or task.initialisers}


def recursive_prompting(
    update: Update,
    task: Task,
    metric: Metric,
    starts: Mapping[str, Float[Tensor, "networks D"]],
    *,
    known: str = "default",
    updates: int = 10,
    prompt: float | None = None,
    within: float = 0.1,
    networks_at_once: int = 256,
    first_index: int = 0,
) -> dict[str, Any]:
    """Prompt each network `updates` times, from its last result and the metric that this has.

    Update k = 0, 1, ... of network i draws the noise of index first_index + k * networks + i, whatever its initialiser.

    Args:
        starts: networks by initialiser, including `known`, the initialiser that the update was trained on.
        prompt: by default the metric's own for recursion.
        within: the margin of "updates_to_reach", as a fraction of the known initialiser's mean after one update.

    Returns the settings, that mean as "one_update", and by initialiser the "curves": every metric after 0 .. updates updates
    [networks, updates + 1], mean and standard error of the prompted one, how many updates were "rejected" because they were not
    finite (the network then stays as it was), and how many bring the mean within the margin (None: more than `updates`).

    Raises ValueError for starts without `known`, a metric without prompts, or networks that are not finite.
    """
    if known not in starts:
        raise ValueError(
            f"initialiser {known!r}: expected one of {', '.join(starts)}; its first update is the reference"
        )
    if updates < 1:
        raise ValueError(f"updates {updates}: expected at least 1")
    prompt = prompt_of(metric, prompt, "recursive")
    curves: dict[str, dict[str, Any]] = {}
    for name, theta in starts.items():
        current: Mapping[str, Tensor] = starting_metrics(task, theta, metric, networks_at_once=networks_at_once)
        history, rejected, networks = [current], 0, len(theta)
        for first in range(first_index, first_index + updates * networks, networks):
            indices = range(first, first + networks)
            theta, current, usable = advanced(
                update, task, theta, current, metric.name, prompt, indices, networks_at_once=networks_at_once
            )
            history.append(current)
            rejected += int((~usable).sum())
        metrics = {key: torch.stack([one[key] for one in history], dim=1) for key in current}
        values = metrics[metric.name]
        mean = values.mean(0)
        error = values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.full_like(mean, torch.nan)
        curves[name] = {"metrics": metrics, "mean": mean, "standard_error": error, "rejected": rejected}
    one_update = float(curves[known]["metrics"][metric.name][:, 1].mean())
    for curve in curves.values():
        behind = curve["mean"] - one_update if metric.better == "lower" else one_update - curve["mean"]
        reached = (behind <= within * abs(one_update)).nonzero()
        curve["updates_to_reach"] = int(reached[0]) if len(reached) else None
    return {
        "metric": metric.name, "better": metric.better, "prompt": prompt, "known": known, "one_update": one_update,
        "within": within, "curves": curves,
    }  # fmt: skip


def run(context: Context) -> dict[str, Any]:
    """Recursion of networks of every initialiser of the task, towards the best prompt."""
    trial, amounts = context.trial, context.amounts
    starts = {
        name: theta.to(trial.trained.device)
        for name, theta in new_networks(trial.task, UNSEEN_SEED, amounts.recursion_networks).items()
    }
    known = trial.zoo.facts.get("recipe", {}).get("initialiser", "default")
    recursion = recursive_prompting(
        trial.update, trial.task, trial.metric, starts, known=known, updates=amounts.updates, prompt=trial.best_prompt,
        networks_at_once=trial.settings.networks_at_once,
    )  # fmt: skip
    return plain(recursion)


def verdicts(result: Result) -> list[Verdict]:
    """Whether one update does worse from foreign initialisers, and whether up to ten bring the test error down.

    Of the test error where the task has one, of the prompted metric otherwise; both intervals by Student's t over networks.

    - Worse: for each foreign initialiser, confirmed where its mean after one update lies wholly on the worse side of that of the
      zoo's own initialiser, refuted where wholly on the better side.
    - Down: for each foreign initialiser, the sign of the mean improvement, network by network, from the first update to the
      tenth or the last before.

    The claim is confirmed where all comparisons are, and refuted where one is. Networks before any update, which the identity
    returns, stand in the evidence.
    """
    metric, direction = _claimed(result)
    foreign = [name for name in result["curves"] if name != result["known"]]
    last = min(WITHIN, len(result["curves"][result["known"]]["mean"]) - 1)
    after_one = {name: _at(curve, metric, 1) for name, curve in result["curves"].items()}
    parts, evidence = [], []
    known = f"{interval(after_one[result['known']], '.3f')} from the zoo's own"
    for name in foreign:
        change = _improvement(result["curves"][name], metric, last, direction)
        worse = better(after_one[result["known"]], after_one[name], direction)
        parts += [worse, sign(change) if change else UNDECIDED]
        others = [
            f"{interval(_at(result['curves'][name], metric, i), '.3f')} {when}"
            for i, when in ((last, f"after {last}"), (0, "before any (the identity)"))
        ]
        what = f"{named(metric)} after one update from {named(name)}"
        evidence.append(Evidence(what, interval(after_one[name], ".3f"), "", known, others))
    after_last = [_at(result["curves"][name], metric, last) for name in foreign]
    summary = f"{named(metric)} after one update from {len(foreign)} initialisers that the zoo does not have"
    evidence.insert(0, Evidence(summary, _range([after_one[name] for name in foreign]), "", known,
                                [f"{_range(after_last)} after {last}"]))  # fmt: skip
    if not parts:
        return [Verdict(CLAIM, UNDECIDED, evidence, "the task has no other initialiser")]
    return [Verdict(CLAIM, overall(parts), evidence)]


def _claimed(result: Result) -> tuple[str, str]:
    """The metric that the claim is about, and which of its values are better."""
    has_error = "test_error" in result["curves"][result["known"]]["metrics"]
    return ("test_error", "lower") if has_error else (result["metric"], result["better"])


def _at(curve: Mapping[str, Any], metric: str, update: int) -> dict[str, float | None]:
    """The mean over networks after an update, with its interval; None for all three where no network is finite."""
    values = [row[update] for row in curve["metrics"][metric] if row[update] is not None]
    return mean_estimate(values)._asdict() if values else dict.fromkeys(Estimate._fields)


def _range(estimates: Sequence[Mapping[str, float | None]]) -> str:
    """The least and the greatest of several means."""
    values = [each["value"] for each in estimates if each["value"] is not None]
    return f"{min(values):.3f} to {max(values):.3f}" if values else number(None)


def _improvement(curve: Mapping[str, Any], metric: str, last: int, direction: str) -> Estimate | None:
    rows = [row for row in curve["metrics"][metric] if row[1] is not None and row[last] is not None]
    if last < 2 or not rows:
        return None
    return mean_estimate([(row[1] - row[last]) * (1 if direction == "lower" else -1) for row in rows])


def figure(data: Mapping[str, Any], *, metric: str | None = None) -> Figure:
    """Mean and standard error over networks after each update, a curve for each initialiser.  [Fig. 3.6]

    Args:
        data: `recursive_prompting`, as JSON holds it.
        metric: another of the task's than the prompted one.
    """
    metric = metric or data["metric"]
    figure, (axes,) = panels()
    values = {name: numbers(curve["metrics"][metric]) for name, curve in data["curves"].items()}
    for (name, curve), color, marker in zip(values.items(), PALETTE, MARKERS, strict=False):
        mean, counts = curve.mean(axis=0), np.arange(curve.shape[1])
        error = curve.std(axis=0, ddof=1) / len(curve) ** 0.5 if len(curve) > 1 else np.zeros_like(mean)
        known = name == data["known"]
        label = f"{named(name)}{' (the zoo’s own)' if known else ''}"
        axes.errorbar(
            counts, mean, error, color=color, marker=marker, linewidth=2 if known else 1.2, markersize=4, label=label,
            capsize=2, elinewidth=0.8, zorder=3 if known else 2,
        )  # fmt: skip
    if metric == data["metric"]:
        label = "one update, the zoo’s own initialiser"
        axes.axhline(data["one_update"], color=PALETTE[0], linestyle="--", linewidth=1, label=label)
    everything = np.concatenate([curve.mean(axis=0) for curve in values.values()])
    if everything.min() > 0 and everything.max() > 3 * everything.min():
        axes.set_yscale("log")
    axes.set(xlabel="updates", ylabel=words(metric))
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    measure(axes.yaxis, metric)
    legend(axes, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _drawn(result: Result) -> list[str]:
    metrics = next(iter(result["curves"].values()))["metrics"]
    return list(dict.fromkeys(metric for metric in (result["metric"], "test_error") if metric in metrics))


def section(study: Study, result: Result) -> Section:
    """The curves, and a row for each initialiser."""
    networks = len(result["curves"][result["known"]]["metrics"][result["metric"]])
    rows, last = [], len(result["curves"][result["known"]]["mean"]) - 1
    for name, curve in result["curves"].items():
        cells = [interval(_at(curve, metric, i), ".3f") for metric in _drawn(result) for i in (0, 1, last)]
        reached = curve["updates_to_reach"]
        rows.append((named(name), *cells, "never" if reached is None else reached, curve["rejected"]))
    columns = [f"{named(metric)} {when}" for metric in _drawn(result)
               for when in ("before", "after one update", f"after {last}")]  # fmt: skip
    caption = (
        f"Every initialiser in numbers. Means over {networks} networks, prompted for {named(result['metric'])} "
        f"{result['prompt']:.3g} every time. Updates needed: until the mean is within "
        f"{result['within']:.0%} of the zoo's own initialiser's after one. Rejected: updates that were not finite."
    )
    pictures = [study.figure(f"fig-3.6-{metric}", f"{named(metric)}: mean and standard error over networks".capitalize())
                for metric in _drawn(result)]  # fmt: skip
    return Section(
        "Other initialisers, update after update (Figure 3.6)",
        pictures,
        [Table(("initialiser", *columns, "updates needed", "rejected"), rows, caption, folded=True)],
        note="The zoo has networks of one initialiser; the others are new to the model. Each network is prompted again and again, "
        "every time from its last result and the metric that this has.",
    )


EXPERIMENT = Experiment(
    name="fig-3.6", order=4, measure=run, verdicts=verdicts, section=section, kept=True,
    figures=lambda result: { f"fig-3.6-{metric}": figure_png(figure(result, metric=metric)) for metric in _drawn(result) },
)  # fmt: skip
