"""Figure 2.11: each model at its most denoising steps against a larger one at no more compute an image."""

from itertools import combinations

from matplotlib.figure import Figure
from triptych_dit.flops import gflops

from triptych_thesis.chapter2.context import Context, SampleSet
from triptych_thesis.chapter2.showing import all_better, decided, factor, lines, with_scores
from triptych_thesis.chapter2.sizes import Model
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.verdicts import Evidence, Verdict

THESIS = "L/2, 1000 steps (80.7 Tflops): 25.9; XL/2, 128 steps (15.2 Tflops): 23.7"


def _samples(context: Context, name: str, steps: int) -> SampleSet:
    return context.after(Model(name), n=context.size.compute_samples, num_inference_steps=steps)


def _every(context: Context) -> list[SampleSet]:
    size = context.size
    return [_samples(context, name, steps) for name in size.compute for steps in size.compute_steps]


def needs(context: Context) -> list[SampleSet]:
    return [*_every(context), *context.repeated()]


def measure(context: Context) -> Result:
    size, most, comparisons = context.size, max(context.size.compute_steps), []
    for small, large in combinations(size.compute, 2):
        budget = gflops(size.models[small]) * most
        within = [steps for steps in size.compute_steps if gflops(size.models[large]) * steps <= budget]
        if within:
            ours, theirs = _samples(context, large, max(within)), _samples(context, small, most)
            comparisons.append(context.compare(ours, theirs, steps=max(within), steps_of_smaller=most))
    rows = [context.row(samples) for samples in _every(context)]
    for row in rows:
        row["sampling_gflops"] = row["gflops"] * row["steps"]
    return {"rows": rows, "comparisons": comparisons}


def verdicts(result: Result) -> list[Verdict]:
    comparisons = result["comparisons"]
    evidence = [Evidence(f"Fréchet distance of {_pair(c)}, ratio", factor(c)) for c in comparisons]
    why = "" if comparisons else "no model's most steps cost what the next one's fewest do"
    return [Verdict("dit.fig-2.11", all_better(comparisons), evidence, why)]


def _pair(c: Result) -> str:
    return f"{c['worse']} in {c['about']['steps_of_smaller']} steps over {c['better']} in {c['about']['steps']}"


def figures(result: Result) -> dict[str, Figure]:
    labels = {"xlabel": "GFLOPs to sample one image", "xscale": "log"}
    return {"sampling-compute": lines(result["rows"], "sampling_gflops", **labels)}


def section(study: Study, result: Result) -> Section:
    table = Table(
        ("our setting", "the smaller's Fréchet distance over the larger's", "the larger is better"),
        [(_pair(c), factor(c), decided(c)) for c in result["comparisons"]],
        f"Models that spend at least as much on sampling as larger ones. Thesis (FID-10K): {THESIS}.",
    )
    picture = study.figure("sampling-compute", "Denoising steps grow from left to right along each line.")
    section = Section("Sampling compute against model compute (Figure 2.11)", [picture], [table])
    return with_scores(study, section, result["rows"], ("model", "steps", "sampling_gflops"))


EXPERIMENT = Experiment("compute", 6, measure, section, verdicts, figures, needs)
