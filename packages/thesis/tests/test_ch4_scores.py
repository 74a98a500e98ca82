"""`triptych score-alignment` and `score-clusters`: methods whose scores are known, and the commands."""

import json
import math
from functools import partial

import pytest
import torch
from triptych_common.images import from_uint8
from triptych_common.testing import fails_with, run_here, strict_json
from triptych_gangealing.aligner import Aligner, Alignment, write_aligner
from triptych_gangealing.digits32 import affine
from triptych_gangealing.encoders.descriptor import Groups
from triptych_gangealing.encoders.perceptual import EncoderConfig
from triptych_gangealing.keypoints.synthetic import pairs, posed_digits
from triptych_gangealing.modes import Directions, Mode
from triptych_gangealing.spatial_transformer import SpatialTransformer, SpatialTransformerConfig
from triptych_gangealing.warp import Affine, Warp
from triptych_thesis import cli
from triptych_thesis.chapter4 import context
from triptych_thesis.chapter4.alignment_scores import score
from triptych_thesis.chapter4.cluster_scores import cluster_scores
from triptych_thesis.chapter4.options import AlignmentScoreConfig
from triptych_thesis.chapter4.pose import pose_errors

command = partial(run_here, cli.run)


def knowing(*known):
    """A method that has seen the jitters: from an upright canvas to each digit as it lies."""

    def method(images):
        jitters = next(j for theirs, j in known if theirs.shape == images.shape and torch.equal(theirs, images))
        return Alignment.of_warp(Warp((Affine(affine(jitters)),)).inverse())

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


def test_doing_nothing_leaves_the_jitters():
    several, posed = pairs(10, seed=1, digit=3), posed_digits(200, 2, 3)
    found = score(lambda images: Alignment.of_warp(Warp.identity(len(images))), several, posed)
    away = (posed.jitters.angle - posed.jitters.angle.mean()).abs().rad2deg().mean()
    assert found.pose.rotation_deg.value == pytest.approx(float(away), abs=3)
    assert found.pose.rotation_deg.value == pytest.approx(30, abs=5)  # of angles even in -60 .. 60
    assert not math.isnan(found.pose.shift_px.value)


def test_poses_of_clusters_are_beside_their_own_modes():
    """One who shows half of the digits upright and half lying makes no error if these are two clusters."""
    several, posed = pairs(4, seed=1, digit=3), posed_digits(40, 2, 3)
    cluster = torch.arange(40) % 2
    known = Warp((Affine(affine(posed.jitters)),)).inverse()
    turns = torch.stack([torch.zeros(40), torch.ones(40)])[cluster, torch.arange(40)] * math.pi / 2
    turn = Affine.similarity(turns, torch.zeros(40), torch.zeros(40, 2))

    def method(images, cluster=cluster):
        if len(images) != 40:
            return Alignment.of_warp(Warp.identity(len(images)))
        return Alignment.of_warp(Warp((turn,)).compose(known), cluster)

    found = score(method, several, posed)
    assert found.pose.rotation_deg.value < 0.01
    as_one = score(lambda images: method(images, torch.zeros(40, dtype=torch.long)), several, posed)
    assert as_one.pose.rotation_deg.value > 30


def test_intervals_of_scores_resample_digits():
    """Every picture five times over says no more about digits than once; other digits would, and intervals be sqrt(5) narrower."""
    posed = posed_digits(60, 2, 3)
    once = pose_errors(posed.jitters, Warp.identity(60), repeats=400).rotation_deg
    rows = torch.arange(60).repeat(5)
    again = type(posed.jitters)(*(values[rows] for values in posed.jitters))
    five = pose_errors(again, Warp.identity(300), repeats=400).rotation_deg
    others = pose_errors(again._replace(digit=torch.arange(300)), Warp.identity(300), repeats=400).rotation_deg
    width = [estimate.high - estimate.low for estimate in (once, five, others)]
    assert five.value == pytest.approx(once.value, rel=0.02)
    assert width[1] == pytest.approx(width[0], rel=0.15)
    assert width[2] == pytest.approx(width[0] / math.sqrt(5), rel=0.15)


def written(path, *, heads: int = 1, **facts):
    """An aligner that turns everything by 20 degrees a look; with several heads its clusters are those of a random descriptor."""
    torch.manual_seed(0)
    config = SpatialTransformerConfig(input_size=16, channel_max=8, flow_size=4, flow_upsampling=4, heads=heads)
    transformer = SpatialTransformer(config)
    raw = torch.tensor([math.atanh(1 / 9), 0.0, 0.0, 0.0])
    transformer.similarity.head.bias.data.copy_(raw.repeat(heads))
    groups = None
    if heads > 1:
        groups = Groups(EncoderConfig(widths=(4, 8), compared=1), 32, heads).requires_grad_(False).eval()
        groups.centres.copy_(groups.descriptor(from_uint8(posed_digits(heads, 0, None).images)))
    aligner = Aligner(transformer, Mode(Directions(torch.zeros(4), torch.eye(4)[:1], torch.ones(1)), heads), groups)
    usual = {"padding": "border", "iterations": 1, "flips": False, "generator": "none"}
    write_aligner(path / "aligner.safetensors", aligner.requires_grad_(False).eval(), usual | facts)
    return path


def test_clusters_are_scored_on_their_own(tmp_path):
    """By the command, and by counting; a pair's images in two of them are told."""
    aligner = written(tmp_path / "three", heads=3)
    done = command("score-clusters", "--aligner", aligner, "--images", "40", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])["scores"]
    assert scores["clusters"] == 3
    descriptor, pixels = (name for name in scores if name != "clusters")
    assert descriptor == "GANgealing's clusters: k-means on a contrastive descriptor"
    assert pixels == "k-means, moments-aligned pixels"
    assert scores[pixels]["n"] == 40
    assert scores[descriptor]["purity"]["low"] <= scores[descriptor]["purity"]["value"]
    assert strict_json((tmp_path / "out/clusters.json").read_text())["scores"] == scores
    fails_with(
        command("score-clusters", "--aligner", written(tmp_path / "one"), "--images", "10"),
        "clusters: the aligner has one; pass --aligner of a training with --clusters",
    )
    words = ["--digit", "None", "--pairs", "20", "--images", "20", "--baselines", "none"]
    done = command("score-alignment", "--aligner", aligner, *words, "--out", tmp_path / "pck", "--json")
    assert done.returncode == 0, done.stderr
    apart = json.loads(done.stdout.splitlines()[-1])["scores"]["GANgealing"]["pairs apart"]
    assert apart > 0
    assert f", {apart} pairs apart" in done.stdout + done.stderr


def test_clusters_of_several_pictures_a_digit_have_intervals_over_digits():
    labels, clusters = torch.arange(200) % 10, (torch.arange(200) * 7 % 13) % 10
    five = [values.repeat(5) for values in (clusters, labels)]
    once = cluster_scores(clusters, labels, repeats=300).purity
    together = cluster_scores(*five, repeats=300, groups=torch.arange(200).repeat(5)).purity
    assert together.value == once.value
    assert together.high - together.low == pytest.approx(once.high - once.low, rel=0.2)


def test_the_command_writes_every_method(tmp_path):
    words = ["--aligner", "None", "--pairs", "8", "--images", "12", "--out", tmp_path]
    done = command("score-alignment", *words, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])["scores"]
    assert list(scores) == ["none", "moments", "moments, upright", "Congealing"]
    assert set(scores["moments"]["pck"]) >= {"target box, per point, 0.1", "image, per image, 0.01"}
    assert json.loads((tmp_path / "pck.json").read_text())["scores"] == scores


def test_bad_settings_get_one_line():
    fails_with(command("score-alignment", "--images", "0"), "images 0: expected at least 1", 2)
    fails_with(command("score-clusters", "--images", "1"), "images 1: expected at least 2", 2)


@pytest.mark.parametrize("content", ["{", "[]", '{"config": {}}', '{"scores": {"ours": 1}}'])
def test_damaged_scores_are_named(tmp_path, content):
    (tmp_path / "pck.json").write_text(content)
    with pytest.raises(ValueError, match=r"pck\.json: .*; delete it and repeat the command, which scores again"):
        context._scores(AlignmentScoreConfig(out=tmp_path))
