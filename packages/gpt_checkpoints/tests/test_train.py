"""`triptych-gpt train` at a tiny size: interrupted, killed, on two ranks; and what examples and validations are made of."""

import contextlib
import io
import json
import math
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from triptych_common import cost, testing
from triptych_common.cost import Memory, state_bytes
from triptych_common.parallel import Ranks
from triptych_common.storage import checkpoint
from triptych_common.testing import logged, run_cli, run_here, run_torchrun
from triptych_common.training import Batch
from triptych_gpt import SamplerSettings, TrainedGpt, Zoo, cli, load
from triptych_gpt.objective import Objective, TrainingZoo
from triptych_gpt.tasks import open_task
from triptych_gpt.train import make_state, step_cost
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.validation import PROMPTS, SEED
from triptych_gpt.zoo.collect import collect
from triptych_gpt.zoo.collect_config import CollectConfig

TINY = [
    "--width", "16", "--depth", "1", "--num-heads", "2", "--batch-size", "16", "--total-pairs", "600", "--lr", "1e-2",
    "--warmup-pairs", "64", "--log-every", "5", "--checkpoint-every", "8", "--validation-every", "10",
    "--validation-networks", "4", "--validation-inference-steps", "3",
]  # fmt: skip
STEPS = 38  # the last batch goes 8 pairs beyond total_pairs
VALIDATED = [10, 20, 30, 38]
SCORE = "validation/alignment"

pytestmark = pytest.mark.filterwarnings("ignore:tokens of up to")


ALONE = Ranks(0, 1, torch.device("cpu"))

command = partial(run_here, cli.run)


def train(zoo: Path, out: Path, *options: object) -> subprocess.CompletedProcess:
    return command("train", *TINY, "--zoo", zoo, "--out", out, *options)


def trained(zoo: Path, out: Path, *options: object) -> dict:
    """The result of a training run that must succeed."""
    done = train(zoo, out, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


fails_with = partial(testing.fails_with, quiet=("training:", "verifying", "warning: tokens of"))


def scores(out: Path) -> dict[int, float]:
    return {row["step"]: row[SCORE] for row in logged(out) if SCORE in row}


def assert_same_run(a: Path, b: Path) -> None:
    """Models, the last checkpoint and metrics are bit-identical."""
    for name in ("model.safetensors", "last.safetensors", f"checkpoints/step-{STEPS:08d}-extra.safetensors"):
        (tensors_a, facts_a), (tensors_b, facts_b) = checkpoint.read(a / name), checkpoint.read(b / name)
        assert facts_a == facts_b
        assert tensors_a.keys() == tensors_b.keys()
        assert [key for key, value in tensors_a.items() if not torch.equal(value, tensors_b[key])] == []
    assert logged(a) == logged(b)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, collect_zoo) -> Path:
    """Fifteen runs of the laptop's task, five a split."""
    return collect_zoo(
        tmp_path_factory.mktemp("zoo") / "zoo", runs=15, checkpoints=8, cohort_runs=5, networks_at_once=5
    )


@pytest.fixture(scope="module")
def whole(zoo, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    assert trained(zoo, out)["last"]["step"] == STEPS
    return out


# --- learning and validating


def test_training_denoises_better_than_the_identity_it_starts_from(zoo, whole):
    objective = Objective(TrainingZoo(GptTrainConfig(zoo=zoo, seed=7)))  # another seed than was trained on
    examples, model = objective.draw(range(256)), load(whole / "last.safetensors").model
    with torch.no_grad():
        ours = objective.loss(model, examples, torch.device("cpu")).total.mean()
    identity = (examples.theta - examples.theta_star).square().mean()
    assert ours < 0.9 * identity


def test_the_saved_model_is_the_one_that_scored_best(zoo, whole):
    rows = scores(whole)
    assert list(rows) == VALIDATED
    best = max(rows, key=lambda step: (rows[step], step))
    kept = load(whole)
    assert kept.facts["validation"] == {"alignment": rows[best], "step": best}
    for file, step in (("model.safetensors", best), ("last.safetensors", STEPS)):
        assert alignment_by_hand(load(whole / file), Zoo(zoo)) == pytest.approx(rows[step], abs=1e-3)
    assert len(set(rows.values())) == len(rows)  # or the lines above could not tell models apart


def test_any_checkpoint_can_be_prompted(whole, tmp_path):
    newest = checkpoint.steps_in(whole / "checkpoints")[-1]
    ours, theirs = load(newest), load(whole / "last.safetensors")
    assert ours.facts == theirs.facts
    assert all(torch.equal(ours.model.state_dict()[key], value) for key, value in theirs.model.state_dict().items())
    before = checkpoint.scheduled_in(whole / "checkpoints")[-1]
    shutil.copytree(before.parent, tmp_path / "run/checkpoints")
    (tmp_path / "run/checkpoints" / newest.name).unlink()  # a run that was interrupted before its first validation
    assert load(tmp_path / "run").facts["pairs_seen"] == load(before).facts["pairs_seen"] == 32 * 16


def test_a_run_may_be_lengthened(zoo, tmp_path):
    trained(zoo, tmp_path, "--total-pairs", 160, "--validation-every", 0)
    done = train(zoo, tmp_path, "--total-pairs", 320, "--validation-every", 10, "--log-every", 2)
    assert done.returncode == 0, done.stderr
    # Half a cosine from pair 64 on: it was at its end, and is at 96 of 256 pairs.
    rate = 1e-2 * 0.5 * (1 + math.cos(math.pi * 96 / 256))
    assert f"total_pairs is 320 now, was 160: the learning rate of pair 161 becomes {rate:.3g}, was 0" in done.stdout
    fails_with(train(zoo, tmp_path, "--total-pairs", 160, "--validation-every", 10), "has trained on 320 already")


def alignment_by_hand(gpt: TrainedGpt, zoo: Zoo) -> float:
    """R^2 over prompts of updates of untrained networks of validation runs, one network after the other."""
    metric, found = next(metric for metric in gpt.task.metrics if metric.name == gpt.metric), []
    for number, row in enumerate(zoo.runs_in("validation")[:4].tolist()):
        before = zoo.metrics(gpt.metric)[row, :1].double()
        prompts = torch.linspace(
            metric.prompts.best, metric.prompts.worst * float(before), PROMPTS, dtype=torch.float64
        )
        new = gpt.sample(
            zoo.theta([row] * PROMPTS, [0] * PROMPTS), before.repeat(PROMPTS), prompts, settings=SamplerSettings("ddpm", 3),
            seed=SEED, indices=range(number * PROMPTS, (number + 1) * PROMPTS),
        )  # fmt: skip
        residual = (gpt.task.evaluate(new)[gpt.metric].double() - prompts).square().sum()
        found.append(float(1 - residual / (prompts - prompts.mean()).square().sum()))
    return sum(found) / len(found)


def test_a_model_is_trained_on_from_its_weights_and_scales(zoo, whole, tmp_path):
    """At a rate of almost nothing, on other pairs and fewer runs: what is left is what it started from."""
    options = ("--init-from", whole, "--seed", 5, "--runs", 3)
    trained(zoo, tmp_path / "run", *options, "--lr", 1e-12)
    source, found = load(whole), load(tmp_path / "run" / "last.safetensors")
    assert found.scale == source.scale
    assert found.model.config == source.model.config
    for name, value in source.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=0, atol=1e-6)
    wide = train(zoo, tmp_path / "wide", *options, "--width", 48)
    fails_with(wide, f"a model of width {source.model.config.width}, here it is 48; pass its own settings")
    other = train(zoo, tmp_path / "other", *options, "--metric", "test_error")
    fails_with(other, "prompted with test_loss; pass --metric test_loss")
    assert not (tmp_path / "wide").exists()


def test_every_validation_has_the_same_networks_and_prompts(zoo, tmp_path):
    trained(zoo, tmp_path, "--lr", "1e-30", "--weight-decay", "0")
    rows = scores(tmp_path)
    assert list(rows) == VALIDATED
    assert len(set(rows.values())) == 1
    assert load(tmp_path).facts["validation"]["step"] == STEPS  # of equals the last
    assert next(iter(rows.values())) == pytest.approx(alignment_of_the_identity(Zoo(zoo)), abs=1e-4)


def test_a_zoo_of_few_validation_runs_is_validated_on_those(zoo, tmp_path):
    done = train(zoo, tmp_path / "more", "--validation-networks", 16)
    assert done.returncode == 0, done.stderr
    assert f"validated on 5 networks, not 16: {zoo} has no more for it" in done.stdout
    trained(zoo, tmp_path / "all", "--validation-networks", 5)
    assert scores(tmp_path / "more") == scores(tmp_path / "all")


def alignment_of_the_identity(zoo: Zoo) -> float:
    found = []
    for before in zoo.metrics("test_loss")[zoo.runs_in("validation")[:4], 0].double():
        prompts = torch.linspace(0, 0.9 * float(before), PROMPTS, dtype=torch.float64)
        found.append(float(1 - (before - prompts).square().mean() / prompts.var(correction=0)))
    return sum(found) / len(found)


def test_validating_more_often_trains_no_differently(zoo, whole, tmp_path):
    trained(zoo, tmp_path, "--validation-every", "19")
    assert list(scores(tmp_path)) == [19, 38]
    assert scores(tmp_path)[38] == scores(whole)[38]
    learned = [[row for row in logged(out) if "loss" in row] for out in (whole, tmp_path)]
    assert learned[0] == learned[1]


# --- resuming


INTERRUPT = """
import os, signal, sys
from triptych_common.storage.run import RunDirectory

when, step, signum, real_log = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), RunDirectory.log

def log(self, row):
    here = row["step"] == step and ("validation/alignment" in row or step % 10)
    if here and when == "before":
        os.kill(os.getpid(), signum)
    real_log(self, row)
    if here and when == "after":
        os.kill(os.getpid(), signum)

RunDirectory.log = log
from triptych_gpt.cli import run
sys.exit(run(sys.argv[4:]))
"""


def test_a_run_killed_about_its_validations_and_interrupted_ends_bit_identical(zoo, whole, tmp_path):
    def stopped(when: str, step: int, signum: signal.Signals) -> "subprocess.CompletedProcess[str]":
        words = ["-c", INTERRUPT, when, str(step), str(int(signum)), "train", *TINY, "--zoo", zoo, "--out", tmp_path]
        return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300)

    # Killed with the model of step 10 written, its score not.
    assert stopped("before", 10, signal.SIGKILL).returncode == -signal.SIGKILL
    assert load(tmp_path).facts["validation"]["step"] == 10
    assert scores(tmp_path) == {}
    # Killed with the score written, the step's checkpoint not.
    assert stopped("after", 30, signal.SIGKILL).returncode == -signal.SIGKILL
    assert list(scores(tmp_path)) == [10, 20, 30]
    assert checkpoint.read(checkpoint.steps_in(tmp_path / "checkpoints")[-1])[1]["step"] == 24
    done = stopped("after", 35, signal.SIGINT)
    fails_with(done, f"stopped at step 35 of {STEPS}, saved in", 128 + signal.SIGINT)
    trained(zoo, tmp_path)
    assert_same_run(whole, tmp_path)


def test_repeating_a_finished_run_changes_nothing(zoo, whole):
    def content() -> dict[str, tuple]:
        return {name: checkpoint.content_sha256(whole / name) for name in ("model.safetensors", "last.safetensors")}

    before, rows = content(), (whole / "metrics.jsonl").read_bytes()
    result = trained(zoo, whole)
    assert result["last"]["step"] == STEPS
    assert content() == before
    assert (whole / "metrics.jsonl").read_bytes() == rows


def test_a_config_that_does_not_fit_is_refused(zoo, whole):
    fails_with(train(zoo, whole, "--lr", "0.5"), "(now 0.5); repeat its settings to resume it, or use another --out")
    fails_with(train(zoo, whole, "--metric", "test_error"), "metric=None (now 'test_error')")


# --- the zoo's bytes


def flip_exponents(path: Path) -> None:
    """Another exponent in 180 numbers: finite, and no reader of safetensors notices."""
    content = bytearray(path.read_bytes())
    content[-720 + 3 :: 4] = bytes(byte ^ 4 for byte in content[-720 + 3 :: 4])
    path.write_bytes(content)


def test_a_damaged_shard_trains_nothing(zoo, whole, tmp_path):
    damaged = tmp_path / "zoo"
    shutil.copytree(zoo, damaged)
    path = damaged / "shards" / "runs-00000000-00000004.safetensors"
    flip_exponents(path)
    assert train(damaged, tmp_path / "run", "--dry-run").returncode == 0
    assert command("info", "--zoo", damaged).returncode == 0
    message = f"{path}: contents differ from the manifest's checksum; run triptych-gpt collect mnist_mlp_14 --epochs 1"
    fails_with(train(damaged, tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()
    fails_with(command("export", "--zoo", damaged, "--run", "2", "--out", tmp_path / "a.pt"), message)
    assert command("export", "--zoo", damaged, "--run", "5", "--out", tmp_path / "a.pt").returncode == 0
    for name in ("evaluate", "audit"):
        fails_with(command(name, "--model", whole, "--zoo", damaged, "--out", tmp_path / name), message)


def test_a_run_goes_on_only_with_the_bytes_it_began_with(zoo, collect_zoo, tmp_path):
    grown = tmp_path / "zoo"
    shutil.copytree(zoo, grown)
    all_runs, four_runs = tmp_path / "all", tmp_path / "four"
    trained(grown, all_runs, "--total-pairs", "64")
    trained(grown, four_runs, "--total-pairs", "64", "--runs", "4")
    shard = grown / "shards" / "runs-00000000-00000004.safetensors"
    before = shard.read_bytes()
    flip_exponents(shard)
    collect_zoo(grown, runs=40, checkpoints=8, cohort_runs=5, networks_at_once=5, repair=True)
    assert shard.read_bytes() == before
    trained(grown, four_runs, "--total-pairs", "64", "--runs", "4")  # repaired and grown, its own runs are the same
    fails_with(train(grown, all_runs, "--total-pairs", "64"), "zoo.training_runs=5 (now 15)")
    # As many runs by the same recipe, of other bytes.
    other = collect_zoo(tmp_path / "other", runs=15, checkpoints=8, cohort_runs=5, networks_at_once=2)
    done = train(other, all_runs, "--total-pairs", "64")
    fails_with(done, "holds a run with zoo.contents=")
    assert "training_runs" not in done.stderr


# --- ranks and parts


def test_a_model_file_that_was_lost_is_made_again(zoo, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    again = trained(zoo, tmp_path / "run")
    assert again["kept"] == "the last one, since model.safetensors was lost"
    last, _ = checkpoint.read(tmp_path / "run" / "last.safetensors")
    model, _ = checkpoint.read(Path(again["model"]))
    assert all(torch.equal(model[name], value) for name, value in last.items())


@pytest.fixture(scope="module")
def exact(zoo, tmp_path_factory) -> Path:
    """A short run of one process in float64."""
    out = tmp_path_factory.mktemp("exact")
    trained(zoo, out, *EXACT)
    return out


EXACT = ["--precision", "float64", "--total-pairs", "320", "--validation-every", "10"]


def assert_equal_to_rounding(a: Path, b: Path) -> None:
    for name in ("last.safetensors", "model.safetensors"):
        (tensors, facts), (others, other_facts) = checkpoint.read(a / name), checkpoint.read(b / name)
        for key, value in tensors.items():
            torch.testing.assert_close(others[key], value, rtol=0, atol=1e-10, msg=key)
        assert facts["scale"] == other_facts["scale"]
    assert len(logged(a)) == len(logged(b))
    for row, other in zip(logged(a), logged(b), strict=True):
        rel = 1e-4 if SCORE in row else 1e-9  # networks are scored in float32
        assert row == pytest.approx(other, rel=rel)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_give_the_weights_and_scores_of_one(zoo, exact, tmp_path, parallel):
    words = ["train", *TINY, "--zoo", str(zoo), "--out", str(tmp_path), *EXACT, "--parallel", parallel]
    done = run_torchrun(2, "triptych_gpt.cli", *words)
    assert done.returncode == 0, done.stderr
    assert_equal_to_rounding(exact, tmp_path)


def test_parts_of_a_batch_give_what_the_whole_does(zoo, exact, tmp_path):
    trained(zoo, tmp_path, *EXACT, "--micro-batch", "3")
    assert_equal_to_rounding(exact, tmp_path)


# --- settings


@pytest.mark.parametrize(
    "options",
    [
        ["--tokenizer", "layer"],
        ["--tokenizer", "chunk", "--chunk-size", "100", "--pairs", "released"],
        ["--tokenizer", "layer", "--augment", "off", "--canonicalise", "--pairs", "ends"],
        ["--pairs", "thesis", "--scalars", "raw", "--metric", "test_error", "--metric-factor", "100", "--runs", "2"],
    ],
    ids=lambda options: " ".join(options),
)
def test_every_kind_of_model_trains_and_loads(zoo, tmp_path, options):
    result = trained(zoo, tmp_path, *options, "--total-pairs", "100", "--log-every", "1")
    losses = [row["loss"] for row in logged(tmp_path) if "loss" in row]
    assert len(losses) == 7
    assert all(math.isfinite(loss) for loss in losses)
    gpt = load(result["model"])
    assert gpt.facts["pairs_seen"] == 112
    assert gpt.metric == ("test_error" if "test_error" in options else "test_loss")
    assert gpt.facts["zoo"]["training_runs"] == (2 if "--runs" in options else 5)
    values = Zoo(zoo).metrics(gpt.metric)[Zoo(zoo).runs_in("train")[: gpt.facts["zoo"]["training_runs"]]]
    assert gpt.trained_range == (float(values.min()), float(values.max()))


def test_without_validation_the_last_model_is_saved(zoo, tmp_path):
    one_split = tmp_path / "zoo"
    with contextlib.redirect_stderr(io.StringIO()):
        collect(CollectConfig(task="mnist_mlp_14", runs=2, epochs=1, checkpoints=3, cohort_runs=2, engine="here",
                              networks_at_once=2, out=one_split))  # fmt: skip
    out, short = tmp_path / "run", ["--total-pairs", "64"]
    fails_with(train(one_split, out, *short), "0 validation runs, too few to choose a model by")
    result = trained(one_split, out, *short, "--validation-every", "0")  # the remedy
    assert "not validated" in result["kept"]
    model, last = (checkpoint.read(out / name)[0] for name in ("model.safetensors", "last.safetensors"))
    assert all(torch.equal(model[name], value) for name, value in last.items())
    assert scores(out) == {}


def test_dry_run_shows_parameters_and_cost_and_writes_nothing(zoo, whole, tmp_path):
    done = train(zoo, tmp_path / "run", "--dry-run", "--json")
    printed = json.loads(done.stdout)
    tensors, _ = checkpoint.read(whole / "last.safetensors")
    assert printed["parameters"] == sum(value.numel() for value in tensors.values())
    assert printed["steps"] == STEPS
    assert printed["training_gflops"] == pytest.approx(600 * printed["gflops_per_pair"], rel=0.01, abs=0.1)
    assert printed["zoo"]["training_runs"] == 5
    assert printed["estimate"]["pairs_per_second"] > 1
    assert 0 < printed["estimate"]["gigabytes_of_a_step"] < 0.1 < printed["estimate"]["gigabytes_there"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("fits", "remedy"), [(0.7, "pass --micro-batch"), (0.001, "choose a smaller model")])
def test_a_batch_that_does_not_fit_is_refused_before_there_is_a_folder(zoo, tmp_path, monkeypatch, fits, remedy):
    config = GptTrainConfig(zoo=zoo, width=16, depth=1, num_heads=2, batch_size=1024)
    data = TrainingZoo(config)
    whole = step_cost(config, data, ALONE).step_bytes(1024)
    monkeypatch.setattr(cost, "available_bytes", lambda device: fits * whole)
    fails_with(train(zoo, tmp_path / "run", "--batch-size", 1024, "--total-pairs", 2048), remedy)
    assert not (tmp_path / "run").exists()


def test_the_estimated_memory_is_that_of_a_step(zoo):
    config = GptTrainConfig(zoo=zoo, width=16, depth=1, num_heads=2, batch_size=64)
    data = TrainingZoo(config)
    state, objective = make_state(config, data, ALONE), Objective(data)

    def losses(counters: range) -> dict[str, torch.Tensor]:
        return {"loss": objective.loss(state.parallel_model, objective.draw(counters), ALONE.device).total.mean()}

    state.update(Batch(0, 64, range(64)), state.accumulate(Batch(0, 64, range(64)), None, losses))
    with Memory() as memory:
        state.accumulate(Batch(1, 64, range(64)), None, losses)
    found = step_cost(config, data, ALONE).step_bytes(64)
    assert found == pytest.approx(max(memory.history) + state_bytes(state), rel=0.1)


@pytest.mark.parametrize(("options", "status", "message"), [
    (["--metric", "return"], 1, "metric 'return': expected one of test_loss, test_error, train_loss"),
    (["--runs", "99"], 1, "runs 99: "),
    (["--zoo", "nowhere"], 1, "nowhere"),
    (["--width", "15"], 1, "width 15 is not a multiple of num_heads 2"),
    (["--tokenizer", "chunk"], 1, "chunk_size"),
    (["--total-pairs", "0"], 2, "total_pairs 0: expected a number above 0"),
    (["--warmup-pairs", "601"], 2, "warmup_pairs 601: expected 0..600 (total_pairs)"),
    (["--validation-inference-steps", "1001"], 2, "validation_inference_steps 1001: expected 1..1000"),
    (["--device", "tpu"], 1, "device 'tpu': not available here"),
    (["--preset", "huge"], 2, "preset 'huge': expected one of laptop, smoke"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(zoo, tmp_path, options, status, message):
    fails_with(train(zoo, tmp_path / "run", *options), message, status)
    assert not (tmp_path / "run").exists()  # which would refuse the corrected command


def test_a_task_that_is_not_the_zoos_is_refused(zoo, other_task, tmp_path):
    done = train(zoo, tmp_path / "run", "--task", other_task)
    fails_with(done, "networks of 32 parameters, the zoo's have 2,080; give the zoo's own with --task")


def test_a_user_sees_where_the_model_is(zoo, tmp_path):
    """The command itself, in a process of its own."""
    words = ["train", *TINY, "--total-pairs", "64", "--zoo", str(zoo), "--out", "run"]
    done = run_cli("triptych_gpt.cli", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model: run/model.safetensors (prompt alignment R^2 " in done.stdout
    assert "warning: tokens of up to 207 parameters do not fit a width of 16" in done.stderr
    assert load(tmp_path / "run").facts["pairs_seen"] == 64


# --- examples


def draws(zoo: Path, counters: range | list[int], **options):
    return Objective(TrainingZoo(GptTrainConfig(zoo=zoo, **options))).draw(counters)


def hidden_orders(plain: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """Which hidden unit of `plain` each of `moved` is, by its fan-in."""
    layout = open_task("mnist_mlp_14").layout
    plain, moved = (layout.unflatten(theta)["fc1.weight"] for theta in (plain, moved))
    equal = (plain[:, None] == moved[:, :, None]).all(-1)  # (n, moved, plain)
    assert (equal.sum(-1) == 1).all()
    return equal.long().argmax(-1)


def outputs(theta: torch.Tensor) -> torch.Tensor:
    network, layout = open_task("mnist_mlp_14").network(), open_task("mnist_mlp_14").layout
    inputs = torch.randn(5, 196, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.stack([functional_call(network, layout.unflatten(one.double()), (inputs,)) for one in theta])


def test_augmentation_moves_the_units_of_both_checkpoints_alike(zoo):
    plain, moved = draws(zoo, range(12)), draws(zoo, range(12), tokenizer="layer")
    orders = hidden_orders(plain.theta, moved.theta)
    assert torch.equal(orders, hidden_orders(plain.theta_star, moved.theta_star))
    assert len({tuple(order) for order in orders.tolist()}) == 12
    for a, b in ((plain.theta, moved.theta), (plain.theta_star, moved.theta_star)):
        torch.testing.assert_close(outputs(a), outputs(b), rtol=0, atol=1e-12)
    for name in ("metric", "metric_star", "t", "noise"):
        assert torch.equal(getattr(plain, name), getattr(moved, name))


def test_canonicalised_runs_have_one_order_each_that_fits_the_first_run(zoo):
    options = {"tokenizer": "layer", "augment": "off", "pairs": "ends"}
    plain, moved = draws(zoo, range(40), **options), draws(zoo, range(40), canonicalise=True, **options)
    orders = hidden_orders(plain.theta, moved.theta)
    assert torch.equal(orders, hidden_orders(plain.theta_star, moved.theta_star))
    runs = {tuple(theta[:4].tolist()): i for i, theta in enumerate(plain.theta_star)}
    by_run = {run: {tuple(orders[i].tolist()) for i in range(40) if tuple(plain.theta_star[i, :4].tolist()) == run}
              for run in runs}  # fmt: skip
    assert len(by_run) == 5
    assert all(len(each) == 1 for each in by_run.values())
    assert sum(each == {tuple(range(10))} for each in by_run.values()) == 1  # the run that is the reference
    torch.testing.assert_close(outputs(plain.theta_star), outputs(moved.theta_star), rtol=0, atol=1e-12)
    ours = Zoo(zoo)
    first = (
        ours.theta(ours.runs_in("train")[:1], [ours.checkpoints - 1])[0] * TrainingZoo(GptTrainConfig(zoo=zoo)).scale
    )
    before, after = ((theta - first).norm(dim=1) for theta in (plain.theta_star, moved.theta_star))
    assert (after <= before + 1e-4).all()
    assert after.mean() < before.mean() - 0.1


def test_parameters_are_scaled_to_the_deviation_of_pixels(zoo):
    ours = Zoo(zoo)
    rows = ours.runs_in("train").repeat(ours.checkpoints)
    thetas = ours.theta(rows, list(range(ours.checkpoints)) * len(ours.runs_in("train"))).double()
    data = TrainingZoo(GptTrainConfig(zoo=zoo))
    assert data.scale * float(thetas.std()) == pytest.approx(0.538, rel=0.05)  # of checkpoints drawn at random
    drawn = draws(zoo, [3])
    assert any(torch.equal(drawn.theta[0], row) for row in (thetas.float() * data.scale))


def test_a_counter_alone_decides_its_example(zoo):
    some, many = draws(zoo, [3, 5, 9], tokenizer="layer"), draws(zoo, range(10), tokenizer="layer")
    other = draws(zoo, [3, 5, 9], tokenizer="layer", seed=1)
    for name, value in some._asdict().items():
        assert torch.equal(value, getattr(many, name)[[3, 5, 9]]), name
        assert not torch.equal(value, getattr(other, name)), name


def test_pairs_lead_to_later_checkpoints_of_the_same_run_with_their_metrics(zoo):
    ours, drawn = Zoo(zoo), draws(zoo, range(64), pairs="thesis")
    scale, values = TrainingZoo(GptTrainConfig(zoo=zoo)).scale, ours.metrics("test_loss")
    places = {}
    for row in ours.runs_in("train").tolist():
        for number, theta in enumerate(ours.theta([row] * ours.checkpoints, range(ours.checkpoints)) * scale):
            places[tuple(theta[:6].tolist())] = (row, number)
    for i in range(64):
        (run, start), (same, target) = (
            places[tuple(theta[i, :6].tolist())] for theta in (drawn.theta, drawn.theta_star)
        )
        assert run == same
        assert start < target
        assert (drawn.metric[i], drawn.metric_star[i]) == (values[run, start], values[run, target])
