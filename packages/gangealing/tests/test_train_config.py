"""Settings of adversarial training: the published rules as tables worked out by hand, and what is refused at the door."""

import json
from dataclasses import replace
from functools import partial

import pytest
from triptych_common.testing import run_here
from triptych_gangealing import cli
from triptych_gangealing.stylegan2.train_config import PRESETS, GanTrainConfig, auto

command = partial(run_here, cli.run)


def resolved(*options: object) -> dict:
    """What --dry-run says a command comes to."""
    done = command("train-gan", "--data", "nowhere", *options, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


AUTO = {
    # resolution, GPUs: batch, group, channel base, lr, gamma, half-life in images
    (32, 1): (32, 4, 16384, 0.0025, 0.0064, 10_000),
    (64, 1): (32, 4, 16384, 0.0025, 0.0256, 10_000),
    (64, 8): (64, 4, 16384, 0.0025, 0.0128, 20_000),
    (256, 1): (16, 4, 16384, 0.0025, 0.8192, 5_000),
    (256, 8): (64, 4, 16384, 0.0025, 0.2048, 20_000),
    (256, 128): (128, 1, 16384, 0.0025, 0.1024, 40_000),
    (512, 8): (64, 4, 32768, 0.0025, 0.8192, 20_000),
    (1024, 1): (4, 4, 32768, 0.002, 52.4288, 1_250),
    (1024, 8): (32, 4, 32768, 0.002, 6.5536, 10_000),
    (1024, 16): (64, 4, 32768, 0.002, 3.2768, 20_000),
}


@pytest.mark.parametrize(("resolution", "gpus"), AUTO)
def test_auto_is_the_published_rule(resolution, gpus):
    batch, group, channel_base, lr, gamma, half_life = AUTO[resolution, gpus]
    config = auto(resolution, gpus)
    assert (config.batch_size, config.mbstd_group_size, config.channel_base) == (batch, group, channel_base)
    assert config.lr == lr
    assert config.r1_gamma == pytest.approx(gamma, rel=1e-12)
    assert config.ema_half_life_images == half_life
    assert (config.mapping_layers, config.ema_rampup, config.channel_max, config.z_dim) == (2, 0.05, 512, 512)
    assert (config.path_length_weight, config.style_mixing, config.augment, config.ada_target) == (2, 0.9, "bgc", 0.6)
    config.check_groups(gpus)


def test_auto_on_a_command_line_follows_resolution_and_ranks(monkeypatch):
    def settings(*options: str) -> tuple:
        config = resolved("--preset", "auto", *options)["config"]
        return config["resolution"], config["batch_size"], pytest.approx(config["r1_gamma"])

    assert settings("--resolution", "64") == (64, 32, 0.0256)
    assert settings("--resolution=64") == (64, 32, 0.0256)
    assert settings("--data", "photos") == (256, 16, 0.8192)
    assert settings("--resolution", "64", "--r1-gamma", "3") == (64, 32, 3)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert settings("--resolution", "64") == (64, 64, 0.0128)
    assert settings("--data", "photos") == (256, 64, 0.2048)


def test_the_other_published_settings():
    paper, cifar = PRESETS["paper256"], PRESETS["cifar"]
    assert (paper.resolution, paper.batch_size, paper.mbstd_group_size, paper.channel_base) == (256, 64, 8, 16384)
    assert (paper.lr, paper.r1_gamma, paper.ema_half_life_images, paper.ema_rampup) == (0.0025, 1, 20_000, None)
    assert (paper.mapping_layers, paper.total_images, paper.discriminator_architecture) == (8, 25_000_000, "resnet")
    assert (cifar.resolution, cifar.batch_size, cifar.mbstd_group_size, cifar.channel_base) == (32, 64, 32, 32768)
    assert (cifar.lr, cifar.r1_gamma, cifar.ema_half_life_images, cifar.ema_rampup) == (0.0025, 0.01, 500_000, 0.05)
    assert (cifar.path_length_weight, cifar.style_mixing, cifar.discriminator_architecture) == (0, 0, "orig")
    assert (cifar.mapping_layers, cifar.total_images) == (2, 100_000_000)


def test_networks_have_the_published_sizes():
    """The reference sheet's counts of parameters: 24.77 million at half width, 30.03 million at full width."""
    half = resolved("--preset", "paper256")
    full = resolved("--preset", "paper256", "--channel-base", "32768")
    assert half["generator_parameters"] / 1e6 == pytest.approx(24.77, abs=0.005)
    assert full["generator_parameters"] / 1e6 == pytest.approx(30.03, abs=0.005)
    assert half["steps"] == 25_000_000 // 64 + (25_000_000 % 64 > 0)


def test_the_discriminator_may_be_wider():
    alike = resolved("--preset", "digits32")
    wider = resolved("--preset", "digits32", "--discriminator-channel-base", "2048")
    assert wider["generator_parameters"] == alike["generator_parameters"]
    assert wider["discriminator_parameters"] > alike["discriminator_parameters"]


def test_a_dry_run_writes_nothing(tmp_path):
    assert resolved("--preset", "smoke", "--out", str(tmp_path / "run"))["steps"] == 32
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_run_on_one_process(name):
    PRESETS[name].check_groups(1)
    assert replace(PRESETS[name]) == PRESETS[name]


@pytest.mark.parametrize(("ranks", "options", "fits"), [
    (1, {"batch_size": 16}, True),
    (2, {"batch_size": 16}, True),
    (4, {"batch_size": 16}, True),
    (8, {"batch_size": 16}, False),  # 2 images a rank, groups of 4
    (3, {"batch_size": 16}, False),
    (16, {"batch_size": 8}, False),
    (4, {"batch_size": 18, "mbstd_group_size": 1}, False),
    (8, {"batch_size": 16, "mbstd_group_size": 2}, True),
    (16, {"batch_size": 16, "mbstd_group_size": 1}, True),
    (1, {"batch_size": 16, "micro_batch": 8}, True),
    (2, {"batch_size": 16, "micro_batch": 16}, True),  # more than a rank has
    (1, {"batch_size": 16, "micro_batch": 6}, False),
    (1, {"batch_size": 16, "micro_batch": 2}, False),
    (1, {"batch_size": 24, "micro_batch": 16}, False),  # parts of unequal size
    (1, {"batch_size": 2}, True),  # smaller than a group: one group
    (2, {"batch_size": 2}, False),
])  # fmt: skip
def test_groups_that_ranks_or_parts_would_cut_apart_are_refused(ranks, options, fits):
    def check() -> None:
        GanTrainConfig(**options).check_groups(ranks)

    if fits:
        check()
    else:
        with pytest.raises(ValueError, match=f"batch_size {options['batch_size']} on .* expected whole groups of"):
            check()


@pytest.mark.parametrize(("options", "message"), [
    (["--resolution", "48"], "resolution 48: expected a power of two from 8 to 1024"),
    (["--preset", "auto", "--resolution", "48"], "resolution 48: expected a power of two from 8 to 1024"),
    (["--resolution", "wide"], "wide"),
    (["--total-images", "0"], "total_images 0: expected a number above 0"),
    (["--batch-size", "-4"], "batch_size -4: expected a number above 0"),
    (["--batch-size", "6"], "batch_size 6 on 1 ranks, 6 images at once: expected whole groups of 4"),
    (["--micro-batch", "3"], "3 images at once: expected whole groups of 4"),
    (["--lr", "0"], "lr 0.0: expected a number above 0"),
    (["--lr", "nan"], "lr nan: expected a number above 0"),
    (["--discriminator-lr", "0"], "discriminator_lr 0.0: expected a number above 0, or None for none"),
    (["--r1-gamma", "-1"], "r1_gamma -1.0: expected a number of at least 0"),
    (["--r1-every", "0"], "r1_every 0: expected a number above 0"),
    (["--style-mixing", "1.5"], "style_mixing 1.5: expected a number in 0..1"),
    (["--augment", "bgc", "--augment-p", "2"], "augment_p 2.0: expected a number in 0..1"),
    (["--augment", "none", "--augment-p", "0.5"], "augment_p 0.5: of no augmentation; pass --augment bgc too"),
    (["--augment", "bgcfnc"], "bgcfnc"),
    (["--ada-target", "1.5"], "ada_target 1.5: expected a number in 0..1"),
    (["--ada-every", "0"], "ada_every 0: expected a number above 0"),
    (["--ada-images", "0"], "ada_images 0: expected a number above 0"),
    (["--ema-rampup", "0"], "ema_rampup 0.0: expected a number above 0, or None for none"),
    (["--freeze-d", "2"], "freeze_d is for fine-tuning: pass --init-from too"),
    (["--channel-base", "16"], "channel_base 16: expected at least the resolution, 32"),
    (["--mbstd-group-size", "0"], "mbstd_group_size 0"),
    (["--mapping-layers", "0"], "mapping_layers 0: expected at least 1"),
    (["--preset", "cat"], "preset 'cat': expected one of auto, paper256, cifar, digits32"),
])  # fmt: skip
def test_a_wrong_setting_is_one_line(options, message):
    done = command("train-gan", *options, "--dry-run")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr


def test_identity_is_all_that_decides_the_result():
    config = PRESETS["smoke"]
    same = replace(
        config, micro_batch=8, device="cpu", snapshot_every=7, scores="inception", score_images=9, total_images=10**6,
        tensorboard=True, json=True, checkpoint_every=9, log_every=2,
    )  # fmt: skip
    assert same.identity() == config.identity()
    json.dumps(config.identity())
    for changed in ({"lr": 0.1}, {"seed": 1}, {"batch_size": 32}, {"augment_p": 0.5}, {"x_flip": True},
                    {"init_from": "x"}, {"ema_rampup": None}, {"precision": "float64"}):  # fmt: skip
        assert replace(config, **changed).identity() != config.identity()


def test_the_gradient_penalty_may_weigh_less_later():
    config = replace(PRESETS["smoke"], r1_gamma=2.0, r1_gamma_later=0.1, r1_gamma_switch=64)
    assert [config.gamma(images) for images in (0, 63, 64, 1000)] == [2.0, 2.0, 0.1, 0.1]
    assert replace(config, r1_gamma_later=None).gamma(1000) == 2.0


def test_presets_scale_with_the_length_that_is_asked_for(tmp_path):
    """What is counted in images keeps its share of the run; what is typed holds."""
    found = {}
    for command, options in (("train", ("--psi-images", "7")), ("train-gan", ())):
        done = run_here(cli.run, command, "--preset", "digits32", "--total-images", "24000", "--out", tmp_path, *options,
                        "--dry-run", "--json")  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[command] = json.loads(done.stdout.splitlines()[-1])["config"]
    align = found["train"]
    assert (align["psi_images"], align["constant_images"], align["restart_images"]) == (7, 12_000, 12_000)
    assert found["train-gan"]["r1_gamma_switch"] == 4_000  # 80,000 of 480,000
