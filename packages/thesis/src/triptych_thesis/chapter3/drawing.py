"""Which figures an experiment's result has, drawn from that result alone."""

from collections.abc import Callable, Mapping
from typing import Any

from triptych_common.images import figure_png
from triptych_gpt.evaluation.plots import alignment_figure, memorization_figure

from triptych_thesis.chapter3 import figures

KINDS = {
    (False, False): "all checkpoints",
    (False, True): "near the prompt",
    (True, False): "all checkpoints, units matched",
    (True, True): "near the prompt, units matched",
}


def drawn(name: str, result: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files of an experiment by name, without suffix; none for one that has no figure, or none for this task."""
    if "none" in result:
        return {}
    return {title: figure_png(figure) for title, figure in _FIGURES.get(name, lambda _: {})(result).items()}


def _one_step(result: Mapping[str, Any]) -> dict[str, Any]:
    return {f"fig-3.3-{metric}": figures.one_step(data) for metric, data in result["figures"].items()}


def _recursion(result: Mapping[str, Any]) -> dict[str, Any]:
    metrics = next(iter(result["curves"].values()))["metrics"]
    shown = [metric for metric in (result["metric"], "test_error") if metric in metrics]
    return {f"fig-3.6-{metric}": figures.recursion(result, metric=metric) for metric in dict.fromkeys(shown)}


def _neighbours(result: Mapping[str, Any]) -> dict[str, Any]:
    curves = {}
    for update, scores in result["scores"].items():
        for kind, words in KINDS.items():
            some = [score for score in scores if (score["matched"], score["near_prompt"]) == kind]
            found = [score["score"] or {"value": None, "low": None, "high": None} for score in some]
            curves[update, words] = {end: [one[end] for one in found] for end in ("value", "low", "high")}
    model = result["scores"]["G.pt"]
    prompts = [score["target"] for score in model if (score["matched"], score["near_prompt"]) == (False, False)]
    return {
        "fig-3.9": figures.nearest_neighbours(
            {
                "metric": result["metric"],
                "prompts": prompts,
                "scores": {words: curve for (update, words), curve in curves.items() if update == "G.pt"},
                "baselines": {
                    f"{update}, {words}": curve for (update, words), curve in curves.items() if update != "G.pt"
                },
            }
        )
    }


_FIGURES: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "fig-3.3": _one_step,
    "fig-3.4": lambda result: {"fig-3.4": figures.optimisation_curves(result)},
    "fig-3.5": lambda result: {"fig-3.5": alignment_figure(result)},
    "fig-3.6": _recursion,
    "fig-3.7": lambda result: {"fig-3.7": figures.scaling(result["panels"])},
    "fig-3.8": lambda result: {"fig-3.8": figures.landscape(result["landscapes"])},
    "fig-3.9": _neighbours,
    "audit": lambda result: {"audit": memorization_figure(result)},
    "sampler-steps": lambda result: {"sampler-steps": figures.quality(result["rows"])},
    "filters": lambda result: {"filters": figures.filters(result)},
}
