"""The alignment suite at tiny size: every job runs, and warps sampled in two ways are the same."""

from dataclasses import replace

import pytest
import torch
from triptych_gangealing.spatial_transformer import SpatialTransformerConfig
from triptych_gangealing.train_config import PRESETS

from benchmarks.runner import Plan, run_suite
from benchmarks.suites import alignment
from benchmarks.suites.alignment import Size
from benchmarks.suites.warp import levels_by_definition

TINY = Size("tiny", SpatialTransformerConfig(16, 16, 1.0, flow_size=4, flow_upsampling=4), 32, 3, 2)


def test_the_transformer_is_the_same_however_it_samples():
    result = run_suite("alignment", list(alignment.jobs_of(TINY)), Plan(1, 2))
    assert result["failed"] == {}
    (ours,) = [row for row in result["jobs"] if row["name"].endswith(": ours")]
    assert ours["difference"] < 1e-5
    assert set(ours["times_as_long"]) == {"tiny, batch 3: grid_sample alone", "tiny, batch 3: written out"}


@pytest.mark.parametrize("size", [TINY, alignment.SIZES[1]], ids=lambda size: size.name)
def test_samples_need_several_levels(size):
    """Or a plain grid_sample would do the same, and the comparison show nothing."""
    images, transformer = alignment.pictures(size, 0), alignment.transformer_of(size.config, 0)
    side = size.config.input_size
    levels = levels_by_definition(images, transformer(images).warp.grid((side, side)))
    assert float(levels.min()) < float(levels.max())
    assert float((levels > 0.3).float().mean()) > 0.1


def test_another_sampling_would_be_noticed():
    ours, plain = alignment.aligning(TINY)(0)(), alignment.aligning(TINY, alignment.plain)(0)()
    assert float((ours - plain).abs().max() / ours.abs().max()) > 1e-2


def test_training_steps_run_and_learn_in_every_way():
    config = replace(PRESETS["digits32"], batch_size=2, channel_max=8, constant_images=64)
    result = run_suite("alignment", list(alignment.training_jobs(config)), Plan(1, 2))
    assert result["failed"] == {}
    assert [row["unit"] for row in result["jobs"]] == ["steps"] * 3
    first, second = (alignment.training(config)(0) for _ in range(2))
    assert torch.equal(first(), second())
    assert first().any()  # it began as zeros


def test_the_sizes_are_the_presets_and_the_papers():
    jobs = alignment.jobs()
    assert len(jobs) == 4 * 3 + 3
    assert {size.config.input_size for size in alignment.SIZES} == {32, 128}
    assert {size.batch for size in alignment.SIZES} == {1, 16}
    by_name = {job.name: job for job in jobs}
    for job in jobs:
        assert {by_name[other].repeats for other in job.against} <= {job.repeats}
