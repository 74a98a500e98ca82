"""`triptych-gangealing pck`: methods whose scores are known, and the command."""

import json
import math
from functools import partial

import pytest
import torch
from triptych_common.testing import fails_with, run_here
from triptych_gangealing import cli
from triptych_gangealing.digits32 import affine
from triptych_gangealing.evaluate import posed_digits, score
from triptych_gangealing.keypoints.synthetic import pairs
from triptych_gangealing.warp import Affine, Warp

command = partial(run_here, cli.run)


def knowing(*known):
    """A method that has seen the jitters: from an upright canvas to each digit as it lies."""

    def method(images):
        jitters = next(j for theirs, j in known if theirs.shape == images.shape and torch.equal(theirs, images))
        return Warp((Affine(affine(jitters)),)).inverse()

    return method


def test_one_who_knows_the_jitters_makes_no_error():
    several, posed = pairs(30, seed=1, digit=3, elastic_px=0.0), posed_digits(20, 2, 3)
    seen = (several.source, several.source_jitters), (several.target, several.target_jitters)
    method = knowing(*seen, (posed.images, posed.jitters))

    found = score(method, several, posed)
    assert found.pck["target box", "per point", 0.01].value == 1.0
    assert found.pose.rotation_deg.value < 0.01
    assert found.pose.log_scale.value < 1e-3
    assert found.pose.shift_px.value < 1e-2
    assert found.sharpness.ratio.value == pytest.approx(1.0, abs=0.1)


def test_elastic_deformations_are_what_is_left_then():
    """No point moves by more than `elastic_px` in either image: the radius within which all are found."""
    several, posed = pairs(40, seed=1, digit=3, elastic_px=1.0), posed_digits(2, 2, 3)

    seen = (several.source, several.source_jitters), (several.target, several.target_jitters)
    found = score(knowing(*seen, (posed.images, posed.jitters)), several, posed)
    table = found.pck
    assert (
        table["image", "per point", 0.1].value == 1.0
    )  # 3.2 pixels of the canvas; a pair's differ by at most 2 of the digit's
    assert table["image", "per point", 0.01].value < 0.9


def test_doing_nothing_leaves_the_jitters():
    several, posed = pairs(10, seed=1, digit=3), posed_digits(200, 2, 3)
    found = score(lambda images: Warp.identity(len(images)), several, posed)
    away = (posed.jitters.angle - posed.jitters.angle.mean()).abs().rad2deg().mean()
    assert found.pose.rotation_deg.value == pytest.approx(float(away), abs=3)
    assert found.pose.rotation_deg.value == pytest.approx(30, abs=5)  # of angles even in -60 .. 60
    assert not math.isnan(found.pose.shift_px.value)


def test_the_command_writes_every_method(tmp_path):
    words = ["--aligner", "None", "--pairs", "8", "--images", "12", "--out", tmp_path]
    done = command("pck", *words, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])["scores"]
    assert list(scores) == ["none", "moments", "moments, upright", "Congealing"]
    assert set(scores["moments"]["pck"]) >= {"target box, per point, 0.1", "image, per image, 0.01"}
    assert json.loads((tmp_path / "pck.json").read_text())["scores"] == scores


def test_bad_settings_get_one_line(tmp_path):
    fails_with(command("pck", "--digit", "12"), "digit 12: expected 0 to 9, or None for all", 2)
    fails_with(command("pck", "--aligner", tmp_path, "--baselines", "none"), "aligner.safetensors: no such file")
