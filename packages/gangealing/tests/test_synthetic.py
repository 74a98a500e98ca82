"""Pairs with exact correspondences: points against pixels, found by other means than those that drew them."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from triptych_gangealing.digits32 import Digits32, Jitters, render
from triptych_gangealing.keypoints.synthetic import (
    Elastic,
    Pairs,
    deform,
    draw_elastic,
    ink_boxes,
    ink_points,
    on_canvas,
    pairs,
    white_on_black,
)
from triptych_gangealing.warp import to_normalised

DOTS = [(8.0, 8.0), (19.0, 7.0), (13.0, 14.0), (7.0, 20.0), (20.0, 19.0)]  # far enough from each other and the edge


def jitters(n: int) -> Jitters:
    return white_on_black(Digits32("held_out").jitters(range(0, 37 * n, 37)))


def dotted(n: int) -> tuple[Tensor, Tensor]:
    """n images of Gaussian dots, sigma 1.2 px, and their centres in normalised coordinates."""
    rows, columns = np.mgrid[:28, :28]
    dots = sum(np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 1.2**2)) for x, y in DOTS)
    image = torch.from_numpy((255 * dots).clip(0, 255).round().astype(np.uint8))
    return image.expand(n, 1, -1, -1), to_normalised(torch.tensor(DOTS).double(), (28, 28)).expand(n, -1, -1)


def peak(image: Tensor, near: Tensor, radius: float) -> Tensor:
    """(x, y) of a dot's peak: that of the paraboloid fitted to the logarithm around its brightest pixel."""
    rows, columns = torch.meshgrid(*(torch.arange(side).double() for side in image.shape), indexing="ij")
    close = (columns - near[0]) ** 2 + (rows - near[1]) ** 2 < (2 * radius) ** 2
    top = int((image * close).argmax())
    x, y = columns - top % image.shape[1], rows - top // image.shape[1]
    chosen = (x**2 + y**2 <= radius**2) & (image > 20)
    x, y, height = x[chosen], y[chosen], image[chosen].log()
    basis = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=1) * image[chosen][:, None]
    c = torch.linalg.lstsq(basis, (height * image[chosen])[:, None]).solution[:, 0]
    hessian = torch.stack([torch.stack([2 * c[3], c[4]]), torch.stack([c[4], 2 * c[5]])])
    return torch.linalg.solve(hessian, -c[1:3]) + torch.tensor([top % image.shape[1], top // image.shape[1]])


@pytest.mark.parametrize("elastic_px", [0.0, 2.5])
def test_marked_dots_are_at_their_points(elastic_px: float) -> None:
    """To 0.05 px of a 32-pixel canvas: measured on 256 pixels, where a dot is many pixels wide."""
    n, size = 12, 256
    images, centres = dotted(n)
    elastic, placed = draw_elastic(n, 3, "test", elastic_px), jitters(n)
    drawn = render(deform(images, elastic), placed, size)[:, 0].double()
    expected = on_canvas(elastic.forward(centres), placed, size)
    off = []
    for image, points, scale in zip(drawn, expected, placed.scale, strict=True):
        whole = points[((points > 12) & (points < size - 13)).all(1)]
        off += [(peak(image, point, radius=8 * float(scale)) - point) * 32 / size for point in whole]
    assert len(off) > 40
    errors = torch.stack(off)
    assert errors.norm(dim=1).max() < 0.05
    assert errors.mean(0).norm() < 0.01  # no convention is half a pixel off, nor a tenth
    still = on_canvas(centres, placed, size) - expected
    assert still.norm(dim=-1).mean() * 32 / size >= 0.2 * elastic_px  # and the map did something


def test_coordinate_ramps_read_their_own_coordinates() -> None:
    """A digit whose brightness is its column (then its row) shows, at each transferred point, where that came from."""
    n, size = 16, 256
    elastic, placed = draw_elastic(n, 5, "test", 2.5), jitters(n)
    ramp = (torch.arange(28).double() * 9).to(torch.uint8).expand(28, 28)
    centres = to_normalised(torch.tensor(DOTS).double(), (28, 28)).expand(n, -1, -1)
    where = on_canvas(elastic.forward(centres), placed, size)
    inside = ((where > 1) & (where < size - 2)).all(-1)
    assert inside.sum() > 60
    grid = to_normalised(where, (size, size))[:, :, None]
    for axis, image in enumerate((ramp, ramp.T)):
        drawn = render(deform(image.expand(n, 1, -1, -1), elastic), placed, size)[:, :1].double()
        read = torch.nn.functional.grid_sample(drawn, grid, align_corners=False)[:, 0, :, 0] / 9
        errors = (read - torch.tensor(DOTS)[:, axis])[inside]
        assert errors.abs().max() < 0.1  # of which 0.055 is 8-bit rounding
        assert errors.mean().abs() < 0.01


def test_both_images_show_the_same_ink_at_valid_points() -> None:
    found = pairs(64, seed=2, grey=True)
    for images, points in ((found.source, found.source_points), (found.target, found.target_points)):
        grid = to_normalised(points, (32, 32)).float()[:, :, None]
        value = torch.nn.functional.grid_sample(images[:, :1].float(), grid, align_corners=False)[:, 0, :, 0]
        assert (value[found.valid] > 60).float().mean() > 0.98
        assert value[found.valid].mean() > 150
        wrong = torch.nn.functional.grid_sample(images[:, :1].float(), -grid, align_corners=False)[:, 0, :, 0]
        assert wrong[found.valid].mean() < 90


def test_elastic_maps_invert_and_stay_within_their_bound() -> None:
    elastic = draw_elastic(20, 0, "test", 4.4)
    points = torch.rand(20, 500, 2, dtype=torch.float64) * 4 - 2
    assert (elastic.backward(elastic.forward(points)) - points).abs().max() < 1e-12
    assert (elastic.forward(elastic.backward(points)) - points).abs().max() < 1e-12
    moved = elastic.displacement(points).norm(dim=-1) * 14
    assert moved.max() <= 4.4
    assert 0.3 < moved.mean() / 4.4 < 0.5
    steepness = (elastic.amplitude.norm(dim=-1) * elastic.wave.norm(dim=-1)).sum(1)
    assert steepness.max() < 1
    other = draw_elastic(20, 1, "test", 4.4)
    assert not torch.isclose(elastic.phase, other.phase).any()
    assert torch.equal(draw_elastic(3, 0, "test", 4.4).wave, elastic.wave[:3])


def test_a_wave_worked_by_hand() -> None:
    wave = Elastic(torch.tensor([[[0.1, 0.0]]]), torch.tensor([[[0.0, 2.0]]]), torch.tensor([[0.5]]))
    moved = wave.backward(torch.tensor([[[0.2, -0.3]]]))
    torch.testing.assert_close(moved, torch.tensor([[[0.2 + 0.1 * math.sin(-0.6 + 0.5), -0.3]]]))


def test_more_pairs_change_none_and_seeds_do() -> None:
    few, many = pairs(6, seed=1), pairs(9, seed=1)
    assert torch.equal(many.source[:6], few.source)
    assert torch.equal(many.target_points[:6], few.target_points)
    assert torch.equal(pairs(6, seed=1).target, few.target)
    assert not torch.equal(pairs(6, seed=2).target, few.target)


def test_a_pair_is_one_held_out_digit_seen_twice() -> None:
    found, digits = pairs(230, digit=3, k=4), Digits32("held_out", 3, copies=6)  # 100 threes: three times round
    a, b = found.source_jitters, found.target_jitters
    assert torch.equal(a.digit, b.digit)
    assert (found.labels == 3).all()
    assert a.digit[:100].unique().numel() == a.digit[100:200].unique().numel() == 100
    assert torch.cat([a.item, b.item]).unique().numel() == 460  # no drawing twice
    assert torch.equal(digits.jitters(a.item).angle, a.angle)
    assert ((a.angle - b.angle).abs() > 0.01).float().mean() > 0.9
    assert ((a.foreground - b.foreground).abs().amax(1) > 0.05).float().mean() > 0.8


def test_without_elasticity_images_are_items_of_the_data_set() -> None:
    found = pairs(5, seed=4, elastic_px=0)
    digits = Digits32("held_out", copies=2, seed=4)
    assert torch.equal(found.source, digits.batch(found.source_jitters.item))
    assert torch.equal(found.target, digits.batch(found.target_jitters.item))
    assert not torch.equal(pairs(5, seed=4).source, found.source)


def test_grey_pairs_are_white_on_black_in_the_same_places() -> None:
    grey, coloured = pairs(8, grey=True), pairs(8)
    assert (grey.source[:, 0] == grey.source[:, 2]).all()
    assert (grey.source.flatten(1).amin(1) == 0).all()
    assert (grey.source.flatten(1).amax(1) > 150).all()
    for name in ("source_points", "target_points", "valid", "target_boxes"):
        assert torch.equal(getattr(grey, name), getattr(coloured, name))


def test_larger_canvases_show_the_same_pairs() -> None:
    small, large = pairs(8), pairs(8, size=64)
    torch.testing.assert_close((large.source_points + 0.5) / 2 - 0.5, small.source_points)
    assert (torch.nn.functional.avg_pool2d(large.target.float(), 2) - small.target).abs().mean() < 1.5
    assert (large.target_boxes / 2 - small.target_boxes).abs().mean() < 0.6


def test_points_lie_on_ink_apart_from_each_other() -> None:
    digits = Digits32("held_out", copies=1).digits[::50]
    points, room = ink_points(digits, 12)
    assert room[:, :5].all()
    assert not ink_points(digits, 60)[1].all()  # no digit has room for so many
    for digit, own, fits in zip(digits[:, 0].numpy(), points, room, strict=True):
        pixels = (own + 1) * 14 - 0.5
        columns, rows = pixels.round().long().T.clamp(0, 27).numpy()
        assert (digit[rows, columns] > 100).all()
        apart = torch.cdist(pixels[fits], pixels[fits]) + 99 * torch.eye(int(fits.sum()))
        assert apart.min() >= 2 - 1e-6
    empty = ink_points(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), 3)
    assert not empty[1].any()


def test_points_off_the_canvas_are_not_valid() -> None:
    found = pairs(400, seed=7)
    for points in (found.source_points, found.target_points):
        assert (points[found.valid] >= -0.5).all()
        assert (points[found.valid] <= 31.5).all()
    assert found.valid.sum(1).float().mean() > 8.5
    assert not found.valid.all()


def test_boxes_are_those_of_a_loop_over_pixels() -> None:
    ink = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    ink[0, 0, 4:9, 10:12] = 128
    ink[1, 0, 31, 0] = 255
    ink[1, 0, 3, 7] = 100  # less than half
    expected = torch.tensor([[9.5, 3.5, 11.5, 8.5], [-0.5, 30.5, 0.5, 31.5], [-0.5, -0.5, 31.5, 31.5]])
    assert torch.equal(ink_boxes(ink), expected.double())
    grey = pairs(6, grey=True)
    for image, box in zip(grey.target[:, 0].numpy(), grey.target_boxes, strict=True):
        rows, columns = np.nonzero(image >= 127.5)
        assert box.tolist() == [columns.min() - 0.5, rows.min() - 0.5, columns.max() + 0.5, rows.max() + 0.5]


def test_swapped_turns_everything_round() -> None:
    found = pairs(4)
    back: Pairs = found.swapped()
    assert torch.equal(back.source, found.target)
    assert torch.equal(back.target_points, found.source_points)
    assert torch.equal(back.source_boxes, found.target_boxes)
    assert torch.equal(back.target_jitters.angle, found.source_jitters.angle)
    assert torch.equal(back.valid, found.valid)
    assert len(back) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "at least 1 of each"),
        ({"k": 0}, "at least 1 of each"),
        ({"elastic_px": 4.5}, "expected 0 to 4.4, beyond which the map may fold"),
        ({"elastic_px": -1}, "expected 0 to"),
        ({"digit": 11}, "expected a digit, 0 to 9"),
        ({"split": "test"}, "expected 'train' or 'held_out'"),
    ],
)
def test_bad_settings_are_one_line(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        pairs(**{"n": 2, **settings})
    assert "\n" not in str(raised.value)
