"""First-layer filters of a perceptron on square images, before and after an update."""

import math

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from triptych_common.plots import numbers, panels
from triptych_gpt.evaluation.plots import words
from triptych_gpt.evaluation.prompted import starting_metrics
from triptych_gpt.evaluation.records import plain
from triptych_gpt.layout import ParameterLayout

from triptych_thesis.chapter3.context import Context, shown
from triptych_thesis.chapter3.sizes import MNIST
from triptych_thesis.study.experiment import Experiment, Result, Section, Study


def first_layer_filters(
    layout: ParameterLayout, theta: Float[Tensor, "*batch D"]
) -> Float[Tensor, "*batch units side side"] | None:
    """Each hidden unit's weights as the image they are multiplied with; None where no square, grey images come in."""
    name, shape = next(iter(layout.shapes.items()))
    side = math.isqrt(shape[-1])
    if len(shape) != 2 or side < 2 or side**2 != shape[-1]:
        return None
    return layout.unflatten(theta)[name].unflatten(-1, (side, side))


def measure(context: Context) -> Result:
    """Filters of an unseen network before and after one update; {"none": why} for networks that do not see square images."""
    trial, name = context.trial, context.trial.metric.name
    theta = trial.starts("test", 1)
    if first_layer_filters(trial.task.layout, theta) is None:
        return {"none": f"the first layer of {trial.task.name} does not look at square images"}
    start = starting_metrics(trial.task, theta, trial.metric)
    new = trial.prompted(theta, start)
    rows = {
        key: {"filters": first_layer_filters(trial.task.layout, one[0].cpu()), "metric": float(metrics[name])}
        for key, one, metrics in (("before", theta, start), ("after", new.theta, new.metrics))
    }
    return plain({"metric": name, "prompt": trial.best_prompt, **rows})


def figure(data: Result) -> Figure:
    """Weights of each hidden unit as an image, one network above and its update below, in one symmetric range of colours.

    data: {"metric", "prompt", "before": {"filters": [units][side][side], "metric": value}, "after": the same}.
    """
    rows = [data["before"], data["after"]]
    images = [numbers(row["filters"]) for row in rows]
    units, largest = len(images[0]), np.nanmax(np.abs(images))
    figure, axes = panels(units, 2, size=(0.82 * units + 1.0, 2.3))
    for panel, image in zip(axes, np.concatenate(images), strict=True):
        drawn = panel.imshow(image, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
        panel.grid(False)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    for panel, name, row in zip(axes[::units], ("before", "after"), rows, strict=True):
        label = f"{name}\n{shown(data['metric'], row['metric'])}"
        panel.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    figure.suptitle(f"{words(data['metric'])}, prompted for {shown(data['metric'], data['prompt'])}", fontsize=9)
    figure.colorbar(drawn, ax=axes, label="weight", shrink=0.9)
    return figure


def figures(result: Result) -> dict[str, Figure]:
    return {} if "none" in result else {"filters": figure(result)}


def section(study: Study, result: Result) -> Section:
    title = "First-layer filters"
    if "none" in result:
        return Section(title, note=f"No figure: {result['none']}.")
    return Section(title, [study.figure("filters", "An unseen network before (above) and after (below) one update")])


EXPERIMENT = Experiment(
    "filters", 8, measure, section, figures=figures, kept=True, offered=lambda study: study.task == MNIST
)
