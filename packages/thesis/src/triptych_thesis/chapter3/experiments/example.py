"""What a user does: a file of an untrained network in, networks of the prompted metric out."""

from pathlib import Path

from triptych_gpt.prompting import PromptConfig, prompt_command
from triptych_gpt.zoo.inspect import ExportConfig, export

from triptych_thesis.chapter3.context import Context, named
from triptych_thesis.study.estimates import number
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table


def measure(context: Context) -> Result:
    """One unseen network, prompted four times for the median of what training runs end with."""
    assert context.folder is not None  # `triptych figures`, which has none, does not offer this
    zoo, out = context.trial.zoo, context.folder / "prompted"
    start = out / "start.safetensors"
    if not start.exists():
        run = int(zoo.runs.run[zoo.runs_in("test")[0]])
        export(ExportConfig(zoo=zoo.path, run=run, checkpoint="0", out=start))
    metric, settings = context.trial.metric.name, context.settings
    target = float(zoo.metrics(metric)[zoo.runs_in("train"), -1].median())
    return prompt_command(
        PromptConfig(
            out=out, checkpoint=start, target=f"{metric}={target:.3g}", model=context.model, samples=4, sampler=settings.sampler,
            num_inference_steps=settings.num_inference_steps, seed=context.seed, device=context.device,
        )
    )  # fmt: skip


def section(study: Study, result: Result) -> Section:
    metric = result["metric"]
    others = [name for name in result["networks"][0]["achieved"] if name != metric]
    rows = [
        (Path(one["file"]).name, f"{result['start']:.3f}", f"{result['asked']:.3g}",
         *(number(one["achieved"][name]) for name in (metric, *others)))
        for one in result["networks"]
    ]  # fmt: skip
    header = ("network", f"{named(metric)} before", "prompted", "achieved", *(named(name) for name in others))
    command = "triptych-gpt prompt --checkpoint start.safetensors"
    caption = f"One unseen network, prompted four times with other noise: {command}."
    return Section("A network in, networks out", tables=[Table(header, rows, caption)])


EXPERIMENT = Experiment("example", 7, measure, section)
