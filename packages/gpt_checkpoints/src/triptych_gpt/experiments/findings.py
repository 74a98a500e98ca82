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
    model, rest = of["G.pt"], {name: one for name, one in of.items() if name != "G.pt"}
    others = ", ".join(f"{name} {one['r2']['value']:.2f}" for name, one in rest.items())
    return [
        f"Prompt alignment: R^2 {interval(model['r2'])} over {model['prompts']} prompts for {model['metric']}, mean of "
        f"{model['networks']} unseen networks; {interval(model['r2_reachable'])} over prompts that some training checkpoint "
        f"achieves. The same for {others}."
    ]


def _one_step(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for metric, data in result["figures"].items():
        methods = {method["name"]: method for method in data["methods"]}
        optimisers = [
            method for method in data["methods"] if method["kind"] == "optimiser" and method["mean"] is not None
        ]
        best = min(optimisers, key=lambda method: method["mean"], default=None)
        beside = (
            f"; the best of {len(optimisers)} tuned optimisers, {best['name']}, {interval(best, key='mean')}"
            if best
            else ""
        )
        baselines = ", ".join(
            f"{method['name']} {number(method['mean'])}" for method in data["methods"] if method["kind"] == "baseline"
        )
        lines.append(
            f"One update from {result['networks']} unseen networks, asked for {result['prompt']:.3g}: {metric} "
            f"{interval(methods['G.pt'], key='mean')} from {number(data['start'])}{beside}. Best training checkpoint "
            f"{number(data['trained_best'])}; {baselines}."
        )
    return lines


def _curves(result: Mapping[str, Any]) -> list[str]:
    caught = [
        f"{curve['optimizer']} after {curve['caught_up']:,}" if curve["caught_up"] else f"{curve['optimizer']} never"
        for curve in result["curves"]
    ]
    return [
        f"Tuned optimisers catch up with that one update ({result['metric']} {number(result['one_step']['mean'])}) within "
        f"{result['budget']:,} steps: {', '.join(caught)}."
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
    return [
        f"Recursion ({result['metric']}, start to first update, best of {len(result['curves'][known]['mean']) - 1}): "
        + "; ".join(parts) + "."
    ]  # fmt: skip


def _diversity(result: Mapping[str, Any]) -> list[str]:
    noise, starts = (number((result["diversity"][of] or {}).get("matched"), ".2f") for of in ("noise", "starts"))
    return [f"Samples of one start lie {noise} apart (units matched), those of different starts {starts}."]


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
