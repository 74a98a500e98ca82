"""What the experiments found, a plain sentence each, no further than their numbers carry."""

from collections.abc import Callable, Mapping
from typing import Any


def findings(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences for the experiments that are there, headline first."""
    return [line for name, tell in _TELL.items() if name in results for line in tell(results[name])]


def number(value: float | int | None, form: str = ".3f") -> str:
    """ "0.912", or a dash for what is not finite."""
    return "–" if value is None else f"{value:{form}}"


def interval(found: Mapping[str, Any] | None, form: str = ".3f", key: str = "value") -> str:
    """ "0.91 [0.89, 0.93]", or a dash."""
    if found is None or found[key] is None:
        return "–"
    if found.get("low") is None or found.get("high") is None:
        return f"{found[key]:{form}}"
    return f"{found[key]:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def _alignment(result: Mapping[str, Any]) -> list[str]:
    of = result["alignment"]
    model, retrieval = of["G.pt"], of["retrieval"]["r2"]["value"]
    others = ", ".join(
        f"{name} {one['r2']['value']:.2f}" for name, one in of.items() if name not in ("G.pt", "retrieval")
    )
    beaten = (
        "more than" if model["r2"]["low"] > retrieval else "less than" if model["r2"]["high"] < retrieval else "like"
    )
    diverged = f" {model['non_finite']} updates were not finite." if model["non_finite"] else ""
    return [
        f"Prompt alignment: R^2 {interval(model['r2'])} over {model['prompts']} prompts for {model['metric']}, mean of "
        f"{model['networks']} networks of unseen runs; {interval(model['r2_reachable'])} over prompts that some training "
        f"checkpoint achieves. That is {beaten} copying the training checkpoint nearest in metric, {retrieval:.2f}, which starts "
        f"from nobody's network; {others}.{diverged}"
    ]


def _one_step(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for metric, data in result["figures"].items():
        methods = {method["name"]: method for method in data["methods"]}
        best = best_optimiser(data)
        beside = (
            f"; the best tuned optimiser's one step, {best['name']}'s, {interval(best, key='mean')}" if best else ""
        )
        baselines = ", ".join(
            f"{method['name']} {number(method['mean'])}" for method in data["methods"] if method["kind"] == "baseline"
        )
        lines.append(
            f"One update of {result['networks']} networks of unseen runs, asked for a {result['asked']} of "
            f"{result['prompt']:.3g}: {metric} {interval(methods['G.pt'], key='mean')} from {number(data['start'])}{beside}. Best "
            f"training checkpoint {number(data['trained_best'])}; {baselines}."
        )
    return lines


def best_optimiser(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The optimiser whose one step was best; None where there is none."""
    found = [method for method in data["methods"] if method["kind"] == "optimiser" and method["mean"] is not None]
    choose = min if data["better"] == "lower" else max
    return choose(found, key=lambda method: method["mean"], default=None)


def _curves(result: Mapping[str, Any]) -> list[str]:
    if not result["curves"]:
        return ["No optimiser is compared: the task is not supervised."]
    level = result["one_step"]
    if level["mean"] is None:
        return [
            f"None of {level['non_finite']} updates is finite: there is nothing that optimisers could catch up with."
        ]
    caught = [
        f"{curve['optimizer']} after {curve['caught_up']:,}" if curve["caught_up"] else f"{curve['optimizer']} not"
        for curve in result["curves"]
    ]
    edges = [curve["optimizer"] for curve in result["curves"] if curve["at_edge"]]
    at_edge = f" The grid's largest learning rate was best for {', '.join(edges)}." if edges else ""
    return [
        f"Tuned optimisers at constant rates catch up with that one update ({result['metric']} {number(level['mean'])}) within "
        f"{result['budget']:,} steps: {', '.join(caught)}.{at_edge}"
    ]


def _recursion(result: Mapping[str, Any]) -> list[str]:
    known = result["known"]
    parts = []
    for name, curve in result["curves"].items():
        mean = curve["mean"]
        finite = [value for value in mean if value is not None]
        best = (min if result["better"] == "lower" else max)(finite, default=None)
        parts.append(
            f"{name} {number(mean[0], '.2f')} to {number(mean[1], '.2f')}, at best {number(best, '.2f')} after "
            f"{mean.index(best)}"
        )
    lines = [
        f"Recursion ({result['metric']}, start to first update, best of {len(result['curves'][known]['mean']) - 1}): "
        + "; ".join(parts) + "."
    ]  # fmt: skip
    if "test_error" in result["curves"][known]["metrics"] and result["metric"] != "test_error":
        errors = {name: curve["metrics"]["test_error"] for name, curve in result["curves"].items()}
        told = [f"{name} {_mean_at(rows, 1)} to {_mean_at(rows, -1)}" for name, rows in errors.items()]
        lines.append(f"Test error on the same way, after the first update and after the last: {', '.join(told)}.")
    return lines


def _mean_at(rows: list[list[float | None]], update: int) -> str:
    values = [row[update] for row in rows if row[update] is not None]
    return number(sum(values) / len(values) if values else None, ".1%")


def _diversity(result: Mapping[str, Any]) -> list[str]:
    noise, starts = (number((result["diversity"][of] or {}).get("matched"), ".2f") for of in ("noise", "starts"))
    lands = result["landscapes"]
    count = sum(len(land["samples"]) for land in lands)
    accurate = sum(sum(land["accurate"]) for land in lands)
    convex = " and ".join(f"{number(land['convex'], '.0%')}" for land in lands)
    return [
        f"Samples of one start lie {noise} apart (units matched), those of different starts {starts}. Of {count} samples "
        f"{accurate} score in the plane of the figure nearly as they do; the metric curves upwards along both axes at {convex}."
    ]


def _audit(result: Mapping[str, Any]) -> list[str]:
    return list(result["verdict"])


_TELL: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "fig-3.5": _alignment,
    "fig-3.3": _one_step,
    "fig-3.4": _curves,
    "fig-3.6": _recursion,
    "audit": _audit,
    "fig-3.8": _diversity,
}
