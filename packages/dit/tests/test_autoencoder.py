"""The autoencoder: against plain diffusers, from any kind of folder, and trained on the command line."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from triptych_common import data
from triptych_common.storage import checkpoint
from triptych_common.testing import fails_with, run_cli, run_signalled, run_torchrun
from triptych_dit.autoencoder import model as module
from triptych_dit.autoencoder.config import AutoencoderTrainConfig
from triptych_dit.autoencoder.model import Autoencoder, load_autoencoder, scaled_sample
from triptych_dit.autoencoder.train import Reconstruction, train_autoencoder
from triptych_dit.testing import random_vae, run_dit
from triptych_dit.weights import LatentSpace

make_vae = partial(random_vae, (8, 8, 16), latent_channels=4, sample_size=16, scaling_factor=0.5, shift_factor=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vae")
    make_vae().save_pretrained(out)
    return out


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("part", "encodes"), [("encoder", True), ("quant_conv", True), ("decoder", False), ("post_quant_conv", False)]
)
def test_the_encoders_digest_is_of_what_latents_depend_on(folder, images, part, encodes):
    """A change anywhere changes the whole's; moments change exactly where the encoder's does."""
    theirs = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        next(getattr(theirs, part).parameters()).mul_(1.5)
    ours, other = load_autoencoder(str(folder)), Autoencoder(theirs, "theirs")
    assert ours.sha256 != other.sha256
    assert (ours.encoder_sha256 == other.encoder_sha256) == (not encodes)
    assert torch.equal(ours.moments(images), other.moments(images)) == (not encodes)


def test_it_does_what_plain_diffusers_does(folder, images):
    ours, plain = load_autoencoder(str(folder)), AutoencoderKL.from_pretrained(folder)
    assert ours.facts() == {
        "spec": str(folder), "sha256": ours.sha256, "encoder_sha256": ours.encoder_sha256, "scale_factor": 0.5,
        "shift_factor": 0.25, "downsampling": 4, "latent_channels": 4, "image_channels": 3,
    }  # fmt: skip
    assert ours.image_channels == 3
    with torch.no_grad():
        posterior = plain.encode(images).latent_dist
        moments = ours.moments(images)
        assert moments.shape == (5, 8, 4, 6)
        torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.logvar], dim=1))
        noise = torch.randn(5, 4, 4, 6)
        z = posterior.mean + posterior.std * noise
        latents = scaled_sample(moments, noise, ours.space)
        torch.testing.assert_close(latents, (z - 0.25) * 0.5)
        torch.testing.assert_close(ours.decode(latents), plain.decode(z).sample.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_channels_are_normalised_as_diffusers_pipelines_do(images):
    """Its formula of encoding and decoding, as in StableDiffusionXLImg2ImgPipeline, for an autoencoder with mean and std."""
    mean, std = (0.1, -0.4, 0.0, 2.0), (0.5, 1.5, 1.0, 3.0)
    plain = make_vae(shift_factor=None, latents_mean=mean, latents_std=std)
    ours = Autoencoder(plain, "given")
    with torch.no_grad():
        z = plain.encode(images).latent_dist.mode()
        latents_mean, latents_std = (torch.tensor(numbers).view(1, 4, 1, 1) for numbers in (mean, std))
        latents = (z - latents_mean) * plain.config.scaling_factor / latents_std
        decoded = plain.decode(latents * latents_std / plain.config.scaling_factor + latents_mean).sample.clamp(-1, 1)
    torch.testing.assert_close(scaled_sample(ours.moments(images), torch.zeros(5, 4, 4, 6), ours.space), latents)
    torch.testing.assert_close(ours.decode(latents), decoded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.space.unscaled(ours.space.scaled(z)), z)
    assert LatentSpace.of(ours.facts()) == ours.space
    for wrong in ({"latents_mean": (0.0,) * 3}, {"latents_std": (1.0, 1.0, 0.0, 1.0)}, {"latents_mean": mean}):
        with pytest.raises(ValueError, match=r"autoencoder given: .*latents_"):
            Autoencoder(make_vae(**({"shift_factor": None} if "latents_mean" not in wrong else {}), **wrong), "given")


def test_nothing_depends_on_the_batch(folder, images, monkeypatch):
    autoencoder = load_autoencoder(str(folder))
    moments = autoencoder.moments(images)
    ones = torch.cat([autoencoder.moments(image[None]) for image in images])
    torch.testing.assert_close(ones, moments, atol=1e-5, rtol=1e-5)
    latents = scaled_sample(moments, torch.zeros(5, 4, 4, 6), autoencoder.space)
    decoded = autoencoder.decode(latents)
    monkeypatch.setattr(module, "_DECODED_PIXELS", 2 * 16 * 24)  # two, two, one
    torch.testing.assert_close(autoencoder.decode(latents), decoded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_for_encoding_alone(folder, images, dtype):
    full, low = load_autoencoder(str(folder)), load_autoencoder(str(folder), dtype=dtype)
    assert low.sha256 == full.sha256
    moments = low.moments(images)
    assert moments.dtype == torch.float32
    error = (moments - full.moments(images)).abs().max()
    assert 0 < error < 0.1
    latents = torch.randn(2, 4, 4, 4)
    assert torch.equal(low.decode(latents), full.decode(latents))


@pytest.mark.parametrize("options", [
    {"variant": "fp16"}, {"max_shard_size": "20KB"}, {"variant": "fp16", "max_shard_size": "20KB"},
    {"safe_serialization": False, "variant": "fp16"},
])  # fmt: skip
def test_variants_and_shards_are_read(tmp_path, options):
    vae = make_vae()
    vae.save_pretrained(tmp_path, **options)
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    assert load_autoencoder(str(tmp_path)).sha256 == Autoencoder(vae, "given").sha256


def test_the_hash_is_of_weights_not_of_files(folder, tmp_path):
    sha256 = load_autoencoder(str(folder)).sha256
    vae = AutoencoderKL.from_pretrained(folder)
    vae.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert (tmp_path / "bin" / "diffusion_pytorch_model.bin").exists()
    assert load_autoencoder(str(tmp_path / "bin")).sha256 == sha256
    vae.register_to_config(scaling_factor=2.0)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")  # as a pipeline has it
    again = load_autoencoder(str(tmp_path / "pipeline"))
    assert (again.sha256, again.space.scale_factor) == (sha256, 2.0)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-6
    assert Autoencoder(vae, "changed").sha256 != sha256


def test_runaway_log_variances_are_bounded(images):
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.bias[4:] = torch.tensor([1e3, -1e3, 0, 0])
    log_variance = Autoencoder(vae, "wild").moments(images)[:, 4:]
    assert (log_variance[:, 0].unique(), log_variance[:, 1].unique()) == (20, -30)


def hub_cache(tmp_path, monkeypatch) -> None:
    """A hub's cache with the autoencoder of someone/pipeline."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--pipeline" / "snapshots" / ("0" * 40)
    make_vae().save_pretrained(snapshot / "vae")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def test_what_only_a_file_names_is_looked_up_without_the_network(tmp_path, monkeypatch):
    hub_cache(tmp_path, monkeypatch)
    asked = []

    def unreachable(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    assert load_autoencoder("someone/pipeline", download=False).latent_channels == 4
    for absent in ("someone/else", "not/a/hub/name", "../someone"):
        with pytest.raises(OSError, match="neither a folder here nor in the hub's cache, and nothing is fetched"):
            load_autoencoder(absent, download=False)
    dry = run_dit("encode", "--image-size", 28, "--no-flips", "--vae", "someone/else", "--dry-run")
    fails_with(dry, "nothing is fetched")
    assert asked == []


def test_a_hub_name_is_read_from_the_cache_when_offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub_cache(tmp_path, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_autoencoder("someone/pipeline").latent_channels == 4
    for absent in ("someone/else", "not/a/hub/name"):
        with pytest.raises(OSError, match=rf"autoencoder {absent}: no such folder here, and not available") as caught:
            load_autoencoder(absent)
        assert "\n" not in str(caught.value)


class Pwned:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda f: (f / "config.json").unlink(), "no config.json there; expected a folder"),
    (lambda f: edit(f, _class_name="UNet2DModel"), "its config says UNet2DModel, expected AutoencoderKL"),
    (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
    (lambda f: edit(f, scaling_factor=0.0), "scale_factor 0.0: expected a number above 0"),
    (lambda f: edit(f, latent_channels=5), "size mismatch"),
    (lambda f: edit(f, layers_per_block=2), "weights do not fit its config"),
    (lambda f: truncate(f / module.WEIGHTS[0]), "cannot be read"),
    (lambda f: (f / module.WEIGHTS[0]).unlink(), f"no {module.WEIGHTS[0]} beside"),
    (lambda f: pickled(f), "cannot be read"),
])  # fmt: skip
def test_a_folder_that_cannot_be_used_is_one_clear_line(folder, tmp_path, spoil, message):
    for name in ("config.json", module.WEIGHTS[0]):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_autoencoder(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def pickled(folder: Path) -> None:
    (folder / module.WEIGHTS[0]).unlink()
    torch.save({"encoder.conv_in.weight": Pwned()}, folder / module.WEIGHTS[1])


def test_images_and_latents_that_do_not_fit_are_refused(folder):
    autoencoder = load_autoencoder(str(folder))
    with pytest.raises(ValueError, match=r"\(1, 16, 16\): autoencoder .* takes 3 channels"):
        autoencoder.moments(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="sides that are multiples of 4"):
        autoencoder.moments(torch.zeros(2, 3, 16, 18))
    with pytest.raises(ValueError, match="latents have 3 channels"):
        autoencoder.decode(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="expected float32, bfloat16 or float16"):
        load_autoencoder(str(folder), dtype=torch.float64)


def test_without_diffusers_the_error_names_the_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'triptych-dit\[latents\]'"):
        load_autoencoder(str(folder))


def test_the_loss_is_an_error_per_pixel_and_a_divergence_per_latent_value(images):
    from torch.distributions import Normal, kl_divergence

    vae, noise = make_vae(), torch.randn(5, 4, 4, 6)
    with torch.no_grad():
        error, kl = Reconstruction(vae)(images, noise)
        posterior = vae.encode(images).latent_dist
        back = vae.decode(posterior.mean + posterior.std * noise).sample
    expected = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl, expected)
    assert float(error) == pytest.approx(float(np.mean((back - images).numpy() ** 2)), rel=1e-5)


TINY = ["--block-out-channels", "4", "4", "--norm-num-groups", "4", "--latent-channels", "2", "--batch-size", "16",
        "--total-images", "256", "--warmup-images", "32", "--lr", "1e-2", "--checkpoint-every", "8", "--log-every", "4",
        "--ema-half-life-images", "32"]  # fmt: skip
STEPS = 16


def train(out: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return run_cli("triptych_dit.cli", "autoencoder", *TINY, "--out", str(out), *options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    done = train(out, "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["vae"] == str(out / "vae")
    assert printed["last"]["step"] == STEPS
    written = json.loads((out / "vae" / "config.json").read_text())
    assert printed["autoencoder"]["scale_factor"] == written["scaling_factor"]
    return out


def test_training_ends_in_a_folder_that_plain_diffusers_opens(whole):
    vae = AutoencoderKL.from_pretrained(whole / "vae")
    assert (vae.config.in_channels, vae.config.sample_size, vae.config.latent_channels) == (1, 28, 2)
    train_set, held_out = data.load("mnist5k", "train"), data.load("mnist5k", "held_out")
    torch.manual_seed(5)
    with torch.no_grad():
        posterior = vae.encode(train_set.scaled(slice(None, None, 4))).latent_dist  # other images than the run measured
        scaled = posterior.sample() * vae.config.scaling_factor
        back = vae.decode(vae.encode(held_out.scaled()).latent_dist.mode()).sample
    assert float(scaled.std()) == pytest.approx(1, rel=0.01)
    untaught = float((held_out.scaled() - train_set.scaled().mean(0)).square().mean())  # what the mean digit would get
    assert float((back - held_out.scaled()).square().mean()) < untaught
    autoencoder = load_autoencoder(str(whole))  # the run's folder will do
    assert json.loads((whole / "autoencoder.json").read_text())["autoencoder"]["sha256"] == autoencoder.sha256
    assert (whole / "reconstructions.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_and_resumed_it_ends_in_the_same_weights(whole, tmp_path):
    stopped = run_signalled(12, signal.SIGTERM, "triptych_dit.cli", "autoencoder", *TINY, "--out", tmp_path)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "stopped at step 12 of 16" in stopped.stderr
    assert not (tmp_path / "vae").exists()
    assert train(tmp_path).returncode == 0
    name = f"checkpoints/step-{STEPS:08d}.safetensors"
    (ours, state), (theirs, their_state) = checkpoint.read(tmp_path / name), checkpoint.read(whole / name)
    assert state == their_state
    assert [key for key, value in theirs.items() if not torch.equal(value, ours[key])] == []
    config = "vae/config.json"
    assert (tmp_path / config).read_bytes() == (whole / config).read_bytes()


@pytest.mark.parametrize(
    "lost", [None, "autoencoder.json", "vae/config.json", f"vae/{module.WEIGHTS[0]}", "reconstructions.png"]
)
def test_a_repeated_command_makes_what_was_lost_again_and_leaves_the_rest(whole, tmp_path, lost):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    names = ["autoencoder.json", "vae/config.json", f"vae/{module.WEIGHTS[0]}", "reconstructions.png"]
    if lost:
        content = (run / lost).read_bytes()
        (run / lost).write_bytes(content[: len(content) // 2])
    assert run_dit("autoencoder", *TINY, "--out", run).returncode == 0
    unchanged = lost is None
    for name in names:
        assert ((run / name).stat().st_mtime_ns == (whole / name).stat().st_mtime_ns) == unchanged
    written, expected = (load_autoencoder(str(folder)) for folder in (run, whole))
    assert (written.sha256, written.space.scale_factor) == (
        expected.sha256,
        pytest.approx(expected.space.scale_factor, rel=1e-5),
    )
    assert (run / "reconstructions.png").read_bytes() == (whole / "reconstructions.png").read_bytes()


def test_any_checkpoint_is_an_autoencoder(whole, tmp_path):
    newest = checkpoint.steps_in(whole / "checkpoints")[-1]
    ours, theirs = load_autoencoder(str(newest)), load_autoencoder(str(whole))
    assert ours.sha256 == theirs.sha256
    assert ours.space.scale_factor == pytest.approx(theirs.space.scale_factor, rel=0.1)  # of fewer images
    shutil.copytree(whole / "checkpoints", tmp_path / "run/checkpoints")
    assert load_autoencoder(str(tmp_path / "run")).sha256 == theirs.sha256


def test_own_pictures_of_any_size(tmp_path):
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 23 + i, 3), dtype=np.uint8)
        (tmp_path / "photos" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / "a" / f"{i}.png")
    (tmp_path / "photos" / "a" / "broken.png").write_bytes(b"no picture")
    options = ("--preset", "digits-smoke", "--total-images", 16, "--batch-size", 8, "--device", "cpu")
    done = run_dit("autoencoder", *options, "--data", tmp_path / "photos", "--out", tmp_path / "vae")
    assert done.returncode == 0, done.stderr
    assert "5 pictures, --image-size 20, channels 3 (colour, 23x20 to 26x20 pixels)" in done.stdout
    assert "left out 1 of 5 images" in done.stdout
    found = load_autoencoder(str(tmp_path / "vae"))
    assert found.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 16, 16)
    config = json.loads((tmp_path / "vae/config.json").read_text())
    assert config["config"]["warmup_images"] == 2  # of 256 in 2,048
    assert config["contents"]["data"]["classes"][0]["images"] == 4


def test_two_ranks_train_as_one_does(whole, tmp_path):
    done = run_torchrun(2, "triptych_dit.cli", "autoencoder", *TINY, "--out", str(tmp_path), "--micro-batch", "4")
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(metrics(tmp_path), metrics(whole), strict=True):
        for name in ("mse", "kl", "grad_norm"):  # Adam makes much of rounding in gradients that are next to nothing
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2), ours["step"]
    ours, theirs = (load_autoencoder(str(out)).space.scale_factor for out in (tmp_path, whole))
    assert ours == pytest.approx(theirs, rel=0.02)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("changes", "message"), [
    ({"block_out_channels": (8, 8, 8, 8)}, "images of 28x28, which 4 resolutions do not halve evenly"),
    ({"block_out_channels": (6,)}, r"block_out_channels \(6,\): expected multiples of norm_num_groups 8"),
    ({"kl_weight": -1.0}, "kl_weight -1.0: expected a number of at least 0"),
    ({"lr": 0.0}, "lr 0.0: expected a number above 0"),
    ({"grad_clip": 0.0}, "grad_clip 0.0: expected a number above 0, or None"),
    ({"warmup_images": 10**9}, "warmup_images 1000000000: expected 0.."),
    ({"data": "nowhere"}, "data 'nowhere': expected mnist5k, mnist"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_autoencoder(AutoencoderTrainConfig(out=tmp_path, **changes))
    assert list(tmp_path.iterdir()) == []
