"""The figures of chapter 3 that one trained model suffices for, each as data that its figure and its table are drawn from."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor
from triptych_gpt.evaluation.prompted import starting_metrics
from triptych_gpt.evaluation.records import plain
from triptych_gpt.evaluation.trial import (
    Trial,
    alignment_beside_baselines,
    memorization,
    quality_against_sampler_steps,
)
from triptych_gpt.tasks import SupervisedTask

from triptych_thesis.chapter3.context import Amounts
from triptych_thesis.chapter3.diversity import diversity
from triptych_thesis.chapter3.filters import filters_before_and_after, shows_filters
from triptych_thesis.chapter3.hand_designed import OPTIMIZERS, optimise, spaced_steps
from triptych_thesis.chapter3.landscape import landscape
from triptych_thesis.chapter3.neighbours import nearest_neighbour_scores
from triptych_thesis.chapter3.recursion import new_networks, recursive_prompting

UNSEEN_SEED = 1_000_003  # of networks that no zoo began with


def one_step(trial: Trial, amounts: Amounts) -> dict[str, Any]:
    """One update of the model, of each tuned optimiser and of the baselines, for every metric of the task.  [Fig. 3.3]

    Prompted for the same metric throughout, with the value that did best on validation networks.
    """
    n = amounts.baseline_networks
    test, tuning = trial.starts("test", n), trial.starts("validation", n)
    start = starting_metrics(trial.task, test, trial.metric)
    updates = {"G.pt": trial.update, **trial.baselines}
    found = {name: trial.prompted(test, start, update).metrics for name, update in updates.items()}
    figures = {}
    for metric in trial.task.metrics:
        methods = [_method(name, "model" if name == "G.pt" else "baseline", values[metric.name])
                   for name, values in found.items()]  # fmt: skip
        for name in _optimizers(trial):
            curve = optimise(trial.task, name, test, tuning, metric.name, seed=trial.seed)
            methods.append(
                _method(name, "optimiser", curve.tuned[0].double())
                | {"tuned": curve.as_dict()["tuned"]["learning_rate"]}
            )
        figures[metric.name] = {
            "metric": metric.name,
            "better": metric.better,
            "start": float(start[metric.name].mean()),
            "trained_best": trial.trained_best.get(metric.name),
            "methods": methods,
        }
    return {"networks": n, "asked": trial.metric.name, "prompt": trial.best_prompt, "figures": figures}


def optimisation_curves(trial: Trial, amounts: Amounts) -> dict[str, Any]:
    """Tuned optimisers over a training run's steps, and when each catches up with one update of the model.  [Fig. 3.4]"""
    n, metric = amounts.baseline_networks, trial.metric.name
    test, tuning = trial.starts("test", n), trial.starts("validation", n)
    start = starting_metrics(trial.task, test, trial.metric)
    level = _estimate(trial.prompted(test, start, trial.update).metrics[metric])
    steps = spaced_steps(amounts.optimizer_steps or trial.task.steps)
    curves = []
    for name in _optimizers(trial):
        curve = optimise(trial.task, name, test, tuning, metric, steps, seed=trial.seed)
        at_edge = curve.as_dict()["tuned"]["learning_rate"] == max(point.learning_rate for point in curve.grid)
        told = {"caught_up": None, "not_yet_after": None, "at_edge": at_edge}
        if level["mean"] is not None:
            reach = curve.steps_to_reach(level["mean"])
            told |= {"caught_up": reach.step, "not_yet_after": reach.after}
        curves.append({**curve.as_dict(), **told})
    return {
        "metric": metric, "better": trial.metric.better, "networks": n, "prompt": trial.best_prompt,
        "start": float(start[metric].mean()),
        "one_step": level, "trained_best": trial.trained_best[metric], "curves": curves, "budget": steps[-1],
    }  # fmt: skip


def initialisers(trial: Trial, amounts: Amounts) -> dict[str, Any]:
    """Recursive prompting from initialisers that the zoo does not have.  [Fig. 3.6]"""
    starts = {
        name: theta.to(trial.trained.device)
        for name, theta in new_networks(trial.task, UNSEEN_SEED, amounts.recursion_networks).items()
    }
    known = trial.zoo.facts.get("recipe", {}).get("initialiser", "default")
    found = recursive_prompting(
        trial.update, trial.task, trial.metric, starts, known=known, updates=amounts.updates, prompt=trial.best_prompt,
        networks_at_once=trial.settings.networks_at_once,
    )  # fmt: skip
    return found.as_dict()


def landscapes(trial: Trial, amounts: Amounts) -> dict[str, Any]:
    """Samples of two starts on the landscape of the metric, and how they vary.  [Fig. 3.8]"""
    starts, samples = trial.starts("test", min(8, len(trial.zoo.runs_in("test")))), amounts.samples
    options = {"prompt": trial.best_prompt, "samples": samples}
    return {
        "landscapes": [
            landscape(trial.update, trial.task, trial.metric, theta, first_index=i * samples, **options).as_dict()
            for i, theta in enumerate(starts[:2])
        ],
        "diversity": diversity(trial.update, trial.task, trial.metric, starts, **options).as_dict(),
    }


def neighbours(trial: Trial, amounts: Amounts) -> dict[str, Any]:
    """Nearest-neighbour scores over prompts, raw and under matching, among all checkpoints and those near the prompt, with
    those of the identity and of retrieval beside them.  [Fig. 3.9, thesis 3.5]
    """
    low, high = trial.best_prompt, float(trial.zoo.metrics(trial.metric.name)[:, 0].mean()) * trial.metric.prompts.worst
    prompts = torch.linspace(low, high, amounts.neighbour_prompts, dtype=torch.float64).tolist()
    tolerance = abs(high - low) / 40
    rows = trial.zoo.runs_in("test")[: amounts.networks]
    updates = {"G.pt": trial.update, **{name: trial.baselines[name] for name in ("identity", "retrieval")}}
    return {
        "metric": trial.metric.name,
        "tolerance": tolerance,
        "scores": {
            name: [
                score.as_dict()
                for score in nearest_neighbour_scores(
                    update, trial.zoo, trial.task.symmetry, trial.metric.name, prompts, tolerance=tolerance, rows=rows,
                    every=amounts.every, training=trial.training,
                )
            ]
            for name, update in updates.items()
        },
    }  # fmt: skip


def filters(trial: Trial, amounts: Amounts) -> dict[str, Any]:
    """First-layer weights of an unseen network before and after one update, for networks that see square images."""
    layout = trial.task.layout
    if not shows_filters(layout):
        return {"none": f"the first layer of {trial.task.name} does not look at square images"}
    theta = trial.starts("test", 1)
    start, name = starting_metrics(trial.task, theta, trial.metric), trial.metric.name
    new = trial.prompted(theta, start, trial.update)
    return filters_before_and_after(
        layout, theta[0], new.theta[0], metric=name, before=float(start[name]), after=float(new.metrics[name]),
        prompt=trial.best_prompt,
    )  # fmt: skip


def _optimizers(trial: Trial) -> tuple[str, ...]:
    return tuple(OPTIMIZERS) if isinstance(trial.task, SupervisedTask) else ()


def _method(name: str, kind: str, values: Float[Tensor, " n"]) -> dict[str, Any]:
    return {"name": name, "kind": kind, **_estimate(values)}


def _estimate(values: Float[Tensor, " n"]) -> dict[str, Any]:
    """Mean and 95% interval over networks by Student's t, which is honest about few of them; those that are not finite are left
    out and counted.
    """
    finite = values.double()[values.isfinite()]
    n, mean, margin = len(finite), finite.mean() if len(finite) else torch.nan, torch.nan
    if n > 1:
        margin = float(student.ppf(0.975, n - 1)) * float(finite.std()) / n**0.5
    return plain(
        {"mean": float(mean), "low": float(mean) - margin, "high": float(mean) + margin, "networks": n,
         "non_finite": len(values) - n}
    )  # fmt: skip


SUITE: Mapping[str, Callable[[Trial, Amounts], dict[str, Any]]] = {
    "fig-3.3": one_step,
    "fig-3.4": optimisation_curves,
    "fig-3.5": lambda trial, amounts: alignment_beside_baselines(
        trial, networks=amounts.networks, prompts=amounts.prompts
    ),
    "fig-3.6": initialisers,
    "fig-3.8": landscapes,
    "fig-3.9": neighbours,
    "audit": lambda trial, amounts: memorization(trial, samples=amounts.audit_samples, every=amounts.every),
    "sampler-steps": lambda trial, amounts: quality_against_sampler_steps(
        trial, amounts.sampler_steps, networks=amounts.networks, prompts=amounts.prompts
    ),
    "filters": filters,
}
