"""The ADM suite in chapter 2's study, against `triptych-dit evaluate`."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from triptych_common.metrics import load_inception
from triptych_common.testing import random_inception_weights
from triptych_dit.evaluate import EvaluateConfig, evaluate
from triptych_thesis.chapter2 import adm
from triptych_thesis.chapter2.adm import AdmScorer

REFERENCES, SAMPLES = 8, 7


@pytest.fixture
def folder(tmp_path):
    """Random weights, and two sets of images: smooth ones, and the same kind with noise."""
    random_inception_weights(tmp_path / "weights.pth")
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (REFERENCES + SAMPLES, 3, 3, 3)).repeat(8, 1).repeat(8, 2)
    noisy = np.clip(smooth + rng.normal(0, 25, smooth.shape), 0, 255).astype(np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=smooth[:REFERENCES].astype(np.uint8))
    np.savez_compressed(tmp_path / "samples.npz", arr_0=noisy[REFERENCES:], arr_1=np.arange(SAMPLES))
    return tmp_path


def test_the_studys_scorer_gives_the_commands_scores(folder, monkeypatch):
    """Under the study's names, kept beside the samples; a reference without images is refused in a line."""
    monkeypatch.setattr(
        adm, "load_inception", lambda path, device: load_inception(folder / "weights.pth", device=device)
    )
    files = (folder / "reference.npz", folder / "samples.npz")
    options = {"inception": folder / "weights.pth", "repeats": 20, "device": "cpu"}
    expected = evaluate(EvaluateConfig(files=files, out=folder / "out", **options))["scores"]
    (folder / "drawn").mkdir()
    samples = Path(shutil.copy(folder / "samples.npz", folder / "drawn"))
    found = AdmScorer(folder / "reference.npz", "cpu", 0, 20)(samples)
    names = {"frechet": "fid", "spatial_frechet": "sfid", "digit_score": "inception_score"}
    assert found.pop("n") == SAMPLES
    assert set(found) == {*names, "precision", "recall"}
    for name, score in found.items():
        estimate = expected[names.get(name, name)]
        assert score["value"] == pytest.approx(estimate["value"], rel=1e-6)
        assert score["deviation"] * 1.96 == pytest.approx(estimate["high"] - estimate["value"], rel=1e-6)
    monkeypatch.setattr(adm, "load_inception", None)  # it is not scored again
    assert AdmScorer(folder / "reference.npz", "cpu", 0, 20)(samples) == {"n": SAMPLES, **found}
    monkeypatch.undo()
    monkeypatch.setattr(
        adm, "load_inception", lambda path, device: load_inception(folder / "weights.pth", device=device)
    )
    (folder / "elsewhere").mkdir()
    other = Path(shutil.copy(folder / "samples.npz", folder / "elsewhere/reference.npz"))  # another, of the same name
    assert AdmScorer(other, "cpu", 0, 0)(samples)["frechet"]["value"] == pytest.approx(0, abs=1e-3)
    images = torch.from_numpy(np.load(folder / "reference.npz")["arr_0"]).permute(0, 3, 1, 2)
    pool = load_inception(folder / "weights.pth")(images)[0].double()
    np.savez(folder / "few.npz", mu=pool.mean(0).numpy(), sigma=np.cov(pool.numpy().T))
    with pytest.raises(ValueError, match=r"few\.npz: holds neither images nor statistics enough for sfid"):
        AdmScorer(folder / "few.npz", "cpu", 0, 0)(samples)
    samples.with_name("scores.json").write_text('{"asked": ')
    with pytest.raises(ValueError, match=r"scores\.json: .*; delete it, and it is made again"):
        AdmScorer(other, "cpu", 0, 0)(samples)
