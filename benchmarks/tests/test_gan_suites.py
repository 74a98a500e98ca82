"""The gan suites at tiny size: every job runs, and those that claim the same result give it."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triptych_gangealing.stylegan2.discriminator import Discriminator
from triptych_gangealing.stylegan2.generator import Generator
from triptych_gangealing.stylegan2.train_config import PRESETS

from benchmarks.runner import Job, Plan, run_suite
from benchmarks.suites import gan_gpu, gan_networks, gan_ops
from benchmarks.suites.gan_networks import Size, configs, discriminator_convolutions, generator_convolutions

CPU = torch.device("cpu")
TINY = Size(16, 4, 2, channel_base=64, channel_max=8)


@pytest.fixture
def tiny_shapes(monkeypatch):
    monkeypatch.setattr(gan_ops, "MAPS", (2, 4, 6, 8))
    monkeypatch.setattr(gan_ops, "COLOURS", (2, 3, 8, 6))


def test_operations_and_their_references_give_the_same(tiny_shapes):
    listed = gan_ops.jobs()
    result = run_suite("gan_ops", listed, Plan(1, 2))
    assert result["failed"] == {}
    rows = {row["name"]: row for row in result["jobs"]}
    assert len(rows) == len(listed) == 3 * 2 * (2 * 2 * 2 + 4)
    ours = [row for name, row in rows.items() if name.endswith(": ours")]
    assert len(ours) == len(rows) // 3
    assert all(row["difference"] < 1e-5 for row in ours)
    assert all(len(row["times_as_long"]) == 2 for row in ours)


def test_another_filter_would_be_noticed(tiny_shapes):
    case = replace(gan_ops.RESAMPLING[0], ours=lambda x: gan_ops.layers.upsample2d(x).roll(1, 3))
    failed = run_suite("toy", list(gan_ops.jobs_of(case, gan_ops.MAPS, "contiguous")), Plan(1, 2))["failed"]
    assert len(failed) == 2
    assert all(name.endswith(": ours") for name in failed)


def test_gradients_are_compared_too(tiny_shapes):
    case = replace(gan_ops.RESAMPLING[1], ours=lambda x: gan_ops.layers.downsample2d(x.detach()) + 0 * x.mean())
    failed = run_suite("toy", list(gan_ops.jobs_of(case, gan_ops.MAPS, "channels last")), Plan(1, 2))["failed"]
    assert list(failed) == ["down 2x4x6x8 channels last, both: ours"]


def test_networks_run_beside_their_floor():
    result = run_suite("gan_networks", list(gan_networks.jobs_of(TINY, CPU)), Plan(1, 2))
    assert result["failed"] == {}
    assert len(result["jobs"]) == 2 * 2 * 2
    assert all(len(row["times_as_long"]) == 1 for row in result["jobs"] if row["name"].endswith(": ours"))


class Convolutions(TorchDispatchMode):
    """Those of all channels together: whether transposed, shape of the weight, and side of the output, less the odd row that a
    transposed one leaves to the filter."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and args[8] == 1:
            self.seen.append((args[6], tuple(args[1].shape), out.shape[-1] // 2 * 2))
        return out


def test_the_floor_does_the_networks_convolutions():
    generator, discriminator = configs(TINY)
    found, floors = Convolutions(), Convolutions()
    with found, torch.no_grad():
        Generator(generator)(torch.zeros(4, generator.z_dim))
        Discriminator(discriminator)(torch.zeros(4, 3, 16, 16))
    with floors:
        for convolutions in (generator_convolutions(generator), discriminator_convolutions(discriminator)):
            gan_networks.floor(convolutions, 4, CPU, backward=True)(0)()
    counted = Counter(floors.seen)
    fully_connected = {one: n for one, n in counted.items() if one[2] == 0}
    assert set(fully_connected) == {(False, (8, 128, 1, 1), 0), (False, (1, 8, 1, 1), 0)}
    twice = counted - Counter(fully_connected)
    assert {one: n // 2 for one, n in twice.items()} == dict(
        Counter(found.seen)
    )  # once to know the size, once as timed


def test_a_round_of_training_meets_both_penalties():
    config = replace(
        PRESETS["digits32"], data="noise", resolution=8, channel_base=32, channel_max=4, z_dim=8, batch_size=4,
        r1_every=3, path_length_every=2, path_length_weight=2.0, augment="bgc", augment_p=0.2,
    )  # fmt: skip
    assert gan_networks.round_of(config) == 6
    job = Job("training", gan_networks.training(config, CPU), 24, "images")
    result = run_suite("training", [job, replace(job, name="again", same_as="training")], Plan(1, 2))
    assert result["failed"] == {}


def test_the_published_sizes_are_all_there():
    names = [job.name for job in gan_networks.jobs()]
    for resolution in (32, 64, 128, 256):
        for network in ("generator", "discriminator"):
            assert {f"{network} {resolution}, {kind}: ours" for kind in ("forward", "both")} <= set(names)
    (training,) = [job for job in gan_networks.jobs() if job.name == "training, digits32"]
    assert training.items == 16 * 16  # its batch, until each penalty has had its turn


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_its_suite_is_skipped_and_not_absent():
    listed = gan_gpu.jobs()
    assert len(listed) == 2 * (1 + 2 * 8)
    assert len({job.name for job in listed}) == len(listed)
    assert all(isinstance(job, Job) and "no GPU" in job.skip for job in listed)
    assert {other for job in listed for other in job.against} <= {job.name for job in listed}
    assert listed[0].items == 16 * 16
