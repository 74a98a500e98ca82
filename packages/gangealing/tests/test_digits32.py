"""Coloured jittered digits: pixels against what was recorded of them, by another library and by measurement."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from triptych_common.data import ImageSource, load
from triptych_gangealing.digits32 import LUMA, Digits32, Jitters, affine, render

WHITE_ON_BLACK = {"foreground": torch.ones(1, 3), "background": torch.zeros(1, 3), "gradient": torch.zeros(1, 2)}
ITEMS = [3, 4_017, 31_250, 60_001, 99_999]


def placed(angle: float = 0.0, scale: float = 1.0, shift_px: tuple[float, float] = (0.0, 0.0)) -> Jitters:
    """One white digit on black."""
    place = {"angle": torch.tensor([angle]), "scale": torch.tensor([scale]), "shift_px": torch.tensor([shift_px])}
    number = torch.zeros(1, dtype=torch.long)
    return Jitters(item=number, digit=number, label=number, **place, **WHITE_ON_BLACK)


def ink(digit: Tensor, jitters: Jitters, size: int = 32) -> Tensor:
    return render(digit[None], jitters, size)[0, 0].double() / 255


def centroid(image: Tensor) -> Tensor:
    """(x, y) from the middle of the image, in pixels."""
    middles = torch.arange(len(image), dtype=torch.float64) + 0.5 - len(image) / 2
    return torch.stack([(image.sum(0) * middles).sum(), (image.sum(1) * middles).sum()]) / image.sum()


@pytest.fixture(scope="module")
def digits() -> Digits32:
    return Digits32()


@pytest.fixture(scope="module")
def two() -> Tensor:
    """A digit without symmetry."""
    data = load("mnist5k")
    return data.images[data.labels == 2][11]


def test_is_an_image_source_of_100_000_items(digits: Digits32) -> None:
    assert isinstance(digits, ImageSource)
    assert len(digits) == len(digits.labels) == 100_000
    assert digits.num_classes == 10
    assert len(Digits32("held_out", copies=3)) == 3_000
    picture = digits.image(31_250)
    assert picture.mode == "RGB"
    assert picture.size == (32, 32)
    assert np.array_equal(np.asarray(picture), digits.batch([31_250])[0].permute(1, 2, 0).numpy())


def test_items_are_the_same_in_any_batch_and_order(digits: Digits32) -> None:
    together = digits.batch(ITEMS)
    assert torch.equal(together, torch.cat([Digits32().batch([item]) for item in ITEMS]))
    assert torch.equal(together.flip(0), digits.batch(torch.tensor(ITEMS[::-1])))
    assert not torch.equal(digits.batch([3]), digits.batch([4_003]))  # the same digit, jittered anew
    assert not torch.equal(together, Digits32(seed=1).batch(ITEMS))


def test_pixels_stay_those_that_generators_were_trained_on(digits: Digits32) -> None:
    """A mean over many items, loose enough for other machines' rounding, too tight for any change of recipe."""
    mean = digits.batch(range(0, 100_000, 500)).double().mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([126.1600, 128.0563, 129.5224]).double(), atol=0.02, rtol=0)


def test_the_recorded_digit_is_the_rendered_one(digits: Digits32) -> None:
    data, jitters = load("mnist5k"), digits.jitters(ITEMS)
    assert jitters.item.tolist() == ITEMS
    assert jitters.digit.tolist() == [item % 4_000 for item in ITEMS]
    assert torch.equal(jitters.label, data.labels[jitters.digit])
    assert torch.equal(digits.labels[ITEMS], jitters.label)
    assert torch.equal(digits.batch(ITEMS), render(data.images[jitters.digit], jitters))


def test_jitters_fill_their_ranges(digits: Digits32) -> None:
    jitters = digits.jitters(range(0, 100_000, 5))
    for values, low, high in (
        (jitters.angle.rad2deg(), -60, 60),
        (jitters.scale, 0.6, 1),
        (jitters.shift_px[:, 0], -4, 4),
        (jitters.shift_px[:, 1], -4, 4),
    ):
        spread = (values.double().sort().values - low) / (high - low)
        uniform = torch.linspace(0, 1, len(values), dtype=torch.float64)
        assert (spread - uniform).abs().max() < 1.63 / math.sqrt(len(values))  # Kolmogorov-Smirnov, 1%
    quantities = torch.stack(
        [jitters.angle, jitters.scale, *jitters.shift_px.T, *jitters.foreground.T, *jitters.gradient.T]
    )
    related = torch.corrcoef(quantities) - torch.eye(len(quantities))
    related[4:7, 4:7] = 0  # the three parts of a colour
    assert related.abs().max() < 0.03


def test_colours_are_of_both_polarities_and_readable(digits: Digits32) -> None:
    jitters, luma = digits.jitters(range(20_000)), torch.tensor(LUMA)
    contrast = jitters.foreground @ luma - jitters.background @ luma
    assert contrast.abs().min() > 0.399
    assert 0.45 < (contrast > 0).float().mean() < 0.55
    for colours in (jitters.foreground, jitters.background):
        assert colours.min() >= 0
        assert colours.max() <= 1
        assert (colours.argmax(1).bincount(minlength=3) > 4_000).all()  # red, green and blue


def test_pixels_have_the_recorded_colours(digits: Digits32) -> None:
    jitters = digits.jitters(range(7, 100_000, 2_000))
    empty = torch.zeros(len(jitters.item), 1, 28, 28, dtype=torch.uint8)
    background, foreground = render(empty, jitters) / 255, render(empty + 255, jitters)[:, :, 16, 16] / 255
    torch.testing.assert_close(foreground, jitters.foreground, atol=0.5 / 255 + 1e-6, rtol=0)
    middle = background[:, :, 15:17, 15:17].mean((2, 3))
    torch.testing.assert_close(middle, jitters.background, atol=0.01, rtol=0)
    across = background[:, :, 4:28, 27] - background[:, :, 4:28, 4]  # 23 of 32 pixels: never clamped there
    down = background[:, :, 27, 4:28] - background[:, :, 4, 4:28]
    expected = jitters.gradient[:, :, None, None].expand(-1, -1, 3, 24) * 23 / 16
    unclamped = ((background > 0) & (background < 1)).flatten(1).all(1)
    assert unclamped.sum() > 20
    torch.testing.assert_close(torch.stack([across, down], 1)[unclamped], expected[unclamped], atol=1.1 / 255, rtol=0)


def test_scipy_places_digits_there_too(digits: Digits32) -> None:
    """Splines of scipy at the recorded map, 8 x 8 points a pixel: as in the pixels, up to the interpolation."""
    from scipy.ndimage import map_coordinates

    jitters = digits.jitters(range(5, 100_000, 3_001))
    white = jitters._replace(**{name: values.expand(len(jitters.item), -1) for name, values in WHITE_ON_BLACK.items()})
    found = render(digits.digits[jitters.digit], white)[:, 0].double() / 255
    middles = (np.arange(256) + 0.5) / 128 - 1
    canvas = np.stack([*np.meshgrid(middles, middles), np.ones((256, 256))], axis=-1)
    for image, digit, theta in zip(found, jitters.digit, affine(jitters).double().numpy(), strict=True):
        x, y = np.moveaxis((canvas @ theta.T + 1) * 14 - 0.5, -1, 0)  # columns and rows of the digit's pixels
        digit_pixels = digits.digits[digit, 0].numpy() / 255.0
        values = map_coordinates(digit_pixels, [y, x], order=3, mode="grid-constant").clip(0, 1)
        expected = torch.from_numpy(values.reshape(32, 8, 32, 8).mean((1, 3)))
        assert (image - expected).abs().max() < 0.08
        assert (image - expected).abs().mean() < 0.003


def test_pillow_turns_the_same_way(two: Tensor) -> None:
    upright = ink(two, placed(), 128)
    picture = Image.fromarray((upright * 255).round().to(torch.uint8).numpy())
    turned = torch.from_numpy(np.asarray(picture.rotate(40, Image.Resampling.BICUBIC)).copy()) / 255
    assert (ink(two, placed(math.radians(40)), 128) - turned).abs().mean() < 0.01
    assert (ink(two, placed(math.radians(-40)), 128) - turned).abs().mean() > 0.05


def test_the_recorded_map_undone_gives_the_digit_back(digits: Digits32) -> None:
    jitters = digits.jitters(range(0, 100_000, 4_001))
    white = jitters._replace(**{name: values.expand(len(jitters.item), -1) for name, values in WHITE_ON_BLACK.items()})
    originals = digits.digits[jitters.digit]
    drawn = render(originals, white, 128)[:, :1].float() / 255
    bottom = torch.tensor([0.0, 0, 1]).expand(len(drawn), 1, 3)
    back = torch.linalg.inv(torch.cat([affine(jitters), bottom], dim=1))[:, :2]
    grid = torch.nn.functional.affine_grid(back, list(originals.shape), align_corners=False)
    undone = torch.nn.functional.grid_sample(drawn, grid, align_corners=False)
    difference = (undone - originals / 255).abs().mean((1, 2, 3))
    assert difference.mean() < 0.015
    assert difference.max() < 0.03
    wrong = (undone - originals.roll(1, 0) / 255).abs().mean((1, 2, 3))
    assert wrong.min() > 2 * difference.max()


@pytest.mark.parametrize("size", [32, 64])
def test_the_centroid_moves_with_the_shift(two: Tensor, size: int) -> None:
    """And shifts are in pixels of a 32-pixel canvas at any size."""
    moved = centroid(ink(two, placed(0.3, 0.7, (3.0, -2.5)), size)) - centroid(ink(two, placed(0.3, 0.7), size))
    torch.testing.assert_close(moved, torch.tensor([3.0, -2.5]).double() * size / 32, atol=0.02, rtol=0)


def test_the_amount_of_ink_grows_with_the_scale_squared(two: Tensor) -> None:
    full = ink(two, placed()).sum()
    torch.testing.assert_close(full, two.double().sum() / 255, atol=0, rtol=0.03)
    torch.testing.assert_close(ink(two, placed(1.0, 0.6)).sum(), 0.36 * full, atol=0, rtol=0.01)


def test_sizes_show_the_same_picture(digits: Digits32) -> None:
    jitters = digits.jitters(ITEMS)
    small, large = (render(digits.digits[jitters.digit], jitters, size).float() for size in (32, 128))
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 1.5
    assert Digits32(size=64).batch(ITEMS).shape == (5, 3, 64, 64)


def test_one_digit_alone() -> None:
    threes = Digits32(digit=3)
    assert len(threes) == 400 * 25
    assert threes.num_classes == 1
    assert threes.class_names == ("3",)
    assert threes.name == "digits32:3"
    assert not threes.labels.any()
    jitters = threes.jitters(range(0, 10_000, 97))
    data = load("mnist5k")
    assert (jitters.label == 3).all()
    assert torch.equal(threes.digits[jitters.digit], data.images[data.labels == 3][jitters.digit])


def test_splits_share_neither_digits_nor_jitters() -> None:
    train, held_out = Digits32(), Digits32("held_out")
    assert not (train.jitters(range(100)).angle == held_out.jitters(range(100)).angle).any()
    seen = {digit.numpy().tobytes() for digit in train.digits}
    assert sum(digit.numpy().tobytes() in seen for digit in held_out.digits) == 0


def test_fingerprint_distinguishes_settings() -> None:
    settings = [{}, {"split": "held_out"}, {"digit": 3}, {"digit": 4}, {"copies": 24}, {"seed": 1}, {"size": 64}]
    assert len({Digits32(**each).fingerprint() for each in settings}) == len(settings)
    assert Digits32().fingerprint() == Digits32().fingerprint()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"digit": 10}, "expected a digit, 0 to 9"),
        ({"source": "cifar10"}, "expected mnist5k or mnist"),
        ({"copies": 0}, "at least 1"),
        ({"split": "val"}, "expected 'train' or 'held_out'"),
        ({"size": 4}, "at least 8"),
    ],
)
def test_bad_settings_are_one_line(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        Digits32(**settings).batch([0])
    assert "\n" not in str(raised.value)


def test_items_beyond_the_end_are_refused(digits: Digits32) -> None:
    for item in (100_000, -1):
        with pytest.raises(IndexError, match=r"expected 0\.\.99999"):
            digits.batch([item])
