"""`triptych-gangealing train-gan` at a tiny size: interrupted, killed, on two ranks, fine-tuned, spoiled, misused."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from triptych_common import cost, testing
from triptych_common.cost import Memory, state_bytes
from triptych_common.parallel import Ranks
from triptych_common.storage import checkpoint
from triptych_common.testing import logged, run_here, run_signalled, run_torchrun
from triptych_common.training import Batch
from triptych_gangealing import cli
from triptych_gangealing.stylegan2 import snapshots, train
from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.data import open_images
from triptych_gangealing.stylegan2.generator import Generator, sample_images
from triptych_gangealing.stylegan2.objective import Objective
from triptych_gangealing.stylegan2.train import adversarial_step, make_state, parts_of, step_cost
from triptych_gangealing.stylegan2.train_config import GanTrainConfig
from triptych_gangealing.stylegan2.weights import read_network, write_network

TARGET = 0.2
TINY = [
    "--preset", "smoke", "--resolution", "8", "--channel-base", "64", "--channel-max", "8", "--z-dim", "8",
    "--batch-size", "8", "--total-images", "96", "--checkpoint-every", "2", "--log-every", "3", "--snapshot-every", "48",
    "--scores", "none", "--augment", "bgc", "--ada-images", "300", "--ada-target", str(TARGET), "--style-mixing", "0.9",
    "--path-length-weight", "2", "--r1-gamma", "0.1", "--r1-every", "4", "--lr", "0.01",
]  # fmt: skip
STEPS = 12
LAST = f"checkpoints/step-{STEPS:08d}.safetensors"

command = partial(run_here, cli.run)


def train_gan(data: Path, out: Path, *options: object) -> subprocess.CompletedProcess:
    return command("train-gan", *TINY, "--data", data, "--out", out, *options)


def trained(data: Path, out: Path, *options: object) -> dict:
    """The result of a run that must succeed."""
    done = train_gan(data, out, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


fails_with = partial(testing.fails_with, quiet=("training:",))


def assert_same_run(a: Path, b: Path) -> None:
    """Files have the same names; networks, the last checkpoint and metrics are bit-identical."""
    names = ({str(path.relative_to(run)) for path in run.rglob("*")} for run in (a, b))
    assert next(names) == next(names)
    for name in ("generator.safetensors", "discriminator.safetensors", LAST):
        assert checkpoint.content_sha256(a / name) == checkpoint.content_sha256(b / name), name
    assert logged(a) == logged(b)


def write_pictures(folder: Path, count: int = 24, size: int = 8, mode: str = "RGB", seed: int = 0) -> Path:
    """Coloured squares on coloured grounds, as PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = np.empty((size, size, 3), np.uint8)
        pixels[:], top, left = rng.integers(0, 256, 3), *rng.integers(0, size // 2, 2)
        pixels[top : top + size // 2, left : left + size // 2] = rng.integers(0, 256, 3)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """Two classes, three pictures of the one to one of the other."""
    root = tmp_path_factory.mktemp("data") / "classes"
    write_pictures(root / "a", 18, seed=1)
    write_pictures(root / "b", 6, seed=2)
    return root


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert trained(pictures, out)["last"]["step"] == STEPS
    return out


# --- what a run leaves


def test_a_run_leaves_networks_rows_and_pictures(pictures, whole):
    rows = logged(whole)
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert [row["images"] for row in rows] == [24, 48, 72, 96]
    for row in rows:
        assert all(np.isfinite(value) for value in row.values())
        assert (row["skipped"], row["rollbacks"]) == (0, 0)
    sizes = {path.name: Image.open(path).size for path in (whole / "samples").iterdir()}
    size = 2 * (10 * (8 + 2) + 2), 2 * (8 * (8 + 2) + 2)  # 80 images in 10 columns, 2 pixels apart, twice as large
    assert sizes == {"images-000000048.png": size, "images-000000096.png": size}
    generator, facts = read_network(whole / "generator.safetensors")
    assert facts["images_seen"] == 96
    assert facts["data"] == str(pictures)
    assert facts["images"] == open_images(str(pictures), 8).fingerprint()
    tensors, counters = checkpoint.read(whole / LAST)
    assert counters["samples_seen"] == 96
    for name, value in generator.state_dict().items():
        assert torch.equal(value, tensors[f"ema.{name}"]), name
    assert not torch.equal(
        tensors["ema.synthesis.b8.conv1.weight"], tensors["model.generator.synthesis.b8.conv1.weight"]
    )


def test_dry_run_reports_sizes_and_writes_nothing(pictures, whole, tmp_path):
    done = train_gan(pictures, tmp_path / "run", "--dry-run", "--json")
    printed = json.loads(done.stdout)
    for name in ("generator", "discriminator"):
        network = read_network(whole / f"{name}.safetensors").network
        assert printed[f"{name}_parameters"] == sum(p.numel() for p in network.parameters())
    assert printed["steps"] == STEPS
    assert printed["data"] == {"examples": 24, "classes": 1}
    assert printed["estimate"]["images_per_second"] > 1
    assert 0 < printed["estimate"]["gigabytes_of_a_step"] < 0.1 < printed["estimate"]["gigabytes_there"]
    assert not (tmp_path / "run").exists()


def test_the_estimated_memory_is_that_of_a_step(pictures):
    objective, state = tiny_state(pictures)
    parts_of(state)[2].augment_p.fill_(0.5)
    found = step_cost(state, objective).step_bytes(8)
    with Memory() as memory:
        adversarial_step(state, objective, Batch(0, 8, range(8)))
    assert 1.0 < found / (max(memory.history) + state_bytes(state)) < 1.6  # convolutions take memory besides tensors


def test_a_batch_that_does_not_fit_is_refused_before_there_is_a_folder(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "available_bytes", lambda device: 3e6)
    done = train_gan(pictures, tmp_path / "run", "--batch-size", 96)
    fails_with(done, "this machine has 0.0; pass --micro-batch")
    assert int(re.search(r"--micro-batch (\d+)", done.stderr)[1]) % 4 == 0
    assert not (tmp_path / "run").exists()


def test_scores_are_distances_between_generated_and_real_features(pictures, tmp_path, monkeypatch):
    def features(images):
        return images.float().mean(dim=(2, 3)) / 255

    monkeypatch.setattr(snapshots, "feature_network", lambda name, device: features)
    trained(pictures, tmp_path, "--scores", "digits32", "--score-images", "2000", "--total-images", "64")
    rows = [row for row in logged(tmp_path) if "score/frechet" in row]
    assert [row["images"] for row in rows] == [48, 64]  # when due, and at the end
    generator = read_network(tmp_path / "generator.safetensors").network
    images = open_images(str(pictures), 8)
    fake, real = (features(x).double().numpy() for x in (sample_images(generator, range(24)), images.batch(range(24))))
    cov_fake, cov_real = np.cov(fake.T), np.cov(real.T)
    root = linalg.sqrtm(cov_fake @ cov_real).real
    frechet = ((fake.mean(0) - real.mean(0)) ** 2).sum() + np.trace(cov_fake + cov_real - 2 * root)
    assert rows[-1]["score/frechet"] == pytest.approx(frechet, rel=1e-3)
    assert "score/kernel" in rows[-1]


# --- going on


def test_a_run_killed_and_interrupted_ends_bit_identical(pictures, whole, tmp_path):
    def stopped(step: int, signum: signal.Signals) -> "subprocess.CompletedProcess[str]":
        words = ["train-gan", *TINY, "--data", pictures, "--out", tmp_path]
        return run_signalled(step, signum, "triptych_gangealing.cli", *words)

    assert stopped(3, signal.SIGKILL).returncode == -signal.SIGKILL
    assert [row["step"] for row in logged(tmp_path)] == [3]  # beyond the checkpoint of step 2: to be cut back
    fails_with(stopped(9, signal.SIGTERM), f"stopped at step 9 of {STEPS}, saved in", 128 + signal.SIGTERM)
    assert checkpoint.steps_in(tmp_path / "checkpoints")[-1].name == "step-00000009-extra.safetensors"
    trained(pictures, tmp_path)
    assert_same_run(whole, tmp_path)


def test_prolonging_a_finished_run_is_training_that_long_at_once(pictures, whole, tmp_path):
    trained(pictures, tmp_path, "--total-images", "48")
    trained(pictures, tmp_path)
    assert_same_run(whole, tmp_path)


def test_repeating_a_finished_run_changes_nothing(pictures, whole):
    before = {path: path.read_bytes() for path in (whole / "metrics.jsonl", whole / LAST)}
    hashes = checkpoint.content_sha256(whole / "generator.safetensors")
    assert trained(pictures, whole)["last"]["step"] == STEPS
    assert {path: path.read_bytes() for path in before} == before
    assert checkpoint.content_sha256(whole / "generator.safetensors") == hashes


def test_what_decides_the_result_may_not_change_and_what_does_not_may(pictures, whole, tmp_path):
    fails_with(train_gan(pictures, whole, "--lr", "0.5"), "(now 0.5); repeat its settings to resume it, or use another")
    fails_with(train_gan(pictures, whole, "--x-flip"), "x_flip=False (now True)")
    trained(pictures, tmp_path, "--total-images", "48")
    trained(pictures, tmp_path, "--snapshot-every", "16")
    samples = sorted((tmp_path / "samples").iterdir())[-3:]
    assert [path.name[-6:] for path in samples] == ["64.png", "80.png", "96.png"]
    for more in samples[:2]:
        more.unlink()
    assert_same_run(whole, tmp_path)


# --- ranks and parts


EXACT = ["--precision", "float64", "--log-every", "4"]


@pytest.fixture(scope="module")
def exact(pictures, tmp_path_factory) -> Path:
    """One process in float64."""
    out = tmp_path_factory.mktemp("runs") / "exact"
    trained(pictures, out, *EXACT)
    return out


def assert_equal_to_rounding(a: Path, b: Path) -> None:
    (tensors, counters), (others, other_counters) = checkpoint.read(a / LAST), checkpoint.read(b / LAST)
    assert counters == other_counters
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(others[name], value, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    for row, other in zip(logged(a), logged(b), strict=True):
        assert row == pytest.approx(other, rel=1e-8)


def test_the_run_compared_uses_everything(exact):
    """Or the next two tests would show little."""
    rows = logged(exact)
    assert rows[-1]["augment_p"] > 0.1
    assert rows[-1]["r1"] > 0
    assert rows[-1]["path_length_penalty"] > 0
    tensors, _ = checkpoint.read(exact / LAST)
    assert float(tensors["model.generator.mapping.w_avg"].abs().max()) > 0


def test_two_ranks_train_as_one_does(pictures, exact, tmp_path):
    words = ["train-gan", *TINY, "--data", str(pictures), "--out", str(tmp_path), *EXACT]
    done = run_torchrun(2, "triptych_gangealing.cli", *words)
    assert done.returncode == 0, done.stderr
    assert_equal_to_rounding(exact, tmp_path)


def test_parts_of_a_batch_train_as_the_whole_does(pictures, exact, tmp_path):
    trained(pictures, tmp_path, *EXACT, "--micro-batch", "4")
    assert_equal_to_rounding(exact, tmp_path)


@pytest.mark.parametrize(("ranks", "options"), [(4, []), (3, []), (16, ["--mbstd-group-size", "1"])])
def test_ranks_that_cut_groups_apart_are_refused_and_leave_nothing(pictures, tmp_path, monkeypatch, ranks, options):
    @contextlib.contextmanager
    def many(device):
        yield Ranks(0, ranks, torch.device("cpu"))

    monkeypatch.setattr(train, "process_group", many)
    done = train_gan(pictures, tmp_path / "run", *options)
    fails_with(done, f"batch_size 8 on {ranks} ranks, {8 // ranks} images at once: expected whole groups of")
    assert not (tmp_path / "run").exists()


# --- fine-tuning


def state_of(out: Path, step: int, part: str) -> dict[str, torch.Tensor]:
    paths = [path for path in checkpoint.steps_in(out / "checkpoints") if path.stem.startswith(f"step-{step:08d}")]
    tensors, _ = checkpoint.read(paths[0])
    return {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}


def network_tensors(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(path)[0]


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [name for name, value in a.items() if not torch.equal(value, b[name])] == []


SHORT = ["--total-images", "8"]


def test_freezing_leaves_just_the_first_layers_of_the_discriminator_as_they_were(pictures, whole, tmp_path):
    trained(pictures, tmp_path, "--init-from", whole, "--freeze-d", "2", "--total-images", "24")
    before, after = (network_tensors(run / "discriminator.safetensors") for run in (whole, tmp_path))
    assert before.keys() == after.keys()
    unmoved = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert unmoved == {f"b8.{layer}.{kind}" for layer in ("fromrgb", "conv0") for kind in ("weight", "bias")}


def test_freezing_more_than_there_is_is_refused(pictures, whole, tmp_path):
    done = train_gan(pictures, tmp_path / "run", "--init-from", whole, "--freeze-d", "5")
    fails_with(done, "freeze_d 5: expected at most 4, which the discriminator has")
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_another_runs_networks(pictures, whole, tmp_path):
    trained(pictures, tmp_path, "--init-from", whole, *SHORT)
    for part in ("model.generator.", "ema."):
        assert_equal(state_of(tmp_path, 0, part), network_tensors(whole / "generator.safetensors"))
    assert_equal(state_of(tmp_path, 0, "model.discriminator."), network_tensors(whole / "discriminator.safetensors"))
    assert logged(tmp_path)[-1]["images"] == 8


def test_a_generator_alone_gets_a_fresh_discriminator_which_is_reported(pictures, whole, tmp_path):
    source = whole / "generator.safetensors"
    done = train_gan(pictures, tmp_path / "tuned", "--init-from", source, *SHORT)
    assert done.returncode == 0, done.stderr
    assert f"{source}: no discriminator in it; one is trained from scratch" in done.stdout
    assert_equal(state_of(tmp_path / "tuned", 0, "model.generator."), network_tensors(source))
    trained(pictures, tmp_path / "fresh", *SHORT)
    fresh = state_of(tmp_path / "fresh", 0, "model.discriminator.")
    assert_equal(state_of(tmp_path / "tuned", 0, "model.discriminator."), fresh)


def test_a_run_starts_from_rosinalitys_file(pictures, whole, tmp_path):
    done = command("convert", "--checkpoint", whole, "--format", "rosinality", "--out", tmp_path / "their.pt")
    assert done.returncode == 0, done.stderr
    trained(pictures, tmp_path / "tuned", "--init-from", tmp_path / "their.pt", *SHORT)
    started, source = (
        state_of(tmp_path / "tuned", 0, "model.generator."),
        network_tensors(whole / "generator.safetensors"),
    )
    assert started.keys() == source.keys()
    for name, value in source.items():
        torch.testing.assert_close(started[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_a_discriminator_alone_is_nothing_to_start_from(pictures, whole, tmp_path):
    source = whole / "discriminator.safetensors"
    fails_with(train_gan(pictures, tmp_path / "run", "--init-from", source), "holds no generator to start from")
    fails_with(train_gan(pictures, tmp_path / "run", "--init-from", tmp_path / "no"), "no such file or folder")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("options", "message"), [
    (["--channel-max", "4"], "generator has synthesis.b4.const (8, 4, 4), this config wants (4, 4, 4)"),
    (["--z-dim", "16"], "generator has mapping.w_avg (8,), this config wants (16,)"),
    (["--mapping-layers", "3"], "generator has mapping.fc2.weight absent, this config wants (8, 8)"),
    (["--mapping-layers", "1"], "generator has mapping.fc1.weight (8, 8), this config wants absent"),
    (["--conditional"], "generator has mapping.embed.weight absent"),
    (["--discriminator-architecture", "orig"], "discriminator has b8.skip.weight (8, 8, 1, 1), this config wants absent"),
])  # fmt: skip
def test_networks_of_another_shape_are_refused_by_their_first_tensor(classes, whole, tmp_path, options, message):
    done = train_gan(classes, tmp_path / "run", "--init-from", whole, *options)
    fails_with(done, message)
    assert "pass its own resolution, channels, z_dim, classes and architecture" in done.stderr
    assert not (tmp_path / "run").exists()  # which would refuse the corrected command


@pytest.mark.parametrize(("source", "target", "message"), [
    (16, 8, r"synthesis.b16.conv0.noise_const (16, 16), this config wants absent"),
    (8, 16, r"synthesis.b16.conv0.weight absent, this config wants (4, 8, 3, 3)"),
])  # fmt: skip
def test_networks_of_another_resolution_are_refused(tmp_path, source, target, message):
    data = write_pictures(tmp_path / "pictures", size=16)
    config = GeneratorConfig(source, channel_base=64, channel_max=8, z_dim=8, w_dim=8, mapping_layers=2)
    write_network(tmp_path / "generator.safetensors", Generator(config), {})
    done = train_gan(data, tmp_path / "run", "--resolution", target, "--init-from", tmp_path / "generator.safetensors")
    fails_with(done, "generator has ")
    assert message.split()[0].rsplit(".", 1)[0] in done.stderr


# --- data


def test_a_conditional_run_knows_its_classes(classes, tmp_path):
    trained(classes, tmp_path, "--conditional", "--total-images", "24")
    generator = read_network(tmp_path / "generator.safetensors").network
    assert generator.config.c_dim == 2
    assert read_network(tmp_path / "discriminator.safetensors").network.config.c_dim == 2
    z = torch.randn(4, 8)
    a, b = (generator(z, torch.eye(2)[[label] * 4]) for label in (0, 1))
    assert (a - b).abs().max() > 1e-3
    assert Image.open(tmp_path / "samples" / "images-000000024.png").size == (204, 164)


def test_mirrored_images_are_other_data(pictures, tmp_path):
    trained(pictures, tmp_path, "--x-flip", *SHORT)
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    assert config["x_flip"] is True
    assert config["images"] == open_images(str(pictures), 8, x_flip=True).fingerprint()
    fails_with(train_gan(pictures, tmp_path, *SHORT), "x_flip=True (now False)")


def test_pictures_may_move_and_not_change(classes, tmp_path):
    options = ("--conditional", "--total-images", "16")
    trained(classes, tmp_path / "run", *options)
    moved = Path(shutil.copytree(classes, tmp_path / "moved"))
    trained(moved, tmp_path / "run", *options)
    (moved / "b").rename(moved / "0")
    changed = "changed since it began: class names: was a, b; now 0, a; put back what was there"
    fails_with(train_gan(moved, tmp_path / "run", *options), changed)
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["contents"]  # which earlier versions did not record
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    trained(classes, tmp_path / "run", *options)


def spoil(folder: Path, how: str) -> None:
    if how == "empty":
        folder.mkdir()
        return
    write_pictures(folder, 8)
    if how == "broken":
        path = folder / "003.png"
        path.write_bytes(path.read_bytes()[:40])
    elif how == "too small":
        write_pictures(folder / "..", 1, size=6)
        (folder / ".." / "000.png").rename(folder / "tiny.png")


@pytest.mark.parametrize(("how", "options", "message"), [
    ("empty", [], "no images found"),
    ("absent", [], "expected mnist5k, mnist, cifar10, a folder"),
    ("broken", ["--strict"], "003.png"),
    ("too small", ["--strict"], "tiny.png"),
    ("fine", ["--conditional"], "has no classes for a conditional model; put each into a subfolder of its own"),
    ("fine", ["--resolution", "16"], "000.png"),
])  # fmt: skip
def test_data_that_will_not_do_is_one_line_and_leaves_nothing(tmp_path, how, options, message):
    data, out = tmp_path / "data", tmp_path / "run"
    if how != "absent":
        spoil(data, how)
    fails_with(train_gan(data, out, *options), message)
    assert not out.exists()


def test_pictures_that_will_not_do_are_listed_and_left_out(tmp_path):
    for how in ("broken", "too small"):
        spoil(tmp_path / how / "data", how)
        done = train_gan(tmp_path / how / "data", tmp_path / how / "run", *SHORT)
        assert done.returncode == 0, done.stderr
        assert f"left out 1 of {8 + (how != 'broken')} images" in done.stdout
        (row,) = json.loads((tmp_path / how / "run/skipped.json").read_text())
        assert Path(row["path"]).name == {"broken": "003.png", "too small": "tiny.png"}[how]


def test_any_checkpoint_generates_and_starts_fine_tuning(pictures, whole, tmp_path):
    """Both networks are those of the finished run's files, also in a run that has no such files yet."""
    for path in (whole / LAST, shutil.copytree(whole / "checkpoints", tmp_path / "run/checkpoints").parent):
        for part, name in (("ema", "generator"), ("model.discriminator", "discriminator")):
            ours, theirs = read_network(path, part=part), read_network(whole / f"{name}.safetensors")
            assert ours.facts == theirs.facts
            for key, value in theirs.network.state_dict().items():
                assert torch.equal(ours.network.state_dict()[key], value)
    (tmp_path / "run" / LAST).unlink()
    done = command("generate", "--generator", tmp_path / "run", "--num-samples", 2, "--out", tmp_path / "images")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step-00000010.safetensors: unfinished: step 10 of 12") == 1
    trained(pictures, tmp_path / "tuned", "--init-from", tmp_path / "run", *SHORT)
    began = checkpoint.read(checkpoint.step_path(tmp_path / "tuned/checkpoints", 0))[0]
    before = checkpoint.read(checkpoint.step_path(tmp_path / "run/checkpoints", 10))[0]
    name = "discriminator.b8.conv0.weight"
    assert torch.equal(began[f"model.{name}"], before[f"model.{name}"])


def test_the_corrected_command_runs_in_the_folder_of_the_refused_one(pictures, tmp_path):
    fails_with(train_gan(pictures, tmp_path / "run", "--conditional", *SHORT), "has no classes")
    fails_with(
        train_gan(pictures, tmp_path / "run", "--init-from", tmp_path / "none", *SHORT), "no such file or folder"
    )
    trained(pictures, tmp_path / "run", *SHORT)


def test_cropping_of_pictures_of_several_sizes_and_modes_is_reported(tmp_path):
    data = write_pictures(tmp_path / "data", 12)
    write_pictures(data / "larger", 4, size=20, mode="L")
    done = train_gan(data, tmp_path / "run", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "pictures of 2 sizes, 8x8 to 20x20" in done.stdout


# --- steps that go wrong


def not_a_number(monkeypatch, steps):
    """Plant a loss that is not a number into some steps of the discriminator."""
    real = Objective.discriminator_loss

    def loss(self, counters, p):
        value, sign = real(self, counters, p)
        return value * (float("nan") if counters[0] // 8 in steps else 1.0), sign

    monkeypatch.setattr(Objective, "discriminator_loss", loss)


def test_a_step_whose_gradients_are_not_finite_is_skipped_and_counted(pictures, tmp_path, monkeypatch):
    not_a_number(monkeypatch, {4})
    trained(pictures, tmp_path)
    rows = logged(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1]
    assert rows[-1]["rollbacks"] == 0
    assert rows[-1]["images"] == 96
    for path in ("generator.safetensors", "discriminator.safetensors"):
        assert all(bool(torch.isfinite(value).all()) for value in network_tensors(tmp_path / path).values())


def test_after_three_such_steps_the_weights_of_both_networks_are_rolled_back(pictures, tmp_path, monkeypatch):
    not_a_number(monkeypatch, {4, 5, 6})
    trained(pictures, tmp_path, "--total-images", "56")
    row = logged(tmp_path)[-1]
    assert (row["step"], row["skipped"], row["rollbacks"]) == (7, 3, 1)
    for part in ("model.", "ema.", "optimizer."):
        assert_equal(state_of(tmp_path, 7, part), state_of(tmp_path, 4, part))
    assert (
        checkpoint.read(checkpoint.steps_in(tmp_path / "checkpoints")[-1])[1]["samples_seen"] == 56
    )  # not rolled back


def test_a_diverging_run_stops_and_keeps_good_checkpoints(pictures, tmp_path):
    fails_with(
        train_gan(pictures, tmp_path, "--lr", "1e30", "--total-images", "400"), "lower --lr. Went back as far as"
    )
    for path in checkpoint.steps_in(tmp_path / "checkpoints"):
        assert all(bool(torch.isfinite(value).all()) for value in checkpoint.read(path)[0].values())


# --- averages and augmentation


def test_a_fixed_probability_stays(pictures, tmp_path):
    trained(pictures, tmp_path, "--augment-p", "0.25")
    assert [row["augment_p"] for row in logged(tmp_path)] == [0.25] * 4


def test_the_probability_follows_the_logged_signs(pictures, tmp_path):
    """Every four steps up where the mean sign of D(real) was above the target, else down, by images / ada_images."""
    trained(pictures, tmp_path, "--log-every", "1", "--total-images", "192", "--lr", "0.02")
    rows = logged(tmp_path)
    p, expected, moves = 0.0, [], set()
    for i in range(len(rows)):
        if i % 4 == 3:
            excess = np.mean([each["sign_real"] for each in rows[i - 3 : i + 1]]) - TARGET
            moved = max(0.0, p + np.sign(excess) * 4 * 8 / 300)
            moves.add(np.sign(moved - p))
            p = moved
        expected.append(p)
    assert [row["augment_p"] for row in rows] == pytest.approx(expected)
    assert moves >= {1.0, -1.0}


def tiny_state(pictures, **options):
    config = GanTrainConfig(
        data=str(pictures), resolution=8, channel_base=64, channel_max=8, z_dim=8, mapping_layers=2, batch_size=8,
        precision="float64", r1_every=4, **options,
    )  # fmt: skip
    images = open_images(config.data, 8)
    state = make_state(config, Ranks(0, 1, torch.device("cpu")), images)
    return Objective(config, images, state.model["generator"], state.model["discriminator"]), state


@pytest.mark.parametrize("rampup", [None, 0.5])
def test_the_generators_average_forgets_by_its_half_life(pictures, rampup):
    objective, state = tiny_state(pictures, ema_half_life_images=16, ema_rampup=rampup, augment="none")
    expected = {name: p.detach().clone() for name, p in state.model["generator"].named_parameters()}
    for step in range(6):
        adversarial_step(state, objective, Batch(step, 8, range(8 * step, 8 * step + 8)))
        half_life = 16 if rampup is None else min(16, max(8 * step, 1) * rampup)
        for name, p in state.model["generator"].named_parameters():
            decay = 0.5 ** (8 / half_life)
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    for name, p in state.ema.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-12, msg=name)


def test_a_sure_discriminator_raises_the_probability_and_an_unsure_one_lowers_it(pictures, monkeypatch):
    objective, state = tiny_state(pictures, ada_images=320, ada_target=0.6)
    real, p, found = objective.discriminator_loss, state.model["statistics"].augment_p, []
    for step in range(16):
        sign = torch.tensor(0.75 if step < 8 else 0.5, dtype=torch.float64)
        monkeypatch.setattr(objective, "discriminator_loss", lambda c, p, sign=sign: (real(c, p)[0], sign))
        adversarial_step(state, objective, Batch(step, 8, range(8 * step, 8 * step + 8)))
        found.append(float(p))
    assert found == pytest.approx([0.0] * 3 + [0.1] * 4 + [0.2] * 4 + [0.1] * 4 + [0.0])
