"""How the chapter's G.pt was trained: loss, and prompt alignment on validation runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from triptych_common.plots import BLUE, MARKERS, ORANGE, figure_png, panels, thousands
from triptych_common.storage.run import RunDirectory
from triptych_gpt.evaluation.plots import measure

from triptych_thesis.chapter3.context import Context
from triptych_thesis.study.experiment import Experiment, Result, Section
from triptych_thesis.study.runner import Study

LOSS, SCORE = "loss", "validation/alignment"


def run(context: Context) -> dict[str, Any]:
    """The rows of the training run's log, as far as the figure needs them."""
    rows = RunDirectory(context.model, {}).metrics()
    kept = ("step", "pairs", LOSS, SCORE)
    return {"rows": [{key: row[key] for key in kept if key in row} for row in rows if LOSS in row or SCORE in row]}


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss, and prompt alignment on validation runs, over training.

    rows: of metrics.jsonl; a row that lacks a key is not a point of that curve.
    """
    figure, axes = panels(2, size=(8.4, 3.2))
    curves: Sequence[tuple[str, dict[str, Any]]] = (
        (LOSS, {"color": BLUE, "linewidth": 1}),
        (SCORE, {"color": ORANGE, "marker": MARKERS[0], "markersize": 3.5, "linewidth": 1.2}),
    )
    for panel, (key, style) in zip(axes, curves, strict=True):
        points = [row for row in rows if row.get(key) is not None]
        panel.plot([row["pairs"] for row in points], [row[key] for row in points], **style)
    axes[0].set(yscale="log", ylabel="training loss")
    measure(axes[0].yaxis, "")
    bottom, _ = axes[1].get_ylim()
    axes[1].set(ylabel="prompt alignment (R²), validation runs", ylim=(max(bottom, -3), 1.02))
    for one in axes:
        one.set_xlabel("pairs of checkpoints seen")
        one.xaxis.set_major_formatter(thousands)
    return figure


def section(study: Study, result: Result) -> Section:
    """The figure; for the thesis's sizes, the command that trains on several GPUs."""
    paper = "torchrun --nproc-per-node=8 -m triptych_gpt.cli train --preset mnist_loss --zoo ... --parallel fsdp"
    caption = (
        "Error of the denoised later checkpoint, and prompt alignment on validation runs, by which the model is chosen"
    )
    return Section(
        "Training", [study.figure("training", caption)], note=paper if study.size.startswith("paper") else ""
    )


EXPERIMENT = Experiment(
    name="training", order=12, measure=run, section=section,
    figures=lambda result: {"training": figure_png(figure(result["rows"]))},
)  # fmt: skip
