"""How the error of an alignment is measured: by known poses, and by the sharpness of the average."""

import math
from functools import cache

import pytest
import torch
from torch import Tensor
from triptych_gangealing.digits32 import Digits32, Jitters, affine, render
from triptych_gangealing.keypoints.synthetic import white_on_black
from triptych_gangealing.warp import Affine, Flow, Warp
from triptych_thesis.chapter4.pose import (
    Pose,
    mean_gradient,
    mode,
    own_pose_errors,
    pose_errors,
    poses,
    residuals,
    sharpness,
    wrapped,
)


@cache
def held_out() -> Digits32:
    return Digits32("held_out", seed=5)


def items(n: int) -> tuple[Tensor, Jitters]:
    """Digits and how they are drawn."""
    jitters = held_out().jitters(range(0, 17 * n, 17))
    return held_out().digits[jitters.digit], jitters


def undoing(jitters: Jitters, angle: Tensor | float = 0.0, log_scale: float = 0.0, shift: float = 0.0) -> Warp:
    """The exact warp that shows every digit at the same pose."""
    n = len(jitters.angle)
    angle = torch.as_tensor(angle).float().expand(n)
    alike = jitters._replace(
        angle=angle, scale=torch.full((n,), math.exp(log_scale)), shift_px=torch.full((n, 2), shift)
    )
    there, back = affine(alike).double(), affine(jitters).double()
    linear = torch.linalg.solve(back[:, :, :2], there[:, :, :2])
    offset = torch.linalg.solve(back[:, :, :2], there[:, :, 2:] - back[:, :, 2:])
    return Warp((Affine(torch.cat([linear, offset], dim=2)),))


def test_poses_of_images_left_alone_are_their_jitters() -> None:
    _, jitters = items(50)
    pose = poses(jitters, Warp.identity(50))
    torch.testing.assert_close(pose.angle, jitters.angle.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(pose.log_scale, jitters.scale.double().log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(pose.shift_px, jitters.shift_px.double(), atol=1e-5, rtol=0)


def test_exact_warps_have_no_error_at_any_common_pose() -> None:
    _, jitters = items(50)
    for common in ({}, {"angle": 3.1, "log_scale": -0.4, "shift": 5.0}, {"angle": -math.pi, "log_scale": 0.3}):
        assert residuals(poses(jitters, undoing(jitters, **common))).max() < 1e-4
        errors = pose_errors(jitters, undoing(jitters, **common))
        assert errors.rotation_deg.high < 1e-4
        shared = mode(poses(jitters, undoing(jitters, **common)))
        assert float(wrapped(shared.angle - common.get("angle", 0.0)).abs()) < 1e-5
        assert float(shared.log_scale) == pytest.approx(common.get("log_scale", 0.0), abs=1e-5)


def test_known_errors_are_measured() -> None:
    """Poses about a mode near the cut at 180 degrees, a fifth of them turned round: no mean is dragged along."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(500, generator=rng, dtype=torch.float64) * 0.1
    noise = torch.cat([noise, -noise])  # so that the true mode is known
    turned = torch.arange(1000) % 5 == 0
    angle = wrapped(3.1 + noise + turned * math.pi)
    shift = torch.stack([4 + 2 * noise, torch.full_like(noise, -3)], dim=1)
    pose = Pose(angle, math.log(0.5) + noise / 2, shift)
    shared = mode(pose)
    assert float(wrapped(shared.angle - 3.1).abs()) < 0.02
    errors = residuals(pose)
    expected = torch.where(turned, math.pi - noise.abs(), noise.abs()).rad2deg()
    torch.testing.assert_close(errors[:, 0], expected, atol=1.2, rtol=0)
    torch.testing.assert_close(errors[:, 1], noise.abs() / 2, atol=1e-9, rtol=0)
    torch.testing.assert_close(errors[:, 2], 2 * noise.abs() / 0.5, atol=1e-9, rtol=0)


def test_pose_errors_average_and_bracket() -> None:
    _, jitters = items(200)
    errors = pose_errors(jitters, Warp.identity(200))
    assert errors.n == 200
    assert errors.rotation_deg.value == pytest.approx(30, abs=3)  # of 60 degrees, uniform
    assert errors.median_rotation_deg.value == pytest.approx(30, abs=4)
    spread = residuals(poses(jitters, Warp.identity(200)))[:, 0]
    assert errors.rotation_deg.value == pytest.approx(float(spread.mean()))
    half_width = (errors.rotation_deg.high - errors.rotation_deg.low) / 2
    assert half_width == pytest.approx(1.96 * float(spread.std()) / math.sqrt(200), rel=0.35)


def test_what_writers_do_is_no_error_beside_a_digits_own_mode() -> None:
    """Twenty digits five times each, aligned but for a lean of each digit's own, and ten that are seen once."""
    _, jitters = items(110)
    digit = torch.cat([torch.arange(100) % 20, torch.arange(20, 30)])
    warp = undoing(jitters._replace(digit=digit), angle=digit * 0.05)
    jitters = jitters._replace(digit=digit)
    errors = own_pose_errors(jitters, warp)
    assert errors is not None
    assert errors.n == 100
    assert errors.rotation_deg.value < 1e-4
    assert pose_errors(jitters, warp).rotation_deg.value > 10
    noise = 0.1 * torch.randn(110, generator=torch.Generator().manual_seed(0))
    noisy = own_pose_errors(jitters, undoing(jitters, angle=digit * 0.05 + noise))
    assert noisy is not None
    assert 2.0 < noisy.rotation_deg.value < 5.0  # 4.6 beside the truth; beside modes of five less
    assert own_pose_errors(Jitters(*(values[100:] for values in jitters)), warp.select(slice(100, 110))) is None


def test_every_group_has_its_own_mode() -> None:
    _, jitters = items(40)
    groups = torch.arange(40) % 2
    warp = undoing(jitters, angle=groups * 2.0)
    assert pose_errors(jitters, warp).rotation_deg.value > 50
    assert pose_errors(jitters, warp, groups).rotation_deg.value < 1e-4


def test_flows_count_by_what_they_do_to_the_digit() -> None:
    _, jitters = items(10)
    upright = undoing(jitters)
    shifted = torch.zeros(10, 2, 16, 16, dtype=torch.float64)
    shifted[:, 0] = 0.125  # of half a side: 2 of 32 px; each point is fetched from further right
    pose = poses(jitters, Warp((Flow(shifted), *upright.stages)))
    torch.testing.assert_close(pose.shift_px, torch.tensor([[-2.0, 0.0]]).double().expand(10, 2), atol=1e-5, rtol=0)
    corner = torch.zeros(10, 2, 16, 16, dtype=torch.float64)
    corner[:, :, :2] = 0.1  # above the digit: only the background moves
    assert residuals(poses(jitters, Warp((Flow(corner), *upright.stages)))).max() < 1e-4


def test_the_gradient_of_a_slope_is_its_steepness() -> None:
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    slope = (0.03 * columns + 0.04 * rows)[None]
    assert float(mean_gradient(slope)) == pytest.approx(0.05, rel=1e-5)
    assert float(mean_gradient(torch.cat([slope, 0 * slope]))) == pytest.approx(0.025, rel=1e-5)


def test_sharpness_is_beside_that_of_digits_never_jittered() -> None:
    threes = Digits32("held_out", 3)
    jitters = threes.jitters(range(150))
    digits = threes.digits[jitters.digit]
    exact = sharpness(digits, jitters, undoing(jitters))
    assert 0.9 < exact.ratio.value < 1.02  # enlarging small digits softens them a little
    assert exact.at_mode == pytest.approx(exact.upright, rel=1e-3)
    assert exact.ratio.value == pytest.approx(exact.aligned / exact.at_mode, rel=1e-6)
    small = sharpness(digits, jitters, undoing(jitters, log_scale=-0.5, shift=3.0))
    assert small.ratio.value == pytest.approx(exact.ratio.value, abs=0.08)
    assert small.aligned < 0.75 * exact.aligned
    before = sharpness(digits, jitters, Warp.identity(150))
    assert before.ratio.high < 0.7
    assert before.upright == exact.upright
    by_hand = (render(digits, white_on_black(jitters))[:, :1].double() / 255).mean(0)
    assert before.aligned == pytest.approx(float(mean_gradient(by_hand)), rel=1e-3)


def test_other_than_one_warp_an_image_is_one_line() -> None:
    _, jitters = items(3)
    with pytest.raises(ValueError, match="one warp an image") as raised:
        pose_errors(jitters, Warp.identity(2))
    assert "\n" not in str(raised.value)
