"""Figure 2.5: adaLN-Zero against the three other block designs, after equally many images."""

from triptych_thesis.chapter2 import showing
from triptych_thesis.chapter2.context import Context, SampleSet
from triptych_thesis.chapter2.showing import factor, last_of
from triptych_thesis.chapter2.sizes import Model
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.verdicts import Evidence, Verdict

THESIS = {"in-context": "nearly 2 (119.4 GFLOPs)", "cross-attention": "above 1 (137.6)", "adaln": "above 1 (118.6)"}


def _samples(context: Context) -> list[SampleSet]:
    return context.over_training([Model(context.size.designs), *context.size.others()])


def needs(context: Context) -> list[SampleSet]:
    return [*_samples(context), *context.repeated()]


def measure(context: Context) -> Result:
    ours, others = Model(context.size.designs), context.size.others()
    return {
        "rows": [context.row(samples) for samples in _samples(context)],
        "comparisons": [c for other in others for c in context.compare_stages(ours, other)],
        "noise": context.noises(),
    }


def verdicts(result: Result) -> list[Verdict]:
    comparisons = result["comparisons"]
    every = showing.counted("adaLN-Zero better, every design and stage", comparisons)
    evidence = [
        Evidence(f"Fréchet distance of {_design(c)} over adaLN-Zero's", factor(c), THESIS[_design(c)])
        for c in last_of(comparisons)
    ]
    return [Verdict("dit.fig-2.5", showing.all_better(comparisons), [*every, *evidence])]


def section(study: Study, result: Result) -> Section:
    last = last_of(result["comparisons"])
    final = Table(
        ("design", "its FID over adaLN-Zero's, thesis", "ours"),
        [(_design(c), THESIS[_design(c)], factor(c)) for c in last],
        f"Ours: {last[0]['better']} after {last[0]['about']['images']:,} images. Thesis: XL/2 after 400K steps.",
    )
    every = showing.comparisons_table(result["comparisons"], "At equally many training images.", "Every comparison")
    picture = study.figure("block-designs", "Four designs of the same size, trained on the same examples.")
    section = Section("Block designs (Figure 2.5)", [picture], [final, every])
    return showing.with_scores(study, section, result["rows"], ("model", "images", "gflops"))


def _design(comparison: Result) -> str:
    """The other design's name, out of a title such as "B/2 cross-attention"."""
    return comparison["worse"].split(" ", 1)[1]


figures = showing.over_training("block-designs")
EXPERIMENT = Experiment("block-designs", 4, measure, section, verdicts, figures, needs)
