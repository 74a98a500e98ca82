"""Prompt alignment against denoising steps, for each sampler, on validation networks."""

from typing import Any

from triptych_common.plots import figure_png
from triptych_gpt.evaluation.plots import quality
from triptych_gpt.evaluation.trial import quality_against_sampler_steps

from triptych_thesis.chapter3.context import Context
from triptych_thesis.chapter3.naming import named
from triptych_thesis.study.estimates import interval
from triptych_thesis.study.experiment import Experiment, Result, Section, Table
from triptych_thesis.study.runner import Study


def run(context: Context) -> dict[str, Any]:
    """A row for each sampler and number of steps."""
    amounts = context.amounts
    return quality_against_sampler_steps(
        context.trial, amounts.sampler_steps, networks=amounts.networks, prompts=amounts.prompts
    )


def section(study: Study, result: Result) -> Section:
    """The figure, and its numbers."""
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


EXPERIMENT = Experiment(
    name="sampler-steps", order=10, measure=run, section=section, kept=True, extra=True,
    figures=lambda result: {"sampler-steps": figure_png(quality(result["rows"]))},
)  # fmt: skip
