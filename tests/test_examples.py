"""The scripts of examples/ run as they are, on something small."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from triptych_gangealing import SpatialTransformer, SpatialTransformerConfig
from triptych_gangealing.aligner import Aligner, write_aligner
from triptych_gangealing.modes import Directions, Mode

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> Callable[..., Any]:
    """The `main` of an example."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


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
