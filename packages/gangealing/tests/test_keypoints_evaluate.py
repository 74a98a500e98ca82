"""`triptych-gangealing pck`: methods whose scores are known, and the command."""

import json
import math
from functools import partial

import torch
from triptych_common.images import from_uint8
from triptych_common.testing import fails_with, run_here, strict_json
from triptych_gangealing import cli
from triptych_gangealing.aligner import Aligner, Alignment, write_aligner
from triptych_gangealing.digits32 import affine
from triptych_gangealing.encoders.descriptor import Groups
from triptych_gangealing.encoders.perceptual import EncoderConfig
from triptych_gangealing.keypoints.evaluate import PckConfig, evaluate, score_pairs
from triptych_gangealing.keypoints.synthetic import pairs, posed_digits
from triptych_gangealing.modes import Directions, Mode
from triptych_gangealing.spatial_transformer import SpatialTransformer, SpatialTransformerConfig
from triptych_gangealing.warp import Affine, Warp

command = partial(run_here, cli.run)


def knowing(several):
    """A method that has seen the jitters: from an upright canvas to each digit as it lies."""

    def method(images):
        known = (several.source, several.source_jitters), (several.target, several.target_jitters)
        jitters = next(theirs for seen, theirs in known if torch.equal(seen, images))
        return Alignment.of_warp(Warp((Affine(affine(jitters)),)).inverse())

    return method


def test_known_jitters_transfer_every_point():
    several = pairs(30, seed=1, digit=3, elastic_px=0.0)
    table, apart = score_pairs(knowing(several), several)
    assert table["target box", "per point", 0.01].value == 1.0
    assert apart == 0


def test_known_jitters_leave_the_elastic_deformations():
    """No point moves by more than `elastic_px` in either image: the radius within which all are found."""
    several = pairs(40, seed=1, digit=3, elastic_px=1.0)
    table, _ = score_pairs(knowing(several), several)
    everything = table[
        "image", "per point", 0.1
    ]  # 3.2 pixels of the canvas; a pair's differ by at most 2 of the digit's
    assert everything.value == 1.0
    assert table["image", "per point", 0.01].value < 0.9


def test_pairs_in_two_clusters_are_misses():
    """For a method that knows the jitters: what is left are the pairs both of whose images fall into one cluster."""
    several = pairs(30, seed=1, digit=3, elastic_px=0.0)
    method = knowing(several)

    def parted(images):
        cluster = torch.zeros(30, dtype=torch.long)
        if torch.equal(images, several.target):
            cluster = (torch.arange(30) < 10).long()
        return Alignment.of_warp(method(images).warp, cluster)

    table, apart = score_pairs(parted, several)
    assert apart == 10
    left = several.valid[10:].sum() / several.valid.sum()
    assert abs(table["target box", "per point", 0.1].value - float(left)) < 1e-6


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


def test_pck_defaults_to_the_options_of_training(tmp_path):
    def scores(name, aligner, **options):
        config = PckConfig(out=tmp_path / name, aligner=aligner, pairs=4, baselines="none", device="cpu", **options)
        evaluate(config)
        content = strict_json((tmp_path / name / "pck.json").read_text())
        return content["config"]["iterations"], content["config"]["flips"], content["scores"]["GANgealing"]

    once, twice = (written(tmp_path / str(n), iterations=n) for n in (1, 2))
    mirrored = written(tmp_path / "mirrored", flips=True)
    assert scores("a", twice) == scores("b", once, iterations=2)
    assert scores("c", once) != scores("a", twice)
    assert scores("d", mirrored)[1] is True
    assert scores("e", mirrored, flips="no") == scores("c", once)


def test_pairs_in_two_clusters_are_reported(tmp_path):
    words = ["--digit", "None", "--pairs", "20", "--baselines", "none"]
    aligner = written(tmp_path / "three", heads=3)
    done = command("pck", "--aligner", aligner, *words, "--out", tmp_path / "pck", "--json")
    assert done.returncode == 0, done.stderr
    apart = json.loads(done.stdout.splitlines()[-1])["scores"]["GANgealing"]["pairs apart"]
    assert apart > 0
    assert f", {apart} pairs apart" in done.stdout + done.stderr


def test_the_command_writes_every_method(tmp_path):
    done = command("pck", "--aligner", "None", "--pairs", "8", "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])["scores"]
    assert list(scores) == ["none", "moments", "moments, upright", "Congealing"]
    assert set(scores["moments"]["pck"]) >= {"target box, per point, 0.1", "image, per image, 0.01"}
    assert json.loads((tmp_path / "pck.json").read_text())["scores"] == scores


def test_bad_settings_get_one_line(tmp_path):
    fails_with(command("pck", "--digit", "12"), "digit 12: expected 0 to 9, or None for all", 2)
    fails_with(command("pck", "--iterations", "0"), "iterations 0: expected at least 1", 2)
    fails_with(command("pck", "--aligner", tmp_path, "--baselines", "none"), "aligner.safetensors: no such file")
