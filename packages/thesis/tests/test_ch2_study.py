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
from triptych_common.storage.output import claimed
from triptych_common.storage.run import RunDirectory
from triptych_dit import cli as dit_cli
from triptych_dit import gflops
from triptych_dit.objective import open_training_data
from triptych_thesis import cli
from triptych_thesis.chapter2 import comparisons
from triptych_thesis.chapter2.comparisons import Score, SeedNoise, compare
from triptych_thesis.chapter2.digits import padded_digits, without_margin
from triptych_thesis.chapter2.experiments import gallery
from triptych_thesis.chapter2.experiments.guidance import RIVALS, against_rivals
from triptych_thesis.chapter2.scoring import METRICS, StudyScorer, score_of
from triptych_thesis.chapter2.sizes import SIZES, Model
from triptych_thesis.chapter2.study import Chapter2, _seconds
from triptych_thesis.chapter2.unet import UNet, matched, unet_gflops
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, UNDECIDED, merged, sign

ROOT = Path(__file__).parents[3]


def run(*words: object):
    return testing.run_here(cli.run, *words)


def run_dit(*words: object):
    return testing.run_here(lambda argv: dit_cli.main("triptych-dit", dit_cli.COMMANDS, argv), *words)


def around(value: float, deviation: float, seed: int = 0, n: int = 4000) -> Score:
    """A score with normal replicates of exactly that spread."""
    draws = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Score(value, tuple((value + deviation * (draws - draws.mean()) / draws.std()).tolist()))


def test_correlation_and_its_interval_are_scipys_where_samples_have_no_noise():
    rng = np.random.default_rng(0)
    x = rng.normal(size=9)
    y = -2 * x + rng.normal(size=9)
    found = comparisons.correlation(x.tolist(), [Score(float(v)) for v in y])
    expected = stats.pearsonr(x, y)
    interval = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(expected.statistic)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-3)


def test_noise_of_samples_widens_a_correlations_interval():
    x = [0.0, 1.0, 2.0, 3.0, 4.0]
    values = [5.0, 4.2, 2.9, 2.1, 0.7]
    calm = comparisons.correlation(x, [around(v, 1e-6, seed=i) for i, v in enumerate(values)])
    noisy = comparisons.correlation(x, [around(v, 1.0, seed=i) for i, v in enumerate(values)])
    assert noisy.high > calm.high
    assert noisy.value == pytest.approx(calm.value)
    assert comparisons.correlation(x[:3], [Score(v) for v in values[:3]]).low is None
    assert comparisons.correlation(x, [Score(1.0)] * 5).value == 0.0  # no variation, no correlation


@pytest.mark.parametrize(
    ("low", "high", "sign", "verdict"),
    [
        (0.6, 0.9, 1, CONFIRMED),
        (0.1, 0.4, 1, REFUTED),
        (0.4, 0.9, 1, UNDECIDED),
        (-0.9, -0.6, -1, CONFIRMED),
        (0.6, 0.9, -1, REFUTED),
    ],
)
def test_a_correlation_is_strong_where_its_whole_interval_is(low, high, sign, verdict):
    assert comparisons.strong({"low": low, "high": high}, sign) == verdict


def test_differences_of_distances_are_logarithmic_and_follow_the_closed_form():
    a, b = around(10.0, 1.0, seed=1), around(20.0, 3.0, seed=2)
    found = compare(("a", a), ("b", b), "frechet")["difference"]
    assert found["value"] == pytest.approx(math.log(2))
    margin = 1.96 * math.sqrt((1 / 10) ** 2 + (3 / 20) ** 2)  # the delta method, independent samples
    assert found["high"] - found["value"] == pytest.approx(margin, rel=0.05)
    assert sign(found) == CONFIRMED
    assert sign(compare(("b", b), ("a", a), "frechet")["difference"]) == REFUTED


def test_paired_replicates_cancel_what_two_sets_share():
    a = around(10.0, 2.0, seed=1)
    b = Score(10.5, tuple(v * 1.05 for v in a.replicates))
    assert sign(compare(("a", a), ("b", b), "frechet")["difference"]) == CONFIRMED
    assert sign(compare(("a", a), ("b", around(10.5, 2.1, seed=2)), "frechet")["difference"]) == UNDECIDED


def test_the_noise_of_seeds_can_take_a_verdict_back():
    a, b = around(10.0, 0.1, seed=1), around(13.0, 0.1, seed=2)
    pairs = [(Score(10.0), Score(14.0)), (Score(20.0), Score(15.0))]
    noise = comparisons.seed_noise(pairs, "frechet")
    logs = [math.log(10 / 14), math.log(20 / 15)]
    assert noise == pytest.approx((math.sqrt(sum(x**2 / 2 for x in logs) / 2), 2))
    assert sign(compare(("a", a), ("b", b), "frechet")["difference"]) == CONFIRMED
    with_seeds = compare(("a", a), ("b", b), "frechet", (noise, noise))["difference"]
    assert sign(with_seeds) == UNDECIDED
    margin = stats.t.ppf(0.975, 2) * noise.deviation * math.sqrt(2)
    assert with_seeds["high"] - with_seeds["value"] == pytest.approx(margin, rel=0.01)
    at_other_stages = compare(("a", a), ("b", b), "frechet", (SeedNoise(0.3, 2), SeedNoise(0.4, 2)))["difference"]
    assert at_other_stages["high"] - at_other_stages["value"] == pytest.approx(stats.t.ppf(0.975, 2) * 0.5, rel=0.01)


def test_the_interval_of_a_share_stays_a_share_and_never_closes():
    assert Score(0.99, deviation=0.02, trials=100).estimate.high == 1.0
    assert Score(0.01, deviation=0.02, trials=100).estimate.low == 0.0
    assert Score(0.0, (0.0, 0.0), trials=100).estimate == (0.0, 0.0, 0.03)
    assert Score(1.0, (1.0, 1.0), trials=100).estimate == pytest.approx((1.0, 0.97, 1.0))
    assert Score(0.01, deviation=0.02).estimate.low < 0


def test_rates_compare_as_they_are():
    a, b = Score(0.8, deviation=0.01), Score(0.7, deviation=0.02)
    found = compare(("a", a), ("b", b), "precision", (SeedNoise(0.0, 0),) * 2)["difference"]
    assert found["value"] == pytest.approx(0.1)
    assert found["high"] - found["value"] == pytest.approx(1.96 * math.hypot(0.01, 0.02))


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
    with pytest.raises(ValueError, match=r"scores\.json: .*; delete it, and it is made again"):
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
    [((2.1, 2.25), (270, 280), CONFIRMED), ((2.1, 2.4), (270, 280), UNDECIDED), ((2.1, 2.25), (240, 260), REFUTED)],
)
def test_table_2_2_is_decided_by_the_best_of_its_other_models(fid, inception, verdict):
    """2.30 of StyleGAN-XL, 267.75 of its Inception Scores."""
    scores = {"frechet": dict(zip(("low", "high"), fid, strict=True))}
    scores["digit_score"] = dict(zip(("low", "high"), inception, strict=True))
    assert against_rivals(RIVALS[256], scores) == verdict


def test_the_papers_headline_is_guided_on_three_channels():
    context = Chapter2(size="paper").context()
    guided = [draw for draw in Chapter2().experiments["guidance"].needs(context) if draw.settings.guidance_scale == 1.5]
    on = {(draw.images, draw.settings.guidance_channels) for draw in guided}
    assert on == {(7_000_000 * 256, "all"), (7_000_000 * 256, 3), (2_350_000 * 256, 3)}


def test_figure_2_2_needs_both_of_its_halves():
    experiments = Chapter2().experiments
    apart = {"better": "a", "worse": "b", "difference": {"value": 1.0, "low": 0.5, "high": 1.5}}
    pairs = [{**apart, "about": {"images": 1, "grows": grows}} for grows in ("model size", "tokens")]
    weak = {"value": -0.9, "low": -0.95, "high": -0.6}
    left = {"comparisons": pairs, "correlations": {"frechet": weak}, "similar": [], "budgets": []}
    unclear = {"value": 0.1, "low": -1.0, "high": 1.0}
    right = {"comparisons": [{**apart, "difference": unclear, "about": {"images": 1}}]}
    of_scaling = experiments["scaling"].verdicts(left)
    found = {claim: each.verdict for claim, each in merged(of_scaling).items()}
    assert found == {
        "dit.fig-2.6": CONFIRMED, "dit.fig-2.8": CONFIRMED, "dit.fig-2.9": CONFIRMED, "dit.fig-2.10": UNDECIDED,
    }  # fmt: skip
    both = merged([*of_scaling, *experiments["unet"].verdicts(right)])["dit.fig-2.2"]
    assert both.verdict == UNDECIDED
    assert both.evidence[0].what == "left: larger models better"
    assert both.evidence[-1].ours == "1.11× [0.37, 2.72]"


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_a_study(name):
    config = Chapter2(size=name)
    context = config.context()
    for experiment in config.chosen:
        for draw in config.experiments[experiment].needs(context):
            train = context.train_config(draw.model)
            assert draw.images in (*train.snapshots, train.total_images)
            assert train.total_images % train.batch_size == 0
            context.sampling(draw).config.check(train.model)


def test_the_paper_sizes_print_the_theses_runs():
    plan = Chapter2(size="paper").resolved()
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
        done = run_dit(*words, "--device", "cpu", "--dry-run")
        assert done.returncode == 0 or "no model" in done.stderr or "ILSVRC2012" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--only", "everything"],
            "experiment 'everything': expected one of gallery, scaling, visual-scaling, block-designs",
        ),
        (
            ["--size", "paper", "--only", "gallery"],
            "experiment 'gallery': expected one of scaling, visual-scaling, block-designs, compute",
        ),
        (["--workers", "0"], "workers 0: expected at least 1"),
        (["--latents", "here"], "latents here: for the paper sizes alone"),
    ],
)
def test_bad_requests_are_one_line(tmp_path, words, message):
    testing.fails_with(run("reproduce", "ch2", "--out", tmp_path, *words), message, 2)


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
        done = run_dit("encode", *words, "--out", tmp_path / f"latents-{side}")
        assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "latents-16", tmp_path / "moved")
    for name, content in (("a", b"1"), ("b", b"2"), ("copy", b"1")):
        (tmp_path / f"{name}.npz").write_bytes(content)

    def identity(latents="latents-16", reference="a.npz", **settings):
        config = Chapter2(size="paper", latents=str(tmp_path / latents), reference=tmp_path / reference, **settings)
        return config.identity()

    assert identity() == identity(latents="moved", reference="copy.npz")
    for other in ({"latents": "latents-8"}, {"reference": "b.npz"}, {"decoder": "elsewhere"}, {"vae": "elsewhere"}):
        assert identity() != identity(**other)
    both = {"vae": "elsewhere", "decoder": "its own"}
    assert identity(**both) != identity(decoder="its own")
    words = ("--size", "paper", "--out", tmp_path / "out", "--latents", tmp_path / "latents-16")
    with claimed(tmp_path / "out/paper", "triptych reproduce ch2"), RunDirectory(tmp_path / "out/paper", identity()):
        pass
    done = run("reproduce", "ch2", *words, "--reference", tmp_path / "b.npz")
    testing.fails_with(done, "paper: holds a run with reference='6b86b273ff34")  # SHA-256 of b"1"
    assert "or use another --out" in done.stderr
    done = run("reproduce", "ch2", *words, "--reference", tmp_path / "none.npz")
    testing.fails_with(done, "none.npz: no such reference; fetch it from the ADM suite, pass --reference")


def test_the_command_of_a_paper_size_names_what_it_was_given():
    config = Chapter2(size="paper", vae="mine", decoder="stabilityai/sd-vae-ft-ema", reference=Path("a b.npz"))
    words = "triptych reproduce ch2 --size paper --vae mine --decoder stabilityai/sd-vae-ft-ema --reference 'a b.npz' --seed 0"
    assert config.command == words


def test_another_decoder_draws_and_nothing_else():
    plain, other = (Chapter2(size="paper", decoder=name).resolved() for name in (None, "stabilityai/sd-vae-ft-ema"))
    for before, line in zip(plain["run_first"], other["run_first"], strict=True):
        changed = before.replace("--vae stabilityai/sd-vae-ft-mse", "--vae stabilityai/sd-vae-ft-ema")
        assert line == (changed if " sample " in line else before)


def test_the_plan_leaves_out_what_is_drawn(tmp_path):
    """Samples are drawn under torchrun, and scored by the study itself."""
    before = Chapter2(size="paper-512", out=tmp_path).resolved()["run_first"]
    drawn = next(line for line in before if " sample " in line)
    folder = Path(drawn.split("--out ")[1].split()[0])
    folder.mkdir(parents=True)
    (folder / "samples.npz").touch()
    assert Chapter2(size="paper-512", out=tmp_path).resolved()["run_first"] == [x for x in before if x != drawn]


def test_missing_latents_are_one_line(tmp_path):
    done = run("reproduce", "ch2", "--size", "paper", "--out", tmp_path, "--latents", tmp_path / "none")
    testing.fails_with(done, "no latent cache; pass --latents, or make it: torchrun", 1)
    assert not list(tmp_path.iterdir())


def test_seconds_of_a_log_leave_out_damaged_rows(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(
        b'{"step": 1, "time/seconds": 1.5}\n{"step": 2}\n\xff{\n{"step": 3, "time/seconds": 2}\n{"step": 4, "time'
    )
    assert _seconds(log) == 3.5


@pytest.mark.parametrize("content", ["{", "[]", '{"space": "pixels"}'])
def test_damaged_results_of_another_size_are_named(tmp_path, content):
    study = Chapter2(out=tmp_path, size="smoke")
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "results.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"smoke/results\.json: .*; repeat the study of that size, which writes it again"
    ):
        gallery._spaces_table(study)
