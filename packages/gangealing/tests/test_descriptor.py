"""Descriptions that know no pose, the groups of samples they give, and clusters that start there."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from triptych_common.cli import Interrupted
from triptych_common.images import from_uint8
from triptych_common.parallel import Ranks
from triptych_common.storage import checkpoint
from triptych_common.storage.run import RunDirectory
from triptych_common.testing import fails_with, one_thread, run_here, run_torchrun
from triptych_gangealing import cli
from triptych_gangealing.aligner import load_aligner
from triptych_gangealing.clustering import STREAM, starting_modes
from triptych_gangealing.digits32 import Digits32, render
from triptych_gangealing.encoders import groups as training
from triptych_gangealing.encoders.descriptor import DIM, Descriptor, Groups
from triptych_gangealing.encoders.groups import contrast, open_groups, posed_views
from triptych_gangealing.encoders.perceptual import Encoder, EncoderConfig, PerceptualDistance, write_encoder
from triptych_gangealing.encoders.simclr import EncoderTrainConfig, fit
from triptych_gangealing.keypoints.synthetic import white_on_black
from triptych_gangealing.modes import Mode, pca
from triptych_gangealing.objective import Objective
from triptych_gangealing.spatial_transformer import SpatialTransformer, reduced
from triptych_gangealing.stylegan2.config import GeneratorConfig
from triptych_gangealing.stylegan2.generator import Generator, sample_images
from triptych_gangealing.stylegan2.weights import write_network
from triptych_gangealing.train_config import AlignTrainConfig

ALONE = Ranks(0, 1, torch.device("cpu"))
TINY = [
    "--preset", "smoke", "--input-size", "16", "--flow-size", "4", "--components", "0", "--cutoff", "4", "--pca-samples", "60",
    "--batch-size", "4", "--total-images", "16", "--init-images", "24", "--classifier-images", "8", "--clusters", "3",
    "--assignment", "descriptor", "--descriptor-images", "32",
]  # fmt: skip

command = partial(run_here, cli.run)


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(3)
    return Generator(GeneratorConfig(16, channel_base=64, channel_max=8, z_dim=6, w_dim=6, mapping_layers=2)).eval()


@pytest.fixture(scope="module")
def distance() -> PerceptualDistance:
    torch.manual_seed(4)
    return PerceptualDistance(Encoder(EncoderConfig((4, 6))))


@pytest.fixture(scope="module")
def given(generator: Generator, distance: PerceptualDistance, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("given")
    write_network(folder / "generator.safetensors", generator, {})
    write_encoder(folder / "encoder.safetensors", distance.trunk, {})
    return [
        "--generator",
        str(folder / "generator.safetensors"),
        "--distance",
        f"simclr:{folder / 'encoder.safetensors'}",
    ]


def groups_in(folder: Path, generator: Generator, distance: PerceptualDistance, **changes: int) -> Groups:
    settings = {"clusters": 3, "images": 96, "seed": 0} | changes
    return open_groups(generator, distance.trunk, folder=folder, ranks=ALONE, **settings)


def posed(digits: Digits32, items: Tensor, turn: float = 0.0) -> Tensor:
    jitters = white_on_black(digits.jitters(items))
    return render(digits.digits[jitters.digit], jitters._replace(angle=jitters.angle / 2 + turn))


def test_after_training_poses_matter_less_than_what_is_shown(tmp_path: Path) -> None:
    """A held-out digit turned by 40 degrees is nearer to itself than to others; before, hardly."""
    torch.manual_seed(0)
    trained = Descriptor(EncoderConfig((8, 16, 24, 32), compared=2))
    digits = Digits32("held_out", copies=1, seed=4)
    items = torch.arange(0, 1000, 10)
    first, second = (from_uint8(posed(digits, items, turn)) for turn in (0.0, 0.7))

    @torch.no_grad()
    def found() -> float:
        """Share of digits whose other picture is among the nearest tenth."""
        trained.eval()
        distances = torch.cdist(trained(first), trained(second))
        return float(((distances < distances.diagonal()[:, None]).sum(1) < 10).float().mean())

    before = found()
    recipe = EncoderTrainConfig(
        out=tmp_path, pool_images=1000, batch_size=64, total_images=64 * 60, temperature=0.1, lr=0.005, recolour=0.0
    )
    pool = posed(Digits32("train", copies=1, seed=3), torch.arange(0, 4000, 4))
    trained.train()
    with RunDirectory(tmp_path, {}) as directory:
        fit(recipe, directory, pool, ALONE, trained, posed_views, contrast)
    after = found()
    assert after > before + 0.15, (before, after)


def test_views_are_functions_of_seed_and_index_and_move_things() -> None:
    torch.manual_seed(1)
    images, config = torch.rand(4, 3, 16, 16) * 2 - 1, EncoderTrainConfig(recolour=0.0, blur=0.0, crop_scale=1.0)
    together = posed_views(images, config, [5, 2, 9, 7])
    torch.testing.assert_close(posed_views(images[1:3], config, [2, 9]), together[1:3])
    assert not torch.allclose(posed_views(images[1:3], replace(config, seed=1), [2, 9]), together[1:3])
    blob = torch.zeros(200, 3, 32, 32)
    blob[:, :, 10:22, 14:18] = 1.0
    spread = posed_views(blob, config, list(range(200)))
    weight = spread.sum((1, 2, 3))
    place = (spread.sum((1, 2)) * torch.arange(32.0)).sum(1) / weight
    assert 1.0 < float(place.std()) < 4.0  # shifts of at most 4 pixels, times the scale
    assert float(weight.max() / weight.min()) > 2.5  # scales from 0.67 to 1.49
    away = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")).flatten(1)
    shares = spread[:, 0].flatten(1) / spread[:, 0].sum((1, 2))[:, None]
    centred = away - (shares @ away.T)[:, :, None]
    axes = torch.linalg.eigvalsh((shares[:, None] * centred) @ centred.mT).sqrt()
    slender = axes[:, 1] / axes[:, 0]
    # A bar of 12 by 4 pixels keeps its proportions however it is turned and scaled; sheared and stretched, it does not.
    assert float(slender.quantile(0.9) / slender.quantile(0.1)) > 1.4


def test_groups_are_those_of_k_means_and_are_cached(
    generator: Generator, distance: PerceptualDistance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = groups_in(tmp_path, generator, distance)
    pool = from_uint8(sample_images(generator, range(96), seed=0))
    with torch.no_grad():
        described = groups.descriptor(pool)
    assert described.shape == (96, DIM)
    torch.testing.assert_close(described.norm(dim=1), torch.ones(96))
    model = KMeans(3, n_init=10, random_state=0).fit(described.double().numpy())
    assert torch.equal(groups(pool).argmax(1), torch.from_numpy(model.labels_).long())
    assert len(groups(pool).argmax(1).unique()) == 3
    monkeypatch.setattr(training, "fit", None)  # it is not trained again
    again = groups_in(tmp_path, generator, distance)
    assert checkpoint.digest(again.state_dict()) == checkpoint.digest(groups.state_dict())
    assert all(not parameter.requires_grad for parameter in distance.parameters())  # it was a copy that learned


def test_an_interrupted_descriptor_ends_the_same(
    generator: Generator, distance: PerceptualDistance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "BATCH", 16)
    whole = groups_in(tmp_path / "whole", generator, distance)
    views, calls = training.posed_views, []

    def stopping(*args: object) -> Tensor:
        calls.append(1)
        if len(calls) == 7:
            raise Interrupted("as by a signal", 2)
        return views(*args)

    monkeypatch.setattr(training, "posed_views", stopping)
    with pytest.raises(Interrupted):
        groups_in(tmp_path / "cut", generator, distance)
    assert not (tmp_path / "cut" / training.GROUPS).exists()
    resumed = groups_in(tmp_path / "cut", generator, distance)
    assert checkpoint.digest(resumed.state_dict()) == checkpoint.digest(whole.state_dict())


def test_images_choose_their_group_and_modes_start_inside_it(
    generator: Generator, distance: PerceptualDistance, tmp_path: Path
) -> None:
    config = AlignTrainConfig(
        input_size=16, flow_size=4, channel_max=8, channel_multiplier=2.0, cutoff=4, components=0, origin="sample",
        init_images=24, clusters=3, assignment="descriptor",
    )  # fmt: skip
    objective = Objective(config, generator, distance)
    objective.groups = groups_in(tmp_path, generator, distance)
    samples = objective.samples(range(24), STREAM)
    w, images = samples.w, samples.images
    directions = pca(generator, 60, 0)
    choice = objective.choose(SpatialTransformer(config.transformer()), Mode(directions, 3), samples, 0.0)
    assert torch.equal(choice.cluster, objective.groups(images).argmax(1))
    assert not choice.flipped.any()
    levels = distance.features(images)
    rows = torch.cat([level.flatten(1) / level[0, 0].numel() ** 0.5 for level in levels], 1).double()
    expected = []
    for k in range(3):
        members = [i for i in range(24) if int(choice.cluster[i]) == k]
        assert members  # or it would show little
        nearness = -objective.groups(images)[:, k]
        inner = sorted(members, key=lambda i: float(nearness[i]))[: (len(members) + 1) // 2]
        middle = rows[inner].mean(0)
        expected.append(min(inner, key=lambda i: float((rows[i] - middle).square().sum())))
    torch.testing.assert_close(starting_modes(objective, directions)["origins"], w[expected], rtol=1e-5, atol=1e-6)


def test_a_run_with_a_descriptor_and_the_same_on_two_ranks(given: list[str], tmp_path: Path) -> None:
    with one_thread():
        done = command("train", *TINY, *given, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    aligner = load_aligner(tmp_path / "one")
    assert isinstance(aligner.classifier, Groups)
    assert aligner.facts["trained_on"] == given[1]
    groups = Groups.from_shape(aligner.classifier.shape())
    groups.load_state_dict(checkpoint.read(tmp_path / "one" / training.GROUPS)[0])
    torch.manual_seed(2)
    images = torch.rand(6, 3, 20, 20) * 2 - 1  # of another size, as pictures are
    assert torch.equal(aligner.align(images).cluster, groups.eval()(reduced(images, 16)).argmax(1))
    assert len(aligner.mode().unique(dim=0)) == 3
    both = run_torchrun(2, "triptych_gangealing.cli", "train", *TINY, *given, "--out", str(tmp_path / "two"))
    assert both.returncode == 0, both.stderr
    kept = [checkpoint.content_sha256(tmp_path / run / training.GROUPS) for run in ("one", "two")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flips"], "assignment descriptor, flips"),
        (["--distance", "lpips"], "assignment descriptor, distance lpips"),
        (["--descriptor-images", "0"], "descriptor_images 0: expected a number above 0"),
    ],
)
def test_what_a_descriptor_cannot_do_is_refused(
    given: list[str], tmp_path: Path, options: list[str], message: str
) -> None:
    done = command("train", *TINY, *given, "--out", tmp_path, *options)
    fails_with(done, message, done.returncode)
    assert done.returncode in (1, 2)
