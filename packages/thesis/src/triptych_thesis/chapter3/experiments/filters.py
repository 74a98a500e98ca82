"""First-layer filters of a perceptron on square images, before and after an update."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from triptych_common.plots import figure_png, numbers, panels
from triptych_gpt.evaluation.plots import words
from triptych_gpt.evaluation.prompted import starting_metrics
from triptych_gpt.evaluation.records import plain
from triptych_gpt.layout import ParameterLayout

from triptych_thesis.chapter3.context import Context
from triptych_thesis.chapter3.naming import shown
from triptych_thesis.study.experiment import Experiment, Result, Section
from triptych_thesis.study.runner import Study


def first_layer_filters(
    layout: ParameterLayout, theta: Float[Tensor, "*batch D"]
) -> Float[Tensor, "*batch units side side"]:
    """Each hidden unit's weights as the image they are multiplied with.

    Raises ValueError where the first parameter is no matrix over the pixels of a square, grey image.
    """
    name, shape = next(iter(layout.shapes.items()))
    side = _side(shape)
    if not side:
        raise ValueError(
            f"{name}: shape {shape}, expected [units, side * side]; filters are shown of perceptrons on images"
        )
    return layout.unflatten(theta)[name].unflatten(-1, (side, side))


def filters_before_and_after(
    layout: ParameterLayout, before: tuple[Tensor, float], after: tuple[Tensor, float], *, metric: str, prompt: float
) -> dict[str, Any]:
    """What `figure` draws, of one network [D] and its update, each with its metric. Raises ValueError as `first_layer_filters`."""
    drawn = {
        key: {"filters": first_layer_filters(layout, theta.detach().cpu()), "metric": value}
        for key, (theta, value) in (("before", before), ("after", after))
    }
    return plain({"metric": metric, "prompt": prompt, **drawn})


def _side(shape: tuple[int, ...]) -> int:
    """Of the square images that a matrix of this shape is multiplied with; 0 for any other parameter."""
    side = math.isqrt(shape[-1]) if len(shape) == 2 else 0
    return side if side >= 2 and side**2 == shape[-1] else 0


def run(context: Context) -> dict[str, Any]:
    """Filters of an unseen network before and after one update; {"none": why} for networks that do not see square images."""
    trial = context.trial
    layout = trial.task.layout
    if not _side(next(iter(layout.shapes.values()))):
        return {"none": f"the first layer of {trial.task.name} does not look at square images"}
    theta = trial.starts("test", 1)
    start, name = starting_metrics(trial.task, theta, trial.metric), trial.metric.name
    new = trial.prompted(theta, start)
    before, after = (theta[0], float(start[name])), (new.theta[0], float(new.metrics[name]))
    return filters_before_and_after(layout, before, after, metric=name, prompt=trial.best_prompt)


def figure(data: Mapping[str, Any]) -> Figure:
    """Weights of each hidden unit as an image, one network above and its update below, in one symmetric range of colours.

    data: {"metric", "prompt", "before": {"filters": [units][side][side], "metric": value}, "after": the same}.
    """
    rows = [data["before"], data["after"]]
    images = [numbers(row["filters"]) for row in rows]
    units, largest = len(images[0]), np.nanmax(np.abs(images))
    figure, axes = panels(units, 2, size=(0.82 * units + 1.0, 2.3))
    for i, panel in enumerate(axes):
        image = images[i // units][i % units]
        drawn = panel.imshow(image, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
        panel.grid(False)
        panel.set(xticks=[], yticks=[])
        for side in panel.spines.values():
            side.set_visible(False)
    for panel, name, row in zip(axes[::units], ("before", "after"), rows, strict=True):
        panel.set_ylabel(
            f"{name}\n{shown(data['metric'], row['metric'])}", fontsize=9, rotation=0, ha="right", va="center"
        )
    figure.suptitle(f"{words(data['metric'])}, prompted for {shown(data['metric'], data['prompt'])}", fontsize=9)
    figure.colorbar(drawn, ax=axes, label="weight", shrink=0.9)
    return figure


def section(study: Study, result: Result) -> Section:
    """The figure, or why there is none."""
    title = "First-layer filters"
    if "none" in result:
        return Section(title, note=f"No figure: {result['none']}.")
    return Section(title, [study.figure("filters", "An unseen network before (above) and after (below) one update")])


EXPERIMENT = Experiment(
    name="filters", order=8, measure=run, section=section, kept=True,
    figures=lambda result: {} if "none" in result else {"filters": figure_png(figure(result))},
)  # fmt: skip
