"""The scripts of examples/ run as they are, on something small."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from triptych_dit import DiTConfig, load_model
from triptych_dit.interop import export_released
from triptych_dit.sampling import SamplerSettings, sample_images
from triptych_dit.testing import random_model
from triptych_gangealing import SpatialTransformer, SpatialTransformerConfig
from triptych_gangealing.aligner import Aligner, write_aligner
from triptych_gangealing.modes import Directions, Mode

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> Callable[..., Any]:
    """The `main` of an example."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def run(monkeypatch: pytest.MonkeyPatch, name: str, *options: str | Path) -> None:
    """An example as its command line runs it."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_train_on_own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Two plain colours are learned at once; the model file is one that samples."""
    for name, grey in (("dark", 60), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((9, 12, 3), grey, np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    torch.manual_seed(0)
    options = ("--images", tmp_path / "images", "--out", tmp_path / "run", "--steps", "20", "--size", "8")
    run(monkeypatch, "train_on_own_images", *options)
    assert float(capsys.readouterr().out.rsplit("loss", 1)[1]) < 0.9  # an untrained network's is 1
    trained = load_model(tmp_path / "run")
    assert trained.facts["class_names"] == ["dark", "light"]
    settings = SamplerSettings(num_inference_steps=2, guidance_scale=1.5)
    assert sample_images(trained, torch.tensor([0, 1]), settings).shape == (2, 3, 8, 8)


def test_own_loop(tmp_path: Path) -> None:
    """Squares are learned; a run in two parts is the same as one; any checkpoint of it is a model."""
    loop = example("own_loop")
    dark, bright = loop(tmp_path / "whole", 120)
    assert float(bright[0, 3:5, 3:5].mean() - dark[0, 3:5, 3:5].mean()) > 0.5  # 0 and 1 in the data
    loop(tmp_path / "parts", 60)
    assert torch.equal(torch.stack([dark, bright]), loop(tmp_path / "parts", 120))
    newest = tmp_path / "parts/checkpoints/step-00000120-extra.safetensors"
    assert load_model(newest).facts["images_seen"] == 120 * 32


def test_sample_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DiTConfig((8, 8), 3, patch_size=2, hidden_size=384, depth=1, num_heads=6, num_classes=5)
    model = random_model(config, std=0.02, dtype=torch.float32)
    export_released(model, tmp_path / "released.pt")
    options = ("--labels", "3", "1", "--steps", "2", "--out", tmp_path / "samples.png")
    run(monkeypatch, "sample_released", "--checkpoint", tmp_path / "released.pt", *options)
    assert Image.open(tmp_path / "samples.png").size[0] > 16


def test_align_a_folder(tmp_path: Path) -> None:
    """An untrained aligner is the identity: aligned pictures are the pictures, reduced."""
    transformer = SpatialTransformer(
        SpatialTransformerConfig(input_size=16, channel_max=8, flow_size=4, flow_upsampling=4)
    )
    mode = Mode(Directions(torch.zeros(4), torch.eye(4)[:1], torch.ones(1)))
    facts = {"padding": "border", "iterations": 1, "flips": False, "generator": "none"}
    write_aligner(tmp_path / "aligner.safetensors", Aligner(transformer, mode).requires_grad_(False).eval(), facts)
    (tmp_path / "pictures").mkdir()
    for name, grey in (("a.png", 40), ("b.png", 200)):
        Image.fromarray(np.full((24, 24, 3), grey, np.uint8)).save(tmp_path / "pictures" / name)
    example("align_a_folder")(tmp_path / "pictures", tmp_path / "aligner.safetensors", tmp_path / "out")
    for file, grey in (("aligned/a.png", 40), ("aligned/b.png", 200), ("average.png", 120)):
        pixels = np.asarray(Image.open(tmp_path / "out" / file))
        assert pixels.shape == (16, 16, 3)
        assert np.abs(pixels.astype(int) - grey).max() <= 1


def test_warp_points(tmp_path: Path) -> None:
    assert example("warp_points")(tmp_path / "points.png") < 1e-4
    assert Image.open(tmp_path / "points.png").size[0] > 100


def test_prompt_own_network(tmp_path: Path) -> None:
    """Even twenty steps of training are enough to make a random network better in one update."""
    start, *achieved = example("prompt_own_network")(tmp_path)
    assert len(achieved) == 3
    assert all(abs(loss - 0.4) < abs(start - 0.4) for loss in achieved)
