"""`triptych-gangealing train` at a tiny size: its loss, clusters, interruption, ranks, bad input."""

import copy
import json
import math
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from triptych_common import cost, randomness, testing
from triptych_common.storage import checkpoint
from triptych_common.testing import logged, run_here, run_signalled, run_torchrun
from triptych_gangealing import cli, clustering
from triptych_gangealing.aligner import load_aligner
from triptych_gangealing.clustering import purity, starting_modes
from triptych_gangealing.encoders.perceptual import Encoder, EncoderConfig, Vgg16, open_distance, write_encoder
from triptych_gangealing.modes import Mode, pca
from triptych_gangealing.objective import Choice, Objective
from triptych_gangealing.spatial_transformer import SpatialTransformer
from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.weights import load_generator, write_network
from triptych_gangealing.train_config import PRESETS, AlignTrainConfig

STEPS = 8
CLASSIFIER = "classifier/images-000000032"
LAST = f"checkpoints/step-{STEPS:08d}.safetensors"
TINY = [
    "--preset", "smoke", "--input-size", "16", "--flow-size", "4", "--components", "3", "--pca-samples", "60", "--cutoff", "4",
    "--batch-size", "4", "--total-images", "32", "--checkpoint-every", "2", "--log-every", "2", "--snapshot-every", "16",
    "--psi-images", "16", "--constant-images", "16", "--restart-images", "8", "--init-images", "12",
    "--classifier-images", "16", "--ema-half-life-images", "8",
]  # fmt: skip

command = partial(run_here, cli.run)


def succeeds(*words: object) -> subprocess.CompletedProcess:
    done = command(*words)
    assert done.returncode == 0, done.stderr
    return done


fails_with = partial(testing.fails_with, quiet=("training",))


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """A generator and an encoder of random weights, as options."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(3)
    generator = Generator(GeneratorConfig(16, channel_base=64, channel_max=8, z_dim=6, w_dim=6, mapping_layers=2))
    with torch.no_grad():
        for name, value in generator.named_parameters():
            if name.endswith("noise_strength"):
                value.fill_(0.1)
    write_network(folder / "generator.safetensors", generator, {})
    write_encoder(folder / "encoder.safetensors", Encoder(EncoderConfig((4, 6))), {})
    return [
        "--generator",
        str(folder / "generator.safetensors"),
        "--distance",
        f"simclr:{folder / 'encoder.safetensors'}",
    ]


def test_any_checkpoint_aligns(given: list[str], tmp_path: Path) -> None:
    trained(given, tmp_path / "run", "--clusters", 1)
    finished = load_aligner(tmp_path / "run")
    (tmp_path / "run/aligner.safetensors").unlink()
    for path in (tmp_path / "run", tmp_path / "run" / LAST):
        found = load_aligner(path)
        assert found.facts == finished.facts
        assert all(torch.equal(found.state_dict()[key], value) for key, value in finished.state_dict().items())


def trained(given: list[str], out: Path, *options: object) -> dict:
    """The result of a run that must succeed."""
    done = succeeds("train", *TINY, *given, "--out", out, "--json", *options)
    return json.loads(done.stdout.splitlines()[-1])


def test_an_aligner_is_trained_on_from_its_weights(given, tmp_path):
    """At rates of almost nothing: what is left is what it started from, its mode's directions included."""
    trained(given, tmp_path / "first", "--clusters", 1)
    options = ("--clusters", 1, "--seed", 4, "--init-from", tmp_path / "first")
    trained(given, tmp_path / "second", *options, "--lr", 1e-12, "--mode-lr", 1e-12)
    first, second = (load_aligner(tmp_path / name).state_dict() for name in ("first", "second"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6)
    done = command("train", *TINY, *given, "--out", tmp_path / "other", *options, "--components", 2)
    fails_with(done, "its mode has alpha (1, 3), this config wants (1, 2)")


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory) -> Path:
    """An uninterrupted run of three clusters."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert trained(given, out, "--clusters", 3)["last"]["step"] == STEPS
    return out


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("aligner.safetensors", LAST, f"{CLASSIFIER}/checkpoints/step-00000004.safetensors"):
        assert checkpoint.content_sha256(a / name) == checkpoint.content_sha256(b / name), name
    assert logged(a) == logged(b)
    assert logged(a / CLASSIFIER) == logged(b / CLASSIFIER)


def test_lost_and_damaged_files_of_a_run_are_made_again(given, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    names = ["aligner.safetensors", "start.safetensors", next(run.glob("pca-*")).name]
    before = [checkpoint.content_sha256(run / name) for name in names]
    for name in names:
        content = bytearray((run / name).read_bytes())
        content[-1] ^= 1
        (run / name).write_bytes(content)
    trained(given, run, "--clusters", 3)
    assert [checkpoint.content_sha256(run / name) for name in names] == before
    assert all(checkpoint.is_whole(run / name) for name in names)


def objective_of(given: list[str], **options: object) -> Objective:
    config = AlignTrainConfig(
        generator=given[1], distance=given[3], input_size=16, flow_size=4, channel_max=8, channel_multiplier=2.0, cutoff=4,
        components=3, pca_samples=60, init_images=12, **options,
    )  # fmt: skip
    generator, distance = load_generator(config.generator).double(), open_distance(config.distance).double()
    return Objective(config, generator, distance)


def networks_of(objective: Objective) -> tuple[SpatialTransformer, Mode]:
    """A transformer whose last layers are not zero, and modes apart from one another."""
    torch.manual_seed(5)
    transformer = SpatialTransformer(objective.config.transformer()).double()
    with torch.no_grad():
        transformer.similarity.head.weight.normal_().mul_(0.05)
        transformer.flow.delta[-1].weight.normal_().mul_(0.05)
    mode = Mode(pca(objective.generator, 60, 3), objective.config.clusters).double()
    mode.alpha.data.normal_()
    return transformer, mode


# --- schedules


def test_learning_rates_are_constant_then_fall_by_cosines_with_warm_restarts():
    config = AlignTrainConfig(lr=0.1, constant_images=100, restart_images=50)
    expected = {0: 0.1, 99: 0.1, 100: 0.1, 125: 0.05, 150: 0.09, 200: 0.045, 249: None, 250: 0.081, 350: 0.0405}
    for images, rate in expected.items():
        if rate is not None:
            assert config.rate(images) == pytest.approx(rate, rel=1e-12), images
    assert config.rate(249) == pytest.approx(0.09 * (1 + math.cos(math.pi * 0.99)) / 2, rel=1e-12)


def test_the_published_schedule_ends_where_the_rate_is_zero():
    """Constant for 150,000 steps of 40 images, then periods of 37,500 steps, each twice the last."""
    config = PRESETS["cat"]
    for step in (150_000 + 37_500, 150_000 + 37_500 * 3, 150_000 + 37_500 * 7):
        assert config.rate(step * 40 - 1) < 1e-9
        assert config.rate(step * 40) > 1e-4
    assert config.rate(config.total_images - 1) < 1e-9


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_dry_run(name):
    done = succeeds("train", "--preset", name, "--dry-run", "--json")
    parameters = json.loads(done.stdout.splitlines()[-1])["parameters"]
    assert parameters < 1_000_000 if name.startswith(("digits", "smoke")) else parameters >= 43_000_000


def test_dry_run_estimates_memory_and_time_and_a_batch_that_does_not_fit_is_refused(given, tmp_path, monkeypatch):
    options = ["train", *TINY, *given, "--out", tmp_path / "run"]
    estimate = json.loads(succeeds(*options, "--dry-run", "--json").stdout.splitlines()[-1])["estimate"]
    assert estimate["images_per_second"] > 1
    assert 0 < estimate["gigabytes_of_a_step"] < 0.1 < estimate["gigabytes_there"]
    monkeypatch.setattr(cost, "available_bytes", lambda device: 2e9 * estimate["gigabytes_of_a_step"])
    fails_with(command(*options, "--batch-size", 960), "pass --micro-batch")
    assert not (tmp_path / "run").exists()


# --- the loss


def test_the_loss_is_that_of_the_nearest_cluster_and_so_is_its_gradient(given):
    """Against all clusters differentiated at once and the minimum taken of them (equation 4.6)."""
    objective = objective_of(given, clusters=3, tv_weight=7.0, identity_weight=0.5, psi_images=100)
    transformer, mode = networks_of(objective)
    counters, psi = range(5, 11), (1 + math.cos(math.pi * 0.3)) / 2
    found = objective.loss(transformer, mode, counters, 30)
    found["loss"].backward()
    gradients = [p.grad.clone() for p in (*transformer.parameters(), mode.alpha)]
    for parameter in (*transformer.parameters(), mode.alpha):
        parameter.grad = None

    samples = objective.samples(counters)
    everything = []
    for k in range(3):
        choice = Choice(torch.full((6,), k), torch.zeros(6, dtype=torch.bool))
        everything.append(objective.terms(transformer, mode, samples, choice, psi))
    distances = torch.stack([terms.distance for terms in everything])
    winner = distances.argmin(0)
    assert len(winner.unique()) > 1  # or this would show little
    totals = torch.stack([t.distance + 7.0 * t.tv + 0.5 * t.identity for t in everything])
    expected = totals.gather(0, winner[None]).mean()
    expected.backward()
    torch.testing.assert_close(
        found["loss"], expected.detach().requires_grad_(), rtol=1e-12, atol=0, check_stride=False
    )
    for gradient, parameter in zip(gradients, (*transformer.parameters(), mode.alpha), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-10)
    assert float(mode.alpha.grad.abs().sum()) > 0


def test_assignment_by_similarity_leaves_the_flow_out(given):
    objective = objective_of(given, clusters=3, assignment="similarity")
    transformer, mode = networks_of(objective)
    transformer.flow.delta[-1].weight.data *= 30.0  # so that it matters
    samples = objective.samples(range(12))
    found = objective.choose(transformer, mode, samples, 0.0)
    whole = objective_of(given, clusters=3).choose(transformer, mode, samples, 0.0)
    still = copy.deepcopy(transformer)
    for parameter in still.flow.delta.parameters():
        parameter.data.zero_()
    alike = objective_of(given, clusters=3).choose(still, mode, samples, 0.0)
    assert torch.equal(found.cluster, alike.cluster)
    assert not torch.equal(found.cluster, whole.cluster)  # or this would show little


def test_mirror_images_are_chosen_where_they_fit_better(given):
    objective = objective_of(given, flips=True)
    transformer, mode = networks_of(objective)
    samples = objective.samples(range(12))
    choice = objective.choose(transformer, mode, samples, 0.0)
    plain = Choice(torch.zeros(12, dtype=torch.long), torch.zeros(12, dtype=torch.bool))
    both = samples, samples._replace(images=samples.images.flip(3))
    sides = [objective.terms(transformer, mode, seen, plain, 0.0).distance for seen in both]
    assert torch.equal(choice.flipped, sides[1] < sides[0])
    assert 0 < int(choice.flipped.sum()) < 12


def test_at_psi_one_a_target_is_the_image_but_for_its_noise(given):
    objective = objective_of(given)
    with torch.no_grad():
        for name, value in objective.generator.named_parameters():
            if name.endswith("noise_strength"):
                value.zero_()
    samples = objective.samples(range(4))
    c = torch.zeros_like(samples.w)
    torch.testing.assert_close(objective.targets(samples, c, 1.0), samples.images, rtol=0, atol=1e-12)
    assert float((objective.targets(samples, c, 0.5) - samples.images).abs().max()) > 1e-3


# --- clusters


def test_k_means_plus_plus_draws_in_proportion_to_the_distance_from_the_nearest(given, monkeypatch):
    """Over evenly spread draws the second mode is drawn as often as its distance to the first asks for."""
    objective = objective_of(given, clusters=2)
    directions = pca(objective.generator, 60, 3)
    w, images, *_ = objective.samples(range(12), "k-means++")
    alphas = directions.coefficients(w.float())
    distance = torch.stack([objective.distance(images, images[i : i + 1].expand_as(images)) for i in range(12)])
    counts, real, second_draw = torch.zeros(12, 12), randomness.uniform, [0.0]

    def drawn(seed, stream, indices):
        return torch.tensor([0.3, second_draw[0]]) if stream == "k-means++" else real(seed, stream, indices)

    monkeypatch.setattr(clustering.randomness, "uniform", drawn)
    for draw in range(60):
        second_draw[0] = (draw + 0.5) / 60
        found = starting_modes(objective, directions)["alpha"]
        first, second = (int((alphas - row).square().sum(1).argmin()) for row in found)
        counts[first, second] += 1
    assert counts.sum(1).nonzero().flatten().tolist() == [3]  # 0.3 of 12
    expected = 60 * distance[3] / distance[3].sum()
    assert float((counts[3] - expected.float()).abs().max()) <= 1.0
    assert counts[3, 3] == 0


def test_a_mode_may_start_at_the_sample_that_is_nearest_to_all_others(given):
    objective = objective_of(given, origin="sample")
    w, images, *_ = objective.samples(range(12), "k-means++")
    distances = [objective.distance(images, images[i : i + 1].expand_as(images)).sum() for i in range(12)]
    found = starting_modes(objective, pca(objective.generator, 60, 3))
    typical = int(torch.stack(distances).argmin())
    torch.testing.assert_close(found["origins"], w[typical : typical + 1].float(), rtol=0, atol=0)
    assert not found["alpha"].any()


def test_several_modes_start_at_samples_nearest_to_the_centres_of_k_means(given):
    """Of features spelled out: each level's pixels weigh as much as the perceptual distance lets them."""
    objective = objective_of(given, clusters=3, origin="sample")
    w, images, *_ = objective.samples(range(12), "k-means++")
    levels = objective.distance.features(images)
    rows = np.concatenate([level.flatten(1).numpy() / np.sqrt(level[0, 0].numel()) for level in levels], 1)
    centres = KMeans(3, n_init=10, random_state=objective.config.seed).fit(rows).cluster_centers_
    expected = np.square(rows[:, None] - centres).sum(2).argmin(0)
    found = starting_modes(objective, pca(objective.generator, 60, 3))
    torch.testing.assert_close(found["origins"], w[torch.from_numpy(expected)].float(), rtol=0, atol=0)
    assert len(set(expected.tolist())) == 3


def test_several_modes_start_at_the_nearest_points_to_samples(given):
    objective, directions = objective_of(given, clusters=3), pca(objective_of(given).generator, 60, 3)
    found = starting_modes(objective, directions)
    alphas = directions.coefficients(objective.samples(range(12), "k-means++").w.float())
    rows = [int((alphas - row).square().sum(1).argmin()) for row in found["alpha"]]
    assert len(set(rows)) == 3
    torch.testing.assert_close(found["alpha"], alphas[rows])
    assert torch.equal(found["origins"], directions.mean.repeat(3, 1))


def test_a_cluster_that_takes_too_much_becomes_less_attractive(given):
    objective = objective_of(given, clusters=3)
    transformer, mode = networks_of(objective)
    samples = objective.samples(range(12))
    before = torch.bincount(objective.choose(transformer, mode, samples, 0.0).cluster, minlength=3) / 12
    for _ in range(100):
        chosen = objective.choose(transformer, mode, samples, 0.0).cluster
        mode.even_out(torch.bincount(chosen, minlength=3) / 12, 0.06)
    after = torch.bincount(chosen, minlength=3) / 12
    assert float(before.max()) > 0.4
    assert float((after - 1 / 3).abs().max()) <= 1 / 12 + 1e-6


def test_the_classifier_learns_the_clusters_of_generated_images(given, tmp_path):
    trained(given, tmp_path, "--clusters", 2, "--classifier-images", 1200, "--log-every", 50, "--lr", 0.01)
    rows = logged(tmp_path / CLASSIFIER)
    objective = objective_of(given, clusters=2)
    aligner = load_aligner(tmp_path)
    objective.generator.float(), objective.distance.float()
    samples = objective.samples(range(200), "held out")
    choice = objective.choose(aligner.transformer, aligner.mode, samples, 0.0)
    commonest = float(torch.bincount(choice.cluster).max() / 200)
    assert rows[-1]["loss"] < rows[0]["loss"]
    found = aligner.clusters(samples.images)
    assert len(found.unique()) == 2
    assert float((found == choice.cluster).float().mean()) > commonest


def test_purity_by_hand():
    clusters, labels = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([4, 4, 1, 1, 2, 0])
    assert purity(clusters, labels) == pytest.approx((2 + 1 + 1) / 6)


# --- runs


def test_a_run_leaves_an_aligner_rows_and_pictures(given, whole):
    rows = logged(whole)
    assert [row["images"] for row in rows] == [8, 16, 24, 32]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert [path.name for path in sorted((whole / "samples").iterdir())] == [
        "images-000000016.png",
        "images-000000032.png",
    ]
    aligner = load_aligner(whole)
    assert aligner.config.heads == 3
    assert aligner.classifier is not None
    assert aligner.facts["padding"] == "border"
    tensors, _ = checkpoint.read(whole / LAST)
    for name, value in aligner.transformer.state_dict().items():
        torch.testing.assert_close(value, tensors[f"ema.transformer.{name}"], rtol=0, atol=0)
    assert not torch.equal(
        tensors["model.mode.alpha"],
        checkpoint.read(whole / "checkpoints/step-00000006.safetensors")[0]["model.mode.alpha"],
    )


def test_a_run_killed_and_interrupted_ends_bit_identical(given, whole, tmp_path):
    out = tmp_path / "run"

    def stopped(step: int, signum: signal.Signals, folder: str) -> "subprocess.CompletedProcess[str]":
        words = ["train", *TINY, *given, "--out", out, "--clusters", 3]
        return run_signalled(step, signum, "triptych_gangealing.cli", *words, folder=folder)

    assert stopped(4, signal.SIGKILL, "run").returncode == -signal.SIGKILL
    fails_with(stopped(6, signal.SIGTERM, "run"), f"stopped at step 6 of {STEPS}", 128 + signal.SIGTERM)
    fails_with(stopped(2, signal.SIGTERM, "images-000000032"), "stopped at step 2 of 4", 128 + signal.SIGTERM)
    trained(given, out, "--clusters", 3)
    assert_same_run(whole, out)


EXACT = ["--precision", "float64", "--clusters", "2"]


@pytest.fixture(scope="module")
def exact(given, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "exact"
    trained(given, out, *EXACT)
    return out


def assert_equal_to_rounding(a: Path, b: Path) -> None:
    (tensors, counters), (others, other_counters) = checkpoint.read(a / LAST), checkpoint.read(b / LAST)
    assert counters == other_counters
    for name, value in tensors.items():
        torch.testing.assert_close(others[name], value, rtol=1e-7, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
    for row, other in zip(logged(a), logged(b), strict=True):
        row.pop("smallest_cluster"), other.pop("smallest_cluster")  # of a rank's or a part's images
        assert row == pytest.approx(other, rel=1e-7)


def test_two_ranks_train_as_one_does(given, exact, tmp_path):
    done = run_torchrun(2, "triptych_gangealing.cli", "train", *TINY, *given, "--out", str(tmp_path), *EXACT)
    assert done.returncode == 0, done.stderr
    assert_equal_to_rounding(exact, tmp_path)


def test_parts_of_a_batch_train_as_the_whole_does(given, exact, tmp_path):
    trained(given, tmp_path, *EXACT, "--micro-batch", 2)
    assert_equal_to_rounding(exact, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input-size", "32"], "input_size 32: the generator's images have 16 pixels; pass --input-size 16 or less"),
        (["--cutoff", "9"], "cutoff 9: expected 0 to 6, the generator's styles"),
        (["--components", "7"], "7 principal directions of 60 samples: expected 0 to 6"),
        (["--clusters", "2", "--components", "0", "--origin", "mean"], "every mode would be the mean; pass --origin sample"),
        (["--distance", "vgg"], "perceptual distance 'vgg': expected lpips, ssl-vgg, or simclr:PATH"),
        (["--generator", "nowhere.pkl"], "nowhere.pkl: no such file or folder, nor an embedded generator"),
        (["--clusters", "2", "--transforms", "flow"], "the classifier starts from the similarity network"),
        (["--clusters", "13"], "init_images 12: expected at least as many as clusters, 13"),
        (["--micro-batch", "-1"], "micro_batch -1: expected at least 1"),
        (["--lr", "0"], "lr 0.0: expected a number above 0"),
        (["--flow-size", "3"], "flow_size 3: expected a power of two"),
        (["--transforms", "flow", "--iterations", "2"],
         "iterations 2, transforms flow: only the similarity network looks repeatedly; pass --iterations 1"),
        (["--assignment", "descriptor", "--clusters", "9", "--descriptor-images", "8"],
         "clusters 9, descriptor_images 8: groups are formed of that many images, at most 8000; pass --descriptor-images 9"),
    ],
)  # fmt: skip
def test_bad_settings_get_one_line(given, tmp_path, options, message):
    done = command("train", *TINY, *given, "--out", tmp_path / "run", *options)
    testing.fails_with(done, message, done.returncode)
    assert done.returncode in (1, 2)


def test_a_generator_of_grey_images_is_refused_before_anything_is_written(given, tmp_path):
    shape = GeneratorConfig(16, channel_base=64, channel_max=8, z_dim=6, w_dim=6, mapping_layers=2, image_channels=1)
    write_network(tmp_path / "grey.safetensors", Generator(shape), {})
    words = ["--generator", tmp_path / "grey.safetensors", "--out", tmp_path / "run"]
    testing.fails_with(
        command("train", *TINY, *given, *words), "its images have 1 channels, expected 3; train one on RGB"
    )
    assert not (tmp_path / "run").exists()


def test_a_refused_setting_does_not_bar_the_corrected_one(given, tmp_path):
    words = [*TINY, *given, "--out", tmp_path / "run", "--transforms", "flow"]
    assert command("train", *words, "--iterations", "2").returncode == 2
    assert not (tmp_path / "run").exists()
    succeeds("train", *words, "--iterations", "1")


def test_the_weights_of_a_published_distance_may_lie_anywhere(given, tmp_path):
    """Their path is no part of a run's identity, their digest is."""
    torch.manual_seed(1)
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    vgg = {f"features.{name}": value for name, value in Vgg16().state_dict().items()}
    torch.save(vgg, tmp_path / "here/vgg.pth")
    torch.save(vgg, tmp_path / "there/vgg.pth")
    words = ["--distance", "ssl-vgg", "--total-images", 4, "--distance-weights"]
    trained(given, tmp_path / "run", *words, tmp_path / "here/vgg.pth")
    trained(given, tmp_path / "run", *words, tmp_path / "there/vgg.pth")
    succeeds("train", *TINY, *given, *words, tmp_path / "here/vgg.pth", "--dry-run", "--json")


def test_a_prolonged_run_has_a_classifier_of_its_own(given, tmp_path):
    trained(given, tmp_path, "--clusters", 2, "--total-images", 8)
    trained(given, tmp_path, "--clusters", 2, "--total-images", 16)
    assert sorted(path.name for path in (tmp_path / "classifier").iterdir()) == ["images-000000008", "images-000000016"]


def test_another_generator_is_another_run(given, whole, tmp_path):
    torch.manual_seed(4)
    generator = Generator(GeneratorConfig(16, channel_base=64, channel_max=8, z_dim=6, w_dim=6, mapping_layers=2))
    write_network(tmp_path / "other.safetensors", generator, {})
    done = command(
        "train", *TINY, *given, "--out", whole, "--clusters", 3, "--generator", tmp_path / "other.safetensors"
    )
    fails_with(done, "generator=")
