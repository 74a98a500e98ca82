"""The latent cache: against diffusers, on two ranks, killed, spoiled, refused; and reading ahead."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from triptych_common import testing
from triptych_common.data import ImageFolder, open_source
from triptych_common.storage import checkpoint
from triptych_common.storage.files import write_json
from triptych_common.testing import run_torchrun
from triptych_dit.autoencoder.cache import LatentCache, is_latent_cache, shard_path, write_manifest, write_shard
from triptych_dit.autoencoder.encode import EncodeConfig, encode, preview
from triptych_dit.autoencoder.model import load_autoencoder
from triptych_dit.objective import prefetch
from triptych_dit.testing import random_vae, run_dit

diffusers = pytest.importorskip("diffusers")

IMAGES, SHARD, SIZE = 22, 4, 16
CORRUPT = (1, 8, 9, 10, 11)  # one among others, and a whole shard


def save_vae(folder: Path, seed: int = 0, scale: float = 0.5) -> Path:
    """A random AutoencoderKL that halves images twice, with a posterior of some width."""
    vae = random_vae((4, 4, 8), seed=seed, latent_channels=3, scaling_factor=scale)
    with torch.no_grad():
        vae.quant_conv.weight.mul_(6)
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def as_ranks_do():
    with testing.one_thread():
        yield


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes of small pictures of several kinds, five of them damaged in different ways."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        folder = root / ("cat" if i < 9 else "dog")
        folder.mkdir(exist_ok=True)
        kind = ("RGB", "L", "RGBA", "CMYK")[i % 4]
        pixels = rng.integers(0, 256, (20 + i % 3, 18, max(1, len(kind))), dtype=np.uint8)
        picture = Image.fromarray(pixels.squeeze() if kind == "L" else pixels[..., : len(kind)], mode=kind)
        path = folder / f"{i:03d}.{'tiff' if kind == 'CMYK' else 'png'}"
        picture.save(path)
        if i in CORRUPT:
            content = path.read_bytes()
            damaged = (b"", b"junk", content[: len(content) // 2])[i % 3]
            path.write_bytes(damaged)
    return root


def options(images: Path, vae: Path, out: Path, *more: str) -> list[str]:
    return ["encode", "--source", str(images), "--vae", str(vae), "--image-size", str(SIZE), "--shard-size", str(SHARD),
            "--batch-size", "3", "--workers", "0", "--device", "cpu", "--out", str(out), *more]  # fmt: skip


def config_of(images: Path, vae: Path, out: Path, **more) -> EncodeConfig:
    settings = {"image_size": SIZE, "shard_size": SHARD, "batch_size": 3, "workers": 0, "device": "cpu", **more}
    return EncodeConfig(source=str(images), vae=str(vae), out=out, **settings)


@pytest.fixture(scope="module")
def whole(images, vae, tmp_path_factory) -> Path:
    """An uninterrupted run on one rank, one thread."""
    out = tmp_path_factory.mktemp("whole")
    assert encode(config_of(images, vae, out))["items"] == IMAGES - len(CORRUPT)
    return out


def contents(out: Path) -> dict[str, tuple]:
    """Everything in the shards, byte by byte, but for the order in which safetensors happens to write metadata."""
    found = {}
    for path in sorted(out.glob("shard-*")):
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        found[path.name] = json.loads(content[8:end]), content[end:]
    return found


fails_with = partial(testing.fails_with, quiet=("encoding:",))


def direct(images: Path, vae: Path, item: int, *, flipped: bool) -> Tensor:
    """Moments by diffusers itself, from float64 pixels."""
    model = diffusers.AutoencoderKL.from_pretrained(vae)
    pixels = open_source(str(images)).read(item, SIZE).double() / 255 * 2 - 1
    pixels = torch.from_numpy(np.ascontiguousarray(pixels.numpy()[:, :, ::-1])) if flipped else pixels
    with torch.no_grad():
        posterior = model.double().encode(pixels[None]).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], 1)[0].float()


def test_moments_are_those_of_diffusers_for_both_flips(images, vae, whole, tmp_path):
    encode(config_of(images, vae, tmp_path, dtype="float32", workers=2))
    exact, half = LatentCache(tmp_path), LatentCache(whole)
    for row in (0, 5, len(exact) - 1):
        for flipped in (False, True):
            expected = direct(images, vae, int(exact.items[row]), flipped=flipped)
            which = torch.tensor([row]), torch.tensor([flipped])
            torch.testing.assert_close(exact.moments(*which)[0], expected, rtol=1e-4, atol=1e-5)
            # float16 keeps 11 bits: half a unit in the last place, and an absolute floor among the subnormals
            error = (half.moments(*which) - exact.moments(*which)).abs()
            assert (error <= exact.moments(*which).abs() * 2.0**-11 + 2.0**-24 + 1e-6).all()
    mirrored = exact.moments(torch.arange(5), torch.ones(5, dtype=torch.bool))
    assert (mirrored - exact.moments(torch.arange(5)).flip(-1)).abs().max() > 1e-2  # mirroring latents would not do


def test_float16_moments_decode_to_the_same_pixels(images, vae, whole, tmp_path):
    encode(config_of(images, vae, tmp_path, dtype="float32"))
    rows, autoencoder = torch.arange(len(LatentCache(whole))), load_autoencoder(str(vae))
    means = [
        LatentCache(out).moments(rows).chunk(2, dim=1)[0] * autoencoder.space.scale_factor for out in (whole, tmp_path)
    ]
    half, exact = (autoencoder.decode(mean) for mean in means)
    assert exact.std() > 1e-3
    assert (
        half - exact
    ).abs().max() < 1 / 255  # half a step of 8-bit pixels; bfloat16's error would be 8 times as large


def test_corrupt_images_are_listed_and_labels_stay_right(images, whole):
    cache = LatentCache(whole)
    kept = [item for item in range(IMAGES) if item not in CORRUPT]
    assert cache.items.tolist() == kept
    assert cache.labels.tolist() == [int(item >= 9) for item in kept]
    assert cache.class_names == ("cat", "dog")
    assert len(cache) == cache.facts["items"] == len(kept)
    skipped = json.loads((whole / "skipped.json").read_text())
    assert [row["item"] for row in skipped] == list(CORRUPT)
    assert all(Path(row["path"]).stem == f"{row['item']:03d}" and row["reason"] for row in skipped)
    assert cache.facts["skipped"] == len(CORRUPT)


def test_facts_record_how_the_cache_was_made(vae, images, whole):
    facts = LatentCache(whole).facts
    assert facts["autoencoder"] == load_autoencoder(str(vae)).facts()
    assert facts["source"]["fingerprint"] == open_source(str(images)).fingerprint()
    assert facts["image"]["size"] == [SIZE, SIZE]
    assert facts["latent_shape"] == (3, SIZE // 4, SIZE // 4)
    assert [shard["items"] for shard in facts["shards"]] == [3, 4, 0, 4, 4, 2]
    assert {"command", "commit", "versions", "lossy", "flips", "dtype", "precision", "shard_size"} <= facts.keys()


def test_rows_from_the_map_are_those_safetensors_reads(whole):
    cache = LatentCache(whole)
    stored = torch.cat([load_file(path)["moments"] for path in sorted(whole.glob("shard-*"))])
    indices = torch.tensor([16, 0, 3, 3, 9, 15, 2])
    flipped = torch.tensor([True, False, True, False, False, True, True])
    assert torch.equal(cache.moments(indices, flipped), stored[indices, flipped.long()].float())
    assert torch.equal(cache.moments(indices), stored[indices, 0].float())
    for outside in (-1, len(cache)):
        with pytest.raises(IndexError, match=r"outside 0\.\.16"):
            cache.moments(torch.tensor([0, outside]))


def test_opening_a_cache_reads_no_moments(tmp_path):
    """A fresh process opens 128 MB of shards and holds but a small part of them."""
    for shard in range(2):
        moments = torch.zeros(1024, 2, 8, 32, 32, dtype=torch.float16)
        write_shard(tmp_path, shard, moments, torch.zeros(1024, dtype=torch.long), torch.arange(1024) + 1024 * shard)
    facts = {
        "autoencoder": {"spec": "none", "scale_factor": 1.0},
        "source": {"spec": "zeros", "class_names": ["zero"]},
        "flips": True,
    }
    write_manifest(tmp_path, 2, {**facts, "latent_shape": [4, 32, 32]})
    script = """
import resource, sys, torch
from triptych_dit.autoencoder.cache import LatentCache
def mapped(): return sum(int(l.split()[1]) for l in open("/proc/self/smaps") if l.startswith("Rss:"))
before = mapped()
cache = LatentCache(sys.argv[1])
cache.moments(torch.tensor([0, 2047]))
print(mapped() - before)
"""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert int(done.stdout) < 40_000, done.stderr  # kB


def test_two_ranks_write_what_one_writes(images, vae, whole, tmp_path):
    done = run_torchrun(2, "triptych_dit.cli", *options(images, vae, tmp_path, "--json"))
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert (printed["items"], printed["skipped"]) == (17, 5)
    assert f"left out 5 images that cannot be used: {printed['skipped_list']}" in done.stderr
    assert printed["skipped_list"] == f"{tmp_path}/skipped.json"
    assert contents(tmp_path) == contents(whole)
    assert (tmp_path / "skipped.json").read_bytes() == (whole / "skipped.json").read_bytes()
    facts, others = (LatentCache(out).facts for out in (tmp_path, whole))
    assert {key for key in facts if facts[key] != others[key]} <= {"command", "commit", "hardware"}


def test_batch_size_changes_rounding_only(images, vae, whole, tmp_path):
    encode(config_of(images, vae, tmp_path, batch_size=1, workers=1))
    one, three = LatentCache(tmp_path), LatentCache(whole)
    rows = torch.arange(len(one))
    assert torch.equal(one.items, three.items)
    torch.testing.assert_close(one.moments(rows), three.moments(rows), rtol=2.0**-10, atol=1e-6)


KILL_IN_THE_THIRD_SHARD = """
import os, signal, sys
from triptych_common.storage import checkpoint

real_save, calls = checkpoint.save_file, []

def save_half_and_die(tensors, path, metadata):
    calls.append(path)
    real_save(tensors, path, metadata)
    if len(calls) == 3:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = save_half_and_die
from triptych_dit.cli import COMMANDS
from triptych_common.cli import main
sys.exit(main("triptych-dit", COMMANDS, sys.argv[1:]))
"""


def test_a_killed_run_loses_one_shard_and_resumes_to_the_same_bytes(images, vae, whole, tmp_path):
    command = [sys.executable, "-c", KILL_IN_THE_THIRD_SHARD, *options(images, vae, tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert is_latent_cache(tmp_path)
    with pytest.raises(ValueError, match=r"incomplete, 2 of 6 shards are there; repeat the encode or import command"):
        LatentCache(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*.safetensors")}
    assert sorted(before) == ["shard-000000.safetensors", "shard-000001.safetensors"]
    encode(config_of(images, vae, tmp_path))
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert contents(tmp_path) == contents(whole)
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_damaged_and_missing_shards_are_named_and_encoded_again(images, vae, whole, copy, capfd):
    LatentCache(copy).verify()
    path = shard_path(copy, 3)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"shard-000003.safetensors: damaged; repeat the encode or import command"):
        LatentCache(copy).verify()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"shard-000003.safetensors: truncated or of another kind; repeat the encode"):
        LatentCache(copy)
    shutil.copy(shard_path(copy, 4), path)
    with pytest.raises(ValueError, match=r"shard-000003.safetensors: not the shard that the manifest lists; repeat"):
        LatentCache(copy)
    shard_path(copy, 0).unlink()
    with pytest.raises(ValueError, match=r"shard-000000.safetensors: missing; repeat the encode or import command"):
        LatentCache(copy)
    path.write_bytes(content[:99])
    assert encode(config_of(images, vae, copy))["items"] == 17
    assert f"{path}: truncated or of another kind; making it again" in capfd.readouterr().out
    assert contents(copy) == contents(whole)
    shutil.copy(shard_path(copy, 4), path)
    encode(config_of(images, vae, copy))
    assert f"{path}: a shard of another cache or number; making it again" in capfd.readouterr().out
    assert contents(copy) == contents(whole)


def flip_a_bit(path: Path) -> None:
    """Change a shard's last value, at the same size and time of modification, as a failing disk may."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=times)


def train_on(cache: Path, out: Path, *more: str) -> testing.Done:
    model = ("--model.in-channels", 3, "--model.input-size", 4, 4, "--model.num-classes", 2, "--model.patch-size", 1)
    settings = ("--total-images", 16, "--batch-size", 8, "--snapshots", "--warmup-images", 0, "--device", "cpu")
    return run_dit("train", "--preset", "digits-smoke", "--data", cache, "--out", out, *model, *settings, *more)


def test_training_refuses_a_flipped_bit_and_reads_shards_once(copy, tmp_path, monkeypatch):
    reads = []
    real = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda path: reads.append(path.name) or real(path))
    assert train_on(copy, tmp_path / "first").returncode == 0
    assert train_on(copy, tmp_path / "second").returncode == 0
    assert reads == [shard_path(copy, shard).name for shard in range(6)]
    flip_a_bit(shard_path(copy, 3))
    assert train_on(copy, tmp_path / "third", "--dry-run").returncode == 0
    failed = train_on(copy, tmp_path / "third")
    testing.fails_with(
        failed, "shard-000003.safetensors: damaged; repeat the encode or import command", quiet=("verifying",)
    )


def test_training_refuses_latents_that_are_not_finite_though_their_checksum_is_right(copy, tmp_path):
    path = shard_path(copy, 3)
    tensors, state = checkpoint.read(path)
    tensors["moments"][0, 0, 0, 0, 0] = float("nan")
    checkpoint.write(path, tensors, state)
    with safe_open(path, framework="pt") as file:
        sha256 = file.metadata()["sha256"]
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][3]["sha256"] = sha256
    (copy / "manifest.json").write_text(json.dumps(manifest))
    failed = train_on(copy, tmp_path / "run")
    testing.fails_with(
        failed, "shard-000003.safetensors: damaged; repeat the encode or import command", quiet=("verifying",)
    )


def test_a_repeated_encode_reads_shards_once_and_repairs_a_flipped_bit(images, vae, whole, copy, monkeypatch, capfd):
    reads = []
    real = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda path: reads.append(path.name) or real(path))
    encode(config_of(images, vae, copy))
    encode(config_of(images, vae, copy))
    assert reads == [shard_path(copy, shard).name for shard in range(6)]
    flip_a_bit(shard_path(copy, 3))
    encode(config_of(images, vae, copy))
    assert "shard-000003.safetensors: checksum differs" in capfd.readouterr().out
    assert contents(copy) == contents(whole)
    LatentCache(copy).verify()


def write_ppm(path: Path, seed: int) -> None:
    """A picture whose file has the same size whatever it shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)


def test_replaced_pictures_and_renamed_classes_are_refused_and_copies_are_not(vae, tmp_path):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    for i in range(6):
        write_ppm(pictures / "ab"[i % 2] / f"{i}.ppm", i)
    encode(config_of(pictures, vae, out))
    written = (*out.glob("shard-*"), out / "manifest.json")
    before = [path.stat().st_mtime_ns for path in written]
    shutil.copytree(pictures, tmp_path / "copy", copy_function=shutil.copyfile)  # with new times
    encode(config_of(tmp_path / "copy", vae, out))
    assert [path.stat().st_mtime_ns for path in written] == before
    time.sleep(0.02)
    write_ppm(pictures / "b" / "3.ppm", 9)
    with pytest.raises(ValueError, match=r"1 pictures changed since they were encoded, such as \S+/b/3.ppm; put back"):
        encode(config_of(pictures, vae, out))
    write_ppm(pictures / "b" / "3.ppm", 3)
    encode(config_of(pictures, vae, out))
    (pictures / "a").rename(pictures / "c")
    with pytest.raises(ValueError, match=r"pictures changed since it began: class names: was a, b; now b, c; put back"):
        encode(config_of(pictures, vae, out))
    (pictures / "c").rename(pictures / "a")
    write_ppm(pictures / "a" / "9.ppm", 9)
    with pytest.raises(ValueError, match=r"pictures changed since it began: class a: 3 pictures, now 4; put back"):
        encode(config_of(pictures, vae, out))


def test_another_number_of_threads_is_told_if_shards_are_missing(images, vae, copy, capsys):
    config = json.loads((copy / "config.json").read_text())
    assert config["hardware"]["threads"] == 1
    config["hardware"]["threads"] = 3
    write_json(copy / "config.json", config)
    encode(config_of(images, vae, copy))
    assert "thread count" not in capsys.readouterr().out
    shard_path(copy, 2).unlink()
    encode(config_of(images, vae, copy))
    assert "thread count is 1, the run had 3: results may differ" in capsys.readouterr().out


def test_lost_and_damaged_records_are_made_again_byte_for_byte(images, vae, copy, tmp_path):
    names = ("manifest.json", "skipped.json")
    before = {name: (copy / name).read_bytes() for name in names}
    made = json.loads(before["manifest.json"])
    for text in (None, "", "{", '{"kind": "latent cache"}'):
        for name in names:
            (copy / name).unlink() if text is None else (copy / name).write_text(text)
        if text is not None:
            again = r"repeat the encode or import command.*, which makes the manifest again from the shards; nothing else is lost"
            with pytest.raises(ValueError, match=again):
                LatentCache(copy)
        encode(config_of(images, vae, copy))
        assert {name: (copy / name).read_bytes() for name in names} == before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"config.json: not JSON .*; delete this file and repeat the run's own settings"
    ):
        encode(config_of(images, vae, copy))
    (copy / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"shard-000000.safetensors: made with other settings, and config.json, which held"
    ):
        encode(config_of(images, vae, copy, dtype="float32"))
    assert not (copy / "config.json").exists()
    encode(config_of(images, vae, copy))
    assert json.loads((copy / "config.json").read_text())["config"] == config["config"]
    assert json.loads((copy / "manifest.json").read_text()) == made
    for name in ("config.json", "manifest.json"):
        (copy / name).unlink()
    with pytest.raises(
        ValueError, match=r"manifest.json and config.json are lost; repeat the encode or import command"
    ):
        LatentCache(copy)


def test_no_cache_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no latent cache; make one with triptych-dit encode --out"):
        LatentCache(tmp_path)
    assert not is_latent_cache(tmp_path)
    write_json(tmp_path / "config.json", {"config": {"total_images": 1}})
    with pytest.raises(ValueError, match="a run of another command, no latent cache"):
        LatentCache(tmp_path)
    write_json(tmp_path / "manifest.json", {"kind": "something else"})
    with pytest.raises(ValueError, match="kind: 'something else': input should be 'latent cache'"):
        LatentCache(tmp_path)


def test_another_request_is_refused_by_the_field_that_differs(images, vae, copy, tmp_path):
    (tmp_path / "moved").symlink_to(images)
    assert encode(config_of(tmp_path / "moved", vae, copy))["items"] == 17  # the same data elsewhere will do
    with pytest.raises(ValueError, match=r"autoencoder.scale_factor=0.5 \(now 0.25\)"):
        encode(config_of(images, save_vae(tmp_path / "scaled", scale=0.25), copy))
    with pytest.raises(ValueError, match=r"autoencoder.sha256='\w+' \(now '\w+'\); repeat its settings"):
        encode(config_of(images, save_vae(tmp_path / "other", seed=1), copy))
    for change, message in (
        ({"flips": False}, r"flips=True \(now False\)"),
        ({"image_size": 12}, r"image.size=\[16, 16\] \(now \[12, 12\]\)"),
        ({"dtype": "float32"}, r"dtype='float16' \(now 'float32'\)"),
        ({"unconditional": True}, r"pictures changed since it began: class names: was cat, dog; now one class"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(config_of(images, vae, copy, **change))


def test_caches_name_their_encoder_and_earlier_ones_go_on_without(images, vae, copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["autoencoder"].pop("encoder_sha256") == load_autoencoder(str(vae)).encoder_sha256
    write_json(copy / "manifest.json", manifest)
    assert LatentCache(copy).space.difference(load_autoencoder(str(vae)).space) is None
    assert encode(config_of(images, vae, copy))["items"] == 17


def test_an_autoencoder_must_be_the_one_that_encoded(vae, whole):
    ours = LatentCache(whole).space
    for same in ({"spec": "elsewhere"}, {"sha256": "0" * 64}, {"encoder_sha256": None}, {"downsampling": None}):
        assert ours.difference(replace(ours, **same)) is None
    for other in (
        {"encoder_sha256": "0" * 64}, {"encoder_sha256": None, "sha256": "0" * 64}, {"scale_factor": 0.18215},
        {"latents_mean": (0.0, 0.1, 0.0)}, {"latents_std": (1.0, 2.0, 1.0)}, {"latent_channels": 16}, {"downsampling": 8},
    ):  # fmt: skip
        assert ours.difference(replace(ours, **other)).startswith([*other][-1])


def test_a_cache_without_flips_has_none_to_give(images, vae, tmp_path):
    encode(config_of(images, vae, tmp_path, flips=False, image_size=(12, 16)))
    cache, rows = LatentCache(tmp_path), torch.arange(5)
    assert cache.latent_shape == (3, 3, 4)
    assert cache.moments(rows, torch.zeros(5, dtype=torch.bool)).shape == (5, 6, 3, 4)
    with pytest.raises(ValueError, match="holds no mirror images; pass --no-horizontal-flip"):
        cache.moments(rows, rows > 3)


@pytest.mark.parametrize("workers", [0, 1] if multiprocessing.get_start_method() == "fork" else [0])
def test_a_failing_disk_stops_the_run_and_is_no_skipped_image(images, vae, tmp_path, monkeypatch, workers):
    real = ImageFolder.image

    def fail_late(self, index):
        if index == 13:
            raise OSError(errno.EIO, "Input/output error", self.locate(index))
        return real(self, index)

    monkeypatch.setattr(ImageFolder, "image", fail_late)
    with pytest.raises(OSError, match=r"Input/output error.*013"):
        encode(config_of(images, vae, tmp_path, workers=workers))
    with pytest.raises(ValueError, match="3 of 6 shards are there"):
        LatentCache(tmp_path)


@pytest.mark.parametrize(("more", "status", "message"), [
    (["--image-size", "18"], 1, "image_size 18x18: expected multiples of 4, the downsampling of"),
    (["--image-size", "32"], 1, "pixels are fewer than the crop's 32x32 (width x height); choose a smaller size"),
    (["--source", "mnist5k"], 1, "a mirrored digit is no digit; pass --no-flips"),
    (["--source", "{empty}"], 1, "no images found"),
    (["--source", "nowhere"], 1, "nowhere"),
    (["--vae", "{empty}"], 1, "no config.json"),
    (["--batch-size", "0"], 2, "batch_size 0: expected at least 1"),
    (["--dtype", "bfloat16"], 2, "bfloat16"),
    (["--out", "/proc/nowhere"], 1, "cannot be written"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(images, vae, tmp_path, more, status, message):
    argv = options(images, vae, tmp_path / "out", *(text.format(empty=tmp_path) for text in more))
    fails_with(run_dit(*argv), message, status)


def test_moments_beyond_float16_are_refused_with_the_image_named(images, tmp_path):
    folder = save_vae(tmp_path / "vae")
    vae = diffusers.AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        vae.quant_conv.bias[0] = 1e6
    vae.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"000.png: its moments are not finite .*use --dtype float32"):
        encode(config_of(images, folder, tmp_path / "out"))
    assert encode(config_of(images, folder, tmp_path / "wide", dtype="float32"))["items"] == 17


def test_dry_run_prints_the_extent_and_writes_nothing(images, vae, tmp_path):
    config = config_of(images, vae, tmp_path / "out")
    printed = preview(config)
    assert (printed["images"], printed["shards"], printed["latent_shape"]) == (IMAGES, 6, (3, 4, 4))
    assert printed["gigabytes"] == pytest.approx(IMAGES * 2 * 6 * 16 * 2 / 1e9)
    assert not (tmp_path / "out").exists()


def test_reading_ahead_keeps_order_and_takes_items_late():
    taken, delays = [], [0.03, 0.0, 0.02, 0.0, 0.01, 0.0]

    def items():
        for i in range(6):
            taken.append((i, threading.current_thread()))
            yield i

    def work(i):
        time.sleep(delays[i])
        return i * i, threading.current_thread()

    ahead = prefetch(items(), work, depth=2)
    assert not taken  # nothing before it is needed
    assert next(ahead)[0] == 0
    assert [i for i, _ in taken] == [0, 1, 2]
    rest = list(ahead)
    assert [value for value, _ in rest] == [1, 4, 9, 16, 25]
    assert {thread for _, thread in taken} == {threading.current_thread()}
    assert threading.current_thread() not in {thread for _, thread in rest}


def test_reading_ahead_raises_where_the_result_is_due_and_ends_its_thread():
    def work(i):
        if i == 2:
            raise ValueError("item 2")
        return i

    ahead = prefetch(iter(range(9)), work, depth=3)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(ahead)
    assert list(ahead) == []
    stopped = prefetch(iter(range(9)), work, depth=1)
    next(stopped)
    stopped.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_batches_read_ahead_are_those_read_in_turn(whole):
    cache = LatentCache(whole)

    def batch(counters):
        return cache.moments(torch.tensor([counter % len(cache) for counter in counters]))

    counters = [range(start, start + 5) for start in range(0, 50, 5)]
    for got, expected in zip(prefetch(counters, batch, depth=3), map(batch, counters), strict=True):
        assert torch.equal(got, expected)


def test_a_checksum_covers_skipped_images_too(copy):
    _, state = checkpoint.read(shard_path(copy, 0))
    assert state["skipped"][0]["item"] == 1
