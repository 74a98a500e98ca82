"""How well warps undo jitters that are known: errors in rotation, scale and shift, and the sharpness of the average.

Between different digits there is no true correspondence, but the rotation, scale and shift of each are known. Aligned images
should show all digits in one pose; which pose is up to the method, so only the spread counts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate, bootstrap
from triptych_gangealing.digits32 import CANVAS, DIGIT, Jitters, affine, render
from triptych_gangealing.keypoints.synthetic import white_on_black
from triptych_gangealing.warp import Warp, centres

# MNIST's digits fill 20 of their image's 28 pixels: in normalised coordinates, from -DIGIT_BOX to DIGIT_BOX
DIGIT_BOX = 20 / DIGIT
POINTS = 32  # points a side at which a warp is evaluated


class Pose(NamedTuple):
    """Poses of n digits in their images.

    Convention: as `Jitters`; rotation is counter-clockwise, shift is that of the digit's centre from the image's, (x, y).
    """

    angle: Float[Tensor, " n"]  # radians
    log_scale: Float[Tensor, " n"]  # 0: the digit's own 28 pixels are 28 of a 32-pixel canvas
    shift_px: Float[Tensor, "n 2"]  # pixels of a 32-pixel canvas


def poses(jitters: Jitters, warp: Warp) -> Pose:
    """Poses of digits in the aligned images; for the identity warp, the jitters themselves."""
    # Each warp, followed by the known map from canvas to digit, takes 32 x 32 points of the aligned image into the digit's image.
    # The pose is the similarity nearest to that map in least squares, over the points that land within the 20 x 20 pixels that
    # digits fill (over all points, where fewer than 10 do). So what a flow does to the background does not count.
    like = torch.empty((), dtype=torch.float64)
    aligned = centres((POINTS, POINTS), like).view(1, -1, 2).expand(len(jitters.angle), -1, -1)
    canvas = warp.to(dtype=torch.float64).map_points(aligned).points
    theta = affine(jitters).double()
    digit = canvas @ theta[:, :, :2].mT + theta[:, None, :, 2]
    inside = (digit.abs() <= DIGIT_BOX).all(2)
    weights = torch.where((inside.sum(1) < 10)[:, None], True, inside).double()
    weights = weights / weights.sum(1, keepdim=True)

    # As complex numbers a similarity is digit = turn * z + offset: one quotient gives its least-squares rotation and scale.
    def complex_and_mean(points: Tensor) -> tuple[Tensor, Tensor]:
        numbers = torch.view_as_complex(points.contiguous())
        return numbers, (weights * numbers).sum(1)

    (z, z_mean), (d, d_mean) = complex_and_mean(aligned), complex_and_mean(digit)
    centred = z - z_mean[:, None]
    turn = (weights * centred.conj() * (d - d_mean[:, None])).sum(1) / (weights * centred.abs() ** 2).sum(1)
    middle = z_mean - d_mean / turn
    return Pose(turn.angle(), -(turn.abs() * DIGIT / CANVAS).log(), torch.view_as_real(middle) * CANVAS / 2)


def mode(pose: Pose) -> Pose:
    """The pose that most images share, as one row."""
    # The circular mean of the half of the angles that is nearest to the circular mean of all: a minority of upside-down digits does
    # not move it.
    first = torch.polar(torch.ones_like(pose.angle), pose.angle).mean().angle()
    away = wrapped(pose.angle - first)
    near = away.abs().argsort()[: (len(away) + 1) // 2]
    angle = wrapped(first + torch.polar(torch.ones_like(away[near]), away[near]).mean().angle())
    # quantile(0.5) is the mean of the two middle values where median() takes the lower one
    log_scale, shift_px = (values.quantile(0.5, dim=0, keepdim=True) for values in (pose.log_scale, pose.shift_px))
    return Pose(angle.reshape(1), log_scale, shift_px)


def residuals(pose: Pose, groups: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n 3"]:
    """Each image's deviation from the mode: degrees of rotation, |log scale|, and pixels of shift.

    groups: images of one group, such as a cluster or class, are compared with their own mode; by default all with one.
    """
    groups = torch.zeros(len(pose.angle), dtype=torch.long) if groups is None else groups
    errors = pose.angle.new_zeros(len(pose.angle), 3)
    for group in groups.unique():
        here = Pose(*(values[groups == group] for values in pose))
        shared = mode(here)
        # Pixels of a canvas on which the digit has its full size: a method gains nothing by showing digits small.
        shift = (here.shift_px - shared.shift_px).norm(dim=1) / shared.log_scale.exp()
        turned, scaled = wrapped(here.angle - shared.angle).rad2deg().abs(), (here.log_scale - shared.log_scale).abs()
        errors[groups == group] = torch.stack([turned, scaled, shift], dim=1)
    return errors


@dataclass(frozen=True)
class PoseErrors:
    """Residual rotation (degrees), log scale and shift (pixels): means and medians over images, with 95% intervals."""

    n: int
    rotation_deg: Estimate
    log_scale: Estimate
    shift_px: Estimate
    median_rotation_deg: Estimate
    median_log_scale: Estimate
    median_shift_px: Estimate

    def as_dict(self) -> dict[str, Any]:
        """The errors as JSON holds them."""
        return {name: value._asdict() if isinstance(value, Estimate) else value for name, value in vars(self).items()}


def pose_errors(
    jitters: Jitters, warp: Warp, groups: Int[Tensor, " n"] | None = None, *, repeats: int = 100, seed: int = 0
) -> PoseErrors:
    """Mean and median errors of n warps that align n images of known jitters, beside the mode of each of `groups`.

    Writers slant and size their digits differently, which no jitter records, so that even a perfect alignment leaves some degrees.
    Raises ValueError for fewer than two images, or another number of warps.
    """
    n = len(jitters.angle)
    if n < 2 or len(warp) != n:
        raise ValueError(f"{n} images and {len(warp)} warps: expected at least 2, one warp an image")
    errors = residuals(poses(jitters, warp), groups)

    # Intervals resample digits, each with all of its images. Modes are not recomputed for a resample: medians minimise the mean
    # distance from themselves, so that to first order nothing would change.
    def estimate(score: Callable[[Tensor], Tensor], some: Tensor) -> Estimate:
        found = bootstrap(lambda part: float(score(part)), some, repeats=repeats, seed=seed, groups=jitters.digit)
        return found if found.low is None else found._replace(low=max(found.low, 0.0))

    return PoseErrors(n, *(estimate(score, some) for score in (torch.mean, _median) for some in errors.unbind(1)))


def _median(values: Tensor) -> Tensor:
    return values.quantile(0.5)


def own_pose_errors(
    jitters: Jitters, warp: Warp, groups: Int[Tensor, " n"] | None = None, *, repeats: int = 100, seed: int = 0
) -> PoseErrors | None:
    """`pose_errors` beside each digit's own mode, for digits that were drawn at least three times; None without such digits.

    Writers' slant and size drop out, so that only the jitters are left. groups: a digit has its own mode in each group.
    """
    # The mode of a few views lies near each of them, which favours all methods alike.
    own = jitters.digit
    if groups is not None:
        own = torch.stack([own, groups], 1).unique(dim=0, return_inverse=True)[1]
    rows = (torch.bincount(own)[own] >= 3).nonzero().flatten()
    if not len(rows):
        return None
    several = Jitters(*(values[rows] for values in jitters))
    return pose_errors(several, warp.select(rows), own[rows], repeats=repeats, seed=seed)


def wrapped(angle: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """The same angles, in radians between -pi and pi."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def mean_gradient(image: Float[Tensor, "channels height width"]) -> Tensor:
    """Mean length of an image's gradient per pixel, by central differences, each channel separately."""
    down, across = torch.gradient(image, dim=(1, 2))
    return torch.hypot(down, across).mean()


class Sharpness(NamedTuple):
    """Mean gradients of averages of ink (0 to 1), per pixel."""

    aligned: float  # of the aligned images
    at_mode: float  # of digits never jittered, in the pose that the aligned ones share
    upright: float  # of digits never jittered, as the data set has them
    ratio: Estimate  # aligned over at_mode


def sharpness(
    digits: UInt8[Tensor, "n 1 28 28"], jitters: Jitters, warp: Warp, *, repeats: int = 100, seed: int = 0
) -> Sharpness:
    """How sharp the average of aligned images is, compared with that of the same digits never jittered."""
    # Both averages are of ink, white on black, whatever colours the aligned images had: half of all digits are darker than their
    # ground, so their average in colour is grey however well they are aligned. Larger digits have longer outlines, so the ratio is
    # to digits drawn without jitters in the pose that the aligned ones share.
    n, shared = len(digits), mode(poses(jitters, warp))

    def drawn(jitters: Jitters) -> Float[Tensor, "n 1 height width"]:
        return render(digits, white_on_black(jitters))[:, :1].float() / 255

    def alike(angle: Tensor, scale: Tensor, shift_px: Tensor) -> Jitters:
        places = (angle.expand(n).float(), scale.expand(n).float(), shift_px.expand(n, 2).float())
        return jitters._replace(**dict(zip(("angle", "scale", "shift_px"), places, strict=True)))

    aligned = warp.to(dtype=torch.float32).sample(drawn(jitters), padding="zeros")
    at_mode = drawn(alike(shared.angle, shared.log_scale.exp(), shared.shift_px))
    upright = drawn(alike(torch.zeros(1), torch.ones(1), torch.zeros(1, 2)))

    def gain(both: Tensor) -> float:
        ours, theirs = both.mean(0).split(1)
        return float(mean_gradient(ours) / mean_gradient(theirs))

    both = torch.cat([aligned, at_mode], dim=1)
    ratio = bootstrap(gain, both, repeats=repeats, seed=seed, groups=jitters.digit)
    ours, theirs, never = (float(mean_gradient(stack.mean(0))) for stack in (aligned, at_mode, upright))
    return Sharpness(ours, theirs, never, ratio)
