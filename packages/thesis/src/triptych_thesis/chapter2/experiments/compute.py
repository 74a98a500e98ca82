"""Figure 2.11: each model at its most denoising steps against a larger one at no more compute an image."""

from itertools import combinations
from typing import Any

from triptych_dit.flops import gflops

from triptych_thesis.chapter2.context import Context, SampleSet
from triptych_thesis.chapter2.showing import INSTRUMENTS, lines, marked, sample_links, scores_table
from triptych_thesis.chapter2.sizes import Model
from triptych_thesis.study.estimates import ratio
from triptych_thesis.study.experiment import Experiment, Result, Section, Table
from triptych_thesis.study.runner import Study
from triptych_thesis.study.verdicts import Evidence, Verdict, overall, sign

THESIS = "L/2, 1000 steps (80.7 Tflops): 25.9; XL/2, 128 steps (15.2 Tflops): 23.7"


def _samples(context: Context, name: str, steps: int) -> SampleSet:
    return context.after(Model(name), n=context.size.compute_samples, num_inference_steps=steps)


def needs(context: Context) -> list[SampleSet]:
    size = context.size
    samples = [_samples(context, name, steps) for name in size.compute for steps in size.compute_steps]
    return [*samples, *context.repeated()]


def measure(context: Context) -> dict[str, Any]:
    size, most, comparisons = context.size, max(context.size.compute_steps), []
    for small, large in combinations(size.compute, 2):
        budget = gflops(size.models[small]) * most
        within = [steps for steps in size.compute_steps if gflops(size.models[large]) * steps <= budget]
        if within:
            ours, theirs = _samples(context, large, max(within)), _samples(context, small, most)
            comparisons.append(context.compare(ours, theirs, steps=max(within), steps_of_smaller=most))
    rows = [context.row(_samples(context, name, steps)) for name in size.compute for steps in size.compute_steps]
    for row in rows:
        row["sampling_gflops"] = row["gflops"] * row["steps"]
    return {"rows": rows, "comparisons": [c.as_dict() for c in comparisons]}


def verdicts(result: Result) -> list[Verdict]:
    comparisons = result["comparisons"]
    evidence = [Evidence(f"Fréchet distance of {_pair(c)}, ratio", ratio(c["difference"])) for c in comparisons]
    why = "" if comparisons else "no model's most steps cost what the next one's fewest do"
    return [Verdict("dit.fig-2.11", overall(sign(c["difference"]) for c in comparisons), evidence, why)]


def _pair(c: Result) -> str:
    return f"{c['worse']} in {c['about']['steps_of_smaller']} steps over {c['better']} in {c['about']['steps']}"


def figures(result: Result) -> dict[str, bytes]:
    labels = {"xlabel": "GFLOPs to sample one image", "xscale": "log"}
    return {"sampling-compute": lines(result["rows"], "sampling_gflops", **labels)}


def section(study: Study, result: Result) -> Section:
    comparisons = Table(
        ("our setting", "the smaller's Fréchet distance over the larger's", "the larger is better"),
        [(_pair(c), ratio(c["difference"]), marked(sign(c["difference"]))) for c in result["comparisons"]],
        f"Models that spend at least as much on sampling as larger ones. Thesis (FID-10K): {THESIS}.",
    )
    return Section(
        "Sampling compute against model compute (Figure 2.11)",
        [study.figure("sampling-compute", "Denoising steps grow from left to right along each line.")],
        [comparisons, scores_table(result["rows"], ("model", "steps", "sampling_gflops"), INSTRUMENTS)],
        links=sample_links(study, [row["samples"] for row in result["rows"]]),
    )


EXPERIMENT = Experiment("compute", 6, measure, section, verdicts, figures, needs)
