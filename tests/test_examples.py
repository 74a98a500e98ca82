"""The scripts of examples/ run as they are, on something small."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from triptych_dit import DiTConfig, load_model
from triptych_dit.interop import export_released
from triptych_dit.sampling import SamplerSettings, sample_images
from triptych_dit.testing import random_model

EXAMPLES = Path(__file__).parent.parent / "examples"


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


def test_sample_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DiTConfig((8, 8), 3, patch_size=2, hidden_size=384, depth=1, num_heads=6, num_classes=5)
    model = random_model(config, std=0.02, dtype=torch.float32)
    export_released(model, tmp_path / "released.pt")
    options = (
        "--checkpoint",
        tmp_path / "released.pt",
        "--labels",
        "3",
        "1",
        "--steps",
        "2",
        "--out",
        tmp_path / "a.png",
    )
    run(monkeypatch, "sample_released", *options)
    assert Image.open(tmp_path / "a.png").size[0] > 16
