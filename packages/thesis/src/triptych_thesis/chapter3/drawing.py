"""Which figures an experiment's result has, drawn from that result alone."""

from collections.abc import Callable, Mapping
from typing import Any

from triptych_common.images import figure_png

from triptych_thesis.chapter3 import figures

KINDS = {
    (False, False): "all checkpoints",
    (False, True): "near the prompt",
    (True, False): "all checkpoints, units matched",
    (True, True): "near the prompt, units matched",
}
AUDIT_KINDS = {"samples": "model", "held-out at the prompt's metric": "real", "held-out finals": "real"}


def drawn(name: str, result: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files of an experiment by name, without suffix; none for one that has no figure, or none for this task."""
    if "none" in result:
        return {}
    return {title: figure_png(figure) for title, figure in _FIGURES.get(name, lambda _: {})(result).items()}


def _one_step(result: Mapping[str, Any]) -> dict[str, Any]:
    return {f"fig-3.3-{metric}": figures.one_step(data) for metric, data in result["figures"].items()}


def _sweep(result: Mapping[str, Any]) -> dict[str, Any]:
    sweeps = dict(result["sweeps"])
    model = sweeps.pop("G.pt")
    also = [metric for metric in model["achieved"] if metric == "test_error" != model["metric"]]
    return {"fig-3.5": figures.sweep(model, also=also, beside=sweeps)}


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


def _audit(result: Mapping[str, Any]) -> dict[str, Any]:
    groups = [
        {"name": group["name"], "kind": AUDIT_KINDS.get(group["name"], "baseline"), "distances": group["distances"]}
        for group in result["groups"]
    ]
    label = "distance to the nearest training network, units matched"
    return {"audit": figures.audit({"label": label, "groups": groups})}


_FIGURES: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "fig-3.3": _one_step,
    "fig-3.4": lambda result: {"fig-3.4": figures.optimisation_curves(result)},
    "fig-3.5": _sweep,
    "fig-3.6": _recursion,
    "fig-3.7": lambda result: {"fig-3.7": figures.scaling(result["panels"])},
    "fig-3.8": lambda result: {"fig-3.8": figures.landscape(result["landscapes"])},
    "fig-3.9": _neighbours,
    "audit": _audit,
    "sampler-steps": lambda result: {"sampler-steps": figures.quality(result["rows"])},
    "filters": lambda result: {"filters": figures.filters(result)},
}
