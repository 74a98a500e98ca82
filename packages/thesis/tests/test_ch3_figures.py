"""Figures: PNG files of sensible size whose artists carry the data that they were given."""

import io
import json

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from PIL import Image
from triptych_common.plots import BLUE, GREY, INK, ORANGE, figure_png
from triptych_gpt.evaluation.records import plain
from triptych_thesis.chapter3.context import shown
from triptych_thesis.chapter3.experiments import (
    filters,
    initialisers,
    landscape,
    neighbours,
    one_update,
    optimisation,
    scaling,
    training,
)

torch.manual_seed(0)


def read_back(result):
    """A result as a report finds it on disk."""
    return json.loads(json.dumps(result, allow_nan=False))


def png_of(figure) -> Image.Image:
    image = Image.open(io.BytesIO(figure_png(figure)))
    assert image.format == "PNG"
    assert 400 < image.width < 2600
    assert 250 < image.height < 1600
    assert np.asarray(image.convert("L")).std() > 5  # not blank
    return image


def line(axes, label: str):
    """The line of this label, or of the error bars that have it."""
    handles, labels = axes.get_legend_handles_labels()
    (handle,) = [handle for handle, own in zip(handles, labels, strict=True) if own == label]
    return handle[0] if isinstance(handle, tuple) else handle


def a_recursion() -> dict:
    sizes = {"default": [[2.0, 0.4, 0.3], [2.2, 0.5, 0.35]], "kaiming_normal": [[9.0, 1.4, 0.4], [7.0, 1.0, 0.5]]}
    curves = {}
    for name, values in sizes.items():
        values = torch.tensor(values).double()
        error = values.std(0) / 2**0.5
        metrics = {"test_loss": values, "test_error": values / 10}
        curves[name] = {
            "metrics": metrics,
            "mean": values.mean(0),
            "standard_error": error,
            "rejected": 0,
            "updates_to_reach": 1,
        }
    settings = {
        "metric": "test_loss",
        "better": "lower",
        "prompt": 0.0,
        "known": "default",
        "one_update": 0.45,
        "within": 0.1,
    }
    return read_back(plain({**settings, "curves": curves}))


def test_recursion_shows_means_and_standard_errors():
    data = a_recursion()
    figure = initialisers.figure(data)
    (axes,) = figure.axes
    curve = line(axes, "kaiming normal")
    assert list(curve.get_xdata()) == [0, 1, 2]
    assert curve.get_ydata() == pytest.approx([8.0, 1.2, 0.45])
    handles, labels = axes.get_legend_handles_labels()
    bars = handles[labels.index("kaiming normal")][2][0].get_segments()
    error = data["curves"]["kaiming_normal"]["standard_error"][0]
    assert bars[0][:, 1] == pytest.approx([8 - error, 8 + error])
    assert line(axes, "default (the zoo’s own)").get_ydata() == pytest.approx([2.1, 0.45, 0.325])
    assert line(axes, "one update, the zoo’s own initialiser").get_ydata()[0] == 0.45
    assert axes.get_yscale() == "log"
    png_of(figure)
    (axes,) = initialisers.figure(data, metric="test_error").axes
    assert line(axes, "kaiming normal").get_ydata() == pytest.approx([0.8, 0.12, 0.045])
    assert axes.get_ylabel() == "test error (%)"


def test_training_curves_skip_rows_of_the_other_kind():
    score = "validation/alignment"
    rows = [
        {"pairs": 10, "loss": 0.4},
        {"pairs": 10, score: -1.5},
        {"pairs": 20, "loss": 0.2},
        {"pairs": 20, score: 0.5},
    ]
    figure = training.figure([*rows, {"pairs": 30, "loss": None}])
    left, right = figure.axes
    assert (list(left.lines[0].get_xdata()), list(left.lines[0].get_ydata())) == ([10, 20], [0.4, 0.2])
    assert list(right.lines[0].get_ydata()) == [-1.5, 0.5]
    png_of(figure)


def test_one_step_has_a_bar_for_each_method_in_order():
    methods = [
        {"name": "G.pt", "kind": "model", "mean": 0.1, "low": 0.08, "high": 0.13},
        {"name": "identity", "kind": "baseline", "mean": 0.9, "low": None, "high": None},
        {"name": "Adam", "kind": "optimiser", "mean": 0.5, "low": 0.4, "high": 0.6},
        {"name": "SGD", "kind": "optimiser", "mean": None, "low": None, "high": None},
    ]
    figure = one_update.figure({"metric": "test_error", "start": 0.9, "trained_best": 0.06, "methods": methods})
    (axes,) = figure.axes
    bars = {round(bar.get_y() + bar.get_height() / 2): bar for bar in axes.patches}
    assert [bars[row].get_width() for row in (0, 1, 2)] == [0.1, 0.9, 0.5]
    for row, color in enumerate((BLUE, ORANGE, GREY)):
        assert same_color(bars[row].get_facecolor(), color)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["G.pt", "identity", "Adam", "SGD"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    assert axes.collections[0].get_segments()[0][:, 0] == pytest.approx([0.08, 0.13])
    assert same_color(line(axes, "best training checkpoint").get_color(), INK)
    assert line(axes, "before the update").get_xdata()[0] == 0.9
    assert axes.get_xscale() == "linear"
    png_of(figure)
    methods[0]["mean"] = 0.001
    (axes,) = one_update.figure({"metric": "test_error", "methods": methods}).axes
    assert axes.get_xscale() == "log"


def test_optimisation_curves_start_before_the_first_step():
    envelope = {"mean": [2.0, 1.0, None], "standard_error": [0.1, None, None]}
    curve = {"optimizer": "Adam", "steps": [1, 10, 100], "envelope": envelope, "caught_up": 10}
    level = {"mean": 0.4, "low": 0.3, "high": 0.5}
    data = {"metric": "test_loss", "start": 2.3, "one_step": level, "trained_best": 0.25, "curves": [curve]}
    figure = optimisation.figure(data)
    (axes,) = figure.axes
    drawn = line(axes, "Adam (caught up after 10)")
    assert list(drawn.get_xdata()) == [0, 1, 10, 100]
    assert list(drawn.get_ydata()) == pytest.approx([2.3, 2.0, 1.0, np.nan], nan_ok=True)
    assert line(axes, "one update of G.pt").get_ydata()[0] == 0.4
    assert axes.get_xscale() == "symlog"
    png_of(figure)


def looks(lines) -> list[tuple]:
    return [(one.get_color(), one.get_linestyle()) for one in lines]


def test_as_many_curves_as_there_are_optimisers_are_told_apart():
    envelope = {"mean": [2.0, 1.0], "standard_error": [0.1, None]}
    curves = [{"optimizer": f"optimiser {i}", "steps": [1, 10], "envelope": envelope} for i in range(9)]
    data = {"metric": "test_loss", "start": 2.3, "one_step": {"mean": 0.4}, "curves": curves}
    figure = optimisation.figure(data)
    drawn = [line(figure.axes[0], f"optimiser {i}") for i in range(9)]
    assert len(set(looks(drawn))) == 9
    assert len({one.get_marker() for one in drawn}) == 7
    png_of(figure)


def test_scaling_has_a_panel_for_each_thing_scaled():
    points = [{"x": 1e5, "r2": -0.4, "low": -0.5, "high": -0.3}, {"x": 2e6, "r2": 0.8, "low": 0.7, "high": 0.9}]
    runs = [{"x": 100, "r2": 0.1, "low": None, "high": None}, {"x": 1000, "r2": None, "low": None, "high": None}]
    data = [
        {"label": "parameters of G.pt", "points": points, "train": runs},
        {"label": "training runs", "points": runs},
    ]
    figure = scaling.figure(data)
    left, right = figure.axes
    assert list(line(left, "unseen networks").get_ydata()) == [-0.4, 0.8]
    assert list(line(left, "training networks").get_xdata()) == [100]
    assert list(line(right, "unseen networks").get_xdata()) == [100]
    assert right.get_xlabel() == "training runs"
    png_of(figure)


def test_nearest_neighbour_scores_are_per_cent():
    scores = {"raw": {"value": [0.2, 1.0], "low": [0.1, 0.9], "high": [0.3, 1.0]}, "matched": {"value": [0.1, 0.5]}}
    data = {
        "metric": "test_loss",
        "prompts": [0.3, 2.0],
        "scores": scores,
        "baselines": {"identity": {"value": [1, 1]}},
    }
    figure = neighbours.figure(data)
    (axes,) = figure.axes
    assert list(line(axes, "raw").get_ydata()) == [20, 100]
    assert list(line(axes, "matched").get_xdata()) == [0.3, 2.0]
    assert line(axes, "identity").get_linestyle() == "--"
    assert len(axes.collections) == 1  # the one interval
    png_of(figure)


def test_twelve_neighbour_curves_are_told_apart_and_gaps_are_skipped():
    kinds = ("all checkpoints", "near the prompt", "all checkpoints, units matched", "near the prompt, units matched")
    curve = {"value": [0.2, None, 0.6], "low": [0.1, None, 0.5], "high": [0.3, None, 0.7]}
    scores = dict.fromkeys(kinds, curve)
    baselines = {f"{update}, {kind}": {**curve, "value": [None] * 3 if "near" in kind else [1.0, float("inf"), 1.0]}
                 for update in ("identity", "retrieval") for kind in kinds}  # fmt: skip
    data = {"metric": "test_loss", "prompts": [0.3, 1.0, 2.0], "scores": scores, "baselines": baselines}
    figure = neighbours.figure(data)
    (axes,) = figure.axes
    drawn = [line(axes, name) for name in (*scores, *baselines)]
    assert len(set(looks(drawn))) == 12
    assert {one.get_linestyle() for one in drawn[:4]} == {"-"}
    assert "-" not in {one.get_linestyle() for one in drawn[4:]}
    assert (list(drawn[0].get_xdata()), list(drawn[0].get_ydata())) == ([0.3, 2.0], [20, 60])
    assert list(line(axes, "identity, all checkpoints").get_ydata()) == [100, 100]
    assert list(line(axes, "identity, near the prompt").get_ydata()) == []
    png_of(figure)


def a_landscape(accurate: list[bool]) -> dict:
    x, y = torch.linspace(-1, 1, 5).double(), torch.linspace(-2, 2, 5).double()
    n = len(accurate)
    return read_back(
        plain({
            "metric": "test_error", "better": "lower", "prompt": 0.05, "start_metric": 0.9,
            "explained": torch.tensor([0.4, 0.2]).double(), "x": x, "y": y, "values": 0.1 + 0.2 * (x**2 + y[:, None] ** 2),
            "samples": torch.linspace(-0.8, 0.8, 2 * n).double().view(n, 2), "sample_metric": torch.full((n,), 0.1).double(),
            "projected_metric": torch.full((n,), 0.1).double(), "share": torch.ones(n).double(),
            "accurate": torch.tensor(accurate), "curvature": torch.ones(n, 2).double(), "step": torch.ones(2).double(),
            "convex": 1.0, "non_finite": 0,
        })
    )  # fmt: skip


def test_a_landscape_marks_which_samples_lie_in_its_plane():
    data = [a_landscape([True, False, True]), a_landscape([True])]
    figure = landscape.figure(data)
    left, right = figure.axes[:2]
    handles, labels = left.get_legend_handles_labels()
    dots = dict(zip(labels, handles, strict=True))
    filled = dots["sample whose projection scores alike"]
    assert np.asarray(filled.get_offsets()) == pytest.approx(np.array(data[0]["samples"])[[0, 2]])
    hollow = dots["sample whose projection scores otherwise"]
    assert np.asarray(hollow.get_offsets()) == pytest.approx(np.array(data[0]["samples"])[[1]])
    assert hollow.get_facecolor().size == 0
    assert left.get_xlim() == (-1, 1)
    assert left.get_ylim() == (-2, 2)
    assert left.get_xlabel() == "component 1, 40% of variance"
    assert right.get_title() == "start 2, prompted for 5"
    png_of(figure)


def test_filters_share_one_symmetric_range():
    before, after = 0.1 * torch.randn(3, 5, 5), torch.randn(3, 5, 5)
    rows = {"before": {"filters": before.tolist(), "metric": 0.9}, "after": {"filters": after.tolist(), "metric": 0.08}}
    figure = filters.figure(read_back({"metric": "test_error", "prompt": 0.05, **rows}))
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 6
    largest = float(after.abs().max())
    for image, expected in zip(images, [*before, *after], strict=True):
        assert np.asarray(image.get_array()) == pytest.approx(expected.numpy())
        assert image.get_clim() == pytest.approx((-largest, largest))
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["before\n90", "after\n8"]
    png_of(figure)


def test_what_is_not_finite_is_a_dash_and_does_not_stop_a_figure():
    assert shown("test_error", None) == shown("test_loss", None) == "–"
    assert (shown("test_error", 0.0512), shown("test_loss", 0.0512)) == ("5.12", "0.0512")
    images = [[[0.1, -0.2], [0.3, 0.0]]]
    gone = [[[None, None], [None, None]]]
    rows = {"before": {"filters": images, "metric": 0.9}, "after": {"filters": gone, "metric": None}}
    figure = filters.figure({"metric": "test_error", "prompt": 0.05, **rows})
    assert figure.axes[1].get_ylabel() == "after\n–"
    assert figure.axes[0].images[0].get_clim() == pytest.approx((-0.3, 0.3))
