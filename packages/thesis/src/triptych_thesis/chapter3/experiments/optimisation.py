"""Tuned optimisers over a training run's steps, and when each catches up with one update of G.pt.  [thesis 3.4.1, Fig. 3.4]"""

import numpy as np
from matplotlib.figure import Figure
from triptych_common.plots import BLUE, INK, PALETTE, legend, numbers, panels, thousands
from triptych_gpt.evaluation import plots
from triptych_gpt.evaluation.prompted import starting_metrics

from triptych_thesis.chapter3.context import Context, mean_over_networks, named
from triptych_thesis.chapter3.hand_designed import OF_POLICIES, OPTIMIZERS, PPO, optimise_with_all, spaced_steps
from triptych_thesis.study.estimates import interval, number, quantile
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.plots import distinct
from triptych_thesis.study.verdicts import NOT_RUN, REFUTED, UNDECIDED, Evidence, Verdict, better, overall

CLAIM, CLAIMED, THOUSAND = "gpt.fig-3.4", ("SGD", "Adam"), 1000


def measure(context: Context) -> Result:
    """Curves of every optimiser, and the level that one update of the same networks reaches."""
    trial, n, metric = context.trial, context.amounts.baseline_networks, context.trial.metric.name
    test, tuning = trial.starts("test", n), trial.starts("validation", n)
    start = starting_metrics(trial.task, test, trial.metric)
    level = mean_over_networks(trial.prompted(test, start).metrics[metric])
    steps = spaced_steps(context.amounts.optimizer_steps or trial.task.steps)
    curves = []
    for curve in optimise_with_all(trial.task, test, tuning, metric, steps, seed=trial.seed):
        shown = curve.as_dict()
        rates = {point.learning_rate for point in curve.grid}
        at_edge = len(rates) > 1 and shown["tuned"]["learning_rate"] == max(rates)
        step, after = (None, None) if level["mean"] is None else curve.steps_to_reach(level["mean"])
        curves.append({**shown, "caught_up": step, "not_yet_after": after, "at_edge": at_edge})
    return {
        "metric": metric, "better": trial.metric.better, "networks": n, "prompt": trial.best_prompt,
        "start": float(start[metric].mean()), "one_step": level, "trained_best": trial.trained_best[metric],
        "curves": curves, "budget": steps[-1],
    }  # fmt: skip


def verdicts(result: Result) -> list[Verdict]:
    """Whether SGD and Adam need thousands of steps to equal one update, and end up better.

    An optimiser is compared at every scored step, at the grid point that is best after exactly so many steps, which favours it.
    """
    level, curves = result["one_step"], {curve["optimizer"]: curve for curve in result["curves"]}
    metric = named(result["metric"])
    steps = {name: _reach(curve, result) for name, curve in curves.items()}
    what = f"steps until {' and '.join(CLAIMED)} equal one update in {metric}"
    others = [f"{steps[name]} of {name}" for name in OPTIMIZERS if name in steps and name not in CLAIMED]
    evidence = [Evidence(what, " and ".join(steps[name] for name in CLAIMED if name in steps), "thousands", "", others)]
    if PPO in steps:
        evidence.append(Evidence(f"iterations of PPO until it equals one update in {metric}", steps[PPO]))
    others = [f"{number(result['trained_best'])} of the best training checkpoint (retrieval)"]
    before = f"{number(result['start'])} before it (the identity)"
    evidence.append(Evidence(f"{metric} of one update", interval(level, ".3f", "mean"), "", before, others))
    if not curves:
        return [Verdict(CLAIM, NOT_RUN, evidence, "the task has neither data nor policies: no optimiser is compared")]
    if level["mean"] is None or level["non_finite"]:
        return [Verdict(CLAIM, UNDECIDED, evidence, f"{level['non_finite']} updates are not finite")]
    parts = [part for name in CLAIMED for part in (_late(curves[name], result), _ends_better(curves[name], result))]
    short = result["budget"] < THOUSAND
    why = f"the task's {result['budget']:,} steps are too few to show thousands" if short else ""
    return [Verdict(CLAIM, overall(parts), evidence, why)]


def _reach(curve: Result, result: Result) -> str:
    return f"{curve['caught_up']:,}" if curve["caught_up"] else f"more than {result['budget']:,}"


def _late(curve: Result, result: Result) -> str:
    """Whether the update is better than the optimiser at every scored step below 1,000."""
    steps = [i for i, step in enumerate(curve["steps"]) if step < THOUSAND]
    compared = [better(result["one_step"], _at(curve, i), result["better"]) for i in steps]
    if result["budget"] < THOUSAND:
        # So few steps cannot show thousands: only an optimiser that is better after its first step refutes the claim.
        return REFUTED if compared[:1] == [REFUTED] else UNDECIDED
    return overall(compared)


def _ends_better(curve: Result, result: Result) -> str:
    ahead = better(_at(curve, -1), result["one_step"], result["better"])
    return UNDECIDED if ahead == REFUTED else ahead  # no number of steps refutes "given enough iterations"


def _at(curve: Result, i: int) -> dict[str, float | None]:
    """The mean after step i with its interval over networks; without one where it is not finite."""
    mean, error = curve["envelope"]["mean"][i], curve["envelope"]["standard_error"][i]
    if mean is None or error is None:
        return {"low": None, "high": None}
    margin = quantile(curve["networks"] - 1) * error
    return {"low": mean - margin, "high": mean + margin}


def figure(data: Result) -> Figure:
    """Optimisers over many steps, with standard errors, and the level that one update of the model reaches.  [Fig. 3.4]

    data: {"metric", "start": mean before any step, "one_step": {"mean", "low", "high"}, "trained_best": or None, "curves": of each
    optimiser `hand_designed.Curve.as_dict()` with "caught_up": the step at which it equals the model, or None}.
    """
    figure, (axes,) = panels()
    metric, level, lowest = data["metric"], data["one_step"], data["start"]
    for curve, look in zip(data["curves"], distinct(PALETTE[1:]), strict=False):
        steps, caught = numbers([0, *curve["steps"]]), curve.get("caught_up")
        mean = numbers([data["start"], *curve["envelope"]["mean"]])
        error = np.nan_to_num(numbers([None, *curve["envelope"]["standard_error"]]))
        label = curve["optimizer"] + (f" (caught up after {caught:,})" if caught is not None else "")
        if curve["optimizer"] == PPO:
            look = {"color": INK, "marker": "*", "linestyle": "-"}
        axes.plot(steps, mean, markersize=3, linewidth=1.2, label=label, **look)
        axes.fill_between(steps, mean - error, mean + error, color=look["color"], alpha=0.15, linewidth=0)
        lowest = min(lowest, np.nanmin(mean))
    if level["mean"] is not None:
        axes.axhline(level["mean"], color=BLUE, linewidth=2, label="one update of G.pt")
    if level.get("low") is not None:
        axes.axhspan(level["low"], level["high"], color=BLUE, alpha=0.15, linewidth=0)
    plots.best_line(axes, data.get("trained_best"))
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    if data.get("better") != "higher" and 0 < lowest < data["start"] / 5:
        axes.set_yscale("log")
    of_policies = any(curve["optimizer"] == PPO for curve in data["curves"])
    axes.set(xlabel="optimiser steps" + ", iterations of PPO" * of_policies, ylabel=plots.words(metric), xlim=(0, None))
    axes.xaxis.set_major_formatter(thousands)
    plots.measure(axes.yaxis, metric)
    legend(axes, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def section(study: Study, result: Result) -> Section:
    rows = [
        (curve["optimizer"], _reach(curve, result), number(curve["envelope"]["mean"][-1]),
         f"{curve['tuned']['learning_rate']:g}" + (" (largest of the grid)" if curve["at_edge"] else ""))
        for curve in result["curves"]
    ]  # fmt: skip
    caption = (
        f"Where each optimiser ends. Means over {result['networks']} unseen networks; one update of G.pt gives "
        f"{interval(result['one_step'], '.3f', 'mean')}."
    )
    after = f"{named(result['metric'])} after {result['budget']:,}"
    of_policies = any(curve["optimizer"] == PPO for curve in result["curves"])
    optimisers = "Nine tuned optimisers" + " and PPO" * of_policies
    header = ("optimiser", "steps to equal one update", after, "learning rate")
    return Section(
        "Optimisers over many steps (Figure 3.4)",
        [study.figure("fig-3.4", f"{optimisers}, and the level of one update of G.pt")],
        [Table(header, rows, caption, folded=True)] if rows else [],
        note="Every optimiser runs at a constant rate. At each step the point of the thesis's 3x3 grid is shown that is best after "
        "exactly so many steps on validation networks, which favours the optimiser." + OF_POLICIES * of_policies,
    )


def figures(result: Result) -> dict[str, Figure]:
    return {"fig-3.4": figure(result)}


EXPERIMENT = Experiment("fig-3.4", 3, measure, section, verdicts, figures, kept=True)
