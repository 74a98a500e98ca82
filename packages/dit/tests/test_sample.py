"""Sampling: conditions once a class, guidance, schedulers, latents, files; on batches, ranks and bad requests."""

import json
import subprocess
import sys
import weakref
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from triptych_common.cli import main
from triptych_common.images import to_uint8
from triptych_common.samplers import evaluations, guided
from triptych_common.testing import fails_with, run_torchrun
from triptych_dit import DiTConfig, testing
from triptych_dit.autoencoder.model import load_autoencoder
from triptych_dit.cli import COMMANDS
from triptych_dit.config import BLOCK_DESIGNS
from triptych_dit.interop import load_any
from triptych_dit.sample import SampleConfig, classes_of, image_name, read_batches, read_npz, write_npz
from triptych_dit.sampling import SamplerSettings, bind, decoded, sample_images, trajectory
from triptych_dit.testing import random_vae, run_dit
from triptych_dit.weights import TrainedModel, make_diffusion, save_model

SMALL = DiTConfig((4, 6), 4, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=5)
PIXELS = replace(SMALL, in_channels=3)
NAMES = ["tabby, tabby cat", "great dane/dog", "c", "d", "e"]
random_model = partial(testing.random_model, std=0.15)


def trained(config=PIXELS, **facts):
    return TrainedModel(random_model(config), make_diffusion(config, "noise"), facts)


def save_vae(folder: Path, seed: int = 0) -> Path:
    random_vae((8, 8), seed=seed, sample_size=8, scaling_factor=0.5, shift_factor=0.25).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def latent_model(vae, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "latent.safetensors"
    facts = {"predict": "noise", "autoencoder": load_autoencoder(str(vae)).facts(), "class_names": NAMES}
    save_model(path, random_model(SMALL, dtype=torch.float32), facts)
    return path


def inputs(batch=7):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 4, 6, generator=rng, dtype=torch.float64)
    return x, torch.full((batch,), 417), torch.tensor([3, 0, 3, 3, 1, 0, 3])[:batch]


@pytest.mark.parametrize("design", BLOCK_DESIGNS)
@pytest.mark.parametrize("options", [
    {}, {"guidance_scale": 1.5}, {"guidance_scale": 4.0, "guidance_channels": 3, "guidance_interval": (0, 500)},
    {"guidance_scale": 4.0, "guidance_interval": (500, 999)},
])  # fmt: skip
def test_conditions_once_a_class_give_what_once_a_sample_gives(design, options):
    model, settings = random_model(replace(SMALL, block_design=design)), SamplerSettings(**options)
    x, t, y = inputs()
    plain = guided(
        model, y, model.config.null_label, settings.guidance_scale,
        guidance_channels=settings.guidance_channels, interval=settings.guidance_interval,
    )  # fmt: skip
    mixtures = torch.nn.functional.one_hot(y, 5).double()
    for labels in (y, mixtures):
        torch.testing.assert_close(bind(model, labels, 7, settings)(x, t), plain(x, t), rtol=0, atol=1e-12)


def test_each_class_is_embedded_once():
    model, embedded = random_model(SMALL), []
    model.y_embedder.register_forward_hook(lambda module, given, out: embedded.append(len(out)))
    x, t, y = inputs()
    bind(model, y, 7, SamplerSettings())(x, t)
    bind(model, y, 7, SamplerSettings(guidance_scale=2.0))(x, t)
    assert embedded == [3, 4]  # classes 0, 1, 3; and the null label


def test_a_mixture_is_a_class_whose_embedding_is_the_mean():
    model, (x, t, _) = random_model(SMALL), inputs()
    weights = torch.tensor([[0.25, 0, 0, 0.75, 0]], dtype=torch.float64)
    mixed = bind(model, weights.expand(7, -1), 7, SamplerSettings(guidance_scale=2.0))(x, t)
    table = model.y_embedder.embedding_table.weight
    table[1] = 0.25 * table[0] + 0.75 * table[3]
    expected = bind(model, torch.full((7,), 1), 7, SamplerSettings(guidance_scale=2.0))(x, t)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "EulerAncestralDiscreteScheduler", "dpmsolvermultistep"])
def test_a_sample_depends_on_seed_and_index_alone(sampler):
    settings = SamplerSettings(sampler=sampler, num_inference_steps=6, guidance_scale=1.5)
    model, labels = trained(), torch.tensor([0, 1, 1, 4])
    whole = sample_images(model, labels, settings, seed=3)
    parts = [sample_images(model, labels[i : i + 1], settings, seed=3, first_index=i) for i in range(4)]
    # Euler keeps its state in float32, which makes of differences in the last place what float32 makes of them.
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4 if sampler.startswith("Euler") else 1e-9)
    assert float((sample_images(model, labels, settings, seed=4) - whole).abs().max()) > 0.1


def test_latents_are_not_clipped_and_are_decoded_as_diffusers_does(vae):
    model = trained(SMALL, autoencoder=load_autoencoder(str(vae)).facts())
    settings, labels = SamplerSettings(num_inference_steps=6), torch.tensor([0, 1])
    steps = list(trajectory(model, labels, range(2), settings))
    assert float(steps[-1].x.abs().max()) > 1  # the model's space
    images = sample_images(model, labels, settings)
    assert images.shape == (2, 3, 8, 12)
    plain = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        expected = plain.decode(steps[-1].x.float() / 0.5 + 0.25).sample.clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    pixels = list(trajectory(trained(), labels, range(2), settings))
    assert max(float(step.x_0.abs().max()) for step in pixels) <= 1
    assert torch.equal(decoded(trained(), pixels[-1].x), pixels[-1].x)


def test_an_unconditional_model_samples_by_count():
    model = trained(replace(PIXELS, num_classes=0))
    settings = SamplerSettings(num_inference_steps=3)
    images = sample_images(model, None, settings, count=3)
    torch.testing.assert_close(sample_images(model, None, settings, count=1, first_index=2), images[2:])
    with pytest.raises(ValueError, match="takes none, it is unconditional"):
        sample_images(model, torch.tensor([0]), settings)
    with pytest.raises(ValueError, match="takes one a sample"):
        sample_images(trained(), None, settings, count=1)


def test_nan_is_reported_not_written():
    model = trained()
    model.model.final_layer.linear.bias[0] = torch.nan
    with pytest.raises(ValueError, match="sampling gave NaN or infinity"):
        sample_images(model, torch.tensor([0]), SamplerSettings(num_inference_steps=2))


def test_evaluations_are_counted():
    assert evaluations(SamplerSettings(num_inference_steps=7), trained().diffusion) == 7
    assert evaluations(SamplerSettings(sampler="heun", num_inference_steps=7), trained().diffusion) == 13


def test_npz_is_what_numpy_reads_and_only_one_batch_is_in_memory(tmp_path):
    path, made = tmp_path / "x.npz", []
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 3, 5, 7), generator=rng, dtype=torch.uint8)

    def batches():
        for batch in images.split(4):
            assert all(reference() is None for reference in made[:-1])  # the last is still held while this one is made
            batch = batch.clone()
            made.append(weakref.ref(batch))
            yield batch

    write_npz(path, batches(), 23, torch.arange(23))
    with np.load(path) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        assert np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy())
        assert arrays["arr_1"].tolist() == list(range(23))
    assert torch.equal(torch.cat(list(read_batches(path, 10))), images)
    assert torch.equal(read_npz(path)[0], images)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.npz"
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    write_npz(path, [images], 4)
    before = path.read_bytes()
    for batches, count in (([images], 5), ([images, images[:, :, :1]], 8)):
        with pytest.raises(ValueError, match=r"images"):
            write_npz(path, batches, count)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match="damaged one"):
        list(read_batches(path, 2))


def command(model: Path, out: Path, *options: str) -> list[str]:
    return ["sample", "--checkpoint", str(model), "--out", str(out), "--num-samples", "20",
            "--num-inference-steps", "3", "--batch-size", "8", "--device", "cpu", *options]  # fmt: skip


def test_two_ranks_write_what_one_writes_and_images_resume(latent_model, tmp_path):
    """Latents, guidance and a scheduler that draws noise."""
    options = ["--sampler", "euleranc", "--guidance-scale", "1.5", "--guidance-channels", "3", "--images"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main("triptych-dit", COMMANDS, command(latent_model, one, *options)) == 0
    done = run_torchrun(2, "triptych_dit.cli", *command(latent_model, two, *options, "--batch-size", "3"))
    assert done.returncode == 0, done.stderr
    (a, labels), (b, _) = read_npz(one / "samples.npz"), read_npz(two / "samples.npz")
    assert labels.tolist() == [i % 5 for i in range(20)]
    assert float(a.float().std()) > 1
    assert int((a.int() - b.int()).abs().max()) <= 1
    for out, images in ((one, a), (two, b)):
        files = sorted((out / "images").iterdir())
        assert [path.name for path in files[:3]] == ["000000-tabby.png", "000001-great-dane-dog.png", "000002-c.png"]
        assert len(files) == 20
        for image, path in zip(images, files, strict=True):
            assert np.array_equal(np.asarray(Image.open(path)), image.permute(1, 2, 0).numpy())
    kept, lost = one / "images/000000-tabby.png", one / "images/000002-c.png"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert main("triptych-dit", COMMANDS, command(latent_model, one, *options)) == 0
    assert lost.exists()
    assert kept.stat().st_mtime_ns == before


def test_a_moved_autoencoder_is_named_and_another_refused(latent_model, vae, tmp_path, capsys):
    def run(*options):
        status = main("triptych-dit", COMMANDS, command(model, tmp_path / "out", *options))
        return status, capsys.readouterr().err

    model, moved = tmp_path / "model.safetensors", tmp_path / "moved"
    facts = load_autoencoder(str(vae)).facts()
    lost = {**facts, "spec": str(tmp_path / "nowhere")}
    save_model(model, random_model(SMALL, dtype=torch.float32), {"predict": "noise", "autoencoder": lost})
    status, error = run()
    assert status == 1
    assert "pass --vae with the folder" in error
    assert not (tmp_path / "out").exists()  # a request that cannot work leaves nothing
    status, error = run("--vae", str(save_vae(tmp_path / "other", seed=1)))
    assert status == 1
    assert f"the model's has {facts['encoder_sha256'][:12]}" in error
    save_vae(moved)
    assert run("--vae", str(moved))[0] == 0


def test_another_decoder_of_the_same_encoder_is_accepted(latent_model, vae, tmp_path, capsys):
    """As stabilityai's ft-MSE and ft-EMA: latents are the same, pictures are not; another encoder is another model's."""
    for name in ("decoder", "encoder"):
        theirs = AutoencoderKL.from_pretrained(vae)
        with torch.no_grad():
            next(getattr(theirs, name).parameters()).mul_(1.5)
        theirs.save_pretrained(tmp_path / name)
    words = command(latent_model, tmp_path / "out", "--num-samples", "2")
    assert main("triptych-dit", COMMANDS, words) == 0
    first, _ = read_npz(tmp_path / "out/samples.npz")
    again = [*words, "--vae", str(tmp_path / "decoder")]
    assert main("triptych-dit", COMMANDS, again) == 1  # another request, so nothing is lost
    assert "decoder=" in capsys.readouterr().err
    again[again.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    assert main("triptych-dit", COMMANDS, again) == 0
    other, _ = read_npz(tmp_path / "other/samples.npz")
    assert not torch.equal(first, other)
    again[-1], again[again.index(str(tmp_path / "other"))] = str(tmp_path / "encoder"), str(tmp_path / "third")
    assert main("triptych-dit", COMMANDS, again) == 1
    assert "pass --vae with the folder" in capsys.readouterr().err


def test_a_decoder_of_another_scale_is_refused(latent_model, vae, tmp_path, capsys):
    """Its weights alone would do; its latents are not the model's."""
    theirs = AutoencoderKL.from_pretrained(vae)
    theirs.register_to_config(scaling_factor=2 * theirs.config.scaling_factor)
    theirs.save_pretrained(tmp_path / "vae")
    words = command(latent_model, tmp_path / "out", "--num-samples", "2", "--vae", str(tmp_path / "vae"))
    assert main("triptych-dit", COMMANDS, words) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "vae: scale_factor is " in message
    assert "pass --vae with the folder" in message


@pytest.mark.parametrize("channels", [4, 16])
def test_latents_of_an_unknown_autoencoder_are_no_pictures(channels, tmp_path, capsys):
    config, model = replace(SMALL, in_channels=channels), tmp_path / "model.safetensors"
    save_model(model, random_model(config, dtype=torch.float32), {"predict": "noise"})
    words = command(model, tmp_path / "out", "--num-samples", "2")
    assert main("triptych-dit", COMMANDS, words) == 1
    assert f"samples have {channels} channels, which are no picture's, and no autoencoder" in capsys.readouterr().err
    for latents in (channels, channels + 1):
        vae = random_vae((8, 8), latent_channels=latents, scaling_factor=0.5, latents_std=(2.0,) * latents)
        vae.save_pretrained(tmp_path / f"vae{latents}")
    assert main("triptych-dit", COMMANDS, [*words, "--vae", str(tmp_path / f"vae{channels + 1}")]) == 1
    expected = f"has {channels + 1} latent channels, the model {channels}; pass another --vae"
    assert expected in capsys.readouterr().err
    assert main("triptych-dit", COMMANDS, [*words, "--vae", str(tmp_path / f"vae{channels}")]) == 0
    images, _ = read_npz(tmp_path / "out/samples.npz")
    assert images.shape == (2, 3, 8, 12)
    trained = load_any(model, vae=str(tmp_path / f"vae{channels}"))
    plain = AutoencoderKL.from_pretrained(tmp_path / f"vae{channels}")
    settings = SamplerSettings(num_inference_steps=3)
    latents = list(trajectory(trained, torch.tensor([0, 1]), range(2), settings, seed=0))[-1].x
    with torch.no_grad():
        theirs = plain.decode(latents * 2.0 / 0.5).sample.clamp(-1, 1)
    assert int((images.int() - to_uint8(theirs).int()).abs().max()) <= 1


def test_classes_have_names(latent_model, tmp_path, capsys):
    words = command(latent_model, tmp_path / "out", "--num-samples", "4", "--labels")
    assert main("triptych-dit", COMMANDS, [*words, "Tabby  Cat", "great dane/dog", "4"]) == 0
    assert read_npz(tmp_path / "out/samples.npz")[1].tolist() == [0, 1, 4, 0]
    capsys.readouterr()
    assert main("triptych-dit", COMMANDS, [*words, "taby"]) == 1
    assert "label 'taby': no class of the model has this name; did you mean 'tabby'?" in capsys.readouterr().err
    walk = ["walk", "--checkpoint", str(latent_model), "--out", str(tmp_path / "walk"), "--blend", "c:1", "zebu:1"]
    assert main("triptych-dit", COMMANDS, walk) == 1
    assert "label 'zebu': no class of the model has this name; its classes are tabby" in capsys.readouterr().err


def test_labels_that_the_data_never_had_are_refused():
    model = trained(class_names=["cat", "dog", "bird"])
    with pytest.raises(ValueError, match="label 3: the model's data had 3 classes, cat, dog, bird; it is untrained"):
        sample_images(model, torch.tensor([0, 3]), SamplerSettings(num_inference_steps=2))
    config = SampleConfig(num_samples=4)
    assert classes_of(config, model) == (0, 1, 2)
    assert classes_of(config, trained()) == (0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"label 'cat': the model has no names of classes; pass numbers, 0\.\.4"):
        classes_of(replace(config, labels=("cat",)), trained())


def test_models_of_earlier_caches_take_their_own_autoencoder_alone(vae, tmp_path, capsys):
    """Before encoders had a digest of their own."""
    facts = {k: v for k, v in load_autoencoder(str(vae)).facts().items() if k != "encoder_sha256"}
    model = tmp_path / "model.safetensors"
    save_model(model, random_model(SMALL, dtype=torch.float32), {"predict": "noise", "autoencoder": facts})
    theirs = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        next(theirs.decoder.parameters()).mul_(1.5)
    theirs.save_pretrained(tmp_path / "decoder")
    words = command(model, tmp_path / "out", "--num-samples", "2")
    assert main("triptych-dit", COMMANDS, [*words, "--vae", str(tmp_path / "decoder")]) == 1
    assert "decoder: sha256 is " in capsys.readouterr().err
    assert main("triptych-dit", COMMANDS, words) == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    changes = {"plain": {}, "unconditional": {"num_classes": 0}, "no-null": {"class_dropout_prob": 0.0}}
    for name, change in changes.items():
        config = replace(SMALL, in_channels=3, **change)
        save_model(folder / name, random_model(config, dtype=torch.float32), {"predict": "noise"})
    return {name: folder / name for name in changes}


@pytest.mark.parametrize(("model", "options", "message"), [
    ("unconditional", ["--guidance-scale", "2"], "this model is unconditional (num_classes=0); use 1.0"),
    ("unconditional", ["--labels", "1"], "labels (1,): this model is unconditional (num_classes=0); leave --labels out"),
    ("no-null", ["--guidance-scale", "2"], "trained without label dropout and has no null label; use 1.0"),
    ("plain", ["--labels", "0", "5"], "label 5 is outside 0..4 (num_classes=5)"),
    ("plain", ["--labels", "-1"], "label -1 is outside 0..4"),
    ("plain", ["--guidance-channels", "4"], "guidance_channels 4: expected 'all' or at most 3"),
    ("plain", ["--guidance-channels", "0"], "guidance_channels 0: expected 'all' or at least 1"),
    ("plain", ["--guidance-interval", "500", "100"], "guidance_interval 500 100: expected two timesteps"),
    ("plain", ["--guidance-interval", "0", "1000"], "guidance_interval 0 1000: expected two timesteps"),
    ("plain", ["--vae", "somewhere"], "this model generates pixels and needs none; leave --vae out"),
    ("plain", ["--sampler", "best"], "sampler 'best': expected ddpm, ddim, or one of diffusers' DDIM"),
    ("plain", ["--sampler", "pndm"], "num_inference_steps 3: PNDMScheduler cannot"),
    ("plain", ["--precision", "fp8"], "fp8"),
])  # fmt: skip
def test_a_bad_request_is_one_line_and_leaves_nothing(models, model, options, message, tmp_path):
    done = run_dit(*command(models[model], tmp_path / "out", *options))
    assert done.returncode in (1, 2)
    fails_with(done, message, done.returncode)
    assert not (tmp_path / "out").exists()


FULL_DISK = """
import resource, sys
from triptych_dit.cli import COMMANDS
from triptych_common.cli import main
from triptych_common.images import to_uint8
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # a part fits, all of them do not
sys.exit(main("triptych-dit", COMMANDS, sys.argv[1:]))
"""


def test_a_full_disk_is_one_line_and_repeating_goes_on(models, tmp_path):
    options = command(models["plain"], tmp_path)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *options], capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("sampling:")]
    assert done.returncode == 1
    assert len(lines) == 1, done.stderr
    assert "samples.npz: cannot be written" in lines[0]
    assert not list(tmp_path.glob("*.partial"))
    made = [path.stat().st_mtime_ns for path in sorted((tmp_path / "parts").iterdir())]
    assert len(made) == 3
    assert main("triptych-dit", COMMANDS, options) == 0
    assert read_npz(tmp_path / "samples.npz")[0].shape == (20, 3, 4, 6)


def test_unconditional_samples_have_no_labels(models, tmp_path):
    done = run_dit(*command(models["unconditional"], tmp_path, "--images", "--json"))
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout.splitlines()[-1])
    with np.load(files["samples"]) as arrays:
        assert arrays.files == ["arr_0"]
        assert arrays["arr_0"].shape == (20, 4, 6, 3)
    assert sorted(path.name for path in Path(files["images"]).iterdir())[:2] == ["000000.png", "000001.png"]


def test_bfloat16_is_close_and_another_request(models, tmp_path):
    for out, options in (("a", []), ("b", ["--precision", "bf16"])):
        assert main("triptych-dit", COMMANDS, command(models["plain"], tmp_path / out, *options)) == 0
    a, b = (read_npz(tmp_path / out / "samples.npz")[0].float() for out in "ab")
    assert 0 < float((a - b).abs().mean()) < 0.1 * float(a.std())
    assert main("triptych-dit", COMMANDS, command(models["plain"], tmp_path / "a", "--precision", "bf16")) == 1


def test_settings_of_earlier_runs_still_resume(models, tmp_path):
    """None, which clips pixels and not latents, is recorded as what it means."""
    assert main("triptych-dit", COMMANDS, command(models["plain"], tmp_path)) == 0
    recorded = json.loads((tmp_path / "config.json").read_text())["config"]
    assert recorded["clip_x_0"] is True
    assert asdict(SamplerSettings())["clip_x_0"] is None
    assert main("triptych-dit", COMMANDS, command(models["plain"], tmp_path, "--clip-x-0", "True")) == 0
    assert main("triptych-dit", COMMANDS, command(models["plain"], tmp_path, "--clip-x-0", "False")) == 1


def test_image_names_are_safe_file_names():
    model = trained(class_names=["../../etc", "a:b|c", "", "ok", "e"])
    assert [image_name(i, model, i) for i in range(4)] == [
        "000000-etc.png", "000001-a-b-c.png", "000002-2.png", "000003-ok.png",
    ]  # fmt: skip
    assert image_name(7, trained(), None) == "000007.png"
