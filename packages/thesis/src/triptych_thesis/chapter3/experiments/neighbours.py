"""The nearest-neighbour score: whose checkpoints lie nearer to a generated network, its own run's or the training set's?

The thesis counts runs whose sample is nearer to one of the run's own checkpoints than to any training checkpoint [3.5, Fig. 3.9].
The identity scores 100% on that definition, and so may a constant, such as the mean of all training runs' finals, which is
small and so nearest to where the run began. Hence the score is also given for checkpoints whose metric is near the prompt;
and, since hidden units have no order, both are also given under the best matching of units.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate, bootstrap_rate
from triptych_common.plots import PALETTE, legend, numbers, panels
from triptych_gpt.evaluation import plots
from triptych_gpt.evaluation.prompted import Update
from triptych_gpt.evaluation.trial import MODEL
from triptych_gpt.nearest import Nearest, Pool, nearest
from triptych_gpt.symmetry.spec import PermutationSpec
from triptych_gpt.zoo.zoo import Zoo

from triptych_thesis.chapter3.context import Context, named
from triptych_thesis.study.estimates import interval, number
from triptych_thesis.study.experiment import Experiment, Result, Section, Table
from triptych_thesis.study.plots import LINES, distinct
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, UNDECIDED, Evidence, Verdict, better

if TYPE_CHECKING:
    from triptych_thesis.chapter3.study import Chapter3

CLAIM = "gpt.fig-3.9"
HALF = {"low": 0.5, "high": 0.5}
KINDS = {  # by (matched, near the prompt)
    (False, False): "all checkpoints",
    (False, True): "near the prompt",
    (True, False): "all checkpoints, units matched",
    (True, True): "near the prompt, units matched",
}


def nearest_neighbour_scores(
    update: Update,
    zoo: Zoo,
    spec: PermutationSpec,
    metric: str,
    prompts: Sequence[float],
    *,
    tolerance: float,
    rows: Int[np.ndarray, " runs"] | None = None,
    every: int = 1,
    training: Int[np.ndarray, " training"] | None = None,
) -> list[dict[str, Any]]:
    """Update the initial network of each run to each prompt, and score: four kinds for each prompt, in the prompts' order.

    Args:
        tolerance: how far from the prompt, in the metric's units, a checkpoint may be and still count as near.
        rows: of the zoo's runs to start from; by default all of the test split.
        every: searches each k-th training checkpoint only, which favours the run's own, of which all are searched.
        training: rows of the runs that the model was trained on; by default all of the training split.
    """
    rows = zoo.runs_in("test") if rows is None else rows
    training = zoo.runs_in("train") if training is None else training
    runs, start = len(rows), zoo.metrics(metric)[torch.as_tensor(rows), 0]
    theta = zoo.theta(rows, [0] * runs)
    samples = torch.cat([
        # The update of run r to prompt p samples the noise of index r + p * runs.
        update(theta, start, torch.full_like(start, prompt), range(p * runs, (p + 1) * runs)).detach().cpu()
        for p, prompt in enumerate(prompts)
    ])  # fmt: skip
    finite = samples.isfinite().all(1)
    non_finite = (~finite).view(len(prompts), -1).sum(1).tolist()
    targets = torch.tensor(prompts, dtype=torch.float64).repeat_interleave(runs)[finite]
    run_of = np.tile(np.asarray(rows), len(prompts))[finite.numpy()]

    def search(some: Tensor, of: Int[np.ndarray, " runs"], every: int, matched: bool, near: bool) -> Nearest:
        """The nearest checkpoint of some runs to some of the finite samples."""
        pool = Pool.of(zoo, of, every, metric if near else None)
        options: dict[str, Any] = {"target": targets[some], "tolerance": tolerance} if near else {}
        return nearest(samples[finite][some], pool, spec if matched else None, **options)

    by_prompt: list[list[dict[str, Any]]] = [[] for _ in prompts]
    for matched, near in KINDS:
        in_training = search(torch.arange(len(targets)), training, every, matched, near)
        # To the run's own checkpoints and to training ones, infinite for samples that are not finite.
        distances = torch.full((2, len(samples)), math.inf, dtype=torch.float64)
        distances[1, finite] = in_training.distance
        places = finite.nonzero()[:, 0]
        for row in np.unique(run_of):
            here = torch.from_numpy(np.nonzero(run_of == row)[0])
            distances[0, places[here]] = search(here, np.array([row]), 1, matched, near).distance
        for p, (own, theirs) in enumerate(distances.view(2, len(prompts), -1).unbind(1)):
            kind = {"target": float(prompts[p]), "matched": matched, "near_prompt": near}
            by_prompt[p].append({**kind, **_score(own, theirs, in_training.exact, non_finite[p])})
    return [score for scores in by_prompt for score in scores]


def _score(
    own: Float[Tensor, " runs"], training: Float[Tensor, " runs"], exact: bool, non_finite: int
) -> dict[str, Any]:
    """One prompt's score from distances to the run's own checkpoints and to the training set's, upper bounds unless `exact`."""
    finite = own.isfinite() & training.isfinite()  # a sample that is, and checkpoints to search in both
    hits = (own < training)[finite]
    score, median_own, median_training = None, None, None
    if len(hits):
        score = bootstrap_rate(hits)._asdict()
        median_own, median_training = float(own[finite].median()), float(training[finite].median())
    return {
        "score": score, "counted": len(hits), "runs": len(own), "non_finite": non_finite, "median_distance_own": median_own,
        "median_distance_training": median_training, "exact": exact, "own": own, "training": training,
    }  # fmt: skip


def measure(context: Context) -> Result:
    """Scores at prompts from the best to a random network's metric, of the model, of the identity and of retrieval."""
    trial, amounts, metric = context.trial, context.amounts, context.trial.metric.name
    assert trial.metric.prompts is not None  # a trial's metric has prompts
    low, high = trial.best_prompt, float(trial.zoo.metrics(metric)[:, 0].mean()) * trial.metric.prompts.worst
    prompts = torch.linspace(low, high, amounts.neighbour_prompts, dtype=torch.float64).tolist()
    tolerance, rows = abs(high - low) / 40, trial.zoo.runs_in("test")[: amounts.networks]
    updates = {MODEL: trial.update, **{name: trial.baselines[name] for name in ("identity", "retrieval")}}
    scores = {
        name: nearest_neighbour_scores(
            update, trial.zoo, trial.task.symmetry, metric, prompts, tolerance=tolerance, rows=rows, every=amounts.every,
            training=trial.training,
        )
        for name, update in updates.items()
    }  # fmt: skip
    for score in (score for of_update in scores.values() for score in of_update):
        del score["own"], score["training"]  # every run's distance: the medians are saved
    return {"metric": metric, "tolerance": tolerance, "scores": scores}


def of_kind(scores: Sequence[Result], matched: bool, near_prompt: bool) -> list[Result]:
    """The scores of one kind, prompt by prompt."""
    return [score for score in scores if (score["matched"], score["near_prompt"]) == (matched, near_prompt)]


def verdicts(result: Result) -> list[Verdict]:
    """Whether samples lie nearer to their own run than to the training set at most prompts, and fail at the best ones only.

    By the thesis's score: Euclidean distances to all checkpoints. The identity passes it at every prompt, so the stricter scores
    stand in the evidence: checkpoints near the prompt, hidden units matched.
    """
    plain = of_kind(result["scores"][MODEL], False, False)  # prompts run from the best to a random network's metric
    passed, failed = ([_side(score) == side for score in plain] for side in (CONFIRMED, REFUTED))
    # No prompt that fails may demand a worse network than one that passes.
    late = any(fails and any(passed[:i]) for i, fails in enumerate(failed))
    verdict = CONFIRMED if sum(passed) > len(plain) / 2 else UNDECIDED
    if sum(failed) > len(plain) / 2 or late:
        verdict = REFUTED
    what = "prompts at which most samples lie nearest to their own run"
    beside, *others = (
        f"{sum(_side(score) == CONFIRMED for score in of_kind(scores, False, False))} of {name}"
        for name, scores in result["scores"].items()
        if name != MODEL
    )
    everywhere, at_best_prompt = "all, but for MNIST's smallest", "15 to 20% (MNIST)"
    if result["metric"].endswith("return"):
        everywhere, at_best_prompt = "all", "100%"
    evidence = [Evidence(what, f"{sum(passed)} of {len(plain)}", everywhere, beside, others)]
    for kind, words_of_kind in KINDS.items():
        at_best = {name: of_kind(scores, *kind)[0]["score"] for name, scores in result["scores"].items()}
        beside, *others = (f"{interval(score, '.0%')} of {name}" for name, score in at_best.items() if name != MODEL)
        what = f"share at the best prompt, {words_of_kind}"
        evidence.append(Evidence(what, interval(at_best[MODEL], ".0%"), at_best_prompt, beside, others))
    return [Verdict(CLAIM, verdict, evidence)]


def _side(score: Result) -> str:
    """Whether a prompt's score is above one half."""
    return better(score["score"], HALF) if score["score"] else UNDECIDED


def figure(data: Result) -> Figure:
    """Share of unseen runs whose sample lies nearer to its own run than to the training set, against prompts.  [Fig. 3.9]

    data: {"metric", "prompts": [n], "scores": {name: {"value": [n], "low": [n] or None, "high": [n] or None}}, "baselines": the
    same, optional}; scores are fractions, and left out where None or not finite.
    """
    baselines = data.get("baselines") or {}
    figure, (axes,) = panels(size=(7.2, max(3.4, 0.9 + 0.2 * (len(data["scores"]) + len(baselines)))))
    prompts = numbers(data["prompts"])
    # Baselines are drawn broken and thinner, over the others, which they may meet at 0 and 100%.
    like_scores = distinct(PALETTE[: max(4, len(data["scores"]))], LINES[1:])  # of one kind: in the scores' colours
    for curves, looks, width in ((data["scores"], distinct(), 1.6), (baselines, like_scores, 1.0)):
        for (name, one), look in zip(curves.items(), looks, strict=False):
            value = 100 * numbers(one["value"])
            seen = np.isfinite(prompts) & np.isfinite(value)
            axes.plot(prompts[seen], value[seen], **look, markersize=4, linewidth=width, label=name, clip_on=False)
            if one.get("low") is not None and one.get("high") is not None:
                low, high = (100 * numbers(one[end])[seen] for end in ("low", "high"))
                axes.fill_between(prompts[seen], low, high, color=look["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel=f"prompted {plots.words(data['metric'])}", ylabel="nearest-neighbour score (%)", ylim=(0, 100))
    plots.measure(axes.xaxis, data["metric"])
    legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def figures(result: Result) -> dict[str, Figure]:
    """One figure: four kinds of score, of the model and of the two baselines."""
    curves: dict[str, dict[str, dict[str, list[Any]]]] = {"scores": {}, "baselines": {}}
    for update, scores in result["scores"].items():
        for kind, words_of_kind in KINDS.items():
            shares = [score["score"] or dict.fromkeys(Estimate._fields) for score in of_kind(scores, *kind)]
            curve = {end: [share[end] for share in shares] for end in ("value", "low", "high")}
            if update == MODEL:
                curves["scores"][words_of_kind] = curve
            else:
                curves["baselines"][f"{update}, {words_of_kind}"] = curve
    prompts = [score["target"] for score in of_kind(result["scores"][MODEL], False, False)]
    return {"fig-3.9": figure({"metric": result["metric"], "prompts": prompts, **curves})}


def section(study: "Chapter3", result: Result) -> Section:
    rows = [
        (
            update, f"{score['target']:.3g}", KINDS[score["matched"], score["near_prompt"]], interval(score["score"], ".0%"),
            f"{score['counted']} of {score['runs']}", number(score["median_distance_own"], ".2f"),
            number(score["median_distance_training"], ".2f"),
        )
        for update, scores in result["scores"].items()
        for score in scores
    ]  # fmt: skip
    distances = ("median distance to its own run", "to training runs")
    header = ("update", "prompt", "searched", "score", "runs that count", *distances)
    caption = (
        f"Scores by prompt. Near the prompt: checkpoints with {named(result['metric'])} within {result['tolerance']:.2g} of it; a "
        "run counts where both pools have such checkpoints."
    )
    drawn = "Runs whose sample lies nearer to their own checkpoints than to any training checkpoint"
    return Section(
        "Nearest neighbours (Figure 3.9)",
        [study.figure("fig-3.9", drawn)],
        [Table(header, rows, caption, folded=True)],
        note="The identity scores 100% on the thesis's own definition. Hence the score is also given for checkpoints near the "
        "prompt alone, and with hidden units matched, since they have no order. Of the training runs every "
        f"{study.sized.amounts.every}. checkpoint is searched.",
    )


EXPERIMENT = Experiment("fig-3.9", 6, measure, section, verdicts, figures, kept=True, extra=True)
