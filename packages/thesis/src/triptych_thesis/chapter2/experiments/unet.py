"""Figure 2.2, right: a DiT against a U-Net of equal GFLOPs, trained on the same examples at the same learning rate."""

from typing import Any

from triptych_thesis.chapter2.context import Context, SampleSet
from triptych_thesis.chapter2.showing import (
    INSTRUMENTS,
    marked,
    over_training,
    sample_links,
    scores_table,
)
from triptych_thesis.chapter2.sizes import Model
from triptych_thesis.chapter2.unet import matched, unet_gflops
from triptych_thesis.study.estimates import ratio
from triptych_thesis.study.experiment import Experiment, Result, Section, Table
from triptych_thesis.study.runner import Study
from triptych_thesis.study.verdicts import Evidence, Verdict, sign

THESIS = "1.59 (LDM-4 3.60, 103.6 GFLOPs; XL/2 2.27, 118.6)"


def _models(context: Context) -> tuple[Model, Model]:
    return Model(context.size.unet), Model(context.size.unet, unet=True)


def needs(context: Context) -> list[SampleSet]:
    samples = [context.after(model, stage) for model in _models(context) for stage in context.size.stages]
    return [*samples, *context.repeated()]


def measure(context: Context) -> dict[str, Any]:
    size, (ours, theirs) = context.size, _models(context)
    comparisons = [
        context.compare(context.after(ours, stage), context.after(theirs, stage), images=size.count(stage))
        for stage in size.stages
    ]
    rows = [context.row(context.after(model, stage)) for model in (ours, theirs) for stage in size.stages]
    shape = matched(size.shape(theirs))
    for row in rows:
        if row["model"] == theirs.title:
            row["gflops"] = unet_gflops(shape)
    return {
        "rows": rows,
        "comparisons": [c.as_dict() for c in comparisons],
        "channels": list(shape.channels),
        "noise": context.noises(),
    }


def verdicts(result: Result) -> list[Verdict]:
    last = result["comparisons"][-1]
    evidence = Evidence(
        f"right: Fréchet distance of a U-Net over {last['better']}'s, equal GFLOPs", ratio(last["difference"]), THESIS
    )
    return [Verdict("dit.fig-2.2", sign(last["difference"]), [evidence], parts=2)]


def section(study: Study, result: Result) -> Section:
    caption = (
        f"The same examples, optimiser and rate; the U-Net has channels {result['channels']}, so that its GFLOPs match."
    )
    table = Table(
        ("images", "FID of the U-Net over the DiT's, thesis", "ours", "the DiT is better"),
        [
            (f"{c['about']['images']:,}", THESIS, ratio(c["difference"]), marked(sign(c["difference"])))
            for c in result["comparisons"]
        ],
        f"Ours: {result['comparisons'][0]['better']}. The thesis's models are both guided, each trained in its own way; here "
        "nothing is tuned for either.",
    )
    return Section(
        "Against a U-Net (Figure 2.2 right)",
        [study.figure("unet", caption)],
        [table, scores_table(result["rows"], ("model", "images", "gflops"), INSTRUMENTS)],
        links=sample_links(study, [row["samples"] for row in result["rows"]]),
    )


EXPERIMENT = Experiment("unet", 5, measure, section, verdicts, over_training("unet"), needs)
