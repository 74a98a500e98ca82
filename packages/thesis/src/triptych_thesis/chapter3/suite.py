"""The figures of chapter 3 that one trained model suffices for, each as data that its figure and its table are drawn from."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor
from triptych_gpt.evaluation.alignment import alignment_of
from triptych_gpt.evaluation.prompted import Updated, prompted, starting_metrics
from triptych_gpt.evaluation.records import plain
from triptych_gpt.evaluation.sweep import prompt_sweep
from triptych_gpt.evaluation.update import Update
from triptych_gpt.memorization import audit
from triptych_gpt.tasks import SupervisedTask
from triptych_gpt.trained import SamplerSettings

from triptych_thesis.chapter3.context import Bench
from triptych_thesis.chapter3.diversity import diversity
from triptych_thesis.chapter3.filters import filters_before_and_after, shows_filters
from triptych_thesis.chapter3.hand_designed import OPTIMIZERS, optimise, spaced_steps
from triptych_thesis.chapter3.landscape import landscape
from triptych_thesis.chapter3.neighbours import nearest_neighbour_scores
from triptych_thesis.chapter3.quality import kl_last_step, quality_against_steps
from triptych_thesis.chapter3.recursion import new_networks, recursive_prompting

UNSEEN_SEED = 1_000_003  # of networks that no zoo began with


def one_step(bench: Bench) -> dict[str, Any]:
    """One update of the model, of each tuned optimiser and of the baselines, for every metric of the task.  [Fig. 3.3]

    Prompted for the same metric throughout, with the value that did best on validation networks.
    """
    n = bench.amounts.baseline_networks
    test, tuning = bench.starts("test", n), bench.starts("validation", n)
    start = starting_metrics(bench.task, test, bench.metric)
    updates = {"G.pt": bench.update, **bench.baselines}
    found = {name: _asked(bench, test, start, update).metrics for name, update in updates.items()}
    figures = {}
    for metric in bench.task.metrics:
        methods = [_method(name, "model" if name == "G.pt" else "baseline", values[metric.name])
                   for name, values in found.items()]  # fmt: skip
        for name in _optimizers(bench):
            curve = optimise(bench.task, name, test, tuning, metric.name, seed=bench.seed)
            methods.append(
                _method(name, "optimiser", curve.tuned[0].double())
                | {"tuned": curve.as_dict()["tuned"]["learning_rate"]}
            )
        figures[metric.name] = {
            "metric": metric.name,
            "better": metric.better,
            "start": float(start[metric.name].mean()),
            "trained_best": bench.trained_best.get(metric.name),
            "methods": methods,
        }
    return {"networks": n, "asked": bench.metric.name, "prompt": bench.best_prompt, "figures": figures}


def optimisation_curves(bench: Bench) -> dict[str, Any]:
    """Tuned optimisers over a training run's steps, and when each catches up with one update of the model.  [Fig. 3.4]"""
    n, metric = bench.amounts.baseline_networks, bench.metric.name
    test, tuning = bench.starts("test", n), bench.starts("validation", n)
    start = starting_metrics(bench.task, test, bench.metric)
    level = _estimate(_asked(bench, test, start, bench.update).metrics[metric])
    steps = spaced_steps(bench.amounts.optimizer_steps or bench.task.steps)
    curves = []
    for name in _optimizers(bench):
        curve = optimise(bench.task, name, test, tuning, metric, steps, seed=bench.seed)
        at_edge = curve.as_dict()["tuned"]["learning_rate"] == max(point.learning_rate for point in curve.grid)
        told = {"caught_up": None, "not_yet_after": None, "at_edge": at_edge}
        if level["mean"] is not None:
            reach = curve.steps_to_reach(level["mean"])
            told |= {"caught_up": reach.step, "not_yet_after": reach.after}
        curves.append({**curve.as_dict(), **told})
    return {
        "metric": metric, "better": bench.metric.better, "networks": n, "prompt": bench.best_prompt,
        "start": float(start[metric].mean()),
        "one_step": level, "trained_best": bench.trained_best[metric], "curves": curves, "budget": steps[-1],
    }  # fmt: skip


def prompt_alignment(bench: Bench) -> dict[str, Any]:
    """Sweeps over prompts on unseen networks, and R^2, of the model and of the baselines.  [Fig. 3.5, thesis 3.4.4]"""
    theta = bench.starts("test", bench.amounts.networks)
    updates = {"G.pt": bench.update, **bench.baselines}
    sweeps = {
        name: prompt_sweep(
            update, bench.task, bench.metric, theta, prompts=bench.amounts.prompts, trained_best=bench.trained_best,
            networks_at_once=bench.settings.networks_at_once,
        )
        for name, update in updates.items()
    }  # fmt: skip
    return {
        "sweeps": {name: sweep.as_dict() for name, sweep in sweeps.items()},
        "alignment": {name: alignment_of(sweep).as_dict() for name, sweep in sweeps.items()},
        "kl_last_step": _kl(bench),
    }


def initialisers(bench: Bench) -> dict[str, Any]:
    """Recursive prompting from initialisers that the zoo does not have.  [Fig. 3.6]"""
    starts = {
        name: theta.to(bench.trained.device)
        for name, theta in new_networks(bench.task, UNSEEN_SEED, bench.amounts.recursion_networks).items()
    }
    known = bench.zoo.facts.get("recipe", {}).get("initialiser", "default")
    found = recursive_prompting(
        bench.update, bench.task, bench.metric, starts, known=known, updates=bench.amounts.updates, prompt=bench.best_prompt,
        networks_at_once=bench.settings.networks_at_once,
    )  # fmt: skip
    return found.as_dict()


def landscapes(bench: Bench) -> dict[str, Any]:
    """Samples of two starts on the landscape of the metric, and how they vary.  [Fig. 3.8]"""
    starts, samples = bench.starts("test", min(8, len(bench.zoo.runs_in("test")))), bench.amounts.samples
    options = {"prompt": bench.best_prompt, "samples": samples}
    return {
        "landscapes": [
            landscape(bench.update, bench.task, bench.metric, theta, first_index=i * samples, **options).as_dict()
            for i, theta in enumerate(starts[:2])
        ],
        "diversity": diversity(bench.update, bench.task, bench.metric, starts, **options).as_dict(),
    }


def neighbours(bench: Bench) -> dict[str, Any]:
    """Nearest-neighbour scores over prompts, raw and under matching, among all checkpoints and those near the prompt, with
    those of the identity and of retrieval beside them.  [Fig. 3.9, thesis 3.5]
    """
    low, high = bench.best_prompt, float(bench.zoo.metrics(bench.metric.name)[:, 0].mean()) * bench.metric.prompts.worst
    prompts = torch.linspace(low, high, bench.amounts.neighbour_prompts, dtype=torch.float64).tolist()
    tolerance = abs(high - low) / 40
    rows = bench.zoo.runs_in("test")[: bench.amounts.networks]
    updates = {"G.pt": bench.update, **{name: bench.baselines[name] for name in ("identity", "retrieval")}}
    return {
        "metric": bench.metric.name,
        "tolerance": tolerance,
        "scores": {
            name: [
                score.as_dict()
                for score in nearest_neighbour_scores(
                    update, bench.zoo, bench.task.symmetry, bench.metric.name, prompts, tolerance=tolerance, rows=rows,
                    every=bench.amounts.every, training=bench.training,
                )
            ]
            for name, update in updates.items()
        },
    }  # fmt: skip


def memorisation(bench: Bench, prompt: float | int | None = None) -> dict[str, Any]:
    """The audit of updates of unseen networks, one each, that ask for the best, or for `prompt`."""
    prompt = bench.best_prompt if prompt is None else float(prompt)
    count = min(bench.amounts.audit_samples, len(bench.zoo.runs_in("test")))
    theta = bench.starts("test", count)
    new = _asked(bench, theta, starting_metrics(bench.task, theta, bench.metric), bench.update, prompt)
    finite = new.theta.isfinite().all(1)
    if not finite.any():
        raise ValueError(f"none of {count:,} updates is finite, so there is nothing to audit; train the model further")
    found = audit(
        new.theta[finite], bench.zoo, bench.task, bench.metric.name,
        torch.full((int(finite.sum()),), prompt, dtype=torch.float64), bench.trained.scale, seed=bench.seed,
        every=bench.amounts.every, rows=bench.training,
    )  # fmt: skip
    return {"prompt": prompt, "non_finite": int((~finite).sum()), **found.as_dict()}


def sampler_steps(bench: Bench) -> dict[str, Any]:
    """Prompt alignment on validation networks, and the best that is achieved, against denoising steps, for each sampler: ours
    and, where diffusers is installed, UniPC as an example of its fast ones.
    """
    samplers = ("ddpm", "ddim", *(("unipc",) if find_spec("diffusers") else ()))
    updates = {
        (sampler, steps): bench.trained.update(
            SamplerSettings(sampler, steps, bench.settings.networks_at_once), bench.seed
        )
        for sampler in samplers
        for steps in bench.amounts.sampler_steps
        if sampler in ("ddpm", "ddim") or steps >= 5  # with fewer diffusers' would not begin at noise
    }
    theta = bench.starts("validation", min(bench.amounts.networks, 16))
    found = quality_against_steps(
        updates, bench.task, bench.metric, theta, prompts=bench.amounts.prompts, trained_best=bench.trained_best,
        networks_at_once=bench.settings.networks_at_once,
    )  # fmt: skip
    return {"rows": [quality.as_dict() for quality in found]}


def filters(bench: Bench) -> dict[str, Any]:
    """First-layer weights of an unseen network before and after one update, for networks that see square images."""
    layout = bench.task.layout
    if not shows_filters(layout):
        return {"none": f"the first layer of {bench.task.name} does not look at square images"}
    theta = bench.starts("test", 1)
    start, name = starting_metrics(bench.task, theta, bench.metric), bench.metric.name
    new = _asked(bench, theta, start, bench.update)
    return filters_before_and_after(
        layout, theta[0], new.theta[0], metric=name, before=float(start[name]), after=float(new.metrics[name]),
        prompt=bench.best_prompt,
    )  # fmt: skip


def _asked(
    bench: Bench,
    theta: Float[Tensor, "n D"],
    start: Mapping[str, Float[Tensor, " n"]],
    update: Update,
    prompt: float | None = None,
) -> Updated:
    """One update that asks for the best, or for `prompt`, of networks that score `start`."""
    target = torch.full((len(theta),), bench.best_prompt if prompt is None else prompt, dtype=torch.float64)
    return prompted(update, bench.task, theta, start[bench.metric.name], target, range(len(theta)))


def _optimizers(bench: Bench) -> tuple[str, ...]:
    return tuple(OPTIMIZERS) if isinstance(bench.task, SupervisedTask) else ()


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


def _kl(bench: Bench) -> float:
    """Of the last diffusion step, bits per dimension, on final and other checkpoints of test runs.  [thesis 3.3]"""
    rows = torch.from_numpy(bench.zoo.runs_in("test"))[:32].repeat_interleave(8)
    places = torch.linspace(0, bench.zoo.checkpoints - 1, 8).long().repeat(len(rows) // 8)
    theta_star = bench.zoo.theta(rows, places) * bench.trained.scale
    return kl_last_step(bench.trained.diffusion.schedule.alpha_bar[-1], theta_star)


SUITE: Mapping[str, Callable[[Bench], dict[str, Any]]] = {
    "fig-3.3": one_step,
    "fig-3.4": optimisation_curves,
    "fig-3.5": prompt_alignment,
    "fig-3.6": initialisers,
    "fig-3.8": landscapes,
    "fig-3.9": neighbours,
    "audit": memorisation,
    "sampler-steps": sampler_steps,
    "filters": filters,
}
