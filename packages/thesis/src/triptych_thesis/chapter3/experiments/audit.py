"""The memorisation audit: how far are generated networks from the training set, beside real ones and trivial copies?"""

from matplotlib.figure import Figure
from triptych_gpt.evaluation.plots import memorization_figure
from triptych_gpt.evaluation.trial import memorization

from triptych_thesis.chapter3.context import Context, named
from triptych_thesis.study.estimates import interval
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table


def measure(context: Context) -> Result:
    """The audit of one update each of unseen networks, towards the best prompt."""
    return memorization(context.trial, samples=context.amounts.audit_samples, every=context.amounts.every)


def section(study: Study, result: Result) -> Section:
    metrics, rows = list(result["groups"][0]["metrics"]), []
    of_classes = result["groups"][0]["agreement"] is not None
    for group in result["groups"]:
        scores = [
            group["median_distance"],
            group["median_distance_to_finals"],
            *(group["metrics"][name] for name in metrics),
        ]
        scores += [group["agreement"], group["error_overlap"]] * of_classes
        rows.append((group["name"], group["networks"], *(interval(score, ".3f") for score in scores)))
    classes = ("agreement", "shared errors") * of_classes
    header = ("", "networks", "median distance", "to finals", *(named(metric) for metric in metrics), *classes)
    caption = (
        f"Distance to the nearest of {result['searched']}, hidden units matched (Hungarian method), in the networks' own units. "
        f"Samples are one update each, prompted for {named(result['metric'])} {result['prompt']:.3g}; "
        f"{result['non_finite']} were not finite."
    )
    conclusions = Table(
        ("conclusion",), [(line,) for line in result["verdict"]], "What the audit concludes", folded=True
    )
    return Section(
        "Memorisation audit",
        [study.figure("audit", "Distance from the nearest training network, hidden units matched")],
        [Table(header, rows, caption), conclusions],
        note="Agreement is the share of test items given the class that the nearest training network gives. Shared errors: of the "
        "items that either gets wrong, the share that both do." * of_classes,
    )


def figures(result: Result) -> dict[str, Figure]:
    return {"audit": memorization_figure(result)}


EXPERIMENT = Experiment("audit", 5, measure, section, figures=figures, kept=True)
