"""Figure 2.5: adaLN-Zero against the three other block designs, after equally many images."""

from typing import Any

from triptych_thesis.chapter2.context import Context, SampleSet
from triptych_thesis.chapter2.showing import (
    INSTRUMENTS,
    comparisons_table,
    counted,
    last_of,
    over_training,
    sample_links,
    scores_table,
)
from triptych_thesis.chapter2.sizes import Model
from triptych_thesis.study.estimates import ratio
from triptych_thesis.study.experiment import Experiment, Result, Section, Table
from triptych_thesis.study.runner import Study
from triptych_thesis.study.verdicts import Evidence, Verdict, overall, sign

THESIS = {"in-context": "nearly 2 (119.4 GFLOPs)", "cross-attention": "above 1 (137.6)", "adaln": "above 1 (118.6)"}


def needs(context: Context) -> list[SampleSet]:
    models = [Model(context.size.designs), *context.size.others()]
    return [*(context.after(model, stage) for model in models for stage in context.size.stages), *context.repeated()]


def measure(context: Context) -> dict[str, Any]:
    size, ours = context.size, Model(context.size.designs)
    comparisons = [
        context.compare(context.after(ours, stage), context.after(other, stage), images=size.count(stage))
        for other in size.others()
        for stage in size.stages
    ]
    return {
        "rows": [context.row(context.after(model, stage)) for model in (ours, *size.others()) for stage in size.stages],
        "comparisons": [c.as_dict() for c in comparisons],
        "noise": context.noises(),
    }


def verdicts(result: Result) -> list[Verdict]:
    evidence = [
        Evidence(f"Fréchet distance of {_design(c)} over adaLN-Zero's", ratio(c["difference"]), THESIS[_design(c)])
        for c in last_of(result["comparisons"])
    ]
    every = counted("adaLN-Zero better, every design and stage", result["comparisons"])
    verdict = overall(sign(c["difference"]) for c in result["comparisons"])
    return [Verdict("dit.fig-2.5", verdict, [*every, *evidence])]


def section(study: Study, result: Result) -> Section:
    last = last_of(result["comparisons"])
    final = Table(
        ("design", "its FID over adaLN-Zero's, thesis", "ours"),
        [(_design(c), THESIS[_design(c)], ratio(c["difference"])) for c in last],
        f"Ours: {last[0]['better']} after {last[0]['about']['images']:,} images. Thesis: XL/2 after 400K steps.",
    )
    every = comparisons_table(result["comparisons"], "At equally many training images.", "Every comparison")
    return Section(
        "Block designs (Figure 2.5)",
        [study.figure("block-designs", "Four designs of the same size, trained on the same examples.")],
        [final, every, scores_table(result["rows"], ("model", "images", "gflops"), INSTRUMENTS)],
        links=sample_links(study, [row["samples"] for row in result["rows"]]),
    )


def _design(comparison: Result) -> str:
    """The other design's name, out of a title such as "B/2 cross-attention"."""
    return comparison["worse"].split(" ", 1)[1]


EXPERIMENT = Experiment("block-designs", 4, measure, section, verdicts, over_training("block-designs"), needs)
