import json
import subprocess
import sys

import pytest
import torch
from triptych_dit.config import PRESETS
from triptych_dit.flops import gflops

from benchmarks.memory import peak_memory
from benchmarks.runner import Job, Plan, run_suite, spread, table
from benchmarks.suites import SUITES, dit_gpu, dit_sampling, dit_training
from benchmarks.suites.dit_models import Diffusers, config_of, gemm_shapes, random_model


def test_jobs_are_warmed_up_take_turns_and_are_compared_turn_by_turn():
    calls = []
    jobs = [
        Job("floor", lambda seed: lambda: calls.append("floor"), 4, "images"),
        Job("ours", lambda seed: lambda: calls.append("ours"), 4, "images", against=("floor",)),
    ]
    result = run_suite("toy", jobs, Plan(warmup=2, repeats=3))
    assert calls == ["floor"] * 2 + ["ours"] * 2 + ["floor", "ours"] * 3
    floor, ours = result["jobs"]
    turns = [a / b for a, b in zip(ours["repeats"], floor["repeats"], strict=True)]
    assert ours["times_as_long"]["floor"] == spread(turns)
    assert {"hardware", "versions", "commit", "command", "plan"} <= result.keys()
    json.dumps(result, allow_nan=False)
    assert "ours" in table(result)


def test_long_jobs_take_fewer_repeats():
    jobs = [Job("long", lambda seed: int, 1, "x", repeats=2), Job("short", lambda seed: int, 1, "x")]
    rows = run_suite("toy", jobs, Plan(1, 4))["jobs"]
    assert [len(row["repeats"]) for row in rows] == [2, 4]


def test_a_failing_job_is_recorded_and_the_others_are_still_timed():
    def broken(seed):
        raise RuntimeError("no such luck")

    result = run_suite(
        "toy", [Job("bad", broken, 1, "x"), Job("good", lambda seed: int, 1, "x", against=("bad",))], Plan(1, 2)
    )
    assert "no such luck" in result["failed"]["bad"]
    assert [row["name"] for row in result["jobs"]] == ["good"]
    assert result["jobs"][0]["times_as_long"] == {}
    assert "FAILED" in table(result)


@pytest.mark.parametrize(("off", "passes"), [(0.9e-4, True), (1.1e-4, False), (float("nan"), False)])
def test_jobs_that_claim_the_same_result_must_give_it(off, passes):
    jobs = [
        Job("theirs", lambda seed: lambda: torch.tensor([1.0, 2.0]), 1, "x"),
        Job("ours", lambda seed: lambda: torch.tensor([1.0, 2 * (1 + off)]), 1, "x", same_as="theirs"),
    ]
    result = run_suite("toy", jobs, Plan(1, 2))
    assert ("ours" not in result["failed"]) == passes
    json.dumps(result, allow_nan=False)


def test_a_job_that_cannot_run_here_is_skipped_with_its_reason():
    def never(seed):
        raise AssertionError

    result = run_suite("toy", [Job("big", never, 1, "x", skip="no GPU here")], Plan(1, 2))
    assert (result["skipped"], result["failed"], result["jobs"]) == ({"big": "no GPU here"}, {}, [])
    assert "SKIPPED: no GPU here" in table(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_its_suite_is_skipped_and_not_absent():
    assert len(dit_gpu.jobs()) >= 3
    assert all("no GPU" in job.skip for job in dit_gpu.jobs())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_a_job_touches():
    size = 200_000_000
    peak = peak_memory(Job("big", lambda seed: lambda: bytearray(b"x") * size, 1, "x"), 0)
    assert 0.95 * size < peak < 1.2 * size
    assert peak_memory(Job("small", lambda seed: int, 1, "x"), 0) < 0.1 * size


def test_spread_is_the_median_and_quartiles():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "q1": 1.5, "q3": 4.5, "min": 1.0, "max": 5.0}


@pytest.mark.parametrize("preset", ["digits", "DiT-S/4"])
def test_the_floor_has_exactly_the_products_of_the_model(preset):
    """Their multiply-accumulates, with attention, are the model's GFLOPs."""
    config = PRESETS[preset]
    tokens = config.grid[0] * config.grid[1]
    products = sum(rows * inputs * outputs for rows, inputs, outputs in gemm_shapes(config, 1))
    attention = config.depth * 2 * tokens**2 * config.hidden_size
    assert (products + attention) / 1e9 == pytest.approx(gflops(config), rel=1e-12)


@pytest.mark.parametrize("preset", ["digits", "digits-latent"])
def test_both_models_are_the_same_function(preset):
    config = config_of(preset)
    model = random_model(config, 0)
    x = torch.randn(3, config.in_channels, *config.input_size, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0, 400, 999]), torch.tensor([0, 3, config.null_label])
    with torch.no_grad():
        ours, theirs = model(x, t, y), Diffusers(model)(x, t, y)
    assert float(ours.abs().max()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("jobs", [dit_sampling.jobs, dit_training.jobs])
def test_every_size_compares_us_with_diffusers_and_with_the_floor(jobs):
    listed = {job.name: job for job in jobs()}
    ours = [job for name, job in listed.items() if name.endswith(": ours")]
    assert len(ours) == 4
    for job in ours:
        assert job.against[:2] == (f"{job.name[:-6]}: floor", f"{job.name[:-6]}: diffusers")
        assert {listed[other].repeats for other in job.against} == {job.repeats}
        assert job.same_as in listed


def test_the_command_writes_strict_json_and_refuses_unknown_suites(tmp_path):
    options = ["--suites", "dit_gpu", "--warmup", "1", "--repeats", "2", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "benchmarks", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "dit_gpu.json").read_text())["suite"] == "dit_gpu"
    bad = subprocess.run([sys.executable, "-m", "benchmarks", "--suites", "x"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert f"expected some of {', '.join(SUITES)}" in bad.stderr
