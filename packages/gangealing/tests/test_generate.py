"""`triptych-gangealing generate`: grids, images and films against images drawn one by one."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from triptych_common import randomness
from triptych_common.images import image_grid, to_uint8
from triptych_common.testing import run_here
from triptych_gangealing import cli, load_generator
from triptych_gangealing.stylegan2.config import DiscriminatorConfig, GeneratorConfig
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generate import GenerateConfig, film
from triptych_gangealing.stylegan2.generator import Generator, sample_images
from triptych_gangealing.stylegan2.instrument import gan_scores
from triptych_gangealing.stylegan2.weights import EMBEDDED, GENERATORS, read_network, write_network

command = partial(run_here, cli.run)


def make_generator(c_dim: int = 0, noise: float = 0.3) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(c_dim)
        config = GeneratorConfig(8, channel_base=64, channel_max=8, z_dim=6, w_dim=6, mapping_layers=2, c_dim=c_dim)
        generator = Generator(config).requires_grad_(False)
        generator.mapping.w_avg.normal_()
        for name, value in generator.named_parameters():
            if name.endswith("noise_strength"):
                value.fill_(noise)
    return generator.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A generator without classes, one of three, one whose images are all of their styles, and a discriminator."""
    folder = tmp_path_factory.mktemp("networks")
    networks = {
        "plain": make_generator(), "classes": make_generator(c_dim=3), "quiet": make_generator(noise=0.0),
        "discriminator": Discriminator(DiscriminatorConfig(8, channel_base=64, channel_max=8)),
    }  # fmt: skip
    for name, network in networks.items():
        write_network(folder / f"{name}.safetensors", network, {})
    return {name: folder / f"{name}.safetensors" for name in networks}


def generate(generator: object, out: Path, *options: object) -> subprocess.CompletedProcess:
    return command("generate", "--generator", generator, "--out", out, "--device", "cpu", *options)


def generated(generator: Path, out: Path, *options: object) -> np.ndarray:
    """The images written one by one."""
    done = generate(generator, out, "--images", "--json", *options)
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout.splitlines()[-1])["images"])
    paths = sorted(folder.iterdir())
    assert [path.name for path in paths] == [f"{i:06d}.png" for i in range(len(paths))]
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)


def drawn(path: Path, index: int, *, seed: int = 0, psi: float = 1.0, label: int | None = None) -> np.ndarray:
    """One image from its own latent and noise, all by itself."""
    generator = read_network(path).network
    z = randomness.normal(seed, "sample/z", [index], (6,))
    noise = randomness.normal(seed, "sample/noise", [index], (sum(generator.synthesis.noise_sizes),))
    c = None if label is None else torch.eye(3)[[label]]
    w_avg = generator.mapping.w_avg
    w = w_avg + psi * (generator.mapping(z, c) - w_avg)
    image = generator.synthesis(w[:, None].repeat(1, generator.num_ws, 1), noise=noise)
    return to_uint8(image)[0].permute(1, 2, 0).numpy().astype(int)


def test_images_and_grid_are_those_of_their_numbers(files, tmp_path):
    images = generated(files["plain"], tmp_path, "--num-samples", "12", "--seed", "5")
    assert images.shape == (12, 8, 8, 3)
    expected = np.stack([drawn(files["plain"], i, seed=5) for i in range(12)])
    assert np.abs(images - expected).max() <= 1
    assert len(np.unique(expected.reshape(12, -1), axis=0)) == 12
    tiles = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.uint8)
    grid = image_grid(tiles, columns=10)
    enlarged = grid.repeat_interleave(8, 1).repeat_interleave(8, 2).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), enlarged)


def test_an_image_does_not_depend_on_its_batch_or_on_how_many_there_are(files, tmp_path):
    whole = generated(files["plain"], tmp_path / "a", "--num-samples", "7")
    ones = generated(files["plain"], tmp_path / "b", "--num-samples", "7", "--batch-size", "1")
    more = generated(files["plain"], tmp_path / "c", "--num-samples", "9", "--batch-size", "4")
    assert np.abs(whole - ones).max() <= 1
    assert np.abs(whole - more[:7]).max() <= 1
    assert whole.std() > 1
    assert np.abs(whole - generated(files["plain"], tmp_path / "d", "--num-samples", "7", "--seed", "1")).max() > 20


@pytest.mark.parametrize("psi", [0.0, 0.6])
def test_truncation_draws_styles_towards_their_mean(files, tmp_path, psi):
    images = generated(files["quiet"], tmp_path, "--num-samples", "5", "--truncation-psi", psi)
    expected = np.stack([drawn(files["quiet"], i, psi=psi) for i in range(5)])
    assert np.abs(images - expected).max() <= 1
    assert (np.abs(images - images[0]).max() <= 1) == (psi == 0)


def test_a_cutoff_truncates_only_the_first_layers(files, tmp_path):
    whole, none, cut = (
        generated(files["quiet"], tmp_path / name, "--num-samples", "4", "--truncation-psi", "0", *options)
        for name, options in (
            ("all", []),
            ("none", ["--truncation-cutoff", "0"]),
            ("some", ["--truncation-cutoff", "2"]),
        )
    )
    assert np.abs(none - np.stack([drawn(files["quiet"], i) for i in range(4)])).max() <= 1
    assert np.abs(cut - whole).max() > 5
    assert np.abs(cut - none).max() > 5


def test_classes_alternate_or_are_the_given_label(files, tmp_path):
    turn = generated(files["classes"], tmp_path / "turn", "--num-samples", "6", "--batch-size", "4")
    assert np.abs(turn - np.stack([drawn(files["classes"], i, label=i % 3) for i in range(6)])).max() <= 1
    two = generated(files["classes"], tmp_path / "two", "--num-samples", "6", "--batch-size", "4", "--label", "2")
    assert np.abs(two - np.stack([drawn(files["classes"], i, label=2) for i in range(6)])).max() <= 1
    assert np.abs(two - turn).max() > 5


# --- films


def test_a_film_passes_through_its_latents_slowly_and_ends_where_it_began(files):
    config = GenerateConfig(generator=str(files["quiet"]), keyframes=3, frames=8)
    generator = load_generator(files["quiet"])
    frames = film(generator, config)
    assert frames.shape == (24, 3, 42, 42)  # 4 x 4 walks of 8 pixels, 2 apart
    images = [torch.from_numpy(drawn(files["quiet"], i)).permute(2, 0, 1) for i in range(48)]
    for stop in range(3):
        expected = image_grid(torch.stack(images[16 * stop : 16 * stop + 16]).to(torch.uint8), columns=4)
        assert (frames[8 * stop].int() - expected.int()).abs().max() <= 1
    steps = (frames.roll(-1, 0).int() - frames.int()).abs().double().mean(dim=(1, 2, 3)).view(3, 8)
    assert (steps > 0).all()  # the last leads back to the first
    assert (steps[:, [0, 7]].amax(1) < 0.6 * steps[:, 2:6].amin(1)).all()


def test_a_gif_has_every_frame_and_repeats(files, tmp_path):
    done = generate(
        files["quiet"], tmp_path, "--num-samples", "1", "--video", "gif", "--keyframes", "2", "--frames", "5"
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "walk.gif") as gif:
        assert gif.n_frames == 10
        assert gif.size == (294, 294)  # 42 pixels, 7 times enlarged
        assert gif.info["loop"] == 0
        assert gif.info["duration"] == pytest.approx(1000 / 24, abs=10)


def test_an_mp4_has_every_frame_at_its_rate(files, tmp_path):
    done = generate(files["classes"], tmp_path, "--num-samples", "1", "--video", "mp4", "--keyframes", "2", "--frames", "5",
                    "--fps", "12", "--label", "1", "--truncation-psi", "0.8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    with av.open(str(tmp_path / "walk.mp4")) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(video=0))
        assert (len(frames), float(stream.average_rate)) == (10, 12)
        assert (frames[0].width, frames[0].height) == (294, 294)
    assert len({frame.to_ndarray().tobytes() for frame in frames}) == 10


def test_without_pyav_the_remedy_is_named_before_the_work(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    done = generate(files["plain"], tmp_path / "out", "--video", "mp4")
    assert done.returncode == 1
    assert "pip install 'triptych-common[video]'; gif needs none" in done.stderr
    assert not (tmp_path / "out").exists()


# --- options


@pytest.mark.parametrize(("network", "options", "status", "message"), [
    ("classes", ["--label", "3"], 1, "label 3: expected 0..2"),
    ("classes", ["--label", "-1"], 1, "label -1: expected 0..2"),
    ("plain", ["--label", "0"], 1, "label 0: expected none, the generator is unconditional"),
    ("discriminator", [], 1, "holds no generator"),
    ("plain", ["--num-samples", "0"], 2, "num_samples 0: expected at least 1"),
    ("plain", ["--batch-size", "0"], 2, "batch_size 0: expected at least 1"),
    ("plain", ["--video", "avi"], 2, "avi"),
    ("plain", ["--device", "tpu"], 1, "device 'tpu': not available here"),
])  # fmt: skip
def test_a_bad_request_is_one_line_and_leaves_nothing(files, tmp_path, network, options, status, message):
    done = generate(files[network], tmp_path / "out", *options)
    assert done.returncode == status, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "message"), [
    ("digits64", "digits64: no such file or folder, nor an embedded generator ("),
    ("../weights/digits32", "no such file or folder"),
    ("empty", "no finished generator; train one with triptych-gangealing train-gan --out empty"),
    ("text.pkl", "text.pkl"),
])  # fmt: skip
def test_what_is_no_generator_is_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.pkl").write_text("hello")
    done = generate(name, tmp_path / "out")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", GENERATORS)
def test_an_embedded_generator_is_small_knows_its_origin_and_draws(tmp_path, name):
    path = EMBEDDED / f"{name}.safetensors"
    assert path.stat().st_size < 5e6
    generator, facts = read_network(path)
    assert {"data", "seed", "images_seen", "command", "commit", "scores"} <= facts.keys()
    assert (generator.config.resolution, generator.config.c_dim) == (32, 0)
    images = generated(Path(name), tmp_path, "--num-samples", "8", "--truncation-psi", "0.7")
    assert images.shape == (8, 32, 32, 3)
    assert images.std() > 20


@pytest.mark.parametrize("name", GENERATORS)
def test_an_embedded_generator_has_its_recorded_scores(name):
    """Other images than were scored: their interval meets the recorded one, and flat colours are much farther away."""
    _, facts = read_network(EMBEDDED / f"{name}.safetensors")
    recorded = facts["scores"]["frechet"]
    digit = int(name.partition("-")[2]) if "-" in name else None
    images = sample_images(load_generator(name), range(5_000, 6_000))
    found = gan_scores(images, digit).frechet
    assert found.low < recorded["high"]
    assert recorded["low"] < found.high
    flat = images.float().mean((2, 3), keepdim=True).expand_as(images).to(images.dtype)
    assert gan_scores(flat, digit).frechet.value > 5 * found.value
