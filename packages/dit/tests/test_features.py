"""Latents of others: fast-DiT's folders, LightningDiT's shards, plain arrays; trained on as they were."""

import json
import os
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from triptych_common.storage import checkpoint
from triptych_common.testing import fails_with
from triptych_dit import load_model
from triptych_dit.autoencoder import features
from triptych_dit.autoencoder.cache import LatentCache, LatentData
from triptych_dit.config import DiTConfig
from triptych_dit.objective import open_training_data
from triptych_dit.testing import random_vae, run_dit
from triptych_dit.weights import STABLE_DIFFUSION

N, SHAPE = 11, (4, 8, 8)


def latents(channels=4, n=N):
    return torch.randn(n, channels, 8, 8, generator=torch.Generator().manual_seed(channels))


def labels():
    return torch.arange(N) % 3


def fast_dit(folder: Path) -> Path:
    """As extract_features.py writes them: an image a file, numbered, in batches of one."""
    for name in ("imagenet256_features", "imagenet256_labels"):
        (folder / name).mkdir(parents=True)
    for i, (x, y) in enumerate(zip(latents(), labels(), strict=True)):
        np.save(folder / "imagenet256_features" / f"{i}.npy", x[None].numpy())
        np.save(folder / "imagenet256_labels" / f"{i}.npy", y[None].numpy())
    return folder


def imported(out: Path, source: Path, *options: object) -> LatentData:
    done = run_dit("import", "--features", source, "--out", out, "--shard-size", 4, *options)
    assert done.returncode == 0, done.stderr
    return LatentData(LatentCache(out))


def examples(data: LatentData, flipped: bool = False) -> torch.Tensor:
    return data.examples(torch.arange(N), torch.full((N,), flipped), 0, range(N))


def test_fast_dits_folder_is_trained_on_as_it_is(tmp_path):
    data = imported(tmp_path / "cache", fast_dit(tmp_path / "fast"))
    torch.testing.assert_close(examples(data), latents(), rtol=1e-5, atol=1e-5)
    assert torch.equal(data.labels, labels())
    assert data.cache.space == STABLE_DIFFUSION
    assert open_training_data(str(tmp_path / "cache"), DiTConfig((8, 8), 4, num_classes=3)).identity == data.identity
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("shard-*")}
    imported(tmp_path / "cache", tmp_path / "fast")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_as_data_they_say_the_command_that_makes_a_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fast_dit(tmp_path / "fast")
    np.savez("own.npz", latents=latents().numpy(), labels=labels().numpy())
    small = (
        "--model.depth",
        1,
        "--model.hidden-size",
        16,
        "--model.num-heads",
        2,
        "--batch-size",
        4,
        "--total-images",
        8,
        "--preview-images",
        0,
    )
    for source in ("fast", "fast/imagenet256_features", "own.npz"):
        for preset in ("DiT-S/8", "digits"):
            refused = run_dit("train", "--preset", preset, "--data", source, *small)
            fails_with(
                refused, f"data {source}: latents of other programs; make a cache of them once: triptych-dit import"
            )
        command, data = refused.stderr.split("once: triptych-dit ")[1].split("; then pass ")
        done = run_dit(*command.replace("--vae AUTOENCODER", "--scale-factor 1").split())
        assert done.returncode == 0, done.stderr
        done = run_dit(
            "train", "--preset", "DiT-S/8", *data.split(), *small, "--device", "cpu", "--out", f"runs/{source}"
        )
        assert done.returncode == 0, done.stderr
        # fast-DiT mirrors no image either
        assert "--model.in-channels 4, --no-horizontal-flip (11 latents without mirror images)" in done.stdout


def test_an_interrupted_import_says_what_to_do_and_goes_on(tmp_path, monkeypatch):
    np.savez(tmp_path / "own.npz", latents=latents().numpy(), labels=labels().numpy())
    words = ("import", "--features", tmp_path / "own.npz", "--scale-factor", 1, "--shard-size", 4, "--out")
    assert run_dit(*words, tmp_path / "whole").returncode == 0
    monkeypatch.setattr(
        features, "write_shard", Mock(wraps=features.write_shard, side_effect=[DEFAULT, KeyboardInterrupt])
    )
    assert run_dit(*words, tmp_path / "cache").returncode == 130
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cache: incomplete, 1 shards are there; repeat the encode or import command"):
        LatentCache(tmp_path / "cache")
    written = (tmp_path / "cache/shard-000000.safetensors").stat().st_mtime_ns
    assert run_dit(*words, tmp_path / "cache").returncode == 0
    assert (tmp_path / "cache/shard-000000.safetensors").stat().st_mtime_ns == written
    shards = [[path.read_bytes() for path in sorted((tmp_path / name).glob("shard-*"))] for name in ("cache", "whole")]
    assert len(shards[0]) == 3
    assert shards[0] == shards[1]


@pytest.mark.parametrize("form", ["npy", "npz", "safetensors"])
def test_arrays_of_any_autoencoder_with_their_facts(tmp_path, form):
    x, path = latents(16), tmp_path / f"latents.{form}"
    (tmp_path / "names.json").write_text(json.dumps(["cat", "dog", "bird"]))
    mean, std = [0.1 * i for i in range(16)], [1 + 0.1 * i for i in range(16)]
    options = [
        "--latents-mean",
        *mean,
        "--latents-std",
        *std,
        "--scale-factor",
        0.5,
        "--class-names",
        tmp_path / "names.json",
    ]
    if form == "npy":
        np.save(path, x.numpy())
        np.save(tmp_path / "y.npy", labels().numpy())
        options += ["--labels", tmp_path / "y.npy"]
    elif form == "npz":
        np.savez(path, arr_0=x.numpy(), arr_1=labels().numpy())
    else:
        save_file({"latents": x, "labels": labels()}, path)
    data = imported(tmp_path / "cache", path, *options)
    torch.testing.assert_close(examples(data), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(data.labels, labels())
    assert data.facts["class_names"] == ["cat", "dog", "bird"]
    assert (data.cache.space.latents_mean, data.cache.space.scale_factor) == (pytest.approx(mean), 0.5)


def test_lightning_dits_shards_have_mirror_images_and_are_not_scaled_yet(tmp_path):
    vae = random_vae((4, 4, 8), latent_channels=4, scaling_factor=0.5, latents_mean=(1.0,) * 4, latents_std=(2.0,) * 4)
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "shards").mkdir()
    for i, some in enumerate((slice(0, 6), slice(6, N))):
        tensors = {
            "latents": latents()[some],
            "latents_flip": latents()[some].flip(-1).contiguous(),
            "labels": labels()[some],
        }
        save_file(tensors, tmp_path / "shards" / f"latents_rank00_shard{i:03d}.safetensors")
    data = imported(tmp_path / "cache", tmp_path / "shards", "--raw", "--vae", tmp_path / "vae")
    expected = (latents() - 1) / 2 * 0.5
    torch.testing.assert_close(examples(data), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(examples(data, flipped=True), expected.flip(-1), rtol=1e-5, atol=1e-5)


def test_wide_latents_are_encoded_trained_on_and_sampled(tmp_path):
    """16 channels with a mean and std of each, from pictures to pictures."""
    options = {"latents_mean": (0.1,) * 16, "latents_std": (0.3,) * 16}
    random_vae((4, 4, 8), latent_channels=16, in_channels=1, out_channels=1, **options).save_pretrained(
        tmp_path / "vae"
    )
    cache = tmp_path / "cache"
    words = [
        "encode",
        "--source",
        "mnist5k",
        "--no-flips",
        "--image-size",
        28,
        "--vae",
        tmp_path / "vae",
        "--workers",
        0,
    ]
    assert run_dit(*words, "--out", cache).returncode == 0
    small = ["--model.in-channels", 16, "--model.input-size", 7, 7, "--model.patch-size", 1, "--model.depth", 1]
    small += ["--model.hidden-size", 16, "--model.num-heads", 2, "--batch-size", 8, "--total-images", 16]
    small += ["--warmup-images", 0, "--snapshots"]
    done = run_dit("train", "--preset", "digits-latent", "--data", cache, *small, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert load_model(tmp_path / "run").space == LatentCache(cache).space
    sampled = ["--num-samples", 2, "--num-inference-steps", 2, "--labels", 3, "--out", tmp_path / "samples"]
    done = run_dit("sample", "--checkpoint", tmp_path / "run", *sampled)
    assert done.returncode == 0, done.stderr
    np.testing.assert_equal(np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape, (2, 28, 28, 1))


@pytest.mark.parametrize(("change", "message"), [
    (lambda folder: (folder / "imagenet256_labels" / "3.npy").unlink(), "3.npy is in only one of imagenet256_features and"),
    (lambda folder: np.save(folder / "imagenet256_labels" / "0.npy", np.array([0.5])), "expected an integer for each"),
    (lambda folder: np.save(folder / "imagenet256_features" / "10.npy", np.zeros((1, 4, 4, 4), np.float32)), "latents of both"),
    (lambda folder: np.save(folder / "imagenet256_features" / "0.npy", np.array(["a"], dtype=object)), "damaged one"),
    (lambda folder: np.save(folder / "imagenet256_features" / "0.npy", np.full((1, *SHAPE), np.nan, np.float32)), "not finite"),
])  # fmt: skip
def test_features_that_cannot_be_used_are_one_line(tmp_path, change, message):
    change(fast_dit(tmp_path / "fast"))
    done = run_dit("import", "--features", tmp_path / "fast", "--out", tmp_path / "cache")
    assert done.returncode == 1
    assert message in next(line for line in done.stderr.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize(("name", "arrays", "message"), [
    ("labels beyond any table", {"labels": np.array([0, 1 << 40])}, "labels are int64 in 0..1099511627776, expected"),
    ("unsigned labels that wrap", {"labels": np.array([0, (1 << 64) - 1], np.uint64)}, "in 0..18446744073709551615, expected"),
    ("negative labels", {"labels": np.array([0, -1])}, "labels are int64 in -1..0, expected an integer for each, 0..1048575"),
    ("floats of no tensor", {"latents": np.zeros((2, *SHAPE), np.longdouble)}, "expected floats (n, channels, height, width)"),
    ("nothing", {"latents": np.zeros((0, *SHAPE), np.float32), "labels": np.zeros(0, int)}, "no latents in"),
])  # fmt: skip
def test_arrays_that_no_cache_can_hold_are_one_line(tmp_path, name, arrays, message):
    np.savez(tmp_path / "x.npz", **{"latents": latents(n=2).numpy(), "labels": np.arange(2), **arrays})
    done = run_dit("import", "--features", tmp_path / "x.npz", "--scale-factor", 1, "--out", tmp_path / "cache")
    fails_with(done, message)
    assert f"{tmp_path / 'x.npz'}" in done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("place", ["latents.npz", "labels.npy", "shards/0.safetensors", "fast/x_labels/0.npy"])
def test_pipes_among_features_are_refused(tmp_path, place):
    np.save(tmp_path / "x.npy", latents().numpy())
    for folder in ("shards", "fast/x_labels", "fast/x_features"):
        (tmp_path / folder).mkdir(parents=True)
    np.save(tmp_path / "fast/x_features/0.npy", latents(n=1).numpy())
    os.mkfifo(tmp_path / place)
    source = {"labels.npy": ("x.npy", "--labels", tmp_path / place)}.get(place, (place.partition("/")[0],))
    words = (
        "import",
        "--features",
        tmp_path / source[0],
        *source[1:],
        "--scale-factor",
        1,
        "--out",
        tmp_path / "cache",
    )
    fails_with(run_dit(*words), f"{tmp_path / place}: a pipe or device, expected a file")


def test_a_damaged_header_is_named_in_a_short_line(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': " + b"(" * 3000 + b")" * 3000 + b"}"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header)
    done = run_dit("import", "--features", tmp_path / "x.npy", "--scale-factor", 1, "--out", tmp_path / "cache")
    fails_with(done, "x.npy: not an array file, or a damaged one (")
    assert len(done.stderr) < 500 + len(str(tmp_path))


def test_numbers_of_a_latent_space_are_finite(tmp_path):
    np.save(tmp_path / "x.npy", latents().numpy())
    words = ("import", "--features", tmp_path / "x.npy", "--out", tmp_path / "cache")
    fails_with(run_dit(*words, "--scale-factor", "inf"), "scale_factor inf: expected finite numbers")
    fails_with(
        run_dit(*words, "--latents-mean", *["nan"] * 4), "latents_mean (nan, nan, nan, nan): expected finite numbers"
    )


def test_bfloat16_features_are_read(tmp_path):
    save_file({"latents": latents().bfloat16(), "labels": labels()}, tmp_path / "x.safetensors")
    data = imported(tmp_path / "cache", tmp_path / "x.safetensors", "--scale-factor", 1)
    torch.testing.assert_close(examples(data), latents(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("replaced", ["latents", "labels", "nothing"])
def test_features_replaced_by_others_of_the_same_size_join_no_cache(tmp_path, replaced):
    arrays = {"latents": latents().numpy(), "labels": labels().numpy()}
    np.savez(tmp_path / "own.npz", **arrays)
    words = (
        "import",
        "--features",
        tmp_path / "own.npz",
        "--scale-factor",
        1,
        "--shard-size",
        4,
        "--out",
        tmp_path / "c",
    )
    assert run_dit(*words).returncode == 0
    whole = [path.read_bytes() for path in sorted((tmp_path / "c").glob("shard-*"))]
    (tmp_path / "c/shard-000000.safetensors").unlink()
    np.savez(tmp_path / "own.npz", **arrays | ({} if replaced == "nothing" else {replaced: arrays[replaced][::-1]}))
    done = run_dit(*words)
    if replaced == "nothing":
        assert done.returncode == 0
        assert whole == [path.read_bytes() for path in sorted((tmp_path / "c").glob("shard-*"))]
    else:
        assert "other latents or labels than those that were imported into" in done.stderr
        assert done.returncode == 1
        assert whole[1:] == [path.read_bytes() for path in sorted((tmp_path / "c").glob("shard-*"))]


def test_a_label_that_no_class_has_is_refused_before_training(tmp_path):
    np.savez(tmp_path / "own.npz", latents=latents().numpy(), labels=labels().numpy())
    imported(tmp_path / "cache", tmp_path / "own.npz", "--scale-factor", 1)
    path, manifest = tmp_path / "cache/shard-000001.safetensors", tmp_path / "cache/manifest.json"
    tensors, state = checkpoint.read(path)
    for label in (3, -1):  # of a foreign cache, whose checksums are right
        tensors["labels"][2] = label
        before = _recorded(path)
        checkpoint.write(path, tensors, state)
        manifest.write_text(manifest.read_text().replace(before, _recorded(path)))
        with pytest.raises(ValueError, match=rf"shard-000001.safetensors: label {label} of 3 classes; repeat the"):
            LatentCache(tmp_path / "cache")


def _recorded(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return file.metadata()["sha256"]


def test_the_facts_of_arrays_must_be_given(tmp_path):
    np.save(tmp_path / "x.npy", latents(16).numpy())
    done = run_dit("import", "--features", tmp_path / "x.npy", "--out", tmp_path / "cache")
    assert "pass their autoencoder as --vae, or --scale-factor" in done.stderr
    random_vae(latent_channels=4).save_pretrained(tmp_path / "vae")
    done = run_dit("import", "--features", tmp_path / "x.npy", "--vae", tmp_path / "vae", "--out", tmp_path / "cache")
    assert f"16 channels, those of {tmp_path / 'vae'} have 4" in done.stderr
