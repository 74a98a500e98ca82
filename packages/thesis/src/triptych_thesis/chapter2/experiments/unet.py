"""Figure 2.2, right: a DiT against a U-Net of equal GFLOPs, trained on the same examples at the same learning rate."""

from triptych_thesis.chapter2.context import Context, SampleSet
from triptych_thesis.chapter2.showing import decided, factor, over_training, with_scores
from triptych_thesis.chapter2.sizes import Model
from triptych_thesis.chapter2.unet import matched, unet_gflops
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.verdicts import Evidence, Verdict, sign

THESIS = "1.59 (LDM-4 3.60, 103.6 GFLOPs; XL/2 2.27, 118.6)"


def _models(context: Context) -> tuple[Model, Model]:
    return Model(context.size.unet), Model(context.size.unet, unet=True)


def needs(context: Context) -> list[SampleSet]:
    return [*context.over_training(_models(context)), *context.repeated()]


def measure(context: Context) -> Result:
    ours, theirs = _models(context)
    rows = [context.row(samples) for samples in context.over_training((ours, theirs))]
    shape = matched(context.size.shape(theirs))
    for row in rows:
        if row["model"] == theirs.title:
            row["gflops"] = unet_gflops(shape)
    comparisons = context.compare_stages(ours, theirs)
    return {"rows": rows, "comparisons": comparisons, "channels": list(shape.channels), "noise": context.noises()}


def verdicts(result: Result) -> list[Verdict]:
    last = result["comparisons"][-1]
    what = f"right: Fréchet distance of a U-Net over {last['better']}'s, equal GFLOPs"
    return [Verdict("dit.fig-2.2", sign(last["difference"]), [Evidence(what, factor(last), THESIS)], parts=2)]


def section(study: Study, result: Result) -> Section:
    comparisons, channels = result["comparisons"], result["channels"]
    caption = f"The same examples, optimiser and rate; the U-Net has channels {channels}, so that its GFLOPs match."
    table = Table(
        ("images", "FID of the U-Net over the DiT's, thesis", "ours", "the DiT is better"),
        [(f"{c['about']['images']:,}", THESIS, factor(c), decided(c)) for c in comparisons],
        f"Ours: {comparisons[0]['better']}. The thesis's models are both guided, each trained in its own way; here nothing is "
        "tuned for either.",
    )
    section = Section("Against a U-Net (Figure 2.2 right)", [study.figure("unet", caption)], [table])
    return with_scores(study, section, result["rows"], ("model", "images", "gflops"))


EXPERIMENT = Experiment("unet", 5, measure, section, verdicts, over_training("unet"), needs)
