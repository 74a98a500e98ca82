"""One update of G.pt beside one step of tuned optimisers and beside updates that learn nothing.  [thesis 3.4.1, Fig. 3.3]"""

import numpy as np
from matplotlib.figure import Figure
from triptych_common.plots import GREY, INK, intervals, numbers, panels
from triptych_gpt.evaluation import plots
from triptych_gpt.evaluation.prompted import starting_metrics
from triptych_gpt.evaluation.trial import MODEL

from triptych_thesis.chapter3.context import Context, mean_over_networks, named
from triptych_thesis.chapter3.hand_designed import OF_POLICIES, PPO, one_step, optimise_with_all
from triptych_thesis.study.estimates import interval, number
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.verdicts import NOT_RUN, UNDECIDED, Evidence, Verdict, better, overall

CLAIM = "gpt.fig-3.3"
WORDS = {"model": MODEL, "optimiser": "hand-designed optimisers", "baseline": "baselines", "real": "real networks"}
IN_THESIS = {"test_loss": "0.2 when prompted for 0 (MNIST, 784-10-10)"}


def measure(context: Context) -> Result:
    """Every metric of the task after one update, prompted for the value that did best on validation networks."""
    trial, n = context.trial, context.amounts.baseline_networks
    test, tuning = trial.starts("test", n), trial.starts("validation", n)
    start = starting_metrics(trial.task, test, trial.metric)
    updates = {MODEL: trial.update, **trial.baselines}
    achieved = {name: trial.prompted(test, start, update).metrics for name, update in updates.items()}
    shown = {}
    for metric in trial.task.metrics:
        methods = [
            {"name": name, "kind": "model" if name == MODEL else "baseline", **mean_over_networks(values[metric.name])}
            for name, values in achieved.items()
        ]
        for curve in optimise_with_all(trial.task, test, tuning, metric.name, seed=trial.seed):
            estimate, best = mean_over_networks(curve.tuned[0].double()), curve.grid[curve.chosen[-1]]
            methods.append({"name": curve.optimizer, "kind": "optimiser", **estimate, "tuned": best.learning_rate})
        shown[metric.name] = {
            "metric": metric.name, "better": metric.better, "start": float(start[metric.name].mean()),
            "trained_best": trial.trained_best.get(metric.name), "methods": methods,
        }  # fmt: skip
    return {"networks": n, "asked": trial.metric.name, "prompt": trial.best_prompt, "figures": shown}


def best_optimiser(data: Result) -> Result | None:
    """The optimiser whose one step was best; None where there is none."""
    finite = [method for method in data["methods"] if method["kind"] == "optimiser" and method["mean"] is not None]
    choose = min if data["better"] == "lower" else max
    return choose(finite, key=lambda method: method["mean"], default=None)


def verdicts(result: Result) -> list[Verdict]:
    """Whether one update is better than one step of every tuned optimiser.

    An update that is not finite for one of the networks decides nothing. Baselines take no part: they stand in the evidence.
    """
    parts, evidence = [], []
    for metric, data in result["figures"].items():
        # The claim names return, test loss and test error, so training losses and errors do not count.
        if metric.startswith("train_") and not metric.endswith("return"):
            continue
        methods = {method["name"]: method for method in data["methods"]}
        ours, best = methods[MODEL], best_optimiser(data)
        optimisers = [method for method in data["methods"] if method["kind"] == "optimiser"]
        parts += [UNDECIDED if ours["non_finite"] else better(ours, one, data["better"]) for one in optimisers]
        beside = f"{interval(best, '.3f', 'mean')} of {one_step(best['name'])}, the best optimiser" if best else ""
        others = [f"{interval(m, '.3f', 'mean')} of {m['name']}" for m in data["methods"] if m["kind"] == "baseline"]
        what = f"{named(metric)} after one update of {result['networks']} unseen networks"
        evidence.append(Evidence(what, interval(ours, ".3f", "mean"), IN_THESIS.get(metric, ""), beside, others))
    why = "" if parts else "the task has neither data nor policies: no optimiser is compared"
    return [Verdict(CLAIM, overall(parts) if parts else NOT_RUN, evidence, why)]


def figure(data: Result) -> Figure:
    """What one update gives, a bar for each method from the top in the order given.  [Fig. 3.3]

    data: of one metric: {"metric", "better", "start": mean before the update or None, "trained_best": or None, "methods": [{"name",
    "kind": "model" | "optimiser" | "baseline", "mean", "low", "high"}]}; low and high end the error bar and may be None.
    """
    methods, metric = list(data["methods"]), data["metric"]
    figure, (axes,) = panels(size=(5.0, 1.2 + 0.26 * len(methods)))
    values = numbers([method["mean"] for method in methods])
    positions = np.arange(len(methods))
    for kind in dict.fromkeys(method["kind"] for method in methods):
        own = np.array([method["kind"] == kind for method in methods])
        axes.barh(positions[own], values[own], height=0.62, color=plots.KINDS[kind], label=WORDS[kind])
    axes.errorbar(values, positions, xerr=intervals(methods, "mean"), fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    finite = values[np.isfinite(values)]
    if data.get("better") != "higher" and finite.size and finite.min() > 0 and finite.max() > 30 * finite.min():
        axes.set_xscale("log")
    plots.measure(axes.xaxis, metric)
    axes.set_yticks(positions, [method["name"] for method in methods])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    lines = (("start", GREY, ":", "before the update"), ("trained_best", INK, "--", "best training checkpoint"))
    for key, color, style, label in lines:
        if data.get(key) is not None:
            axes.axvline(data[key], color=color, linestyle=style, linewidth=1.2, label=label)
    axes.set_xlabel(f"{plots.words(metric)} after one update")
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3, columnspacing=1.2)
    return figure


def figures(result: Result) -> dict[str, Figure]:
    return {f"fig-3.3-{metric}": figure(data) for metric, data in result["figures"].items()}


def section(study: Study, result: Result) -> Section:
    metrics = result["figures"]
    by_method = zip(*(data["methods"] for data in metrics.values()), strict=True)  # every metric has them in one order
    rows = [(means[0]["name"], *(interval(mean, ".3f", "mean") for mean in means)) for means in by_method]
    rows += [
        (label, *(number(data[key]) for data in metrics.values()))
        for label, key in (("before the update", "start"), ("best training checkpoint", "trained_best"))
    ]
    caption = (
        f"Mean over {result['networks']} unseen networks, with 95% intervals by Student's t. One update of G.pt, prompted for "
        f"{named(result['asked'])} {result['prompt']:.3g}; one step of every optimiser at the best point of its grid."
    )
    return Section(
        "One update (Figure 3.3)",
        [study.figure(f"fig-3.3-{metric}", f"{named(metric)} after one update or one step".capitalize()) for metric in metrics],
        [Table(("", *(named(metric) for metric in metrics)), rows, caption, folded=True)],
        note="Every optimiser is tuned over three learning rates and three weight decays on validation networks, for each metric "
        "by itself. Retrieval copies the training checkpoint nearest in metric; the means are those of all training runs' final "
        "networks, as they are and with hidden units matched; the identity leaves a network as it is."
        + OF_POLICIES * any(row[0] == PPO for row in rows),
    )  # fmt: skip


EXPERIMENT = Experiment("fig-3.3", 2, measure, section, verdicts, figures, kept=True)
