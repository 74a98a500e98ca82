"""The memorisation audit: how far are generated networks from the training set, beside real ones and trivial copies?"""

from typing import Any

from triptych_common.plots import figure_png
from triptych_gpt.evaluation.plots import memorization_figure
from triptych_gpt.evaluation.trial import memorization

from triptych_thesis.chapter3.context import Context
from triptych_thesis.chapter3.naming import named
from triptych_thesis.study.estimates import interval
from triptych_thesis.study.experiment import Experiment, Result, Section, Table
from triptych_thesis.study.runner import Study


def run(context: Context) -> dict[str, Any]:
    """The audit of one update each of unseen networks, towards the best prompt."""
    return memorization(context.trial, samples=context.amounts.audit_samples, every=context.amounts.every)


def section(study: Study, result: Result) -> Section:
    """The figure, a row for each group of networks, and the audit's conclusions."""
    metrics = list(result["groups"][0]["metrics"])
    rows = [
        (
            group["name"], group["networks"], interval(group["median_distance"], ".3f"),
            interval(group["median_distance_to_finals"], ".3f"),
            *(interval(group["metrics"][name], ".3f") for name in metrics), interval(group["agreement"], ".3f"),
            interval(group["error_overlap"], ".3f"),
        )
        for group in result["groups"]
    ]  # fmt: skip
    header = (
        "", "networks", "median distance", "to finals", *(named(metric) for metric in metrics), "agreement", "shared errors",
    )  # fmt: skip
    caption = (
        f"Distance to the nearest of {result['searched']}, hidden units matched (Hungarian method), in the networks' own units. "
        f"Samples are one update each, prompted for {named(result['metric'])} {result['prompt']:.3g}; "
        f"{result['non_finite']} were not finite."
    )
    return Section(
        "Memorisation audit",
        [study.figure("audit", "Distance from the nearest training network, hidden units matched")],
        [
            Table(header, rows, caption),
            Table(("conclusion",), [(line,) for line in result["verdict"]], "What the audit concludes", folded=True),
        ],
        note="Agreement is the share of test items given the class that the nearest training network gives. Shared errors: of the "
        "items that either gets wrong, the share that both do.",
    )


EXPERIMENT = Experiment(
    name="audit", order=5, measure=run, section=section, kept=True,
    figures=lambda result: {"audit": figure_png(memorization_figure(result))},
)  # fmt: skip
