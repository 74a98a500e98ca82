"""How the chapter's G.pt was trained: loss, and prompt alignment on validation runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from triptych_common.plots import BLUE, MARKERS, ORANGE, panels, thousands
from triptych_common.storage.run import RunDirectory
from triptych_gpt.evaluation import plots
from triptych_gpt.train_config import TRAIN_PRESETS

from triptych_thesis.chapter3.context import Context
from triptych_thesis.study.experiment import Experiment, Result, Section

if TYPE_CHECKING:
    from triptych_thesis.chapter3.study import Chapter3

LOSS, SCORE = "loss", "validation/alignment"


def measure(context: Context) -> Result:
    """The rows of the training run's log, as far as the figure needs them."""
    rows = RunDirectory(context.model, {}).metrics()
    drawn = ("step", "pairs", LOSS, SCORE)
    return {"rows": [{key: row[key] for key in drawn if key in row} for row in rows if LOSS in row or SCORE in row]}


def figure(rows: Sequence[Result]) -> Figure:
    """Training loss, and prompt alignment on validation runs, over training, from rows of metrics.jsonl."""
    figure, (left, right) = panels(2, size=(8.4, 3.2))
    line, dots = (
        {"color": BLUE, "linewidth": 1},
        {"color": ORANGE, "marker": MARKERS[0], "markersize": 3.5, "linewidth": 1.2},
    )
    for panel, key, style in ((left, LOSS, line), (right, SCORE, dots)):
        points = [(row["pairs"], row[key]) for row in rows if row.get(key) is not None]
        panel.plot([pairs for pairs, _ in points], [value for _, value in points], **style)  # type: ignore[arg-type]
        panel.set_xlabel("pairs of checkpoints seen")
        panel.xaxis.set_major_formatter(thousands)
    left.set(yscale="log", ylabel="training loss")
    plots.measure(left.yaxis, "")
    bottom, _ = right.get_ylim()
    right.set(ylabel="prompt alignment (R²), validation runs", ylim=(max(bottom, -3), 1.02))
    return figure


def section(study: "Chapter3", result: Result) -> Section:
    """The figure; for the thesis's sizes, the command that trains on several GPUs."""
    preset = next((name for name, config in TRAIN_PRESETS.items() if config == study.sized.train), "")
    paper = f"torchrun --nproc-per-node=8 -m triptych_gpt.cli train --preset {preset} --zoo ... --parallel fsdp"
    caption = (
        "Error of the denoised later checkpoint, and prompt alignment on validation runs, by which the model is chosen"
    )
    note = paper if study.size.startswith("paper") else ""
    return Section("Training", [study.figure("training", caption)], note=note)


def figures(result: Result) -> dict[str, Figure]:
    return {"training": figure(result["rows"])}


EXPERIMENT = Experiment("training", 12, measure, section, figures=figures)
