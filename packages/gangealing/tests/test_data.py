"""Images to train on: what may be named, how pictures become squares, and one line for what cannot be used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from triptych_common.data import load
from triptych_gangealing.digits32 import Digits32
from triptych_gangealing.stylegan2.data import TrainingImages, open_images


def save(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three pictures, 16 x 16."""
    for number in range(6):
        save(tmp_path / "pictures" / ("cats", "dogs")[number % 2] / f"{number}.png", 16, 16, number)
    return tmp_path / "pictures"


def test_digits_equal_those_of_the_data_set() -> None:
    images, digits = open_images("digits32", 32), Digits32()
    assert isinstance(images, TrainingImages)
    assert images.name == "digits32"
    assert images.resolution == 32
    assert len(images) == len(images.labels) == 100_000
    assert images.num_classes == 10
    assert torch.equal(images.batch([7, 50_000]), digits.batch([7, 50_000]))
    assert open_images("digits32", 64).batch([7]).shape == (1, 3, 64, 64)
    held_out = open_images("digits32", 32, split="held_out")
    assert len(held_out) == 25_000
    assert torch.equal(held_out.batch([9]), Digits32("held_out").batch([9]))


def test_one_digit() -> None:
    images = open_images("digits32:3", 32)
    assert len(images) == 10_000
    assert images.num_classes == 1
    assert torch.equal(images.batch([9_999]), Digits32(digit=3).batch([9_999]))


def test_grey_digits_become_rgb_and_grow_to_the_resolution() -> None:
    images, data = open_images("mnist5k", 32, split="held_out", conditional=True), load("mnist5k", "held_out")
    batch = images.batch([0, 500])
    assert batch.shape == (2, 3, 32, 32)
    assert (batch == batch[:, :1]).all()
    assert images.num_classes == 10
    assert torch.equal(images.labels, data.labels)
    grown = data.images[500, 0].numpy()
    expected = np.asarray(Image.fromarray(grown).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(batch[1, 0].numpy(), expected)


def test_a_folder_at_its_own_size_is_read_as_it_is(folder: Path) -> None:
    images = open_images(str(folder), 16, conditional=True)
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.class_names == ("cats", "dogs")
    assert len(images) == 6
    assert images.num_classes == 2
    first = np.asarray(Image.open(folder / "cats" / "0.png"))
    assert np.array_equal(images.batch([0])[0].permute(1, 2, 0).numpy(), first)
    assert open_images(str(folder), 16).num_classes == 1


def test_pictures_are_cropped_to_their_central_square_and_reduced(tmp_path: Path) -> None:
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, 16:80] = np.arange(64, dtype=np.uint8)[None, :, None] * 4  # a ramp in the central square alone
    (tmp_path / "wide").mkdir()
    Image.fromarray(pixels).save(tmp_path / "wide" / "a.png")
    found = open_images(str(tmp_path / "wide"), 16).batch([0])[0].float()
    expected = torch.arange(64.0).view(16, 4).mean(1) * 4
    torch.testing.assert_close(found[0, 8, 1:-1], expected[1:-1], atol=2, rtol=0)


def test_several_sizes_of_pictures_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(tmp_path / "mixed" / "a.png", 20, 16)
    save(tmp_path / "mixed" / "b.png", 16, 40)
    images = open_images(str(tmp_path / "mixed"), 16)
    said = capsys.readouterr().out
    assert "2 sizes, 16x16 to 20x40" in said
    assert said.count("\n") == 1
    assert images.batch([0, 1]).shape == (2, 3, 16, 16)


def test_one_size_of_pictures_is_not_reported(folder: Path, capsys: pytest.CaptureFixture) -> None:
    open_images(str(folder), 16)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("spec", ["digits32", "folder"])
def test_flips_double_the_data(spec: str, folder: Path) -> None:
    spec, resolution = (str(folder), 16) if spec == "folder" else (spec, 32)
    plain = open_images(spec, resolution, conditional=True)
    doubled = open_images(spec, resolution, conditional=True, x_flip=True)
    n = len(plain)
    assert len(doubled) == 2 * n
    assert torch.equal(doubled.labels, plain.labels.repeat(2))
    mixed = doubled.batch([1, n + 1, n + 5, 5])
    assert torch.equal(mixed[[0, 3]], plain.batch([1, 5]))
    assert torch.equal(mixed[[1, 2]], plain.batch([1, 5]).flip(3))


def test_fingerprint_depends_on_content_size_and_flips(folder: Path, tmp_path: Path) -> None:
    specs = [
        {"spec": "digits32", "resolution": 32},
        {"spec": "digits32", "resolution": 64},
        {"spec": "digits32", "resolution": 32, "x_flip": True},
        {"spec": "digits32", "resolution": 32, "split": "held_out"},
        {"spec": "digits32:3", "resolution": 32},
        {"spec": str(folder), "resolution": 16},
        {"spec": str(folder), "resolution": 16, "conditional": True},
        {"spec": str(folder), "resolution": 8},
    ]
    before = [open_images(**each).fingerprint() for each in specs]
    assert len(set(before)) == len(specs)
    assert open_images("digits32", 32).fingerprint() == before[0]
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "pictures")
    assert open_images(str(moved), 16).fingerprint() == before[5]
    save(moved / "cats" / "0.png", 16, 16, seed=99)
    assert open_images(str(moved), 16).fingerprint() != before[5]


def test_items_beyond_the_end_are_refused(folder: Path) -> None:
    images = open_images(str(folder), 16)
    assert images.batch([]).shape == (0, 3, 16, 16)
    for item in (6, -1):
        with pytest.raises(IndexError, match=r"expected 0\.\.5"):
            images.batch([item])


def test_bad_data_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    small = save(tmp_path / "small" / "a.png", 20, 9)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(small.read_bytes()[:90])
    flat = save(tmp_path / "flat" / "a.png", 16, 16).parent
    cases = [
        ("digits32:12", {}, "expected digits32, or digits32:0 to digits32:9"),
        ("digits32:", {}, "expected digits32, or digits32:0 to digits32:9"),
        ("nowhere", {}, "expected mnist5k"),
        ("digits32", {"split": "val"}, "expected 'train' or 'held_out'"),
        ("digits32:3", {"conditional": True}, "no classes for a conditional model"),
        (str(flat), {"conditional": True}, "no classes for a conditional model"),
        (str(tmp_path / "empty"), {}, "no images"),
        (str(tmp_path / "small"), {}, r"a.png: 20x9 pixels are fewer than the resolution 16x16; choose"),
        (str(tmp_path / "broken"), {}, "a.png"),
    ]
    for spec, options, message in cases:
        with pytest.raises((ValueError, OSError), match=message) as raised:
            open_images(spec, 16, **options)
        assert "\n" not in str(raised.value)
