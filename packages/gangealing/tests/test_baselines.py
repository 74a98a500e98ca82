"""Alignment by moments and by classical Congealing, of digits whose poses are known."""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate, bootstrap
from triptych_gangealing.baselines.congealing import Congealing, _entropy, _matrices, _sweep, _warped
from triptych_gangealing.baselines.moments import ink, luma, moments
from triptych_gangealing.digits32 import Digits32, Jitters, affine, render
from triptych_gangealing.keypoints.synthetic import white_on_black
from triptych_gangealing.warp import Warp


@cache
def held_out() -> Digits32:
    return Digits32("held_out", seed=5)


def items(n: int) -> tuple[Tensor, Jitters]:
    """Digits and how they are drawn."""
    jitters = held_out().jitters(range(0, 17 * n, 17))
    return held_out().digits[jitters.digit], jitters


def one_digit(n: int, *, limit: float = 1.0) -> tuple[Tensor, Jitters]:
    """One seven, drawn n times; limit: share of the data set's jitters."""
    _, jitters = items(n)
    seven = held_out().digits[held_out()._digit_labels == 7][3]
    place = {"angle": jitters.angle * limit, "scale": jitters.scale**limit, "shift_px": jitters.shift_px * limit}
    return seven.expand(n, 1, -1, -1), jitters._replace(**place)


def poses(jitters: Jitters, warp: Warp) -> tuple[Tensor, Tensor, Tensor]:
    """Angle, log scale and shift in pixels at which an affine warp shows each digit: canvas to digit after aligned to canvas."""
    known, warped = affine(jitters).double(), warp.stages[0].matrix.double()
    linear = known[:, :, :2] @ warped[:, :, :2]
    offset = known[:, :, :2] @ warped[:, :, 2:] + known[:, :, 2:]
    turn = torch.complex(linear[:, 0, 0] + linear[:, 1, 1], linear[:, 1, 0] - linear[:, 0, 1]) / 2
    return turn.angle(), -(turn.abs() * 28 / 32).log(), -torch.linalg.solve(linear, offset)[:, :, 0] * 16


def errors(jitters: Jitters, warp: Warp) -> tuple[Tensor, Tensor, Tensor]:
    """How far each pose is from the median one: degrees, log scale, and pixels at the digit's full size."""
    angle, log_scale, shift = poses(jitters, warp)
    turned = wrapped(angle - torch.polar(torch.ones_like(angle), angle).mean().angle())
    away = (shift - shift.quantile(0.5, dim=0)).norm(dim=1) / log_scale.quantile(0.5).exp()
    return (turned - turned.quantile(0.5)).rad2deg().abs(), (log_scale - log_scale.quantile(0.5)).abs(), away


def wrapped(angle: Tensor) -> Tensor:
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def median(values: Tensor) -> Estimate:
    return bootstrap(lambda part: float(part.quantile(0.5)), values)


def measured(image: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid and covariance of one image's ink in half sides, by a loop over pixels."""
    size, mass, first, second = len(image), 0.0, torch.zeros(2), torch.zeros(2, 2)
    for row in range(size):
        for column in range(size):
            point = (2 * torch.tensor([column, row]) + 1) / size - 1
            mass += float(image[row, column])
            first += image[row, column] * point
            second += image[row, column] * point[:, None] * point
    centroid = first / mass
    return centroid, second / mass - centroid[:, None] * centroid


def test_ink_is_independent_of_colours() -> None:
    digits, jitters = items(200)
    drawn = render(digits, white_on_black(jitters))[:, :1].double() / 255
    coloured = render(digits, jitters)
    found = ink(coloured)
    assert found.shape == drawn.shape
    assert (found - drawn).abs().mean() < 0.012  # ink itself averages 0.09
    assert (found - drawn).abs().flatten(1).mean(1).max() < 0.05
    assert found.amin() == 0
    assert found.amax() == 1
    assert torch.equal(ink(coloured), found)
    torch.testing.assert_close(ink(coloured.float() / 127.5 - 1), found, atol=1e-3, rtol=0)
    naive = (luma(coloured) - drawn).abs().mean()
    assert naive > 10 * (found - drawn).abs().mean()


def test_ink_of_grey_images_of_either_polarity() -> None:
    digits, jitters = items(20)
    grey = render(digits, white_on_black(jitters))[:, :1]
    torch.testing.assert_close(ink(255 - grey), ink(grey), atol=1e-3, rtol=0)
    torch.testing.assert_close(ink(grey.expand(-1, 3, -1, -1)), ink(grey), atol=1e-3, rtol=0)
    assert (ink(grey) - grey.float() / 255).abs().mean() < 0.012
    assert torch.equal(luma(grey), grey.float() / 255)


def test_ink_that_crosses_the_border_does_not_bend_the_background() -> None:
    ramp = torch.linspace(0.2, 0.5, 32).expand(1, 3, 32, 32).clone()
    ramp[:, :, 12:16, :20] = 0.95
    expected = torch.zeros(32, 32)
    expected[12:16, :20] = 1
    found = ink(ramp * 2 - 1)[0, 0]
    assert (found[expected == 0] == 0).all()
    assert found[expected == 1].min() > 0.5


@pytest.mark.parametrize("coloured", [False, True])
def test_moments_are_undone(coloured: bool) -> None:
    """Centroid in the middle, axis upright, radius 0.4: remeasured in the aligned images, pixel by pixel."""
    digits, jitters = one_digit(8)
    white = render(digits, white_on_black(jitters))
    aligned = moments(render(digits, jitters) if coloured else white).sample(white[:, :1].float(), padding="zeros")
    for image in aligned[:, 0]:
        centroid, covariance = measured(image)
        assert centroid.norm() < 0.02 + 0.02 * coloured
        assert covariance.trace().sqrt() == pytest.approx(0.4, rel=0.05)
        assert covariance[1, 1] > 2 * covariance[0, 0]
        assert abs(math.atan2(2 * covariance[0, 1], covariance[1, 1] - covariance[0, 0])) / 2 < math.radians(3)


@pytest.mark.parametrize("resolve", ["skewness", "upright"])
def test_moments_bring_one_digit_to_one_pose(resolve: str) -> None:
    digits, jitters = one_digit(60, limit=1.0 if resolve == "skewness" else 0.6)  # a seven's own axis leans
    rotation_deg, log_scale, shift_px = errors(jitters, moments(render(digits, jitters), resolve=resolve))
    assert rotation_deg.mean() < 3
    assert log_scale.mean() < 0.03
    assert shift_px.mean() < 0.3


def test_the_long_tail_points_down_or_the_turn_is_small() -> None:
    """A wedge, heavy at one end, in all directions: its tail is known; its upright is not, beyond 90 degrees."""
    rows, columns = np.mgrid[:28, :28] - 13.5
    wedge = ((rows > -9) & (rows < 9) & (np.abs(columns) < (10 - rows) / 6)) * 255
    digits = torch.from_numpy(wedge.astype(np.uint8)).expand(12, 1, -1, -1)  # broad above, its tail below
    _, jitters = items(12)
    angle = torch.arange(12) * (2 * math.pi / 12) - math.pi + 0.2
    jitters = white_on_black(jitters._replace(angle=angle, scale=torch.ones(12), shift_px=torch.zeros(12, 2)))
    by_tail = poses(jitters, moments(render(digits, jitters)))[0]
    assert wrapped(by_tail).abs().rad2deg().max() < 2  # always as drawn unturned
    by_turn = poses(jitters, moments(render(digits, jitters), resolve="upright"))[0]
    flipped = angle.abs() > math.pi / 2
    assert wrapped(by_turn[~flipped]).abs().rad2deg().max() < 2
    assert wrapped(by_turn[flipped] - math.pi).abs().rad2deg().max() < 2


def test_images_without_ink_stay() -> None:
    plain = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
    torch.testing.assert_close(moments(plain).stages[0].matrix, torch.eye(2, 3).expand(2, -1, -1))


def test_parameters_are_the_product_of_seven_matrices() -> None:
    tx, ty, turn, log_x, log_y, shear_x, shear_y = values = (0.1, -0.2, 0.5, 0.2, -0.3, 0.15, -0.25)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    scales, across, down = (
        np.diag(np.exp([log_x, log_y])),
        np.array([[1, shear_x], [0, 1]]),
        np.array([[1, 0], [shear_y, 1]]),
    )
    expected = np.column_stack([rotation @ scales @ across @ down, [tx, ty]])
    torch.testing.assert_close(
        _matrices(torch.tensor([values]))[0].double(), torch.from_numpy(expected), atol=1e-6, rtol=0
    )


def test_a_sweep_is_coordinate_descent_image_by_image() -> None:
    """Against a loop that codes each image in bits, at one coordinate after another."""
    digits, jitters = one_digit(5, limit=0.3)
    stack = render(digits, white_on_black(jitters))[:, :1].double() / 255
    bias = ((stack.sum(0)[0] + 0.5) / 6).clamp(1e-3, 1 - 1e-3)
    start = 0.02 * torch.arange(35).view(5, 7).double().sin()

    def bits(image: Tensor, parameters: Tensor) -> float:
        shown = _warped(image[None], parameters[None], "zeros")[0, 0]
        return float(-(shown * bias.log2() + (1 - shown) * (1 - bias).log2()).sum())

    expected = start.clone()
    for image, own in zip(stack, expected, strict=True):
        for number, step in enumerate([1 / 16, 1 / 16, 0.1, 1 / 16, 1 / 16, 1 / 16, 1 / 16]):
            tries = []
            for move in (0.0, 0.5 * step, -0.5 * step):
                moved = own.clone()
                moved[number] += move
                tries.append((bits(image, moved), move))
            own[number] += min(tries)[1]
    found = _sweep(stack, start, bias.logit(), 0.5, "zeros")
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert not torch.equal(found, start)


def test_no_sweep_raises_the_entropy_though_all_images_move() -> None:
    digits, jitters = items(40)
    stack = render(digits, white_on_black(jitters))[:, :1].double() / 255
    parameters = torch.zeros(40, 7, dtype=torch.float64)
    entropy = [_entropy(stack)]
    for _ in range(6):
        bias = _warped(stack, parameters, "zeros").mean(0)[0].clamp(1e-9, 1 - 1e-9)
        parameters = _sweep(stack, parameters, bias.logit(), 0.5, "zeros")
        entropy.append(_entropy(_warped(stack, parameters, "zeros")))
    assert all(after <= before + 1e-9 for before, after in pairwise(entropy))
    assert entropy[-1] < 0.9 * entropy[0]
    loop = [-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in stack.mean(0).flatten().tolist() if 0 < p < 1]
    assert entropy[0] == pytest.approx(sum(loop) / 1024, rel=1e-9)


@pytest.fixture(scope="module")
def congealed() -> tuple[Congealing, Tensor, Jitters]:
    digits, jitters = one_digit(60, limit=0.5)
    images = render(digits, jitters)
    return Congealing.fit(images, sweeps=8), images, jitters


def test_congealing_aligns_what_is_moderately_jittered(congealed: tuple[Congealing, Tensor, Jitters]) -> None:
    congealing, _, jitters = congealed
    before, after = errors(jitters, Warp.identity(60)), errors(jitters, congealing.training)
    for quantity in (0, 2):  # rotation, shift
        assert median(after[quantity]).high < median(before[quantity]).low / 3
    assert after[1].mean() < 0.8 * before[1].mean()
    assert congealing.entropy[-1] < 0.6 * congealing.entropy[0]


def test_the_funnel_does_to_new_images_what_it_did_to_the_stack(congealed: tuple[Congealing, Tensor, Jitters]) -> None:
    congealing, images, jitters = congealed
    again = congealing.align(images).stages[0].matrix
    torch.testing.assert_close(again, congealing.training.stages[0].matrix)
    torch.testing.assert_close(congealing.align(images[7:9]).stages[0].matrix, again[7:9], atol=1e-5, rtol=0)
    other = held_out().digits[held_out()._digit_labels == 7][8].expand(60, 1, -1, -1)
    before, after = errors(jitters, Warp.identity(60)), errors(jitters, congealing.align(render(other, jitters)))
    for quantity in (0, 2):  # rotation, shift
        assert after[quantity].quantile(0.5) < before[quantity].quantile(0.5) / 2


def test_brightness_of_coloured_images_stays_on_the_canvas_with_borders_continued() -> None:
    digits, jitters = items(60)
    images = render(digits, jitters)
    gone, there = (Congealing.fit(images, read=luma, padding=padding, sweeps=8) for padding in ("zeros", "border"))
    assert gone.entropy[-1] < 0.7 * there.entropy[-1]  # all agree on black
    assert there.training.inside((32, 32)).mean() > 0.7 > gone.training.inside((32, 32)).mean()


def test_the_stack_neither_shrinks_nor_wanders(congealed: tuple[Congealing, Tensor, Jitters]) -> None:
    matrix = congealed[0].training.stages[0].matrix
    area = torch.linalg.det(matrix[:, :, :2]).log().mean()
    assert abs(float(area)) < 0.05
    assert matrix[:, :, 2].mean(0).norm() < 1e-5


def test_bad_input_is_one_line(congealed: tuple[Congealing, Tensor, Jitters]) -> None:
    oblong = torch.zeros(3, 3, 32, 24, dtype=torch.uint8)
    for wrong, message in (
        (lambda: moments(oblong), "32 x 24: expected square"),
        (lambda: Congealing.fit(oblong), "32 x 24: expected square"),
        (lambda: Congealing.fit(oblong[:1]), "at least 2"),
        (lambda: congealed[0].align(oblong), "expected 32 x 32"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            wrong()
        assert "\n" not in str(raised.value)
