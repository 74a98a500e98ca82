import copy
import subprocess
import sys

import pytest
import torch
from triptych_common.storage.files import write_json

from benchmarks.compare import compare, read_result, regressed, report


def result(**jobs):
    """A result whose jobs took these times; those named in pairs "a_vs_b" were compared with b."""
    rows = []
    for name, seconds in jobs.items():
        name, _, other = name.partition("_vs_")
        rows.append({"name": name, "repeats": seconds, "times_as_long": {other: {}} if other else {}})
    return {
        "suite": "toy", "jobs": rows, "failed": {}, "skipped": {}, "hardware": {"cpu": "x"}, "versions": {"torch": "2"},
    }  # fmt: skip


def noisy(median, spread, n=20, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (median * (1 + spread * torch.randn(n, generator=rng, dtype=torch.float64))).tolist()


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (noisy(1, 0.01), noisy(1.2, 0.01, seed=1), "slower"),
        (noisy(1, 0.01), noisy(0.8, 0.01, seed=1), "faster"),
        (noisy(1, 0.01), noisy(1.01, 0.01, seed=1), "same"),
        (noisy(1, 0.3), noisy(1.1, 0.3, seed=1), "unclear"),
    ],
)
def test_verdicts_wait_for_the_noise(before, after, verdict):
    a, b = result(job=before), result(job=after)
    (change,) = compare(a, b, 0.05)
    assert change.verdict == verdict
    assert change.low <= change.ratio <= change.high
    assert regressed(b, [change]) == (verdict == "slower")


def test_a_slower_machine_is_no_regression_where_a_reference_took_turns():
    drift = torch.linspace(1, 2, 20, dtype=torch.float64)
    floor, ours = torch.tensor(noisy(1, 0.01)), torch.tensor(noisy(1.5, 0.01, seed=1))
    a = result(floor=floor.tolist(), ours_vs_floor=ours.tolist())
    b = result(floor=(drift * floor).tolist(), ours_vs_floor=(drift * ours).tolist())
    verdicts = {change.name: (change.verdict, change.measured) for change in compare(a, b, 0.05)}
    assert verdicts == {"floor": ("slower", "seconds"), "ours": ("same", "times floor")}


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says():
    held = 0
    for seed in range(100):
        (change,) = compare(result(j=noisy(1, 0.1, seed=2 * seed)), result(j=noisy(1.3, 0.1, seed=2 * seed + 1)), 0.05)
        held += change.low <= 1.3 <= change.high
    assert 88 <= held <= 100


def test_what_makes_a_comparison_doubtful_is_said():
    a, b = result(gone=[1.0, 1.0], kept=[1.0, 1.0]), result(kept=[1.0, 1.0], new=[1.0, 1.0])
    b["hardware"], b["versions"], b["failed"] = {"cpu": "y"}, {"torch": "3"}, {"gone": "Traceback"}
    changes = compare(a, b, 0.05)
    text = report(a, b, changes)
    for part in ("hardware: cpu x -> y", "versions: torch 2 -> 3", "only in A: failed in B", "only in B: absent in A"):
        assert part in text
    assert [change.name for change in changes] == ["kept"]
    assert regressed(b, changes)


def test_the_command_exits_with_1_for_a_regression_only(tmp_path):
    before, slower = result(job=noisy(1, 0.01)), result(job=noisy(1.3, 0.01, seed=1))
    write_json(tmp_path / "a.json", before)
    write_json(tmp_path / "b.json", slower)
    (tmp_path / "bad.json").write_text("[]")

    def run(*options):
        command = [sys.executable, "-m", "benchmarks", "compare", *map(str, options)]
        return subprocess.run(command, capture_output=True, text=True)

    a, b = tmp_path / "a.json", tmp_path / "b.json"
    assert (done := run(a, b)).returncode == 1, done.stderr
    assert "slower" in done.stdout
    assert run(a, b, "--tolerance", "0.5").returncode == 0
    bad = run(a, tmp_path / "bad.json")
    assert bad.returncode == 2
    assert "not a result of python -m benchmarks" in bad.stderr
    assert len(bad.stderr.splitlines()) == 1


def test_results_are_read_back(tmp_path):
    content = copy.deepcopy(result(job=[1.0, 2.0]))
    write_json(tmp_path / "a.json", content)
    assert read_result(tmp_path / "a.json") == content
