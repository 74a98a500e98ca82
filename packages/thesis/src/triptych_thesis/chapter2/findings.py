"""What the experiments found, a plain sentence each, no further than their intervals carry."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from triptych_common.metrics import Estimate

from triptych_thesis.chapter2.scoring import METRICS
from triptych_thesis.chapter2.statistics import FAILS, HOLDS, UNCLEAR, overall

Result = Mapping[str, Any]


def findings(results: Mapping[str, Result]) -> list[str]:
    """Sentences for the experiments that are there, headline first."""
    return [tell(results[name]) for name, tell in _TELL.items() if name in results]


def measured(results: Mapping[str, Result]) -> dict[str, str]:
    """For each claim of the ledger that the experiments speak of, what was measured, in words."""
    words: dict[str, str] = {}
    if "block-designs" in results:
        words["dit.fig-2.5"] = _designs(results["block-designs"])
    if "gallery" in results:
        words["dit.fig-2.1"] = f"Drawn, nothing selected. {_gallery(results['gallery'])}"
    if "visual-scaling" in results:
        words["dit.fig-2.7"] = "Drawn, with one noise and class through every model; Figure 2.8 is the measured form."
    if "guidance" in results:
        table = next(iter(results["guidance"]["verdicts"]))
        words[table] = _guidance(results["guidance"]) + _of_photographs(results["guidance"])
    if "compute" in results:
        words["dit.fig-2.11"] = _compute(results["compute"])
    if "scaling" in results:
        scaling = results["scaling"]
        words["dit.fig-2.6"] = f"At each of {len(_stages(scaling))} stages: {counted(scaling['comparisons'])}."
        words["dit.fig-2.8"] = _correlations(scaling, ["frechet"]) + _similar(scaling)
        words["dit.fig-2.9"] = _correlations(scaling, list(METRICS))
        words["dit.fig-2.10"] = f"At no more training compute, larger against smaller: {counted(scaling['budgets'])}."
        if "unet" in results:
            words["dit.fig-2.2"] = f"Left: {_final(scaling)} Right: {_unet(results['unet'])}"
    return words


def shown(estimate: Mapping[str, Any] | None) -> str:
    """ "11.4 [5.2, 17.6]"; a dash for none."""
    return "–" if estimate is None else str(Estimate(**estimate))


def factor(difference: Mapping[str, Any]) -> str:
    """A difference of logarithms as a ratio: "1.8 times [1.4, 2.3]"."""
    low, high = (math.exp(difference[key]) for key in ("low", "high"))
    return f"{math.exp(difference['value']):.2f} times [{low:.2f}, {high:.2f}]"


def counted(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """ "7 of 12 hold, 1 is reversed, 4 cannot be told apart"; which ones are reversed."""
    if not comparisons:
        return "nothing was measured that could be compared"
    found = Counter(each["verdict"] for each in comparisons)
    reversed_ones = [f"{c['better']} behind {c['worse']}" for c in comparisons if c["verdict"] == FAILS]
    which = f" ({', '.join(dict.fromkeys(reversed_ones))})" if reversed_ones else ""
    return (
        f"of {len(comparisons)} comparisons {found[HOLDS]} hold, {found[FAILS]} are reversed{which}, "
        f"{found[UNCLEAR]} cannot be told apart from noise"
    )


def _gallery(result: Result) -> str:
    guided, floor = result["rows"]["guided"], result["floor"]["frechet"]
    return (
        f"Of {result['n']:,} digits sampled with guidance {result['guidance_scale']}, {_percent(guided['accuracy'])} are read as "
        f"the digit that was asked for (real ones: {_percent(result['held_out']['accuracy'])}). Their Fréchet distance to "
        f"held-out digits is {shown(guided['frechet'])}, that of real digits {floor:.1f}; recall {guided['recall']['value']:.2f} "
        f"(training digits {result['rows']['training digits']['recall']['value']:.2f}); {_percent(guided['near_duplicates'])} lie "
        "as close to a training digit as the nearest 5% of held-out digits do."
    )


def _designs(result: Result) -> str:
    last = max(_stages(result))
    parts = [
        f"{c['worse'].split(' ', 1)[1]} has {factor(c['difference'])} its Fréchet distance"
        for c in result["comparisons"]
        if c["about"]["images"] == last
    ]
    return (
        f"adaLN-Zero against other block designs at the last of {len(_stages(result))} stages: {'; '.join(parts)}. "
        f"Over all stages, {counted(result['comparisons'])}."
    )


def _final(result: Result) -> str:
    last = max(_stages(result))
    kinds = {}
    for c in result["comparisons"]:
        if c["about"]["images"] == last:
            kinds.setdefault(c["about"]["grows"], []).append(c)
    return " ".join(
        f"{'Larger models' if kind == 'model size' else 'More tokens'}, by Fréchet distance after equal steps: {counted(each)}."
        for kind, each in kinds.items()
    )


def _scaling(result: Result) -> str:
    noise = result["noise"]
    moved = ", ".join(f"{100 * math.expm1(stage['deviation']):.0f}%" for stage in noise)
    seeds = (
        f" Another training seed moves a distance by {moved} at the {len(noise)} stages (one deviation; models trained twice: "
        f"{noise[0]['pairs']}); comparisons of models include that."
        if noise[0]["pairs"]
        else " The noise of training seeds is in no interval."
    )
    return f"{_final(result)} {_correlations(result, ['frechet'])}{_similar(result)}{seeds}"


def _similar(result: Result) -> str:
    """Whether distances follow GFLOPs whatever the width."""
    pairs = result["similar"]
    if not pairs:
        return ""
    told = "; ".join(f"{' and '.join(pair['models'])} {factor(pair['log_ratio'])}" for pair in pairs)
    return (
        f" That models of other widths with GFLOPs within a factor of 1.5 have Fréchet distances within one of 1.5 "
        f"{overall(pair['verdict'] for pair in pairs)} (the second's over the first's: {told})."
    )


def _correlations(result: Result, metrics: Sequence[str]) -> str:
    parts = []
    for metric in metrics:
        r = result["correlations"][metric]
        interval = "" if r["low"] is None else f" [{r['low']:.2f}, {r['high']:.2f}]"
        parts.append(f"{metric.replace('_', ' ').replace('frechet', 'Fréchet distance')} {r['value']:.2f}{interval}")
    beside = " (thesis: -0.93 for FID)" if metrics[0] == "frechet" else ""
    models = len({row["model"] for row in result["rows"]})
    return f"Correlation of log GFLOPs over {models} models with {', '.join(parts)}{beside}."


def _compute(result: Result) -> str:
    parts = [
        f"{c['worse']} in {c['about']['steps_of_smaller']} steps has {factor(c['difference'])} the Fréchet distance of "
        f"{c['better']} in {c['about']['steps']}: the claim {c['verdict']}"
        for c in result["comparisons"]
    ]
    if not parts:
        return "Sampling compute: no model's most steps cost what the next one's fewest do."
    return f"Smaller models that spend at least as much on sampling as larger ones: {'; '.join(parts)}."


def _guidance(result: Result) -> str:
    told = {c["about"]["of"]: c for c in result["comparisons"]}
    words = {HOLDS: "yes", FAILS: "no, the reverse", UNCLEAR: "cannot be told apart from noise"}
    scale = told["frechet"]["about"]["better_scale"]
    return (
        f"Guidance {scale:g} on one trained model, as in the thesis's Table 2.2: lowers the Fréchet distance: "
        f"{words[told['frechet']['verdict']]}; raises precision: {words[told['precision']['verdict']]}; costs recall: "
        f"{words[told['recall']['verdict']]}; raises the digit score: {words[told['digit_score']['verdict']]}.{_fewer(result)}"
    )


def _fewer(result: Result) -> str:
    """Guidance on all channels but one against on all."""
    if not result["fewer"]:
        return ""
    words = {HOLDS: "lower", FAILS: "higher", UNCLEAR: "not told apart"}
    told = ", ".join(
        f"at {c['about']['scale']:g} {words[c['verdict']]} ({factor(_negated(c['difference']))})"
        for c in result["fewer"]
    )
    fewer = next(row["channels"] for row in result["rows"] if row["channels"] != "all")
    return f" On {fewer} of {result['channels']} channels instead of all the Fréchet distance is {told}."


def _negated(difference: Mapping[str, float]) -> dict[str, float]:
    return {"value": -difference["value"], "low": -difference["high"], "high": -difference["low"]}


def _of_photographs(result: Result) -> str:
    if result["side"] in (256, 512):
        return f" That it is ahead of the other models of the table, as published, {next(iter(result['verdicts'].values()))}."
    return " The table compares models of ImageNet, which no digit decides."


def _unet(result: Result) -> str:
    last = result["comparisons"][-1]
    return (
        f"A U-Net of as many GFLOPs has {factor(last['difference'])} the Fréchet distance of {last['better']} after the same "
        f"examples: that the DiT is better {last['verdict']}."
    )


def _samplers(result: Result) -> str:
    best = min(result["rows"], key=lambda row: row["frechet"]["value"])
    told = {}
    for c in result["comparisons"]:
        better, worse = c["about"]["pair"]
        sampler, other = better.split(",")[0], worse.split(",")[0]
        kind = "more steps are better" if sampler == other else f"in few steps others are better than {other}"
        told.setdefault((kind, c["about"]["of"]), []).append(c)
    parts = [
        f"{kind}, by {metric.replace('frechet', 'Fréchet distance')}: {_tally(each)}"
        for (kind, metric), each in told.items()
    ]
    return (
        f"Samplers: {'; '.join(parts)}. Lowest of {len(result['rows'])} Fréchet distances, chosen after the fact: "
        f"{best['sampler']} in {best['steps']} steps, {shown(best['frechet'])}."
    )


def _tally(comparisons: Sequence[Mapping[str, Any]]) -> str:
    found = Counter(c["verdict"] for c in comparisons)
    return f"{found[HOLDS]} of {len(comparisons)} hold, {found[FAILS]} reversed"


def _stages(result: Result) -> set[int]:
    return {c["about"]["images"] for c in result["comparisons"]}


def _percent(estimate: Mapping[str, float]) -> str:
    return f"{100 * estimate['value']:.1f}%"


_TELL: Mapping[str, Callable[[Result], str]] = {
    "gallery": _gallery,
    "scaling": _scaling,
    "block-designs": _designs,
    "unet": _unet,
    "compute": _compute,
    "guidance": _guidance,
    "samplers": _samplers,
}
