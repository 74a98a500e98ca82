"""Quality of the main model against denoising steps, sampler by sampler: do more steps, or faster samplers in few, help?"""

from matplotlib.figure import Figure

from triptych_thesis.chapter2.context import Context, SampleSet
from triptych_thesis.chapter2.showing import decided, difference, lines, metric_name, with_scores
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table


def _samples(context: Context, sampler: str, steps: int) -> SampleSet:
    return context.of_main(context.size.compute_samples, sampler=sampler, num_inference_steps=steps)


def needs(context: Context) -> list[SampleSet]:
    size = context.size
    return [_samples(context, sampler, steps) for sampler in size.samplers for steps in size.sampler_steps]


def measure(context: Context) -> Result:
    first, *others = context.size.samplers
    few, many = min(context.size.sampler_steps), max(context.size.sampler_steps)
    pairs = [((name, many), (name, few)) for name in context.size.samplers]
    pairs += [((name, few), (first, few)) for name in others]
    comparisons = [
        context.compare(
            _samples(context, *better), _samples(context, *worse), metric, seeds=False, of=metric,
            pair=[f"{name}, {steps} steps" for name, steps in (better, worse)],
        )
        for metric in ("frechet", "recall")
        for better, worse in pairs
    ]  # fmt: skip
    return {"rows": [context.row(samples) for samples in needs(context)], "comparisons": comparisons}


def figures(result: Result) -> dict[str, Figure]:
    return {"samplers": lines(result["rows"], "steps", by="sampler", xlabel="denoising steps", xscale="log")}


def section(study: Study, result: Result) -> Section:
    table = Table(
        ("is this", "better than this", "by", "difference", "verdict"),
        [
            (*c["about"]["pair"], metric_name(c["about"]["of"]), difference(c), decided(c))
            for c in result["comparisons"]
        ],
        "Fréchet distances as the second's over the first's, recall as the first's less the second's. One trained model, the same "
        f"starting noises, {result['rows'][0]['n']:,} samples each. The thesis uses DDPM with 250 steps alone.",
    )
    picture = study.figure("samplers", "The main model without guidance.")
    return with_scores(study, Section("Samplers", [picture], [table]), result["rows"], ("sampler", "steps", "n"))


EXPERIMENT = Experiment("samplers", 8, measure, section, figures=figures, needs=needs)
