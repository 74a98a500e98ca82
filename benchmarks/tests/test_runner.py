import json
import subprocess
import sys

import pytest
from triptych_dit.flops import gflops

from benchmarks.runner import Job, Plan, run_suite, spread, table
from benchmarks.suites.dit_digits import PRESET, gemm_shapes


def test_jobs_are_warmed_up_take_turns_and_are_compared_turn_by_turn():
    calls = []
    jobs = [
        Job("floor", lambda seed: lambda: calls.append("floor"), 4, "images"),
        Job("ours", lambda seed: lambda: calls.append("ours"), 4, "images", against="floor"),
    ]
    result = run_suite("toy", jobs, Plan(warmup=2, repeats=3))
    assert calls == ["floor"] * 2 + ["ours"] * 2 + ["floor", "ours"] * 3
    ours = result["jobs"][1]
    assert ours["against"] == "floor"
    assert ours["times_as_long"]["min"] <= ours["times_as_long"]["median"] <= ours["times_as_long"]["max"]
    assert {"hardware", "versions", "commit", "command", "plan"} <= result.keys()
    json.dumps(result, allow_nan=False)
    assert "ours" in table(result)


def test_a_failing_job_is_recorded_and_the_others_are_still_timed():
    def broken(seed):
        raise RuntimeError("no such luck")

    result = run_suite(
        "toy", [Job("bad", broken, 1, "x"), Job("good", lambda seed: int, 1, "x", against="bad")], Plan(1, 2)
    )
    assert "no such luck" in result["failed"]["bad"]
    assert [row["name"] for row in result["jobs"]] == ["good"]
    assert "FAILED" in table(result)


def test_spread_is_the_median_and_quartiles():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "q1": 1.5, "q3": 4.5, "min": 1.0, "max": 5.0}


def test_the_floor_has_exactly_the_products_of_the_model():
    """Their multiply-accumulates, with attention, are the model's GFLOPs."""
    config = PRESET.model
    tokens = config.grid[0] * config.grid[1]
    products = sum(rows * inputs * outputs for rows, inputs, outputs in gemm_shapes(config, 1))
    attention = config.depth * 2 * tokens**2 * config.hidden_size
    assert (products + attention) / 1e9 == pytest.approx(gflops(config), rel=1e-12)


def test_the_command_writes_strict_json(tmp_path):
    options = ["--warmup", "1", "--repeats", "2", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "benchmarks", *options], capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "dit_digits.json").read_text())
    assert [row["name"] for row in result["jobs"]][1] == "training step"
    assert "times training step, floor" in done.stdout
    bad = subprocess.run([sys.executable, "-m", "benchmarks", "--suites", "x"], capture_output=True, text=True)
    assert bad.returncode == 2
