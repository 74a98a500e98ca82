"""Prompt alignment against denoising steps, for each sampler, on validation networks."""

from matplotlib.figure import Figure
from triptych_gpt.evaluation.plots import quality
from triptych_gpt.evaluation.trial import quality_against_sampler_steps

from triptych_thesis.chapter3.context import Context, named
from triptych_thesis.study.estimates import interval
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table


def measure(context: Context) -> Result:
    """A row for each sampler and number of steps."""
    amounts, trial = context.amounts, context.trial
    steps = amounts.sampler_steps
    return quality_against_sampler_steps(trial, steps, networks=amounts.networks, prompts=amounts.prompts)


def figures(result: Result) -> dict[str, Figure]:
    return {"sampler-steps": quality(result["rows"])}


def section(study: Study, result: Result) -> Section:
    rows = [
        (row["sampler"], row["model_evaluations"], interval(row["alignment"]["r2"], ".3f"),
         interval(row["alignment"]["achieved_at_best"], ".3f"))
        for row in result["rows"]
    ]  # fmt: skip
    first = result["rows"][0]["alignment"]
    header = ("sampler", "denoising steps", "R²", f"{named(first['metric'])} at the best prompt")
    caption = f"Mean over {first['networks']} validation networks with 95% bootstrap intervals."
    return Section(
        "Samplers and denoising steps",
        [study.figure("sampler-steps", "Prompt alignment, and the best that is achieved, on validation networks")],
        [Table(header, rows, caption, folded=True)],
    )


EXPERIMENT = Experiment("sampler-steps", 10, measure, section, figures=figures, kept=True, extra=True)
