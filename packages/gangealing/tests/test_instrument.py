"""The frozen instrument of coloured digits: what it reads, what its distances notice, and that it is the recorded one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triptych_common.metrics.bootstrap import Estimate
from triptych_common.metrics.distances import frechet_distance
from triptych_gangealing.digits32 import LUMA, Digits32, Jitters, render
from triptych_gangealing.stylegan2.instrument import DIM, NAME, Digits32Instrument, gan_scores, load_instrument
from triptych_gangealing.stylegan2.weights import EMBEDDED

N = 1_000


@pytest.fixture(scope="module")
def instrument() -> Digits32Instrument:
    return load_instrument()


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, Jitters]:
    """Every held-out digit once, in jitters of this test's own."""
    digits = Digits32("held_out", copies=1, seed=123)
    return digits.batch(range(N)), digits.jitters(range(N))


@pytest.fixture(scope="module")
def train() -> Tensor:
    return Digits32("train", seed=124).batch(range(0, 4 * N, 4))


def test_the_instrument_reads_digit_pose_and_colours(
    instrument: Digits32Instrument, held_out: tuple[Tensor, Jitters]
) -> None:
    """On digits and jitters it was not trained on, each far better than guessing."""
    images, truth = held_out
    found = instrument.read(images)
    assert (found.labels == truth.label).float().mean() > 0.93
    for name, furthest in (
        ("scale", 0.06),
        ("shift_px", 0.7),
        ("foreground", 0.1),
        ("background", 0.05),
        ("gradient", 0.03),
    ):
        error = (getattr(found, name) - getattr(truth, name)).abs().median()
        assert error < furthest, name
    assert (found.angle - truth.angle).abs().median().rad2deg() < 15
    assert (found.angle - truth.angle).abs().median() < 0.5 * (found.angle + truth.angle).abs().median()


def test_features_do_not_depend_on_the_batch(instrument: Digits32Instrument, held_out: tuple[Tensor, Jitters]) -> None:
    images = held_out[0][:300]
    together = instrument.features(images)
    assert together.shape == (300, DIM)
    assert not together.requires_grad
    torch.testing.assert_close(instrument.features(images[257:259]), together[257:259], atol=1e-4, rtol=1e-4)


def gray(colours: Tensor) -> Tensor:
    """Of the same brightness."""
    return (colours @ torch.tensor(LUMA))[:, None].expand(-1, 3)


def spoilt(fault: str) -> Tensor:
    """Training digits as a generator with one fault would draw them."""
    digits, items = Digits32("train", seed=124), range(0, 4 * N, 4)
    images, drawn = digits.batch(items), digits.jitters(items)
    if fault == "half the classes":
        return images[drawn.label < 5]
    if fault == "mirrored":
        return images.flip(3)
    if fault == "blurred":
        return torch.nn.functional.avg_pool2d(images.float(), 3, 1, 1).round().to(torch.uint8)
    if fault == "collapsed":
        return images[::100].repeat(100, 1, 1, 1)
    changes = {
        "gray": {"foreground": gray(drawn.foreground), "background": gray(drawn.background)},
        "gray background": {"background": gray(drawn.background)},
        "colours shuffled": {"foreground": drawn.foreground.roll(1, 0)},
        "one background": {"background": drawn.background.mean(0).expand(N, 3)},
        "no gradient": {"gradient": torch.zeros(N, 2)},
        "upright": {"angle": torch.zeros(N)},
        "centred": {"shift_px": torch.zeros(N, 2)},
        "one scale": {"scale": torch.full((N,), 0.8)},
    }
    return render(digits.digits[drawn.digit], drawn._replace(**changes[fault]))


@pytest.mark.parametrize(
    "fault",
    [
        "gray", "gray background", "colours shuffled", "one background", "no gradient", "upright", "centred", "one scale",
        "mirrored", "half the classes", "blurred", "collapsed",
    ],
)  # fmt: skip
def test_distance_notices(
    fault: str, instrument: Digits32Instrument, held_out: tuple[Tensor, Jitters], train: Tensor
) -> None:
    """Each fault of a generator lies well above what real digits score, those of colour and of place included; one scale for all
    is seen least.
    """
    reference = instrument.features(held_out[0])
    floor = frechet_distance(instrument.features(train), reference)
    distance = frechet_distance(instrument.features(spoilt(fault)), reference)
    print(f"{fault}: {distance:.3f}, floor {floor:.3f}")
    assert distance > (1.3 if fault == "one scale" else 2) * floor


def test_scores_of_real_digits_are_the_floor() -> None:
    threes = Digits32(digit=3, seed=124).batch(range(400))
    scores = gan_scores(threes, digit=3)
    assert scores.n == 400
    assert scores.frechet.low < scores.floor_frechet.value < scores.frechet.high
    assert scores.kernel.low < scores.floor_kernel.value < scores.kernel.high
    others = gan_scores(Digits32(digit=5, seed=124).batch(range(400)), digit=3)
    assert others.frechet.low > 3 * others.floor_frechet.high
    assert others.kernel.low > 3 * abs(others.floor_kernel.high)


def test_scores_compare_equal_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the usual copies of one held-out digit are fewer than the images."""

    class Blank:
        def features(self, images: Tensor) -> Tensor:
            counts.append(len(images))
            return torch.zeros(len(images), 2)

    counts: list[int] = []
    monkeypatch.setattr("triptych_gangealing.stylegan2.instrument.load_instrument", Blank)
    monkeypatch.setattr("triptych_gangealing.stylegan2.instrument.bootstrap", lambda *_, **__: Estimate(0.0))
    gan_scores(torch.zeros(2_600, 3, 32, 32, dtype=torch.uint8), digit=3)
    assert counts == [2_600] * 3


def test_record_has_its_origin() -> None:
    record = json.loads((EMBEDDED / "instruments.json").read_text())[NAME]
    assert {"sha256", "held_out", "trained_on", "command", "seed", "commit", "torch"} <= record.keys()
    assert record["held_out"]["digit_accuracy"] > 0.93
    assert (EMBEDDED / f"{NAME}.safetensors").stat().st_size < 1_000_000


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    for name in ("instruments.json", f"{NAME}.safetensors"):
        shutil.copy(EMBEDDED / name, tmp_path)
    assert load_instrument(tmp_path).sha256 == load_instrument().sha256
    load_instrument.cache_clear()
    weights = tmp_path / f"{NAME}.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"SHA-256 .* differs from the recorded") as raised:
        load_instrument(tmp_path)
    assert "\n" not in str(raised.value)


def test_bad_images_are_one_line(instrument: Digits32Instrument) -> None:
    images = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    for bad in (images.float(), images[:, :1], images[..., :28]):
        with pytest.raises(ValueError, match=r"expected uint8 \(n, 3, 32, 32\)") as raised:
            instrument.features(bad)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="99 images: expected at least 100"):
        gan_scores(images[:99])
