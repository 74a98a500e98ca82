"""`triptych-gpt evaluate` and `audit` of a model of a few steps: what they write, that they resume, and what they refuse."""

import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from triptych_common import testing
from triptych_common.storage import checkpoint
from triptych_common.testing import run_cli, run_here, strict_json
from triptych_gpt import SamplerSettings, Zoo, cli, load
from triptych_gpt.evaluation.alignment import prompt_alignment
from triptych_gpt.model import FILE_NAME, write_model

pytestmark = pytest.mark.filterwarnings("ignore:tokens of up to")

FEW = ["--num-inference-steps", "2", "--networks", "3", "--prompts", "3"]

command = partial(run_here, cli.run)
fails_with = partial(testing.fails_with, quiet=("verifying", "warning: tokens of"))


@pytest.fixture(scope="module")
def evaluated(place) -> Path:
    """By the command in a process of its own."""
    options = ["--model", "gpt", "--zoo", "zoo", "--out", "all", *FEW, "--sampler-steps", "1", "2", "--json"]
    done = run_cli("triptych_gpt.cli", "evaluate", *options, cwd=place)
    assert done.returncode == 0, done.stderr
    assert strict_json(done.stdout)["r2"].keys() > {"G.pt", "identity", "retrieval", "mean of finals"}
    assert "prompt alignment (R^2)" in done.stderr
    assert len(done.stderr.splitlines()) <= 10
    return place / "all"


def evaluate(place: Path, out: Path, *options: object) -> subprocess.CompletedProcess:
    return command("evaluate", "--model", place / "gpt", "--zoo", place / "zoo", "--out", out, *FEW, *options)


def test_it_writes_strict_json_and_figures(evaluated):
    assert {path.stem for path in evaluated.glob("[!.]*.json")} == {"alignment", "sampler-steps-1-2", "config"}
    for name in ("alignment", "sampler-steps-1-2"):
        written = strict_json((evaluated / f"{name}.json").read_text())
        assert written["result"]
        assert written["commit"]
        assert (evaluated / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_those_of_the_model_and_the_zoo(evaluated, place):
    """Numbers that can be had another way."""
    zoo, gpt = Zoo(place / "zoo"), load(place / "gpt")
    test = zoo.runs_in("test")[:3]
    result = strict_json((evaluated / "alignment.json").read_text())["result"]
    assert {"identity", "retrieval", "mean of finals", "mean of matched finals"} < result["alignment"].keys()
    own, sweep = result["alignment"]["G.pt"], result["sweeps"]["G.pt"]
    assert (own["networks"], own["prompts"]) == (3, 3)
    losses = zoo.metrics("test_loss")[torch.from_numpy(test), 0]
    assert sweep["start"]["test_loss"] == pytest.approx(losses.tolist(), rel=1e-5)
    assert result["sweeps"]["identity"]["achieved"]["test_loss"][0] == pytest.approx([float(losses[0])] * 3, rel=1e-5)
    metric = next(metric for metric in gpt.task.metrics if metric.name == gpt.metric)
    update = gpt.update(SamplerSettings(num_inference_steps=2))
    again = prompt_alignment(update, gpt.task, metric, zoo.theta(test, [0] * 3), prompts=3)
    assert own["r2"]["value"] == pytest.approx(again.r2.value, rel=1e-6)
    rows = strict_json((evaluated / "sampler-steps-1-2.json").read_text())["result"]["rows"]
    assert [(row["sampler"], row["model_evaluations"]) for row in rows[:4]] == [
        ("ddpm", 1), ("ddpm", 2), ("ddim", 1), ("ddim", 2)
    ]  # fmt: skip


def test_by_default_it_takes_as_many_networks_as_there_are(place, tmp_path):
    held = len(Zoo(place / "zoo").runs_in("test"))
    words = [
        "evaluate",
        "--model",
        place / "gpt",
        "--zoo",
        place / "zoo",
        "--out",
        tmp_path / "out",
        *FEW[:2],
        *FEW[4:],
    ]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert f"{held} networks, all test runs of {place / 'zoo'}, rather than 32" in done.stdout
    result = strict_json((tmp_path / "out/alignment.json").read_text())["result"]
    assert result["alignment"]["G.pt"]["networks"] == held


def test_repeating_measures_only_what_is_missing(evaluated, place):
    (evaluated / "sampler-steps-1-2.json").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in evaluated.glob("[!.]*.json")}
    done = evaluate(place, evaluated, "--sampler-steps", "1", "2")
    assert done.returncode == 0, done.stderr
    after = {path.name: path.stat().st_mtime_ns for path in evaluated.glob("[!.]*.json")}
    assert after.pop("sampler-steps-1-2.json")
    assert after == before
    fails_with(evaluate(place, evaluated, "--seed", "1"), "seed=0 (now 1)")


def test_a_damaged_result_is_named_and_measured_again(evaluated, place):
    path = evaluated / "alignment.json"
    whole = path.read_text()
    digit = next(at for at in range(len(whole) // 2, len(whole)) if whole[at] == "1")
    spoiled = (
        whole[:-100],
        whole.replace('"alignment"', '"alignmenT"', 1),
        whole[:digit] + "2" + whole[digit + 1 :],
        "[]",
    )
    for content in spoiled:
        path.write_text(content)
        fails_with(evaluate(place, evaluated), f"{path}: ")
        assert "delete this file and repeat the command" in evaluate(place, evaluated).stderr
    path.unlink()
    assert evaluate(place, evaluated).returncode == 0
    assert strict_json(path.read_text())["result"] == strict_json(whole)["result"]


def test_another_models_results_are_not_taken_for_this_ones(evaluated, place, tmp_path):
    tensors, facts = checkpoint.read(place / "gpt" / FILE_NAME)
    spoiled = {name: value * 1.01 for name, value in tensors.items()}
    write_model(tmp_path / "gpt" / FILE_NAME, load(place / "gpt").model.config, spoiled, facts)
    done = command("evaluate", "--model", tmp_path / "gpt", "--zoo", place / "zoo", "--out", evaluated, *FEW)
    fails_with(done, "holds a run with weights=")


def test_an_audit_shows_a_table_and_its_verdict(place, tmp_path):
    """The command itself, in a process of its own."""
    options = ["--model", place / "gpt", "--zoo", place / "zoo", "--out", "new", "--samples", "4", "--target", "1.5",
               "--num-inference-steps", "2", "--json"]  # fmt: skip
    done = run_cli("triptych_gpt.cli", "audit", *map(str, options), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed, written = strict_json(done.stdout), strict_json((tmp_path / "new" / "audit.json").read_text())["result"]
    assert written["prompt"] == 1.5
    assert printed["verdict"] == written["verdict"]
    assert printed["verdict"]
    assert printed["verdict"][0] in done.stderr
    assert all(name in done.stderr for name in printed["median_distance"])
    assert (tmp_path / "new" / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert printed["median_distance"]["samples"]["value"] > 0


def test_a_model_and_a_zoo_that_do_not_belong_together_are_refused(place, collect_zoo, other_task, tmp_path):
    other = collect_zoo(tmp_path / "other", task=other_task, epochs=None)
    again = collect_zoo(tmp_path / "again", seed=1, checkpoints=2)
    for name in ("evaluate", "audit"):
        words = [name, "--model", place / "gpt", "--out", tmp_path / "out"]
        fails_with(
            command(*words, "--zoo", other), "networks of 32 parameters, the model was trained on 2,080; give the zoo"
        )
        # Of the same task, but none of its training runs were seen: an audit would find nothing memorised.
        fails_with(command(*words, "--zoo", again), "give the zoo that it was trained on")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "status", "message"), [
    (["evaluate", "--networks", "0"], 2, "networks 0: expected at least 1"),
    (["evaluate", "--prompts", "1"], 2, "prompts 1: expected at least 2"),
    (["evaluate", "--sampler-steps", "0"], 2, "expected numbers of 1..1000"),
    (["evaluate", "--num-inference-steps", "0"], 2, "num_inference_steps 0: expected 1..1000"),
    (["evaluate", "--networks-at-once", "0"], 2, "networks_at_once 0: expected at least 1"),
    (["evaluate", "--networks", "99"], 1, "99 networks of test runs: "),
    (["evaluate", "--model", "nowhere"], 1, "nowhere: no such"),
    (["evaluate", "--zoo", "nowhere"], 1, "nowhere"),
    (["evaluate", "--out", "/proc/nowhere", *FEW], 1, "cannot be written"),
    (["audit", "--samples", "0"], 2, "samples 0: expected at least 1"),
    (["audit", "--every", "0"], 2, "every 0: expected at least 1"),
    (["audit", "--target", "nan"], 2, "target nan: expected a finite number"),
    (["audit", "--model", "nowhere"], 1, "nowhere: no such"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(place, tmp_path, monkeypatch, options, status, message):
    monkeypatch.chdir(tmp_path)
    few = ["--num-inference-steps", "2"]
    given = ["--model", place / "gpt", "--zoo", place / "zoo"]
    fails_with(command(options[0], *given, *few, *options[1:]), message, status)


def test_a_model_whose_updates_are_not_finite_is_evaluated_and_not_audited(place, tmp_path):
    tensors, facts = checkpoint.read(place / "gpt" / FILE_NAME)
    wild = {name: torch.full_like(value, 3e38) if "norm_out" in name else value for name, value in tensors.items()}
    write_model(tmp_path / "gpt" / FILE_NAME, load(place / "gpt").model.config, wild, facts)
    options = ["--model", tmp_path / "gpt", "--zoo", place / "zoo"]
    done = command("evaluate", *options, *FEW, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    written = strict_json((tmp_path / "out" / "alignment.json").read_text())["result"]
    assert written["alignment"]["G.pt"]["non_finite"] == 9
    fails_with(
        command("audit", *options, *FEW[:2], "--samples", "4", "--out", tmp_path / "audit"),
        "none of 4 updates is finite",
    )


def test_a_converted_models_file_which_does_not_know_its_zoo_is_evaluated(place, tmp_path):
    tensors, facts = checkpoint.read(place / "gpt" / FILE_NAME)
    del facts["zoo"]
    write_model(tmp_path / "gpt" / FILE_NAME, load(place / "gpt").model.config, tensors, facts)
    options = ["--model", tmp_path / "gpt", "--zoo", place / "zoo", "--out", tmp_path / "out", *FEW]
    assert command("evaluate", *options).returncode == 0
