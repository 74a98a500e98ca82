"""The study's parts: statistics, the matched U-Net, scores, the ledger, what is asked for."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from scipy import stats
from triptych_common import data, testing
from triptych_common.metrics import frechet_distance
from triptych_common.storage.run import RunDirectory
from triptych_dit import cli, gflops
from triptych_dit.objective import open_training_data
from triptych_thesis.chapter2 import command, experiments, ledger, statistics
from triptych_thesis.chapter2.command import StudyConfig
from triptych_thesis.chapter2.digits import padded_digits, without_margin
from triptych_thesis.chapter2.experiments import EXPERIMENTS, Experiment
from triptych_thesis.chapter2.ledger import verdicts
from triptych_thesis.chapter2.report import write_report
from triptych_thesis.chapter2.scoring import METRICS, StudyScorer, score_of
from triptych_thesis.chapter2.sizes import SIZES, Model
from triptych_thesis.chapter2.statistics import FAILS, HOLDS, SHOWN, UNCLEAR, Score, SeedNoise, compare
from triptych_thesis.chapter2.unet import UNet, matched, unet_gflops
from triptych_thesis.study.claims import FOUND, load_claims, record

ROOT = Path(__file__).parents[3]


def run(*words: object):
    return testing.run_here(lambda argv: cli.main("triptych-dit", cli.COMMANDS, argv), *words)


def around(value: float, deviation: float, seed: int = 0, n: int = 4000) -> Score:
    """A score with normal replicates of exactly that spread."""
    draws = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Score(value, tuple((value + deviation * (draws - draws.mean()) / draws.std()).tolist()))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 10, 100])
def test_students_quantile_is_scipys(degrees):
    assert statistics.student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-3)


def test_correlation_and_its_interval_are_scipys_where_samples_have_no_noise():
    rng = np.random.default_rng(0)
    x = rng.normal(size=9)
    y = -2 * x + rng.normal(size=9)
    found = statistics.correlation(x.tolist(), [Score(float(v)) for v in y])
    expected = stats.pearsonr(x, y)
    interval = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(expected.statistic)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-3)


def test_noise_of_samples_widens_a_correlations_interval():
    x = [0.0, 1.0, 2.0, 3.0, 4.0]
    values = [5.0, 4.2, 2.9, 2.1, 0.7]
    calm = statistics.correlation(x, [around(v, 1e-6, seed=i) for i, v in enumerate(values)])
    noisy = statistics.correlation(x, [around(v, 1.0, seed=i) for i, v in enumerate(values)])
    assert noisy.high > calm.high
    assert noisy.value == pytest.approx(calm.value)
    assert statistics.correlation(x[:3], [Score(v) for v in values[:3]]).low is None
    assert statistics.correlation(x, [Score(1.0)] * 5).value == 0.0  # no variation, no correlation


@pytest.mark.parametrize(
    ("low", "high", "sign", "verdict"),
    [
        (0.6, 0.9, 1, HOLDS),
        (0.1, 0.4, 1, FAILS),
        (0.4, 0.9, 1, UNCLEAR),
        (-0.9, -0.6, -1, HOLDS),
        (0.6, 0.9, -1, FAILS),
    ],
)
def test_a_correlation_is_strong_where_its_whole_interval_is(low, high, sign, verdict):
    assert statistics.strong_verdict(statistics.Estimate((low + high) / 2, low, high), sign) == verdict


def test_differences_of_distances_are_logarithmic_and_follow_the_closed_form():
    a, b = around(10.0, 1.0, seed=1), around(20.0, 3.0, seed=2)
    found = compare(("a", a), ("b", b), "frechet")
    assert found.difference.value == pytest.approx(math.log(2))
    margin = 1.96 * math.sqrt((1 / 10) ** 2 + (3 / 20) ** 2)  # the delta method, independent samples
    assert found.difference.high - found.difference.value == pytest.approx(margin, rel=0.05)
    assert found.verdict == HOLDS
    assert compare(("b", b), ("a", a), "frechet").verdict == FAILS


def test_paired_replicates_cancel_what_two_sets_share():
    a = around(10.0, 2.0, seed=1)
    b = Score(10.5, tuple(v * 1.05 for v in a.replicates))
    assert compare(("a", a), ("b", b), "frechet").verdict == HOLDS
    assert compare(("a", a), ("b", around(10.5, 2.1, seed=2)), "frechet").verdict == UNCLEAR


def test_the_noise_of_seeds_can_take_a_verdict_back():
    a, b = around(10.0, 0.1, seed=1), around(13.0, 0.1, seed=2)
    pairs = [(Score(10.0), Score(14.0)), (Score(20.0), Score(15.0))]
    noise = statistics.seed_noise(pairs, "frechet")
    logs = [math.log(10 / 14), math.log(20 / 15)]
    assert noise == pytest.approx((math.sqrt(sum(x**2 / 2 for x in logs) / 2), 2))
    assert compare(("a", a), ("b", b), "frechet").verdict == HOLDS
    with_seeds = compare(("a", a), ("b", b), "frechet", (noise, noise))
    assert with_seeds.verdict == UNCLEAR
    margin = stats.t.ppf(0.975, 2) * noise.deviation * math.sqrt(2)
    assert with_seeds.difference.high - with_seeds.difference.value == pytest.approx(margin, rel=0.01)
    at_other_stages = compare(("a", a), ("b", b), "frechet", (SeedNoise(0.3, 2), SeedNoise(0.4, 2))).difference
    assert at_other_stages.high - at_other_stages.value == pytest.approx(stats.t.ppf(0.975, 2) * 0.5, rel=0.01)


def test_the_interval_of_a_share_stays_a_share_and_never_closes():
    assert Score(0.99, deviation=0.02, trials=100).estimate.high == 1.0
    assert Score(0.01, deviation=0.02, trials=100).estimate.low == 0.0
    assert Score(0.0, (0.0, 0.0), trials=100).estimate == (0.0, 0.0, 0.03)
    assert Score(1.0, (1.0, 1.0), trials=100).estimate == pytest.approx((1.0, 0.97, 1.0))
    assert Score(0.01, deviation=0.02).estimate.low < 0


def test_rates_compare_as_they_are():
    found = compare(
        ("a", Score(0.8, deviation=0.01)), ("b", Score(0.7, deviation=0.02)), "precision", (SeedNoise(0.0, 0),) * 2
    )
    assert found.difference.value == pytest.approx(0.1)
    assert found.difference.high - found.difference.value == pytest.approx(1.96 * math.hypot(0.01, 0.02))


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([], UNCLEAR),
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, UNCLEAR], UNCLEAR),
        ([HOLDS, UNCLEAR, FAILS], FAILS),
        ([SHOWN], SHOWN),
        ([HOLDS, SHOWN], UNCLEAR),
    ],
)
def test_a_claim_of_parts(parts, whole):
    assert statistics.overall(parts) == whole


@pytest.mark.parametrize("name", ["laptop", "laptop-pixels", "gpu"])
def test_the_unet_costs_what_the_dit_costs(name):
    size = SIZES[name]
    shape = size.shape(Model(size.unet))
    assert unet_gflops(matched(shape)) == pytest.approx(gflops(shape), rel=0.1)


def test_the_unets_cost_is_that_of_its_products():
    """By hooks on every convolution and linear map; attention's two products are all that is left."""
    config = matched(SIZES["laptop"].shape(Model(SIZES["laptop"].unet)))
    model, products = UNet(config).eval(), []

    def count(layer, inputs, output):
        products.append(
            output[0].numel() * layer.weight[0].numel() if output.ndim == 4 else output.numel() * layer.weight.shape[1]
        )

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        out = model(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.tensor([10]))
    assert out.shape == (1, 8, 8, 8)
    left = unet_gflops(config) - sum(products) / 1e9
    assert 0 <= left < 0.05 * unet_gflops(config)


def test_digits_get_a_margin_and_lose_it_again(tmp_path):
    folder = padded_digits(tmp_path / "digits32", "mnist5k")
    held_out = data.load("mnist5k", "held_out")
    read = open_training_data(str(folder), SIZES["smoke-pixels"].models["S/4"], "held_out")
    assert read.shape == (1, 32, 32)
    assert read.labels.bincount().tolist() == [100] * 10
    assert torch.equal(without_margin(read.dataset.images), held_out.images[held_out.labels.argsort(stable=True)])
    assert not bool(read.dataset.images[..., :2, :].any())


def test_scores_pair_and_real_digits_score_well():
    scorer = StudyScorer("mnist5k", seed=0, repeats=4)
    train = scorer.digits.train
    items = torch.cat([(train.labels == c).nonzero().flatten()[:20] for c in range(10)])
    images, labels = train.images[items], train.labels[items]
    real, noised = scorer.score(images, labels), scorer.score((images // 2), labels)
    expected = frechet_distance(scorer.digits.features(images), scorer.digits.features(scorer.digits.held_out.images))
    assert real["frechet"]["value"] == pytest.approx(expected, rel=1e-4)
    assert real["accuracy"]["value"] > 0.97
    assert 8 < real["digit_score"]["value"] <= 10
    assert real["frechet"]["value"] < noised["frechet"]["value"]
    rows, _ = scorer._rows(200, 1000)
    right = scorer.digits.classifier(images).argmax(1) == labels
    assert real["accuracy"]["replicates"][2] == pytest.approx(float(right[rows[2]].float().mean()))
    assert set(real) == {*METRICS, "accuracy", "n"}
    assert len(score_of(real, "recall").replicates) == 4


@pytest.mark.parametrize("content", ['{"asked": ', '{"asked": {}}', "[1]"])
def test_damaged_scores_are_named(tmp_path, content):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(ValueError, match=r"scores\.json: damaged, expected a scorer's JSON; delete it"):
        StudyScorer("mnist5k", seed=0, repeats=2)(tmp_path / "samples.npz")


def test_replicates_spread_as_scores_of_fresh_samples_do():
    """Ten sets of 400 digits that share none; replicates hold the noise of the real digits besides, so they may spread more."""
    scorer = StudyScorer("mnist5k", seed=0, repeats=60)
    train = scorer.digits.train
    parts = torch.randperm(4000, generator=torch.Generator().manual_seed(0)).split(400)
    scores = [scorer.score(train.images[part], train.labels[part]) for part in parts]
    for metric in ("frechet", "spatial_frechet", "precision", "recall"):
        found = [score_of(each, metric) for each in scores]
        actual = float(torch.tensor([score.value for score in found]).std())
        spread = sum(score.spread for score in found) / len(found)
        assert 0.7 < spread / actual < 2.6, metric


def test_no_model_is_narrower_than_its_patches():
    """The thesis's smallest has 256 values a patch for a width of 384."""
    size = SIZES["laptop"]
    assert {"L/4", "L/2", "L/1", "S/2", "S/1"} < size.models.keys()
    assert "S/4" not in size.models
    narrow = replace(size.models["S/2"], patch_size=4)
    with pytest.raises(ValueError, match="S/4: 64 values a patch, expected fewer than its width 32"):
        replace(size, models={**size.models, "S/4": narrow})
    for each in SIZES.values():
        for shape in each.grid(True).values():
            assert shape.hidden_size > shape.patch_size**2 * shape.in_channels


@pytest.mark.parametrize(
    ("fid", "inception", "verdict"),
    [((2.1, 2.25), (270, 280), HOLDS), ((2.1, 2.4), (270, 280), UNCLEAR), ((2.1, 2.25), (240, 260), FAILS)],
)
def test_table_2_2_is_decided_by_the_best_of_its_other_models(fid, inception, verdict):
    """2.30 of StyleGAN-XL, 267.75 of its Inception Scores."""

    def score(metric):
        low, high = {"frechet": fid, "digit_score": inception}[metric]
        return Score((low + high) / 2, deviation=(high - low) / 2 / 1.96)

    assert experiments.against_rivals(256, score) == verdict
    assert experiments.against_rivals(32, score) == SHOWN


def test_the_papers_headline_is_guided_on_three_channels():
    bench = StudyConfig(size="paper").bench()
    guided = [draw for draw in EXPERIMENTS["guidance"].needs(bench) if draw.settings.guidance_scale == 1.5]
    on = {(draw.images, draw.settings.guidance_channels) for draw in guided}
    assert on == {(7_000_000 * 256, "all"), (7_000_000 * 256, 3), (2_350_000 * 256, 3)}


def test_the_ledger_takes_verdicts_and_keeps_all_else(tmp_path):
    file = tmp_path / "claims.toml"
    file.write_text((ROOT / "claims.toml").read_text())
    before = load_claims(file)
    row = ("undecided", "laptop", 'says "1.2 times" [0.9, 1.5]', "triptych-dit study --size laptop --seed 0")
    record(file, {"dit.fig-2.5": dict(zip(FOUND, row, strict=True))})
    after = load_claims(file)
    assert after["dit.fig-2.5"].interval == 'says "1.2 times" [0.9, 1.5]'
    assert (after["dit.fig-2.5"].verdict, after["dit.fig-2.5"].size) == ("undecided", "laptop")
    assert {id: claim for id, claim in after.items() if id != "dit.fig-2.5"} == {
        id: claim for id, claim in before.items() if id != "dit.fig-2.5"
    }
    lines = zip((ROOT / "claims.toml").read_text().splitlines(), file.read_text().splitlines(), strict=True)
    assert sum(a != b for a, b in lines) <= 4
    with pytest.raises(ValueError, match=r"has no claim 'dit\.fig-9'"):
        record(file, {"dit.fig-9": dict(zip(FOUND, row, strict=True))})


def test_figure_2_2_needs_both_of_its_halves():
    left, right = {"verdicts": {"dit.fig-2.2": HOLDS, "dit.fig-2.6": HOLDS}}, {"verdicts": {"dit.fig-2.2": UNCLEAR}}
    assert verdicts({"scaling": left}) == {"dit.fig-2.6": HOLDS}
    assert verdicts({"scaling": left, "unet": right}) == {"dit.fig-2.2": UNCLEAR, "dit.fig-2.6": HOLDS}
    assert list(verdicts({"a": {"verdicts": dict.fromkeys(("dit.fig-2.10", "dit.fig-2.9"), HOLDS)}})) == [
        "dit.fig-2.9",
        "dit.fig-2.10",
    ]


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_a_study(name):
    config = StudyConfig(size=name)
    bench = config.bench()
    for experiment in config.chosen:
        for draw in EXPERIMENTS[experiment].needs(bench):
            train = bench.train_config(draw.model)
            assert draw.images in (*train.snapshots, train.total_images)
            assert train.total_images % train.batch_size == 0
            bench.sampling(draw).config.check(train.model)


def test_the_paper_sizes_print_the_theses_runs():
    plan = StudyConfig(size="paper").resolved()
    assert plan["models"].keys() == {
        *(f"{w}/{p}" for w in ("S", "B", "L", "XL") for p in (8, 4, 2)),
        "XL/2 adaln", "XL/2 cross-attention", "XL/2 in-context",
    }  # fmt: skip
    assert plan["models"]["XL/2"]["images"] == 7_000_000 * 256
    assert plan["models"]["S/8"]["images"] == 400_000 * 256
    trains = [line for line in plan["run_first"] if " train " in line]
    longest = next(line for line in trains if "--preset DiT-XL/2 " in line)
    assert str(400_000 * 256) in longest
    assert str(2_350_000 * 256) in longest
    samples = [line for line in plan["run_first"] if " sample " in line]
    assert any(
        "--guidance-scale 1.5 --guidance-channels 3" in line and "--num-samples 50000" in line for line in samples
    )
    assert any("--num-inference-steps 1000" in line and "--num-samples 10000" in line for line in samples)
    for line in plan["run_first"]:  # they are commands that the program takes
        words = line.split("triptych_dit.cli ")[1].split()
        done = run(*words, "--device", "cpu", "--dry-run")
        assert done.returncode == 0 or "no model" in done.stderr or "ILSVRC2012" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "huge"], "size 'huge': expected one of smoke, smoke-pixels, laptop"),
        (["--only", "everything"], "experiment 'everything': expected one of gallery, block-designs"),
        (
            ["--size", "paper", "--only", "gallery"],
            "experiment 'gallery': not for size paper; expected one of block-designs",
        ),
        (["--workers", "0"], "workers 0: expected at least 1"),
        (["--latents", "here"], "latents here: for the paper sizes alone"),
    ],
)
def test_bad_requests_are_one_line(tmp_path, words, message):
    testing.fails_with(run("study", "--out", tmp_path, *words), message, 2)


@pytest.mark.parametrize("content", ["a = 1", "[[claim", "claim = 1", "claim = [1]", None])
def test_what_is_no_ledger_is_said_before_the_work(tmp_path, content):
    file = tmp_path / "claims.toml"
    file.write_text(content) if content else file.mkdir()
    done = run("study", "--size", "smoke", "--out", tmp_path / "out", "--claims", file)
    testing.fails_with(done, f"{file}: no ledger, expected TOML with [[claim]] tables")
    assert not (tmp_path / "out").exists()


def test_paper_sizes_are_what_they_were_given(tmp_path):
    """Latents and reference by content, wherever they lie: others, or another decoder, are another study."""
    AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=8,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    for i in range(4):
        folder = tmp_path / "pictures" / f"class-{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(folder / f"{i}.png")
    for side in (8, 16):
        words = ("--source", tmp_path / "pictures", "--vae", tmp_path / "vae", "--image-size", side)
        done = run("encode", *words, "--out", tmp_path / f"latents-{side}")
        assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "latents-16", tmp_path / "moved")
    for name, content in (("a", b"1"), ("b", b"2"), ("copy", b"1")):
        (tmp_path / f"{name}.npz").write_bytes(content)

    def identity(latents="latents-16", reference="a.npz", **settings):
        config = StudyConfig(size="paper", latents=str(tmp_path / latents), reference=tmp_path / reference, **settings)
        return config.identity()

    assert identity() == identity(latents="moved", reference="copy.npz")
    for other in ({"latents": "latents-8"}, {"reference": "b.npz"}, {"decoder": "elsewhere"}, {"vae": "elsewhere"}):
        assert identity() != identity(**other)
    both = {"vae": "elsewhere", "decoder": "its own"}
    assert identity(**both) != identity(decoder="its own")
    words = ("--size", "paper", "--out", tmp_path / "out", "--latents", tmp_path / "latents-16")
    with RunDirectory(tmp_path / "out/paper", identity()):
        pass
    done = run("study", *words, "--reference", tmp_path / "b.npz")
    testing.fails_with(done, "paper: holds a run with reference='6b86b273ff34")  # SHA-256 of b"1"
    assert "or use another --out" in done.stderr
    done = run("study", *words, "--reference", tmp_path / "none.npz")
    testing.fails_with(done, "none.npz: no such reference; fetch it from the ADM suite, pass --reference")


def test_a_claims_command_is_that_of_its_experiment(monkeypatch):
    monkeypatch.setattr(ledger, "measured", lambda experiments: dict.fromkeys(("dit.fig-2.6", "dit.fig-2.5"), "words"))
    experiments = {
        "scaling": {"verdicts": {"dit.fig-2.6": HOLDS}, "made": {"command": "study --all", "commit": "a"}},
        "block-designs": {"verdicts": {"dit.fig-2.5": UNCLEAR}, "made": {"command": "study", "commit": "b"}},
    }
    found = ledger.claims(experiments, "laptop")
    assert found["dit.fig-2.6"] == dict(zip(FOUND, ("confirmed", "laptop", "words", "study --all"), strict=True))
    assert found["dit.fig-2.5"]["command"] == "study"
    for name in experiments:  # a claim of two
        experiments[name]["verdicts"] = {"dit.fig-2.5": UNCLEAR}
    assert ledger.claims(experiments, "laptop")["dit.fig-2.5"]["command"] == "study --all; study"


def test_what_comes_out_as_before_keeps_its_command_and_commit(tmp_path, monkeypatch):
    value, commit = [1.0], ["before"]
    monkeypatch.setitem(command.EXPERIMENTS, "scaling", Experiment(list, lambda bench: {"rows": ({"x": value[0]},)}))
    monkeypatch.setattr(command, "git_commit", lambda: commit[0])
    monkeypatch.setattr(command, "drawn", lambda name, result: {})
    file = tmp_path / "smoke/experiments/scaling.json"

    def made(**options):
        config = StudyConfig(out=tmp_path, size="smoke", **options)
        command.measure(config, config.bench(), "scaling")
        return command.read_result(file)["made"]

    first = {"command": "triptych-dit study --size smoke --all --seed 0", "commit": "before"}
    assert made(all=True) == first
    commit[0] = "after"
    assert made() == first
    value[0] *= 1 + 1e-9
    assert made() == first  # linear algebra on many threads
    value[0] *= 1.001
    assert made() == {"command": "triptych-dit study --size smoke --seed 0", "commit": "after"}
    file.write_text("{")
    with pytest.raises(ValueError, match=r"scaling\.json: damaged, expected JSON; delete it and repeat the command"):
        made()


def test_the_command_of_a_paper_size_names_what_it_was_given():
    config = StudyConfig(size="paper", vae="mine", decoder="stabilityai/sd-vae-ft-ema", reference=Path("a b.npz"))
    words = (
        "triptych-dit study --size paper --vae mine --decoder stabilityai/sd-vae-ft-ema --reference 'a b.npz' --seed 0"
    )
    assert command.made_by(config)["command"] == words


def test_another_decoder_draws_and_nothing_else():
    plain, other = (StudyConfig(size="paper", decoder=name).resolved() for name in (None, "stabilityai/sd-vae-ft-ema"))
    for before, line in zip(plain["run_first"], other["run_first"], strict=True):
        changed = before.replace("--vae stabilityai/sd-vae-ft-mse", "--vae stabilityai/sd-vae-ft-ema")
        assert line == (changed if " sample " in line else before)


def test_the_plan_leaves_out_what_is_drawn(tmp_path):
    """Samples are drawn under torchrun, and scored by the study itself."""
    before = StudyConfig(size="paper-512", out=tmp_path).resolved()["run_first"]
    drawn = next(line for line in before if " sample " in line)
    folder = Path(drawn.split("--out ")[1].split()[0])
    folder.mkdir(parents=True)
    (folder / "samples.npz").touch()
    assert StudyConfig(size="paper-512", out=tmp_path).resolved()["run_first"] == [x for x in before if x != drawn]


def test_the_page_names_its_subject_and_other_commits(tmp_path):
    results = {
        "experiments": {
            "first": {"made": {"command": "study --all", "commit": "older"}, "verdicts": {}},
            "second": {"made": {"command": "study", "commit": "now"}, "verdicts": {}},
        },
        "verdicts": {}, "findings": [], "models": {}, "seconds": {"training": 60.0}, "space": "latents of vae",
        "autoencoder": None, "model": {"name": "XL/2", "parameters": 1, "gflops_per_forward": 1, "images": 1, "config": {}},
        "training": {"data": "here"}, "hardware": {"cores": 2, "cpu": "one"}, "versions": {}, "command": "study",
        "commit": "now", "commits": ["now", "oldest"], "decoder": "another vae",
    }  # fmt: skip
    for size, subject in (("paper-512", "ImageNet"), ("laptop", "digits")):
        write_report(tmp_path / "report.html", StudyConfig(size=size, claims=tmp_path / "none"), results)
        page = (tmp_path / "report.html").read_text()
        assert f"<h1>Diffusion transformers on {subject}: what of chapter 2 holds at this size</h1>" in page
        assert "1.0 minutes, without what was cut short by a kill" in page
        for cells in (
            ("command, of experiments", "first `study --all`, second `study`"),
            ("commit, of experiments", "first older"),
            ("commits, of models and samples", "oldest"),
            ("autoencoder", "latents of vae"),
            ("decoder of the samples", "another vae"),
        ):
            assert "".join(f"<td>{cell}</td>" for cell in cells) in page


def test_missing_latents_are_one_line(tmp_path):
    done = run("study", "--size", "paper", "--out", tmp_path, "--latents", tmp_path / "none")
    testing.fails_with(done, "no latent cache; pass --latents, or make it: torchrun", 1)
    assert not list(tmp_path.iterdir())
