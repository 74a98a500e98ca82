"""Walks: where they pass, what their frames are, and the films of them."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from triptych_common.cli import main
from triptych_common.images import to_uint8
from triptych_common.testing import fails_with
from triptych_dit import DiTConfig, testing
from triptych_dit.cli import COMMANDS
from triptych_dit.sample import read_npz
from triptych_dit.sampling import SamplerSettings, sample_images
from triptych_dit.testing import run_dit
from triptych_dit.walk import FrameNoise, WalkConfig, blended, film, slerp, stops_between_classes
from triptych_dit.weights import TrainedModel, make_diffusion, save_model

SMALL = DiTConfig((4, 6), 3, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=5)
FEW = {"num_inference_steps": 4, "frames": 3, "seed": 7, "guidance_scale": 1.5}
random_model = partial(testing.random_model, std=0.15)


def trained(config=SMALL):
    return TrainedModel(random_model(config), make_diffusion(config, "noise"), {})


def filmed(model, noises, **options):
    config = WalkConfig(**{**FEW, **options})
    mixtures = stops_between_classes(config, model)
    return film(model, config, noises, mixtures, config.num_inference_steps)


def settings(**options):
    return SamplerSettings(**{"sampler": "ddim", "num_inference_steps": 4, "guidance_scale": 1.5, **options})


def test_slerp_turns_evenly_from_end_to_end():
    a, b = torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[0.0, 2.0]]).double()
    share = torch.linspace(0, 1, 7)
    angles = share * math.pi / 2
    between = slerp(a.expand(7, -1), b.expand(7, -1), share)
    torch.testing.assert_close(between, 2 * torch.stack([angles.cos(), angles.sin()], dim=1).double())
    torch.testing.assert_close(slerp(a, a, share[3:4]), a, rtol=0, atol=1e-12)
    wide = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    middle = slerp(wide[:1], wide[1:], torch.tensor([0.5]))
    assert float(middle.std()) == pytest.approx(1, abs=0.02)  # a straight line would pass at 0.71


def test_a_latent_walk_passes_through_the_samples_it_is_named_after():
    frames = filmed(trained(), (5, 2, 9), labels=(3,))
    assert frames.shape == (7, 3, 4, 6)
    for stop, index in enumerate((5, 2, 9)):
        expected = sample_images(trained(), torch.tensor([3]), settings(), seed=7, first_index=index)
        assert torch.equal(frames[3 * stop], to_uint8(expected)[0])
    assert not torch.equal(frames[1], frames[0])


def test_a_class_walk_goes_from_class_to_class_by_their_embeddings():
    frames = filmed(trained(), (5,), labels=(3, 0), frames=4, loop=True)
    assert len(frames) == 8
    middle = trained()
    table = middle.model.y_embedder.embedding_table.weight
    table[1] = 0.5 * (table[3] + table[0])  # an independent way to stand between two classes
    for frame, model, label in ((0, trained(), 3), (4, trained(), 0), (2, middle, 1), (6, middle, 1)):
        expected = sample_images(model, torch.tensor([label]), settings(), seed=7, first_index=5)
        assert torch.equal(frames[frame], to_uint8(expected)[0])


def test_a_blend_is_a_class_between_its_classes():
    model = trained()
    table = model.model.y_embedder.embedding_table.weight
    table[4] = 0.25 * table[3] + 0.75 * table[1]
    expected = sample_images(model, torch.tensor([4]), settings(), seed=7, first_index=2)
    assert torch.equal(filmed(trained(), (2, 0), blend=("3:1", "1:3"))[0], to_uint8(expected)[0])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euleranc"])
@pytest.mark.parametrize("stops", [{"labels": (3, 0)}, {"labels": (2,)}])
def test_frames_do_not_depend_on_the_batch(sampler, stops):
    noises = (5, 2) if len(stops["labels"]) == 1 else (5,)
    whole = filmed(trained(), noises, sampler=sampler, **stops)
    parts = filmed(trained(), noises, sampler=sampler, batch_size=1, **stops)
    assert int((whole.int() - parts.int()).abs().max()) <= 1
    assert len(whole) == 4


def test_later_noise_is_the_same_for_all_frames():
    x_T = torch.randn(3, 2, 2)
    noise = FrameNoise(x_T, 0, 4)
    assert torch.equal(noise.draw(), x_T)
    later = noise.draw()
    assert torch.equal(later[0], later[2])
    assert not torch.equal(later, noise.draw())


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, change in {"plain": {}, "unconditional": {"num_classes": 0}}.items():
        config = replace(SMALL, **change)
        save_model(folder / name, random_model(config, dtype=torch.float32), {"predict": "noise"})
    return {name: folder / name for name in ("plain", "unconditional")}


def command(model: Path, out: Path, *options: str) -> list[str]:
    return ["walk", "--checkpoint", str(model), "--out", str(out), "--frames", "3", "--num-inference-steps", "3",
            "--device", "cpu", *options]  # fmt: skip


def test_the_command_films_and_refilms_without_sampling_again(models, tmp_path):
    done = run_dit(*command(models["plain"], tmp_path, "--labels", "1", "2", "--loop", "--json"))
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout.splitlines()[-1])
    with av.open(files["video"]) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6
    assert Image.open(files["strip"]).width == (6 * (6 + 2) + 2) * 21
    frames = Path(files["frames"])
    before = frames.stat().st_mtime_ns
    again = command(models["plain"], tmp_path, "--labels", "1", "2", "--loop", "--format", "gif", "--fps", "5")
    assert main("triptych-dit", COMMANDS, again) == 0
    assert frames.stat().st_mtime_ns == before
    assert Image.open(tmp_path / "walk.gif").n_frames == 6
    assert main("triptych-dit", COMMANDS, command(models["plain"], tmp_path, "--labels", "1", "3")) == 1


def test_an_unconditional_model_walks_between_noises(models, tmp_path):
    assert main("triptych-dit", COMMANDS, command(models["unconditional"], tmp_path, "--format", "gif")) == 0
    assert len(read_npz(tmp_path / "walk.npz")[0]) == 3 * 3 + 1


@pytest.mark.parametrize(("model", "options", "message"), [
    ("plain", ["--labels", "5"], "label 5 is outside 0..4 (num_classes=5)"),
    ("plain", ["--blend", "7:1"], "label 7 is outside 0..4"),
    ("plain", ["--blend", "3"], "blend '3': expected LABEL:WEIGHT"),
    ("plain", ["--blend", "3:1", "3:2"], "blend '3:2': expected LABEL:WEIGHT, weights above 0 and each label once"),
    ("plain", ["--blend", "3:-1"], "blend '3:-1': expected"),
    ("plain", ["--blend", "3:nan"], "blend '3:nan': expected"),
    ("plain", ["--labels", "3", "--blend", "1:1"], "labels and blend: pass one of them"),
    ("plain", ["--labels", "3", "4", "--noises", "1", "2"], "walk between one or the other"),
    ("plain", ["--noises", "1"], "nothing to walk between"),
    ("plain", ["--noises", "0", "-1"], "expected numbers of samples, from 0"),
    ("plain", ["--frames", "0"], "frames 0: expected at least 1"),
    ("plain", ["--format", "avi"], "format 'avi': expected one of mp4, gif"),
    ("plain", ["--sampler", "pndm"], "num_inference_steps 3: PNDMScheduler cannot"),
    ("unconditional", ["--labels", "1"], "this model is unconditional (num_classes=0); leave them out"),
    ("unconditional", ["--guidance-scale", "2"], "this model is unconditional (num_classes=0); use 1.0"),
])  # fmt: skip
def test_a_bad_request_is_one_line_and_leaves_nothing(models, model, options, message, tmp_path):
    done = run_dit(*command(models[model], tmp_path / "out", *options))
    assert done.returncode in (1, 2)
    fails_with(done, message, done.returncode)
    assert not (tmp_path / "out").exists()


def test_blends_add_up_to_one():
    assert blended(["3:1", "8:3"]) == {"3": 0.25, "8": 0.75}
    assert blended([]) == {}


def test_without_pyav_the_remedies_are_named_before_the_work(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    done = run_dit(*command(models["plain"], tmp_path / "out", "--labels", "1", "2"))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: mp4 needs a package: pip install 'triptych-common[video]'; gif needs none"
    ]
    assert not (tmp_path / "out").exists()
