"""`triptych-gpt collect` at a tiny size, as a user would run it: repeated, extended, interrupted, killed, spoiled."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from triptych_common import testing, workers
from triptych_common.testing import descendants, run_cli, run_here
from triptych_gpt import cli
from triptych_gpt.tasks import Cohort, open_task
from triptych_gpt.zoo import PRELOAD
from triptych_gpt.zoo.cohorts import cohorts, split_of
from triptych_gpt.zoo.pairs import Pairs
from triptych_gpt.zoo.zoo import Zoo

TASK = """
import time
import torch
from torch import nn
from triptych_gpt import cli
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.symmetry.spec import Axis, PermutationSpec
from triptych_gpt.tasks import Items, Metric, Score, Speed, SupervisedTask, Trajectories, cross_entropy, momentum_sgd

def network():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))

def points(part):
    rng = torch.Generator().manual_seed(len(part))
    inputs = torch.randn(64, 3, generator=rng)
    return Items(inputs, (inputs[:, 0] * inputs[:, 1] > 0).long())

def slow(inputs, rng):
    time.sleep(0.5)
    return inputs

TINY = SupervisedTask(name="tiny", network=network, data=points, epochs=3, batch_size=16)
SLOW = SupervisedTask(name="slow", network=network, data=points, epochs=3, batch_size=16, augment=slow)
WILD = SupervisedTask(name="wild", network=network, data=points, epochs=3, batch_size=16, optimizer=momentum_sgd(lr=2.5))
TIED = SupervisedTask(name="tied", network=lambda: nn.Sequential(nn.Linear(3, 4), nn.Bilinear(4, 4, 2)),
                      data=points, epochs=1, batch_size=16)
def once(part):
    return Items(torch.randn(64, 3), torch.randint(2, (64,)))

def scalar(outputs, targets):
    return outputs.mean()

UNSEEDED = SupervisedTask(name="unseeded", network=network, data=once, epochs=3, batch_size=16)
SCALAR = SupervisedTask(name="scalar", network=network, data=points, epochs=3, batch_size=16, loss=scalar)
STEP = SupervisedTask(name="step", network=network, data=points, epochs=3, batch_size=16,
                      scores=(Score(Metric("step", "lower"), "test", cross_entropy),))
HOPELESS = SupervisedTask(name="hopeless", network=network, data=points, epochs=3, batch_size=16,
                          optimizer=momentum_sgd(lr=1e30))

class Undefined(SupervisedTask):
    def evaluate(self, theta):
        scores = super().evaluate(theta)
        scores["test_loss"][theta[:, 0] > 0] = float("nan")
        return scores

class Short(SupervisedTask):
    def train_cohort(self, cohort, device, networks_at_once):
        made = super().train_cohort(cohort, device, networks_at_once)
        return Trajectories(made.theta[:, :-1], made.steps[:, :-1])

UNDEFINED = Undefined(name="undefined", network=network, data=points, epochs=3, batch_size=16)
SHORT = Short(name="short", network=network, data=points, epochs=3, batch_size=16)
crossed = PermutationSpec(ParameterLayout.of(network()), {
    "0.weight": (Axis("hidden"), None), "0.bias": (Axis("hidden"),), "2.weight": (None, None), "2.bias": (None,)})
CROSSED = SupervisedTask(name="crossed", network=network, data=points, epochs=3, batch_size=16, permutations=crossed)

class Search:
    # Hill climbing; its reward is known only while it climbs, its height any time.
    name, steps, initialisers = "search", 10, ("default",)
    layout = ParameterLayout({"place": (3,)})
    symmetry = PermutationSpec(layout, {"place": (Axis("place"),)})
    metrics = (Metric("reward", "higher"), Metric("height", "higher"))

    def recipe(self):
        return {"steps": self.steps}

    def settings(self):
        return {"stride": 0.1}

    def initial(self, seed, runs, initialiser="default"):
        return torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(run)) for run in runs])

    def train_cohort(self, cohort, device, networks_at_once):
        steps = torch.arange(cohort.checkpoints)
        theta = self.initial(cohort.seed, cohort.runs)[:, None] * 0.9 ** steps[:, None]
        rewards = torch.tensor([[100.0 * run + step for step in steps] for run in cohort.runs])
        return Trajectories(theta, steps.expand(len(cohort.runs), -1), {"reward": rewards})

    def evaluate(self, theta):
        return {"reward": theta[:, 0] * float("nan"), "height": -theta.square().sum(1)}

    def measure(self, device, cohort_runs, shared_batches=True):
        return Speed(cohort_runs, 1e-3, 1e-6)

NOTHING = 3
"""
OPTIONS = ["--runs", "12", "--cohort-runs", "4", "--checkpoints", "6", "--networks-at-once", "4"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "tasks.py"
    path.write_text(TASK)
    return path


command = partial(run_here, cli.run)
fails_with = partial(testing.fails_with, quiet=("collecting:", "verifying"))


def collect(tasks: Path, out: Path, *options: str, name: str = "TINY") -> "subprocess.CompletedProcess[str]":
    return command("collect", f"{tasks}:{name}", *OPTIONS, "--engine", "here", "--out", str(out), *options)


def processes(tasks: Path, out: Path, *options: str, name: str = "TINY") -> "subprocess.CompletedProcess[str]":
    return run_cli("triptych_gpt.cli", "collect", f"{tasks}:{name}", *OPTIONS, "--out", str(out), *options)


def shards(zoo: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((zoo / "shards").iterdir())}


def files(zoo: Path) -> dict[Path, bytes]:
    """Everything that a zoo promises."""
    paths = [zoo / "manifest.json", *(zoo / "records").iterdir(), *(zoo / "shards").iterdir()]
    return {path.relative_to(zoo): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(tasks, tmp_path_factory) -> Path:
    """An uninterrupted zoo, of two processes."""
    out = tmp_path_factory.mktemp("whole") / "zoo"
    done = processes(tasks, out, "--json", "--workers", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["runs"] == {"train": 4, "validation": 4, "test": 4}
    assert result["bytes"] == sum(len(content) for content in shards(out).values())
    return out


def test_a_zoo_holds_what_the_task_trains_and_scores(whole, tasks):
    zoo, task = Zoo(whole), open_task(f"{tasks}:TINY")
    assert len(zoo) == 12
    assert not zoo.verify()
    for run in (0, 5, 11):
        number = run // 4
        runs = range(4 * number, 4 * number + 4)
        again = task.train_cohort(Cohort(0, number, runs, checkpoints=6), torch.device("cpu"), 4)
        theta = zoo.theta([zoo.row_of(run)] * 6, range(6))
        torch.testing.assert_close(theta, again.theta[run - runs[0]], rtol=1e-5, atol=1e-6)
        assert torch.equal(zoo.steps[run], again.steps[run - runs[0]])
        scores = task.evaluate(theta)
        for name, values in scores.items():
            torch.testing.assert_close(zoo.metrics(name)[run], values)
    index = zoo.index().to_pylist()
    assert {"run", "checkpoint", "step", "split", "seed", "initialiser", "cohort", "test_loss", "test_error", "train_loss",
            "minibatch_loss", "optimizer", "lr", "momentum", "weight_decay", "schedule"} <= index[0].keys()  # fmt: skip
    assert index[0]["lr"] == 0.1
    assert torch.equal(zoo.theta([0], [0])[0], task.initial(0, [0])[0])


def test_repeating_adds_nothing_and_more_runs_extend(whole, tasks, tmp_path):
    first = tmp_path / "first"
    assert collect(tasks, first, "--runs", "6").returncode == 0  # the second cohort is cut short
    before = shards(first)
    again = collect(tasks, first, "--runs", "6")
    assert "has its 6 runs already" in again.stdout
    assert shards(first) == before
    assert collect(tasks, first).returncode == 0
    assert before.items() <= shards(first).items()
    zoo, other = Zoo(first), Zoo(whole)
    assert zoo.runs.run.tolist() == other.runs.run.tolist()
    assert zoo.runs.split.tolist() == other.runs.split.tolist()
    rows = [row for row in range(12) for _ in range(6)]
    checkpoints = [*range(6)] * 12
    torch.testing.assert_close(zoo.theta(rows, checkpoints), other.theta(rows, checkpoints), rtol=1e-4, atol=1e-5)


def test_workers_and_networks_at_once_change_nothing_but_rounding(whole, tasks, tmp_path):
    assert collect(tasks, tmp_path / "here").returncode == 0
    assert shards(tmp_path / "here") == shards(whole)
    assert collect(tasks, tmp_path / "few", "--networks-at-once", "3").returncode == 0
    rows = [row for row in range(12) for _ in range(6)]
    few, many = (Zoo(path).theta(rows, [*range(6)] * 12) for path in (tmp_path / "few", whole))
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-5)


def test_runs_of_a_cohort_share_minibatches_by_default(tasks, tmp_path):
    assert collect(tasks, tmp_path / "zoo", "--no-shared-batches").returncode == 0
    zoo, task = Zoo(tmp_path / "zoo"), open_task(f"{tasks}:TINY")
    alone = task.train_cohort(Cohort(0, 77, range(6, 7), 6, shared_batches=False), torch.device("cpu"), 1)
    torch.testing.assert_close(zoo.theta([6] * 6, range(6)), alone.theta[0], rtol=1e-4, atol=1e-5)


def test_bfloat16_halves_the_bytes_and_scores_what_is_stored(whole, tasks, tmp_path):
    assert collect(tasks, tmp_path / "zoo", "--dtype", "bfloat16").returncode == 0
    zoo, task = Zoo(tmp_path / "zoo"), open_task(f"{tasks}:TINY")
    rows, checkpoints = [*range(12)] * 2, [0] * 12 + [5] * 12
    theta, exact = zoo.theta(rows, checkpoints), Zoo(whole).theta(rows, checkpoints)
    assert torch.equal(theta, exact.bfloat16().float())
    scores = task.evaluate(theta)["test_loss"]
    torch.testing.assert_close(zoo.metrics("test_loss")[:, [0, 5]].T.flatten(), scores)
    sizes = [sum(len(c) for n, c in shards(z).items() if n.endswith(".safetensors")) for z in (zoo.path, whole)]
    assert sizes[0] < 0.7 * sizes[1]


def test_bad_runs_are_dropped_and_counted(tasks, tmp_path):
    done = collect(tasks, tmp_path / "zoo", "--json", name="WILD")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    zoo = Zoo(tmp_path / "zoo")
    assert result["dropped"] == len(zoo.dropped) > 0
    assert sum(result["runs"].values()) + result["dropped"] == 12
    assert set(zoo.dropped.values()) <= {"weights beyond 10", "weights that are not finite"}
    for row in range(len(zoo)):
        assert zoo.theta([row] * 6, range(6)).abs().max() <= 10


@pytest.fixture(scope="module")
def slow(tasks, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("slow") / "zoo"
    assert collect(tasks, out, name="SLOW").returncode == 0
    return out


def start_slowly(tasks: Path, out: Path, *options: str) -> "subprocess.Popen[str]":
    """A collection that takes seconds a cohort, with one cohort committed."""
    words = [sys.executable, "-m", "triptych_gpt.cli", "collect", f"{tasks}:SLOW", *OPTIONS, "--workers", "1", *options]
    running = subprocess.Popen(
        [*words, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list((out / "records").glob("*.json")):
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.8)  # into the next cohort
    return running


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_stopped_anywhere_it_goes_on_to_the_same_zoo(how, slow, tasks, tmp_path):
    out = tmp_path / "zoo"
    running = start_slowly(tasks, out)
    workers = descendants(running.pid)
    assert workers
    if how == signal.SIGINT:
        os.killpg(running.pid, how)  # as a terminal sends it
    else:
        running.send_signal(how)
    if how == signal.SIGTERM:
        running.send_signal(how)  # as schedulers do that are in a hurry
    _, errors = running.communicate(timeout=60)
    if how != signal.SIGKILL:
        fails_with(
            subprocess.CompletedProcess([], running.returncode, "", errors), "repeat the command to go on", 128 + how
        )
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.1)
    kept = len(Zoo(out))
    assert 4 <= kept < 12
    assert collect(tasks, out, name="SLOW").returncode == 0
    assert shards(out) == shards(slow)


def test_a_signal_while_workers_start_is_one_line(tasks, tmp_path):
    words = [sys.executable, "-m", "triptych_gpt.cli", "collect", f"{tasks}:SLOW", *OPTIONS, "--workers", "2"]
    running = subprocess.Popen(
        [*words, "--out", str(tmp_path / "zoo")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in running.stdout:
        if "12 runs in 3 cohorts" in line:
            break
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    fails_with(subprocess.CompletedProcess([], running.returncode, "", errors), "interrupted; repeat the command", 143)


def test_a_full_disk_in_mid_cohort_is_one_line_and_loses_nothing(whole, tasks, tmp_path):
    script = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
from triptych_gpt import cli
sys.exit(cli.run(sys.argv[1:]))
"""
    assert collect(tasks, tmp_path, "--runs", "4").returncode == 0
    words = ["collect", f"{tasks}:TINY", *OPTIONS, "--workers", "1", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=300)
    fails_with(done, "cannot be written (File too large)")
    assert len(Zoo(tmp_path)) == 4
    assert collect(tasks, tmp_path).returncode == 0
    assert shards(tmp_path) == shards(whole)


def test_damage_is_refused_and_repaired(whole, tasks, tmp_path):
    out = tmp_path / "zoo"
    assert collect(tasks, out).returncode == 0
    truncated, altered = sorted((out / "shards").glob("*.safetensors"))[:2]
    content = bytearray(altered.read_bytes())
    content[-5] ^= 1
    altered.write_bytes(content)
    assert "checksum" in command("verify", "--zoo", str(out)).stdout
    for runs in ("12", "16"):  # finished or growing, it claims no runs of a damaged shard
        done = collect(tasks, out, "--runs", runs)
        fails_with(
            done, f"{altered.name}: contents differ from the manifest's checksum; run triptych-gpt collect --repair"
        )
        assert "runs (" not in done.stdout
    truncated.write_bytes(truncated.read_bytes()[:-10])
    done = collect(tasks, out)
    fails_with(done, f"{truncated.name}: ")
    # The command that the zoo records names a file of code, so it is not shown as advice.
    assert "run triptych-gpt collect --repair with the task, settings and --out that made the zoo" in done.stderr
    repaired = collect(tasks, out, "--repair")
    assert repaired.returncode == 0, repaired.stderr
    assert repaired.stdout.count("collecting it again") == 2
    assert shards(out) == shards(whole)
    assert not Zoo(out).verify()


@pytest.mark.parametrize("option", [[], ["--repair"]])
def test_a_lost_manifest_is_made_again(option, whole, tasks, tmp_path):
    out = tmp_path / "zoo"
    shutil.copytree(whole, out)
    (out / "manifest.json").unlink()
    advice = (
        "run triptych-gpt collect --repair with the task, settings and --out that made the zoo, which makes it again"
    )
    fails_with(command("info", "--zoo", str(out)), advice)
    done = collect(tasks, out, *option)
    assert done.returncode == 0, done.stderr
    assert f"{out}/manifest.json: written again, with 3 shards" in done.stdout
    assert files(out) == files(whole)


def test_a_shard_whose_record_and_manifest_are_lost_is_collected_again(whole, tasks, tmp_path):
    out = tmp_path / "zoo"
    shutil.copytree(whole, out)
    (out / "manifest.json").unlink()
    (out / "records" / "runs-00000004-00000007.json").write_text("{")
    done = collect(tasks, out)
    assert "written again, with 2 shards" in done.stdout
    assert "4 runs in 1 cohort" in done.stdout
    assert files(out) == files(whole)


def test_shards_that_nothing_lists_are_not_overwritten(whole, tasks, tmp_path):
    shutil.copytree(whole, tmp_path / "zoo")
    (tmp_path / "zoo/manifest.json").unlink()
    shutil.rmtree(tmp_path / "zoo/records")
    fails_with(
        collect(tasks, tmp_path / "zoo"), "shards without their manifest.json and records/; put one of them back"
    )
    assert shards(tmp_path / "zoo") == shards(whole)


def test_an_edited_task_file_is_another_task(whole, tasks, tmp_path):
    edited = tmp_path / "tasks.py"
    edited.write_text(TASK.replace("momentum_sgd\n", "momentum_sgd\n# a comment, or a change of the loss\n"))
    fails_with(collect(edited, whole), "task_file=")


def test_a_zoo_copied_without_its_config_still_knows_its_recipe(whole, tasks, tmp_path):
    shutil.copytree(whole, tmp_path / "zoo", ignore=shutil.ignore_patterns("config.json", ".lock"))
    fails_with(collect(tasks, tmp_path / "zoo", "--seed", "5"), "a zoo of another recipe, seed=0 (now 5)")
    assert collect(tasks, tmp_path / "zoo").returncode == 0


def test_a_zoo_of_another_recipe_is_refused(whole, tasks, tmp_path):
    fails_with(collect(tasks, whole, "--seed", "1"), "seed=0 (now 1)")
    fails_with(collect(tasks, whole, "--epochs", "4"), "recipe.epochs=3 (now 4)")
    fails_with(collect(tasks, whole, name="SLOW"), "task='tiny' (now 'slow')")


@pytest.mark.parametrize(
    ("options", "message", "status"),
    [
        (["--runs", "0"], "runs 0: expected at least 1", 2),
        (["--checkpoints", "1"], "checkpoints 1: expected at least 2", 2),
        (["--checkpoints", "14"], "a run of tiny takes 12 steps, so expected 2 to 13", 1),
        (["--initialiser", "zeros"], "initialiser 'zeros': expected one of default, xavier_uniform", 1),
        (["--engine", "slurm"], "slurm", 2),
        (["--data", "mnist5k"], "task tiny has data of its own", 1),
        (["--split-every", "2"], "split_every 2: expected at least 3", 2),
        (["--device", "cuda:99"], "device 'cuda:99': not available here", 1),
        (["--device", "banana"], "device 'banana': not available here", 1),
        (["--seed", "9" * 23], "expected a number of 64 bits", 2),
    ],
)
def test_bad_requests_are_one_line(options, message, status, tasks, tmp_path):
    fails_with(collect(tasks, tmp_path / "zoo", *options), message, status)
    assert not (tmp_path / "zoo").exists()


def test_bad_tasks_are_one_line(tasks, tmp_path):
    for spec, message in (
        ("mnist", "task 'mnist': expected one of mnist_mlp, mnist_mlp_14, cifar_cnn, cartpole, cartpole_small, or"),
        (f"{tasks}:ABSENT", "has no ABSENT"),
        (f"{tasks}:NOTHING", "int, no Task"),
        (f"{tasks}:TIED", "network Sequential: cannot be run on a batch [2, 3] (TypeError: Bilinear"),
        ("nowhere.py:TASK", "nowhere.py: no such file"),
    ):
        fails_with(command("collect", spec, "--out", str(tmp_path / "zoo")), message)


def test_tasks_that_break_their_promises_are_one_line(tasks, tmp_path):
    for name, message in (
        ("UNSEEDED", "another recipe each time it is opened"),
        ("SCALAR", "task scalar"),
        ("STEP", "task step: 'step' would name two columns"),
        ("HOPELESS", "every run was dropped (weights that are not finite: 12)"),
        ("CROSSED", "task crossed: permuting hidden units changes outputs by"),
        ("SHORT", "train_cohort gave theta (4, 5, 32), expected (4, 6, 32)"),
    ):
        fails_with(collect(tasks, tmp_path / name, name=name), message)


def test_a_task_need_not_be_supervised(tasks, tmp_path):
    done = collect(tasks, tmp_path / "zoo", name="Search")
    assert done.returncode == 0, done.stderr
    zoo = Zoo(tmp_path / "zoo")
    assert zoo.better == {"reward": "higher", "height": "higher"}
    assert zoo.metrics("reward").tolist() == [[100.0 * run + step for step in range(6)] for run in range(12)]
    torch.testing.assert_close(zoo.metrics("height")[7, 3], -zoo.theta([7], [3]).square().sum())
    pairs = Pairs(zoo, "train").draw(range(50))
    assert (pairs.metrics_star["reward"] > pairs.metrics["reward"]).all()


def test_runs_with_undefined_metrics_are_dropped(tasks, tmp_path):
    assert collect(tasks, tmp_path / "zoo", name="UNDEFINED").returncode == 0
    zoo = Zoo(tmp_path / "zoo")
    assert set(zoo.dropped.values()) == {"metrics that are not finite"}
    assert 0 < len(zoo) < 12
    for row, number in enumerate(zoo.runs.run):
        theta = zoo.theta([row] * 6, range(6))
        assert (theta[:, 0] <= 0).all()
        assert torch.equal(theta[0], open_task(f"{tasks}:TINY").initial(0, [int(number)])[0])
    assert zoo.metrics("test_loss").isfinite().all()


def test_the_task_may_also_be_named_by_an_option(tasks, tmp_path):
    done = command("collect", "--task", f"{tasks}:TINY", *OPTIONS, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["runs_by_split"] == {"train": 4, "validation": 4, "test": 4}
    assert plan["bytes"] == 12 * 6 * 32 * 4
    assert plan["minutes"] > 0


def test_ray_does_the_same_work(whole, tasks, tmp_path):
    pytest.importorskip("ray")
    done = processes(tasks, tmp_path / "zoo", "--engine", "ray", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "zoo") == shards(whole)


def test_ray_stopped_goes_on_to_the_same_zoo(slow, tasks, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "zoo"
    running = start_slowly(tasks, out, "--engine", "ray")
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    fails_with(subprocess.CompletedProcess([], running.returncode, "", errors), "interrupted; repeat the command", 143)
    assert len(Zoo(out)) >= 4
    assert collect(tasks, out, name="SLOW").returncode == 0
    assert shards(out) == shards(slow)


def test_the_page_about_own_tasks_is_true(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs/own-task.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert len(example.splitlines()) < 60
    (tmp_path / "spirals.py").write_text(example)
    line = re.search(r"triptych-gpt (collect spirals.py:SPIRALS .*)", page)[1]
    words = [*line.split(), "--runs", "5", "--cohort-runs", "5", "--checkpoints", "20"]
    monkeypatch.chdir(tmp_path)
    done = command(*words, "--engine", "here")
    assert done.returncode == 0, done.stderr
    zoo = Zoo(tmp_path / "runs/spirals")
    assert zoo.metrics("test_error")[:, -1].mean() < 0.2 < zoo.metrics("test_error")[:, 0].mean()


def test_splits_are_whole_cohorts_and_never_change():
    numbers = [split_of(cohort, 10) for cohort in range(30)]
    assert numbers.count("test") == numbers.count("validation") == 3
    assert {numbers[0], numbers[1], numbers[2]} == {"train", "test", "validation"}
    assert [list(runs) for _, runs in cohorts(3, 9, 4)] == [[3], [4, 5, 6, 7], [8]]


def _fail(unit: int, device: str) -> int:
    if unit == 2:
        raise OSError("no room")
    if unit == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return unit


def test_the_pool_passes_errors_on_and_notices_death():
    run = partial(workers.run, "local", _fail, preload=PRELOAD)
    assert sorted(run([0, 1], workers.devices(torch.device("cpu"), 2))) == [0, 1]
    with pytest.raises(OSError, match="no room"):
        list(run([2, 2], ["cpu"]))
    with pytest.raises(MemoryError, match="a worker process died"):
        list(run([3], ["cpu"]))
