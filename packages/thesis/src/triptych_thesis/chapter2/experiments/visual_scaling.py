"""Figure 2.7: the same noise through every model, a row a model, cheapest first; a column shares class and noise."""

import torch
from triptych_common.images import image_grid, png_bytes
from triptych_common.storage.files import write_bytes
from triptych_dit.flops import gflops
from triptych_dit.sample import read_batches

from triptych_thesis.chapter2.context import Context, SampleSet
from triptych_thesis.chapter2.sizes import Model
from triptych_thesis.study.experiment import Experiment, Result, Section, Study
from triptych_thesis.study.verdicts import UNDECIDED, Verdict

FIRST = 10  # samples of each model in the picture


def needs(context: Context) -> list[SampleSet]:
    return [context.after(Model(name)) for name in context.grid]


def measure(context: Context) -> Result:
    names = sorted(context.grid, key=lambda name: gflops(context.grid[name]))
    images = torch.cat([next(read_batches(context.path(context.after(Model(name))), FIRST)) for name in names])
    path = context.folder / "figures" / "visual-scaling.png"
    write_bytes(path, png_bytes(image_grid(images, columns=FIRST), scale=2))
    return {"models": [{"model": name, "gflops": gflops(context.grid[name])} for name in names]}


def verdicts(result: Result) -> list[Verdict]:
    why = "a picture: one noise and class through every model; Figure 2.8 is its measured form"
    return [Verdict("dit.fig-2.7", UNDECIDED, why=why)]


def section(study: Study, result: Result) -> Section:
    names = ", ".join(f"{m['model']} ({m['gflops']:.4f})" for m in result["models"])
    caption = (
        f"A row a model, from the top by GFLOPs: {names}. A column shares class, starting noise and sampling noise."
    )
    picture = study.figure("visual-scaling", caption, pixels=True)
    return Section("The same noise through every model (Figure 2.7)", [picture])


EXPERIMENT = Experiment("visual-scaling", 3, measure, section, verdicts, needs=needs)
