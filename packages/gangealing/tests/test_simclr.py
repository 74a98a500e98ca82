"""The encoder trained on a generator's samples: its loss and views against formulas, its runs interrupted, repeated, misused."""

import json
import math
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triptych_common import randomness
from triptych_common.cli import Interrupted
from triptych_common.parallel import Ranks
from triptych_common.storage import checkpoint
from triptych_common.storage.run import RunDirectory
from triptych_common.testing import logged
from triptych_gangealing.digits32 import Digits32, render
from triptych_gangealing.encoders import simclr
from triptych_gangealing.encoders.perceptual import (
    ENCODER_FILE,
    Encoder,
    EncoderConfig,
    PerceptualDistance,
    read_encoder,
)
from triptych_gangealing.encoders.simclr import (
    EncoderTrainConfig,
    contrast_maps,
    fit,
    make_encoder,
    make_views,
    nt_xent,
    recoloured,
    run,
    train_encoder,
)
from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.weights import write_network

PLAIN = EncoderTrainConfig(recolour=0.0, blur=0.0, crop_scale=1.0)
STEPS = 6


def drawn(*shape: int, stream: str = "x") -> Tensor:
    return randomness.normal(0, stream, range(shape[0]), shape[1:], dtype=torch.float64)


# --- the loss


def test_nt_xent_is_the_formula_written_out() -> None:
    """Chen et al., equation 1, averaged over both views of every pair."""
    n, temperature = 5, 0.3
    first, second = drawn(n, 4), drawn(n, 4, stream="y") * 3
    z = [*first, *second]

    def similarity(i: int, j: int) -> float:
        return float(z[i] @ z[j] / (z[i].norm() * z[j].norm()))

    total, found = 0.0, 0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = {k: math.exp(similarity(i, k) / temperature) for k in range(2 * n) if k != i}
        total -= math.log(others[j] / sum(others.values())) / (2 * n)
        found += max(others, key=others.get) == j
    loss, share = nt_xent(first, second, temperature)
    assert float(loss) == pytest.approx(total, rel=1e-12)
    assert float(share) == pytest.approx(found / (2 * n))


def test_maps_are_contrasted_by_their_perceptual_distance() -> None:
    """The cosine of two maps is 1 - distance / 2."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig((4, 6), compared=1)).double().eval()
    distance = PerceptualDistance(encoder)
    views = torch.rand(6, 3, 8, 8, dtype=torch.float64) * 2 - 1
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    cosines = 1 - distance(views[rows.flatten()], views[columns.flatten()]).view(6, 6) / 2
    logits = (cosines / 0.2).masked_fill(torch.eye(6, dtype=torch.bool), -math.inf)
    expected = F.cross_entropy(logits, torch.tensor([3, 4, 5, 0, 1, 2]))
    torch.testing.assert_close(contrast_maps(encoder, views[:3], views[3:], 0.2)[0], expected, rtol=1e-6, atol=0)


def test_every_map_counts() -> None:
    torch.manual_seed(0)
    views = torch.rand(6, 3, 8, 8, dtype=torch.float64).chunk(2)
    both = Encoder(EncoderConfig((4, 6, 8), compared=2)).double().eval()
    loss = contrast_maps(both, *views, 0.2)[0]
    one = both(torch.cat(views))
    first, second = (nt_xent(*(x / x.norm(dim=1, keepdim=True)).flatten(1).chunk(2), 0.2)[0] for x in one)
    torch.testing.assert_close(loss, (first + second) / 2, rtol=1e-4, atol=0)


# --- views


def ramps(n: int, height: int, width: int) -> Tensor:
    """The first channel is x, the second y, in pixels."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return torch.stack([x, y, torch.zeros(height, width)]).expand(n, -1, -1, -1)


def test_views_are_neither_rotated_nor_mirrored_nor_moved_far() -> None:
    """Every pixel of a view comes from where an upright crop has it: x of x alone, growing, at the same scale in x and y."""
    height, width, config = 24, 32, replace(PLAIN, crop_scale=0.64)
    views = make_views(ramps(300, height, width), config, range(300))
    x, y = views[:, 0], views[:, 1]
    torch.testing.assert_close(x, x[:, :1].expand_as(x))
    torch.testing.assert_close(y, y[:, :, :1].expand_as(y))
    steps_x, steps_y = x[:, 0, 2:-1].diff(), y[:, 2:-1, 0].diff(dim=1)
    side = steps_x.mean(1)
    torch.testing.assert_close(steps_x, side[:, None].expand_as(steps_x))
    torch.testing.assert_close(steps_y, side[:, None].expand_as(steps_y))
    assert 0.8 <= side.min() < 0.82
    assert 0.98 < side.max() <= 1
    middle = (x[:, 0, width // 2 - 1] + x[:, 0, width // 2]) / 2 - (width - 1) / 2
    assert (middle.abs() <= (1 - side) * width / 2 + 1e-9).all()  # the crop stays inside
    assert middle.min() < -2
    assert middle.max() > 2


def test_crops_are_resampled_as_grid_sample_does() -> None:
    images, config = drawn(4, 3, 10, 14), replace(PLAIN, crop_scale=0.5)
    views = make_views(images, config, range(4))
    place = make_views(ramps(4, 10, 14), config, range(4))
    side = place[:, 0, 0, 3:-3].diff().mean(1)
    x = (place[:, 0, 0, 6] + place[:, 0, 0, 7] + 1) / 14 - 1
    y = (place[:, 1, 4, 0] + place[:, 1, 5, 0] + 1) / 10 - 1
    theta = torch.stack([torch.stack([side, 0 * x, x], 1), torch.stack([0 * x, side, y], 1)], 1)
    grid = F.affine_grid(theta, [4, 3, 10, 14], align_corners=False)
    expected = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(views, expected)


def test_views_are_blurred_by_a_gaussian_of_at_most_a_thirtysecond() -> None:
    size = 64
    images = torch.zeros(200, 3, size, size, dtype=torch.float64)
    images[:, :, 32, 32] = 1
    views = make_views(images, replace(PLAIN, blur=1.0), range(200))
    torch.testing.assert_close(views.sum((2, 3)), torch.ones(200, 3, dtype=torch.float64))
    line = views[:, 0].sum(1)
    variance = (line * (torch.arange(size) - 32.0) ** 2).sum(1)
    assert variance.max() <= 2.01**2
    assert variance.median() > 0.8
    widest = int(variance.argmax())
    ratio = line[widest, 33] / line[widest, 32]  # exp(-1 / 2 sigma^2)
    assert float(-1 / (2 * ratio.log())) == pytest.approx(float(variance[widest]), rel=1e-3)
    unblurred = make_views(images, replace(PLAIN, blur=0.5), range(200))[:, 0, 32, 32] > 0.999
    assert 0.35 < unblurred.double().mean() < 0.75


def test_colours_are_mapped_linearly_into_range() -> None:
    images, mix = drawn(50, 3, 8, 8).clamp(-1, 1), drawn(50, 3, 3, stream="mix")
    contrast, place = torch.linspace(0.3, 1, 50).double(), torch.linspace(-1, 1, 150).double().view(50, 3)
    found = recoloured(images, mix, contrast, place)
    assert found.abs().max() <= 1 + 1e-12
    spans = found.amax((2, 3)) - found.amin((2, 3))
    torch.testing.assert_close(spans.amax(1), 2 * contrast)
    for before, after, matrix in zip(images, found, mix, strict=True):
        pixels = torch.cat([before.flatten(1), torch.ones(1, 64)]).T
        fitted = torch.linalg.lstsq(pixels, after.flatten(1).T).solution.T
        torch.testing.assert_close(fitted @ pixels.T, after.flatten(1))
        torch.testing.assert_close(fitted[:, :3] / fitted[0, 0], matrix / matrix[0, 0])
    flat = recoloured(torch.zeros(1, 3, 4, 4).double(), mix[:1], contrast[:1], place[:1])
    assert torch.isfinite(flat).all()


def test_views_take_all_colours_and_both_polarities() -> None:
    image = torch.full((3, 8, 8), -0.5, dtype=torch.float64)
    image[:, 2:6, 2:6] = 0.5
    images = image.expand(600, -1, -1, -1)
    views = make_views(images, replace(PLAIN, recolour=1.0, gray=0.3), range(600))
    difference = views[:, :, 4, 4] - views[:, :, 0, 0]
    assert (difference.abs().amax(1) >= 0.6 - 1e-9).all()  # never lost
    for channel in difference.T:
        assert 0.42 < (channel > 0).double().mean() < 0.58
    gray = (views - views[:, :1]).abs().amax((1, 2, 3)) < 1e-9
    assert 0.24 < gray.double().mean() < 0.36
    some = make_views(images, replace(PLAIN, recolour=0.7), range(600))
    kept = (some - images).abs().amax((1, 2, 3)) < 1e-9
    assert 0.24 < kept.double().mean() < 0.36


def test_a_view_belongs_to_its_index_alone() -> None:
    images, config = drawn(6, 3, 8, 8).clamp(-1, 1), EncoderTrainConfig()
    together = make_views(images, config, [3, 9, 4, 27, 81, 5])
    torch.testing.assert_close(make_views(images[3:5], config, [27, 81]), together[3:5])
    same = make_views(images[:1].expand(2, -1, -1, -1), config, [3, 4])
    assert not torch.allclose(same[0], same[1])
    assert not torch.allclose(make_views(images[:1], replace(config, seed=1), [3])[0], together[0])


# --- training


def tiny(out: Path, **settings: object) -> EncoderTrainConfig:
    given = {
        "out": out, "widths": (4, 6), "pool_images": 20, "batch_size": 8, "total_images": 8 * STEPS, "lr": 0.01,
        "checkpoint_every": 2, "log_every": 3, "device": "cpu",
    }  # fmt: skip
    return EncoderTrainConfig(**(given | settings))


def tiny_generator(seed: int = 0, **settings: int) -> Generator:
    shape = {"resolution": 8, "channel_base": 64, "channel_max": 8, "z_dim": 8, "w_dim": 8, "mapping_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Generator(GeneratorConfig(**(shape | settings)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Encoder]:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train_encoder(tiny_generator(), tiny(out))


def assert_same_run(a: Path, b: Path) -> None:
    assert checkpoint.content_sha256(a / ENCODER_FILE) == checkpoint.content_sha256(b / ENCODER_FILE)
    assert logged(a) == logged(b)


def test_any_checkpoint_is_an_encoder(whole: tuple[Path, Encoder]) -> None:
    out, encoder = whole
    read = read_encoder(checkpoint.steps_in(out / "checkpoints")[-1]).encoder
    assert all(torch.equal(read.state_dict()[key], value) for key, value in encoder.state_dict().items())


def test_a_run_may_be_lengthened(tmp_path: Path) -> None:
    train_encoder(tiny_generator(), tiny(tmp_path, total_images=16))
    train_encoder(tiny_generator(), tiny(tmp_path, total_images=32))
    assert checkpoint.steps_in(tmp_path / "checkpoints")[-1].name == "step-00000004.safetensors"
    with pytest.raises(ValueError, match="has trained on 32 already"):
        train_encoder(tiny_generator(), tiny(tmp_path, total_images=16))


def test_a_run_leaves_its_encoder_and_rows(whole: tuple[Path, Encoder]) -> None:
    out, encoder = whole
    rows = logged(out)
    assert [row["step"] for row in rows] == [3, 6]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    again, facts = read_encoder(out)
    assert facts["trained"]["seed"] == 0
    assert len(facts["generator_sha256"]) == 64
    assert not encoder.training
    tensors, counters = checkpoint.read(out / f"checkpoints/step-{STEPS:08d}.safetensors")
    assert counters["samples_seen"] == 8 * STEPS
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, tensors[f"model.{name}"]), name
    first, _ = checkpoint.read(next(iter(checkpoint.steps_in(out / "checkpoints"))))
    assert not torch.equal(first["model.stages.1.1.weight"], tensors["model.stages.1.1.weight"])


def test_resumed_equals_uninterrupted(
    whole: tuple[Path, Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a signal, a kill that left an older checkpoint, and damage; then a finished run is left as it is."""
    views = simclr.make_views

    def signalled(images: Tensor, config: EncoderTrainConfig, indices: list[int]) -> Tensor:
        if indices[0] == 2 * 8 * 2:
            signal.raise_signal(signal.SIGTERM)
        return views(images, config, indices)

    monkeypatch.setattr(simclr, "make_views", signalled)
    with pytest.raises(Interrupted, match=r"stopped at step 3 of 6"):
        train_encoder(tiny_generator(), tiny(tmp_path))
    assert not (tmp_path / ENCODER_FILE).exists()
    train_encoder(tiny_generator(), tiny(tmp_path))
    assert_same_run(tmp_path, whole[0])

    (tmp_path / ENCODER_FILE).unlink()
    checkpoint.steps_in(tmp_path / "checkpoints")[-1].unlink()
    train_encoder(tiny_generator(), tiny(tmp_path))
    assert_same_run(tmp_path, whole[0])

    content = bytearray((tmp_path / ENCODER_FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / ENCODER_FILE).write_bytes(content)
    train_encoder(tiny_generator(), tiny(tmp_path))
    assert "encoder.safetensors: damaged; making it again" in capsys.readouterr().out
    assert_same_run(tmp_path, whole[0])

    def never(*_: object, **__: object) -> Tensor:
        raise AssertionError("a finished run was begun again")

    monkeypatch.setattr(simclr, "sample_images", never)
    encoder = train_encoder(tiny_generator(), tiny(tmp_path))
    assert torch.equal(encoder.stages[0][0].weight, whole[1].stages[0][0].weight)


def test_run_reads_a_generator_file_and_reports_what_it_wrote(whole: tuple[Path, Encoder], tmp_path: Path) -> None:
    write_network(tmp_path / "generator.safetensors", tiny_generator(), {})
    result = run(tiny(tmp_path / "run", generator=str(tmp_path / "generator.safetensors")))
    assert result["last"]["step"] == STEPS
    assert Path(result["encoder"]) == tmp_path / "run" / ENCODER_FILE
    json.dumps(result)
    assert_same_run(tmp_path / "run", whole[0])


def test_another_generator_or_seed_is_another_encoder(whole: tuple[Path, Encoder], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a run with generator_sha256=.* use another --out"):
        train_encoder(tiny_generator(seed=1), tiny(whole[0]))
    with pytest.raises(ValueError, match=r"holds a run with seed=0 \(now 1\)"):
        train_encoder(tiny_generator(), tiny(whole[0], seed=1))
    other = train_encoder(tiny_generator(seed=1), tiny(tmp_path))
    assert not torch.equal(other.stages[0][0].weight, whole[1].stages[0][0].weight)


def test_what_cannot_be_trained_is_refused_before_there_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"images of 3 x 8 x 8: expected 3 channels, and at least 16 pixels"):
        train_encoder(tiny_generator(), tiny(out, widths=(4, 4, 4, 4, 4)))

    @contextmanager
    def two(device: str):
        yield Ranks(0, 2, torch.device("cpu"))

    monkeypatch.setattr(simclr, "process_group", two)
    with pytest.raises(ValueError, match=r"2 ranks: .* start it without torchrun"):
        train_encoder(tiny_generator(), tiny(out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("total_images", 0, "expected a number above 0"),
        ("temperature", 0.0, "expected a number above 0"),
        ("lr", float("nan"), "expected a number above 0"),
        ("blur", 1.5, r"expected a number in 0\.\.1"),
        ("crop_scale", 0.0, "above 0 and at most 1"),
        ("weight_decay", -0.1, "at least 0"),
        ("batch_size", 1, "expected 2 to 20"),
        ("batch_size", 21, "expected 2 to 20"),
        ("widths", (), "at least one stage"),
        ("compared", 3, "expected 1 to 2"),
    ],
)
def test_configs_are_checked(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny(Path("out"), **{name: value})
    assert str(caught.value).startswith(name)


def test_dry_run_and_learning_rate() -> None:
    config = EncoderTrainConfig(total_images=1000, batch_size=10, lr=0.5)
    resolved = config.resolved()
    assert resolved["steps"] == 100
    weights = 3 * 16 * 9 + sum((a + b) * b * 9 for a, b in ((16, 32), (32, 64), (64, 128)))
    assert resolved["parameters"] == weights + 2 * (16 + 2 * (32 + 64 + 128))
    assert resolved["parameters"] <= 400_000
    assert config.learning_rate(0) == pytest.approx(0.5 / 5)
    assert config.learning_rate(500) == pytest.approx(0.25)
    assert config.learning_rate(1000) == pytest.approx(0)


def test_after_training_colours_matter_less_than_place(tmp_path: Path) -> None:
    """Held-out digits in other colours are nearer than the same turned, moved or made smaller; before, it is not so."""
    config = tiny(
        tmp_path, widths=(8, 16, 24, 32), pool_images=1000, batch_size=32, total_images=32 * 70, checkpoint_every=100, lr=0.005
    )  # fmt: skip
    pool = Digits32("train", copies=1, seed=3).batch(range(0, 4000, 4))
    trained = make_encoder(config)
    with RunDirectory(config.out, {}) as directory:
        fit(config, directory, pool, Ranks(0, 1, torch.device("cpu")), trained, make_views, contrast_maps)
    digits = Digits32("held_out", copies=1, seed=4)
    items = torch.arange(0, 1000, 10)
    jitters, colours = digits.jitters(items), digits.jitters((items + 1) % 1000)
    jitters = jitters._replace(scale=jitters.scale.clamp(0.7, 0.9), shift_px=jitters.shift_px / 2)

    def images(**changes: Tensor) -> Tensor:
        return render(digits.digits[jitters.digit], jitters._replace(**changes)).float() / 127.5 - 1

    as_drawn = images()
    other_colours = images(**{key: getattr(colours, key) for key in ("foreground", "background", "gradient")})
    changed = {
        "turned": images(angle=jitters.angle + math.pi / 6),
        "moved": images(shift_px=jitters.shift_px + 3),
        "smaller": images(scale=jitters.scale * 0.7),
    }
    untrained = PerceptualDistance(Encoder(config.encoder()).eval())
    distance = PerceptualDistance(trained)
    recolouring = distance(as_drawn, other_colours), untrained(as_drawn, other_colours)
    for what, image in changed.items():
        nearer = [
            (d < to(as_drawn, image)).float().mean() for d, to in zip(recolouring, (distance, untrained), strict=True)
        ]
        assert nearer[0] > 0.85, what
        assert nearer[1] < 0.5, what
