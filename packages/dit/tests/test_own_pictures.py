"""Training on one's own folder: what is taken from the data, which pictures are left out, and runs that go on longer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from triptych_common.images import image_grid, to_uint8
from triptych_common.storage import checkpoint
from triptych_common.testing import fails_with, logged, one_thread, run_torchrun
from triptych_dit import DiTConfig, Objective, SamplerSettings, TrainConfig, load_model, sample_images
from triptych_dit.autoencoder.model import load_autoencoder
from triptych_dit.testing import random_model, random_vae, run_dit
from triptych_dit.train import train as train_here
from triptych_dit.weights import save_model

TINY = [
    "--model.depth", "1", "--model.hidden-size", "16", "--model.num-heads", "2", "--batch-size", "8",
    "--checkpoint-every", "2", "--log-every", "2", "--device", "cpu",
]  # fmt: skip


def draw(path: Path, size: tuple[int, int] = (20, 17), mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size[::-1] + (() if mode == "L" else (3,))
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("apples", "pears"):
        for i in range(4):
            draw(tmp_path / "photos" / name / f"{i}.png", seed=i)
    return tmp_path / "photos"


def train(out: Path, *options: object) -> str:
    done = run_dit("train", *TINY, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shape(out: Path) -> tuple:
    config = load_model(out).model.config
    return config.num_classes, config.in_channels, config.input_size


def test_classes_channels_and_size_come_from_the_pictures_unless_typed(photos, tmp_path):
    said = train(tmp_path / "run", "--data", photos, "--total-images", 16)
    assert f"from {photos}: --model.num-classes 2, --model.input-size 16 16, --model.in-channels 3 (8 pictures" in said
    assert shape(tmp_path / "run") == (2, 3, (16, 16))
    assert load_model(tmp_path / "run").facts["class_names"] == ["apples", "pears"]
    typed = ("--model.patch-size", 5, "--model.num-classes", 0, "--model.in-channels", 1)
    train(tmp_path / "typed", "--data", photos, "--total-images", 16, *typed)
    assert shape(tmp_path / "typed") == (0, 1, (15, 15))
    train(tmp_path / "larger", "--data", photos, "--total-images", 16, "--model.input-size", 12, 16)
    assert shape(tmp_path / "larger") == (2, 3, (12, 16))


def test_gray_pictures_without_classes_and_large_ones(tmp_path):
    for i in range(3):
        draw(tmp_path / "gray" / f"{i}.png", (70, 50), "L", seed=i)
    train(tmp_path / "run", "--data", tmp_path / "gray", "--total-images", 16)
    assert shape(tmp_path / "run") == (0, 1, (32, 32))


def test_the_folder_is_listed_once(photos, tmp_path, monkeypatch):
    from triptych_common.data import folder

    listed, real = [], folder._list_images
    monkeypatch.setattr(folder, "_list_images", lambda root: listed.append(root) or real(root))
    train(tmp_path / "run", "--data", photos, "--total-images", 16)
    assert listed == [photos]


def test_a_preset_for_latents_says_how_to_make_them(photos, tmp_path):
    done = run_dit("train", "--preset", "DiT-S/4", "--data", photos, "--out", tmp_path / "run")
    command = f"triptych-dit encode --source {photos} --vae stabilityai/sd-vae-ft-ema --image-size 256 --out latents/photos-256"
    fails_with(done, f"{command}; then pass --data latents/photos-256")
    done = run_dit("train", "--preset", "DiT-S/4", "--data", "latents/typo", "--out", tmp_path / "run")
    fails_with(
        done, "data latents/typo: no such folder; triptych-dit encode --out latents/typo makes a cache of latents"
    )
    assert not (tmp_path / "run").exists()


def test_unusable_pictures_are_listed_once_and_left_out(photos, tmp_path):
    out = tmp_path / "run"
    good = train(tmp_path / "good", "--data", photos, "--total-images", 16)
    assert "left out" not in good
    shutil.copytree(photos, tmp_path / "mixed" / "photos")
    mixed = tmp_path / "mixed" / "photos"
    (mixed / "apples" / "0a.png").write_bytes(b"no picture")
    for i in range(3):
        draw(mixed / "pears" / f"small{i}.png", (3, 9))
    options = ("--data", mixed, "--total-images", 16, "--model.input-size", 16, 16)
    said = train(out, *options)
    assert "left out 4 of 12 images, which cannot be used" in said
    assert f"all of them in {out / 'skipped.json'}" in said
    skipped = json.loads((out / "skipped.json").read_text())
    assert [Path(row["path"]).name for row in skipped] == ["0a.png", "small0.png", "small1.png", "small2.png"]
    ours, theirs = load_model(out).model.state_dict(), load_model(tmp_path / "good").model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # as if they had never been there
    train(out, *options)  # resumed with the same ones left out
    draw(mixed / "apples" / "0a.png")
    fails_with(run_dit("train", *TINY, "--out", out, *options), "class apples: 4 pictures, now 5")
    done = run_dit("train", *TINY, "--out", tmp_path / "strict", "--strict", *options)
    fails_with(done, "small0.png: 3x9 pixels are fewer than the crop's 16x16")


def test_classes_whose_pictures_are_all_damaged_are_named(photos, tmp_path):
    for path in (photos / "pears").iterdir():
        path.write_bytes(b"no picture")
    done = run_dit("train", *TINY, "--data", photos, "--out", tmp_path / "run")
    fails_with(done, f"none of the images of class pears can be used ({photos / 'pears/0.png'}: not an image")


def test_a_short_run_of_a_preset_is_scaled_and_what_is_typed_holds(tmp_path):
    config = json.loads(run_dit("train", "--dry-run", "--json", "--total-images", 2880).stdout.splitlines()[-1])[
        "config"
    ]
    assert (config["warmup_images"], config["snapshots"]) == (32, [64, 256, 768, 1600])
    assert config["checkpoint_every"] == 20  # 5 would be too few steps
    options = ("--total-images", 2880, "--warmup-images", 0, "--snapshots")
    config = json.loads(run_dit("train", "--dry-run", "--json", *options).stdout.splitlines()[-1])["config"]
    assert (config["warmup_images"], config["snapshots"]) == (0, [])


def checkpoints(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(checkpoint.steps_in(out / "checkpoints")[-1])[0]


def test_a_lengthened_run_equals_one_that_was_as_long_from_the_start(photos, tmp_path):
    constant = ("--data", photos, "--lr-schedule", "constant", "--warmup-images", 8, "--snapshots")
    with one_thread():
        said = train(tmp_path / "grown", *constant, "--total-images", 32)
        said = train(tmp_path / "grown", *constant, "--total-images", 64)
        train(tmp_path / "long", *constant, "--total-images", 64)
    assert "total_images is 64 now, was 32\n" in said  # nothing else changes at a constant rate
    grown, long = (checkpoints(tmp_path / name) for name in ("grown", "long"))
    assert grown.keys() == long.keys()
    assert all(torch.equal(grown[name], long[name]) for name in grown)
    assert logged(tmp_path / "grown") == logged(tmp_path / "long")
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("grown", "long"))
    assert ours == theirs


def test_a_run_may_be_shortened_to_what_it_has_trained_on(photos, tmp_path):
    options = ("--data", photos, "--warmup-images", 0, "--snapshots", "--total-images")
    train(tmp_path / "run", *options, 32)
    done = run_dit("train", *TINY, "--out", tmp_path / "run", *options, 16)
    fails_with(done, f"total_images 16: {tmp_path / 'run'} has trained on 32 already; pass at least as many")
    assert load_model(tmp_path / "run").facts["images_seen"] == 32


def test_a_longer_schedule_says_what_changes(tmp_path, photos):
    options = ("--data", photos, "--lr", 1e-2, "--snapshots", "--total-images")
    train(tmp_path / "run", *options, 32)
    said = train(tmp_path / "run", *options, 64)
    # Half way through the cosine, with the warmup that the run began with.
    assert "total_images is 64 now, was 32: the learning rate of image 33 becomes 0.005, was 0" in said
    assert "is 64 now" not in train(tmp_path / "run", *options, 64)


def test_a_longer_run_of_a_preset_has_lost_no_snapshots(photos, tmp_path):
    """Its own are at other counts, some of which the shorter run has passed."""
    train(tmp_path / "run", "--data", photos, "--total-images", 32)
    said = train(tmp_path / "run", "--data", photos, "--total-images", 96)
    assert "lost" not in said
    (tmp_path / "run/snapshots/images-000000009.safetensors").unlink()
    said = train(tmp_path / "run", "--data", photos, "--total-images", 96)
    assert f"{tmp_path / 'run/snapshots/images-000000009.safetensors'}: lost; only training from the start" in said


def test_logging_checkpointing_and_validation_may_change_on_resume(tmp_path):
    data = ("--data", "mnist5k", "--warmup-images", 0, "--snapshots", "--model.patch-size", 7)
    train(tmp_path / "run", *data, "--total-images", 16)
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["config"] |= {"log_every": 50, "checkpoint_every": 500, "validation_every": 0, "snapshots": [5]}
    (tmp_path / "run/config.json").write_text(json.dumps(config))  # as earlier versions recorded it
    others = ("--log-every", 1, "--checkpoint-every", 1, "--validation-every", 1, "--validation-images", 8)
    train(tmp_path / "run", *data, *others, "--total-images", 32, "--preview-images", 0)
    assert [row["step"] for row in logged(tmp_path / "run") if "validation/mse" in row] == [3, 4]


def test_any_checkpoint_samples_exports_and_starts_fine_tuning(photos, tmp_path):
    run, data = tmp_path / "run", ("--data", photos, "--warmup-images", 0, "--snapshots")
    train(run, *data, "--total-images", 48)
    finished = load_model(run)
    (run / "model.safetensors").unlink()
    newest, before = (checkpoint.steps_in(run / "checkpoints")[i] for i in (-1, -2))
    assert all(
        torch.equal(value, finished.model.state_dict()[name])
        for name, value in load_model(newest).model.state_dict().items()
    )
    assert load_model(newest).facts == finished.facts
    newest.unlink()  # as after an interruption
    words = ("--num-samples", 2, "--num-inference-steps", 2, "--out")
    done = run_dit("sample", "--checkpoint", run, *words, tmp_path / "samples")
    assert done.returncode == 0, done.stderr
    assert "step-00000004.safetensors: unfinished: step 4 of 6" in done.stdout
    done = run_dit("export", "--checkpoint", before, "--format", "triptych", "--out", tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    exported = load_model(tmp_path / "exported").facts
    assert (exported["images_seen"], exported["class_names"]) == (32, ["apples", "pears"])
    train(tmp_path / "tuned", "--data", photos, "--total-images", 8, "--init-from", before)
    averages = checkpoint.read(before)[0]
    began = checkpoint.read(checkpoint.step_path(tmp_path / "tuned/checkpoints", 0))[0]
    assert torch.equal(began["model.pos_embed"], averages["ema.pos_embed"])
    assert torch.equal(began["model.x_embedder.proj.weight"], averages["ema.x_embedder.proj.weight"])


def test_a_checkpoint_without_facts_says_what_to_do(photos, tmp_path):
    train(tmp_path / "run", "--data", photos, "--total-images", 16)
    tensors, state = checkpoint.read(checkpoint.step_path(tmp_path / "run/checkpoints", 2))
    del state["models"]
    checkpoint.write(tmp_path / "old.safetensors", tensors, state)
    with pytest.raises(
        ValueError, match="an earlier version, which records no facts about its model; repeat the command"
    ):
        load_model(tmp_path / "old.safetensors")


def test_sharded_checkpoints_are_used_alike(photos, tmp_path):
    run = tmp_path / "run"
    options = ("train", *TINY, "--data", photos, "--total-images", 16, "--parallel", "fsdp", "--out", run)
    done = run_torchrun(2, "triptych_dit.cli", *map(str, options))
    assert done.returncode == 0, done.stderr
    finished = load_model(run).model.state_dict()
    newest = checkpoint.steps_in(run / "checkpoints")[-1]
    assert newest.is_dir()
    loaded = load_model(newest)
    assert all(torch.equal(value, finished[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.facts["class_names"] == ["apples", "pears"]
    assert (run / "previews" / "images-000000016.png").exists()


def test_previews_grow_from_the_same_noise_and_change_no_result(photos, tmp_path):
    options = ("--data", photos, "--total-images", 32)
    with one_thread():
        train(tmp_path / "with", *options)
        train(tmp_path / "without", *options, "--preview-images", 0)
    assert [p.name for p in sorted((tmp_path / "with/previews").iterdir())] == [
        "images-000000016.png", "images-000000032.png",
    ]  # fmt: skip
    assert not (tmp_path / "without/previews").exists()
    with_, without = (checkpoints(tmp_path / name) for name in ("with", "without"))
    assert all(torch.equal(with_[name], without[name]) for name in without)
    assert logged(tmp_path / "with") == logged(tmp_path / "without")
    # The last grid holds what `sample_images` makes of the finished model's weights.
    trained = load_model(tmp_path / "with")
    labels = torch.arange(16) % 2
    images = sample_images(trained, labels, SamplerSettings(sampler="ddim", num_inference_steps=20))
    expected = image_grid(to_uint8(images), columns=4).repeat_interleave(4, 1).repeat_interleave(4, 2)
    found = np.asarray(Image.open(tmp_path / "with/previews/images-000000032.png"), dtype=int)
    assert np.abs(found - expected.permute(1, 2, 0).numpy()).max() <= 1


def test_a_run_shorter_than_a_checkpoint_interval_ends_with_a_preview(photos, tmp_path):
    train(tmp_path / "run", "--data", photos, "--total-images", 24, "--checkpoint-every", 1000)
    assert [p.name for p in (tmp_path / "run/previews").iterdir()] == ["images-000000024.png"]


def test_a_model_of_latents_meets_pictures_with_the_command_that_encodes_them(photos, tmp_path):
    random_vae(latent_channels=4).save_pretrained(tmp_path / "vae")
    config = DiTConfig((8, 8), 4, patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=2)
    space = load_autoencoder(str(tmp_path / "vae")).facts()
    save_model(tmp_path / "latent.safetensors", random_model(config), {"predict": "noise", "autoencoder": space})
    done = run_dit("train", "--init-from", tmp_path / "latent.safetensors", "--data", photos, "--out", tmp_path / "run")
    fails_with(
        done, f"triptych-dit encode --source {photos} --vae {tmp_path / 'vae'} --image-size 16 --out latents/photos-16;"
    )
    pixels = DiTConfig((28, 28), 3, patch_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=10)
    save_model(tmp_path / "rgb.safetensors", random_model(pixels), {"predict": "noise"})
    done = run_dit("train", "--init-from", tmp_path / "rgb.safetensors", "--out", tmp_path / "run")
    fails_with(done, "data mnist5k: 1 channels, those of the model to start from have 3")


def pairs(count: int = 12) -> list[tuple[torch.Tensor, int]]:
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [(image, i % 3) for i, image in enumerate(pixels)]


def settings(out: Path, **others: object) -> TrainConfig:
    model = DiTConfig((8, 8), 3, patch_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    shape = {"model": model, "batch_size": 4, "total_images": 16, "device": "cpu", "preview_images": 0}
    return TrainConfig(out=out, **{**shape, **others})


def test_any_pairs_of_images_and_classes_train(tmp_path):
    """As the same pictures from a folder do, bit for bit."""
    train_here(settings(tmp_path / "pairs"), pairs())
    for i, (image, label) in enumerate(pairs()):
        (tmp_path / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "folder" / str(label) / f"{i:02d}.png")
    in_order = sorted(pairs(), key=lambda pair: pair[1])
    train_here(settings(tmp_path / "sorted"), in_order)
    train_here(settings(tmp_path / "from_folder", data=str(tmp_path / "folder")))
    ours, theirs = (load_model(tmp_path / name).model.state_dict() for name in ("sorted", "from_folder"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match="holds a run with data="):
        train_here(settings(tmp_path / "pairs"), in_order)


@pytest.mark.parametrize(("image", "label", "message"), [
    (torch.zeros(3, 8, 8), 9, r"dataset\[0\], class: 9 of 3 classes, expected 0..2"),
    (torch.zeros(3, 8, 9), 0, r"dataset\[0\]: shape \(1, 3, 8, 9\), expected \(batch, 3, 8, 8\), the model's"),
    (torch.full((3, 8, 8), 200.0), 0, r"dataset\[0\]: values from 200 to 200, expected pixels in \[-1, 1\]"),
    (torch.zeros(3, 8, 8, dtype=torch.int64), 0, r"dataset\[0\]: torch.int64, expected floating point"),
    (torch.zeros(3, 8, 8), 1.5, r"dataset\[0\], class: torch.float32 \(1,\), expected integers"),
])  # fmt: skip
def test_a_pair_that_does_not_fit_is_named(image, label, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_here(settings(tmp_path / "run"), [(image, label)] * 4)
    assert not (tmp_path / "run").exists()


def test_own_batches_that_do_not_fit_are_named(tmp_path):
    objective, x_0 = Objective(settings(tmp_path)), torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"labels: 9 of 3 classes, expected 0\.\.2"):
        objective.examples(x_0, torch.tensor([0, 9]), range(2))
    with pytest.raises(ValueError, match="counters: 3 for 2 images"):
        objective.examples(x_0, torch.tensor([0, 1]), range(3))
    with pytest.raises(ValueError, match="x_0: holds NaN"):
        objective.examples(x_0 / 0, torch.tensor([0, 1]), range(2))
