"""Prompt sweeps of unseen networks: does an update achieve what it is prompted for?  [thesis 3.4.4, Fig. 3.5]"""

from matplotlib.figure import Figure
from triptych_gpt.evaluation.plots import alignment_figure
from triptych_gpt.evaluation.trial import MODEL, alignment_beside_baselines

from triptych_thesis.chapter3.context import Context, named
from triptych_thesis.study.estimates import interval, mean_estimate, number
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.verdicts import UNDECIDED, Evidence, Verdict, better, overall, sign

CLAIM = "gpt.fig-3.5"
LITTLE = 0.5  # of what is prompted beyond the best training checkpoint


def measure(context: Context) -> Result:
    """Sweeps and alignment of the model and of the baselines, by name."""
    amounts = context.amounts
    return alignment_beside_baselines(context.trial, networks=amounts.networks, prompts=amounts.prompts)


def verdicts(result: Result) -> list[Verdict]:
    """Whether achieved values follow the prompts, and prompts beyond the best training checkpoint gain little."""
    alignment = result["alignment"]
    ours, sweep = alignment[MODEL], result["sweeps"][MODEL]
    # Over the prompts that some training checkpoint achieves. The best constant has R^2 = 0, so prompts that are ignored, or missed
    # by more than they differ, refute the claim.
    follow = sign(ours["r2_reachable"]) if ours["r2_reachable"] else UNDECIDED
    # The mean share gained over networks, by Student's t; undecided where fewer than two prompts lie beyond the best.
    gains = beyond_best(sweep)
    gain = mean_estimate(gains) if gains else None
    little = better(gain._asdict(), {"low": LITTLE, "high": LITTLE}, "lower") if gain else UNDECIDED
    what = f"R² between prompted and achieved {named(ours['metric'])}, where training checkpoints reach"
    # Retrieval copies training checkpoints, whatever network it is given, and can have an R^2 close to 1.
    beside = [f"{interval(one['r2_reachable'], '.3f')} of {name}" for name, one in alignment.items() if name != MODEL]
    evidence = [
        Evidence(what, interval(ours["r2_reachable"], ".3f"), "", beside[0], beside[1:]),
        Evidence(
            "share gained of what is prompted beyond the best training checkpoint", interval(gain, ".2f"), "", "0.5"
        ),
        Evidence("R² over all prompts", interval(ours["r2"], ".3f"), "drawn in Figure 3.7 only"),
    ]
    why = "" if gains else "fewer than two prompts lie beyond the best training checkpoint, so their gain is unknown"
    return [Verdict(CLAIM, overall([follow, little]), evidence, why)]


def beyond_best(sweep: Result) -> list[float]:
    """Of each network: what the best prompt achieves beyond the last reachable prompt, over what it demands beyond it.

    Networks without a reachable prompt, or without two beyond, or with one of the two updates not finite, are left out.
    """
    # Reachable are prompts no better than the best training checkpoint. Most of the way to a single prompt beyond may be reachable.
    limit = sweep["trained_best"].get(sweep["metric"])
    gains = []
    for prompts, achieved in zip(sweep["prompts"], sweep["achieved"][sweep["metric"]], strict=True):
        if limit is None:
            break
        reachable = (i for i, p in enumerate(prompts) if (p >= limit if sweep["better"] == "lower" else p <= limit))
        edge = next(reachable, 0)  # prompts run from the best to the worst
        if edge > 1 and achieved[edge] is not None and achieved[0] is not None:
            gains.append((achieved[edge] - achieved[0]) / (prompts[edge] - prompts[0]))
    return gains


def section(study: Study, result: Result) -> Section:
    """The numbers; the picture is the report's opening."""
    alignment, model = result["alignment"], result["alignment"][MODEL]
    rows = [
        (name, interval(one["r2"], ".3f"), interval(one["r2_reachable"], ".3f"), f"{one['spearman']:.2f}",
         f"{one['mean_gap']:.3f}", interval(one["achieved_at_best"], ".3f"), one["non_finite"])
        for name, one in alignment.items()
    ]  # fmt: skip
    low, high = model["prompt_range"]
    caption = (
        f"Prompt alignment for {named(model['metric'])}: {model['prompts']} prompts from {low:.3g} to {high:.3g}, R² of each of "
        f"{model['networks']} unseen networks, averaged; 95% bootstrap intervals over networks."
    )
    columns = (
        "R²",
        "R², reachable prompts",
        "rank correlation",
        "mean gap",
        "achieved at the best prompt",
        "not finite",
    )
    of_returns = model["metric"].endswith("return")
    scored = "episodes" if of_returns else "items"
    shared = "" if of_returns else "Runs of a cohort share minibatches, and a cohort is never in two splits. "
    thesis = [
        ("R² of the identity, prompts up to a network's own metric", "about -2.7", "-2.7 (closed form)"),
        ("the same, measured with the prompts above", "", interval(alignment["identity"]["r2"], ".3f")),
        ("prompt alignment", "drawn in Figure 3.7 only", interval(model["r2"], ".3f")),
        ("KL at the last diffusion step, bits/dim", "8e-6", number(result["kl_last_step"], ".2g")),
    ]
    beside = "The thesis trains 378M to 858M parameters on 10,000 to 55,000 runs on GPUs; a smaller setting is not its result."
    return Section(
        "Prompt alignment (Figure 3.5)",
        tables=[
            Table(("", *columns), rows, caption),
            Table(("", "thesis", f"here, size {study.size}"), thesis, beside),
        ],
        note="Unseen networks are the untrained networks of runs that were neither trained on nor used to choose anything; their "
        f"metrics are of the same {scored} as the training runs'. {shared}"
        "Reachable prompts are those that some training checkpoint achieves. Retrieval copies the training checkpoint "
        "nearest in metric, and starts from nobody's network. A network prompted for several values gets one update for each.",
    )


def figures(result: Result) -> dict[str, Figure]:
    return {"fig-3.5": alignment_figure(result)}


EXPERIMENT = Experiment("fig-3.5", 1, measure, section, verdicts, figures, kept=True)
