"""Figures of an evaluation carry the data that they were given; the divergence of the last step; records."""

import io
import json
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from PIL import Image
from torch.distributions import Normal, kl_divergence
from triptych_common.diffusion import NoiseSchedule
from triptych_common.metrics.bootstrap import Estimate
from triptych_common.plots import figure_png, panels, thousands
from triptych_gpt.evaluation import plots
from triptych_gpt.evaluation.alignment import Alignment, Quality, Sweep
from triptych_gpt.evaluation.plots import measure, words
from triptych_gpt.evaluation.records import plain
from triptych_gpt.evaluation.trial import kl_last_step


def read_back(result):
    """A result as a report finds it on disk."""
    return json.loads(json.dumps(plain(result), allow_nan=False))


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


def a_sweep(scale: float = 1.0, networks: int = 3) -> dict:
    prompts = torch.linspace(0, 2, 5).double() * torch.linspace(1, 1.1, networks).double()[:, None]
    achieved = scale * prompts + 0.1
    achieved[0, 1] = torch.nan
    values = {"test_loss": achieved, "test_error": achieved / 4}
    start = {name: torch.full((networks,), 2.4).double() for name in values}
    return read_back(Sweep("test_loss", "lower", prompts, values, start, {"test_loss": 0.25}))


def test_a_sweep_shows_every_network_the_mean_and_the_training_sets_best():
    data, other = a_sweep(), a_sweep(0.5)
    figure = plots.sweep(data, also=["test_error"], beside={"identity": other})
    left, right = figure.axes
    curves = [one for one in left.lines if same_color(one.get_color(), "#9db4cf")]
    assert len(curves) == 3
    for curve, prompts, achieved in zip(curves, data["prompts"], data["achieved"]["test_loss"], strict=True):
        assert curve.get_xdata() == pytest.approx(prompts)
        assert curve.get_ydata() == pytest.approx(np.array(achieved, dtype=float), nan_ok=True)
    mean = np.nanmean(np.array(data["achieved"]["test_loss"], dtype=float), axis=0)
    assert line(left, "mean").get_ydata() == pytest.approx(mean)
    assert line(left, "mean").get_xdata() == pytest.approx(np.mean(data["prompts"], axis=0))
    identity = np.nanmean(np.array(other["achieved"]["test_error"], dtype=float), axis=0)
    assert line(right, "identity").get_ydata() == pytest.approx(identity)
    diagonal = line(left, "achieved as prompted")
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == pytest.approx([0, 2.2])
    best = line(left, "best training checkpoint")
    assert list(best.get_ydata()) == [0.25, 0.25]
    assert best.get_linestyle() == "--"
    assert "achieved as prompted" not in right.get_legend_handles_labels()[1]
    assert (left.get_xlabel(), right.get_ylabel()) == ("prompted test loss (nats)", "achieved test error (%)")
    png_of(figure)


def test_a_diverged_network_does_not_set_the_scale_of_a_sweep():
    data = a_sweep()
    data["achieved"]["test_loss"][1][2] = 1e6
    (axes,) = plots.sweep(data).axes
    assert axes.get_ylim()[1] < 4


def alignment(r2: float, best: float) -> Alignment:
    estimates = Estimate(r2, r2 - 0.1, r2 + 0.2), Estimate(best, best - 0.05, best + 0.05)
    return Alignment(
        "test_loss", "lower", 2, 5, estimates[0], r2, None, (r2, r2), 0.9, 0.1, 0, (0.0, 2.0), estimates[1]
    )


def test_quality_shows_both_scores_of_every_sampler():
    values = {("ddpm", 10): (0.2, 0.9), ("ddpm", 1000): (0.9, 0.3), ("ddim", 5): (0.6, 0.5)}
    rows = read_back([Quality(*key, alignment(*value)) for key, value in values.items()])
    figure = plots.quality(rows)
    left, right = figure.axes
    assert list(line(left, "ddpm").get_xdata()) == [10, 1000]
    assert list(line(left, "ddpm").get_ydata()) == [0.2, 0.9]
    assert list(line(right, "ddpm").get_ydata()) == [0.9, 0.3]
    assert list(line(right, "ddim").get_ydata()) == [0.5]
    handles, labels = left.get_legend_handles_labels()
    assert handles[labels.index("ddim")][2][0].get_segments()[0][:, 1] == pytest.approx([0.5, 0.8])
    assert left.get_xscale() == "log"
    png_of(figure)


def test_the_audit_shows_every_distance_and_the_median():
    groups = [
        {"name": "samples", "distances": [3.0, 1.0, 2.0, None]},
        {"name": "held-out finals", "distances": [4.0] * 5},
    ]
    figure = plots.memorization_figure({"groups": groups})
    (axes,) = figure.axes
    dots, _, median = axes.lines[:3]
    assert list(dots.get_xdata()) == [3.0, 1.0, 2.0]
    assert ((dots.get_ydata() > -0.3) & (dots.get_ydata() < 0.3)).all()
    assert list(median.get_xdata()) == [2.0, 2.0]
    assert list(axes.lines[3].get_xdata()) == [4.0] * 5
    assert axes.get_xlabel() == "distance to the nearest training network, units matched"
    png_of(figure)


def test_what_is_not_finite_does_not_stop_a_figure():
    rows = read_back([Quality("ddpm", steps, alignment(0.5, 0.5)) for steps in (5, 10)])
    rows[0]["alignment"]["achieved_at_best"] = {"value": None, "low": None, "high": None}
    assert np.isnan(line(plots.quality(rows).axes[1], "ddpm").get_ydata()[0])


def test_words_and_numbers_of_axes():
    assert [words(name) for name in ("test_loss", "test_error", "train_return")] == [
        "test loss (nats)", "test error (%)", "train return",
    ]  # fmt: skip
    assert [thousands(value) for value in (7, 1500, 2e6)] == ["7", "1.5k", "2M"]
    _, (axes,) = panels()
    axes.set(ylim=(0.05, 0.9), yscale="log")
    measure(axes.yaxis, "test_error")
    assert axes.yaxis.get_major_formatter()(0.1) == "10"
    assert [axes.yaxis.get_minor_formatter()(value) for value in (0.2, 0.3, 0.5)] == ["20", "", "50"]


def test_the_last_steps_divergence_equals_torchs_and_an_integral():
    alpha_bar, x_0 = 0.3, torch.tensor([[0.7, -1.2, 0.1], [2.0, 0.4, 0.0]], dtype=torch.float64)
    noised = Normal(math.sqrt(alpha_bar) * x_0, math.sqrt(1 - alpha_bar))
    standard = Normal(torch.zeros(2, 3).double(), torch.ones(2, 3).double())
    expected = float(kl_divergence(noised, standard).mean()) / math.log(2)
    assert kl_last_step(alpha_bar, x_0) == pytest.approx(expected, rel=1e-12)
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    one = Normal(math.sqrt(alpha_bar) * 0.7, math.sqrt(1 - alpha_bar))
    gap = one.log_prob(grid) - Normal(0.0, 1.0).log_prob(grid)
    integral = float(torch.trapezoid(one.log_prob(grid).exp() * gap, grid)) / math.log(2)
    assert kl_last_step(alpha_bar, x_0[:1, :1]) == pytest.approx(integral, rel=1e-6)


def test_the_thesis_normalisation_leaves_eight_millionths_of_a_bit():
    theta_star = 0.538 * torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    assert kl_last_step(NoiseSchedule.linear().alpha_bar[-1], theta_star) == pytest.approx(8e-6, rel=0.1)


def test_records_hold_what_json_can():
    value = {"a": (1, 2.5, math.inf), "b": torch.tensor([[1.0, torch.nan]]), 3: None, "c": torch.tensor([True])}
    assert plain(value) == {"a": [1, 2.5, None], "b": [[1.0, None]], "3": None, "c": [True]}
    with pytest.raises(TypeError, match="set"):
        plain({1, 2})
