"""Policies as tasks: the zoo, G.pt, anyone's environment, imports, and what is refused."""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from triptych_common.testing import descendants
from triptych_gpt.evaluation.prompted import measured
from triptych_gpt.prompting import OutsideTrainedRange, prompt
from triptych_gpt.settings import ImportConfig
from triptych_gpt.symmetry.spec import check_invariance, forward_of
from triptych_gpt.tasks import TASKS, open_task
from triptych_gpt.tasks.reinforcement import (
    CARTPOLE_SMALL,
    CartpoleWorld,
    GymnasiumWorld,
    PpoSettings,
    ReinforcementTask,
)
from triptych_gpt.tasks.reinforcement.policies import with_log_std
from triptych_gpt.train import train
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.trained import load
from triptych_gpt.zoo.collect import collect
from triptych_gpt.zoo.collect_config import CollectConfig
from triptych_gpt.zoo.importing import import_zoo
from triptych_gpt.zoo.zoo import Zoo

CPU = torch.device("cpu")
TINY_PPO = PpoSettings(environments=4, steps=8, iterations=6, epochs=1, minibatches=2, learning_rate=1e-2)


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# The task


@pytest.mark.parametrize("name", ["cartpole", "cartpole_small"])
def test_a_checkpoint_is_the_policy_alone_under_the_originals_names(name):
    task = TASKS[name]
    expected = {"log_std": (1,), "actor.0.weight": (32, 4), "actor.0.bias": (32,), "actor.2.weight": (32, 32),
                "actor.2.bias": (32,), "actor.4.weight": (1, 32), "actor.4.bias": (1,)}  # fmt: skip
    assert list(task.layout.shapes.items()) == list(expected.items())
    assert [(metric.name, metric.better) for metric in task.metrics] == [
        ("return", "higher"),
        ("train_return", "higher"),
    ]
    assert task.metrics[0].prompts.best == 500


def test_symmetry_is_derived_and_leaves_actions_as_they_are():
    task = CARTPOLE_SMALL
    assert task.symmetry.groups == {"actor.0": 32, "actor.2": 32}
    assert task.symmetry.axes["log_std"] == (None,)
    theta, inputs = task.initial(0, range(3)), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert check_invariance(forward_of(task.policies.policy), task.symmetry, theta, inputs) < 1e-12
    twins = task.symmetry.apply(theta.double(), task.symmetry.draw(0, range(3)))
    assert torch.allclose(task.evaluate(theta.double())["return"], task.evaluate(twins)["return"], rtol=1e-6)


def test_initial_policies_are_orthogonal():
    views = CARTPOLE_SMALL.layout.unflatten(CARTPOLE_SMALL.initial(3, [17])[0])
    hidden, last = views["actor.2.weight"], views["actor.4.weight"]
    assert torch.allclose(hidden @ hidden.T, 2 * torch.eye(32), atol=1e-5)
    assert float(last.norm()) == pytest.approx(0.01, rel=1e-4)
    assert views["log_std"].tolist() == [0]
    assert (views["actor.0.bias"] != 0).any()  # as PyTorch draws it
    xavier = CARTPOLE_SMALL.layout.unflatten(CARTPOLE_SMALL.initial(3, [17], "xavier_uniform")[0])
    assert (xavier["actor.0.bias"] == 0).all()
    assert xavier["log_std"].tolist() == [0]


def test_scores_do_not_depend_on_the_other_networks():
    theta = CARTPOLE_SMALL.initial(0, range(5)).double()
    theta[2] *= 1.5
    together, alone = CARTPOLE_SMALL.evaluate(theta), [CARTPOLE_SMALL.evaluate(row[None]) for row in theta]
    for name in ("return", "train_return"):
        assert torch.allclose(together[name], torch.cat([each[name] for each in alone]))
    assert list(together) == ["return", "train_return"]


def test_the_return_is_the_sum_of_an_episodes_rewards():
    task = replace(CARTPOLE_SMALL, episodes=3)
    theta = task.initial(0, range(1)).double()
    policy = task.policies.policy.double()
    policy.load_state_dict(task.layout.unflatten(theta[0]))
    environments = task.world.evaluation(1, 3, CPU, torch.float64)
    total, alive = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    step = environments.reset()
    for _ in range(500):
        total += torch.where(alive, step.reward[0], 0)
        alive &= ~(step.terminated | step.truncated)[0]
        with torch.no_grad():
            step = environments.step(policy(step.observation[0].T).T[None])
    assert float(task.evaluate(theta)["return"]) == pytest.approx(float(total.mean()))
    policy.float()


def test_networks_that_are_not_finite_have_no_return():
    theta = CARTPOLE_SMALL.initial(0, range(2))
    theta[1, 5] = torch.nan
    scores = measured(CARTPOLE_SMALL, theta)
    assert scores["return"].isnan().tolist() == [False, True]


def test_policies_of_other_shapes_are_refused_with_both():
    def task(network: nn.Module) -> ReinforcementTask:
        return ReinforcementTask("mine", CartpoleWorld(), lambda: network)

    with pytest.raises(ValueError, match=r"first weight is \(8, 3\), the environment has observations \(4,\)") as error:
        task(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))).layout  # noqa: B018
    one_line(error)
    with pytest.raises(ValueError, match=r"the network gives \(2,\), the environment needs .* outputs \(1,\)"):
        task(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))).layout  # noqa: B018
    with pytest.raises(ValueError, match=r"expected an nn\.Sequential ending in nn\.Linear, or give a critic"):
        task(nn.Sequential(nn.Linear(4, 1), nn.Tanh())).layout  # noqa: B018


def test_zero_evaluation_episodes_are_refused():
    with pytest.raises(ValueError, match="episodes 0: expected at least 1"):
        replace(CARTPOLE_SMALL, episodes=0)


# The zoo, and a G.pt of it

POLICIES = """
from dataclasses import replace
from triptych_gpt.tasks.reinforcement import CARTPOLE_SMALL, PpoSettings
PPO = PpoSettings(environments=4, steps=8, iterations=6, epochs=1, minibatches=2, learning_rate=1e-2)
TINY = replace(CARTPOLE_SMALL, name="tiny_cartpole", ppo=PPO, episodes=2)
SLOW = replace(TINY, name="slow_cartpole", ppo=replace(PPO, iterations=300))
"""


def collected(task: str, out: Path, **options: object) -> Zoo:
    small = {"runs": 9, "cohort_runs": 3, "checkpoints": 5, "split_every": 3, "engine": "here", "networks_at_once": 3}
    with quiet():
        collect(CollectConfig(task=task, out=out, **{**small, **options}))
    return Zoo(out)


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    (folder / "policies.py").write_text(POLICIES)
    collected(f"{folder / 'policies.py'}:TINY", folder / "zoo")
    return folder


def bytes_of(zoo: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((zoo / "shards").iterdir())}


def test_a_zoo_of_policies(policies):
    zoo = Zoo(policies / "zoo")
    assert zoo.better == {"return": "higher", "train_return": "higher"}
    assert zoo.splits == {"train": 3, "test": 3, "validation": 3}
    task = open_task(f"{policies / 'policies.py'}:TINY")
    theta = zoo.theta([4] * 5, range(5))
    assert torch.equal(theta[0], task.initial(0, [4])[0])
    assert torch.allclose(task.evaluate(theta)["return"], zoo.metrics("return")[4], rtol=1e-3)
    assert zoo.metrics("train_return").isfinite().all()
    assert zoo.steps[:, [0, -1]].tolist() == [[0, 6]] * 9
    assert zoo.index(["optimizer"]).column("optimizer").to_pylist()[0] == "Adam"


def test_other_processes_and_repairs_give_the_same_bytes(policies, tmp_path):
    task = f"{policies / 'policies.py'}:TINY"
    collected(task, tmp_path / "zoo", engine="local", workers=2)
    assert bytes_of(tmp_path / "zoo") == bytes_of(policies / "zoo")
    spoiled = sorted((tmp_path / "zoo" / "shards").glob("*.safetensors"))[1]
    spoiled.write_bytes(b"\0" * spoiled.stat().st_size)
    collected(task, tmp_path / "zoo", repair=True)
    assert bytes_of(tmp_path / "zoo") == bytes_of(policies / "zoo")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_worker_killed_in_mid_cohort_costs_its_cohort_alone(policies, tmp_path):
    words = ["collect", f"{policies / 'policies.py'}:SLOW", "--runs", "6", "--cohort-runs", "2", "--checkpoints", "5",
             "--networks-at-once", "2", "--workers", "1", "--out", str(tmp_path / "zoo")]  # fmt: skip
    running = subprocess.Popen([sys.executable, "-m", "triptych_gpt.cli", *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "zoo" / "shards").glob("*.parquet")):
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for pid in descendants(running.pid):
        with contextlib.suppress(OSError):
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "a worker process died" in errors
    assert "Traceback" not in errors
    options = {"runs": 6, "cohort_runs": 2, "networks_at_once": 2, "split_every": 10}
    assert 0 < len(Zoo(tmp_path / "zoo")) < 6
    for name in ("zoo", "whole"):
        collected(f"{policies / 'policies.py'}:SLOW", tmp_path / name, **options)
    assert bytes_of(tmp_path / "zoo") == bytes_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def gpt(policies) -> Path:
    with quiet():
        train(GptTrainConfig(
            zoo=policies / "zoo", task=f"{policies / 'policies.py'}:TINY", metric="return", out=policies / "gpt", width=80,
            depth=1, num_heads=2, batch_size=16, total_pairs=160, warmup_pairs=16, lr=1e-2, validation_every=0,
        ))  # fmt: skip
    return policies / "gpt"


def test_a_gpt_is_prompted_by_return(gpt, policies):
    trained = load(gpt, f"{policies / 'policies.py'}:TINY")
    assert (trained.metric, trained.better) == ("return", "higher")
    assert len(trained.model.tokenizer.ends) == 1  # weights between the hidden layers are edges
    policy = with_log_std(trained.task.network(), trained.task.world.actions)
    low, high = trained.trained_range
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = prompt(trained, policy, **{"return": (low + high) / 2})[0]
    policy.load_state_dict(answer.state_dict)
    assert answer.achieved.keys() == {"return", "train_return"}
    with pytest.warns(
        OutsideTrainedRange, match=r"target return=4321: outside .* the range of the training checkpoints"
    ):
        prompt(trained, policy, **{"return": 4321.0})


# Anyone's environment


@pytest.fixture(scope="module")
def control(tmp_path_factory) -> Path:
    """The tasks of docs/own-task.md, smaller."""
    pytest.importorskip("gymnasium")
    page = (Path(__file__).parents[3] / "docs/own-task.md").read_text()
    example = next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "GymnasiumWorld" in code)
    assert len(example.splitlines()) < 40
    smaller = {"environments=8": "environments=2", "steps=64": "steps=16", "iterations=50": "iterations=4"}
    for large, small in smaller.items():
        assert large in example
        example = example.replace(large, small)
    path = tmp_path_factory.mktemp("control") / "control.py"
    short = example.replace("episodes=4", "episodes=1").replace('"Pendulum-v1"', '"Pendulum-v1", max_episode_steps=20')
    path.write_text(short)
    return path


@pytest.mark.parametrize(("name", "size"), [("BALANCE", 114), ("SWING", 82)])
def test_the_page_about_own_environments_is_true(name, size, control, tmp_path):
    zoo = collected(f"{control}:{name}", tmp_path / "zoo", runs=4, cohort_runs=2, networks_at_once=2)
    assert zoo.layout.size == size
    assert ("log_std" in zoo.layout.shapes) == (name == "SWING")
    again = collected(f"{control}:{name}", tmp_path / "again", runs=4, cohort_runs=2, networks_at_once=2)
    assert bytes_of(zoo.path) == bytes_of(again.path)
    task = open_task(f"{control}:{name}")
    before, after = (zoo.theta([0], [place]) for place in (0, -1 % zoo.checkpoints))
    assert (before - after).abs().max() > 1e-3
    assert torch.allclose(task.evaluate(after)["return"], zoo.metrics("return")[0, -1:], rtol=1e-4)


def test_environments_and_bounds_are_the_environments_own():
    gymnasium = pytest.importorskip("gymnasium")
    world = GymnasiumWorld("CartPole-v1")
    batch = world.training(0, range(2), 3, CPU, torch.float64)
    theirs = [gymnasium.make("CartPole-v1") for _ in range(6)]
    observed = np.stack([env.reset(seed=int(seed))[0] for env, seed in zip(theirs, batch.seeds.flatten(), strict=True)])
    step, ended = batch.reset(), 0
    for t in range(30):
        assert np.array_equal(step.observation.transpose(1, 2).flatten(0, 1).numpy(), observed)
        actions = torch.full((2, 1, 3), t % 3 // 2)
        step = batch.step(actions)
        for i, env in enumerate(theirs):
            observed[i], reward, terminated, *_ = env.step(t % 3 // 2)
            assert float(step.reward.flatten()[i]) == reward
            assert bool(step.terminated.flatten()[i]) == terminated
            assert np.array_equal(step.final.transpose(1, 2).flatten(0, 1)[i].numpy(), observed[i])
            if terminated:
                observed[i], ended = env.reset()[0], ended + 1
    assert ended
    batch.keep(torch.tensor([1]))
    assert batch.step(actions[:1]).reward.shape == (1, 3)
    world.process.stop()


BROKEN = """
import os, time
import gymnasium
import numpy as np
from torch import nn
from triptych_gpt.tasks.reinforcement import GymnasiumWorld, PpoSettings, ReinforcementTask

class Env(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    how, steps = "", 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        Env.steps += 1
        if Env.steps == 150 and not os.path.exists(MARK):
            if self.how == "raise":
                raise RuntimeError("the motor is on fire\\nand so on")
            if self.how == "hang":
                time.sleep(60)
            if self.how == "die":
                os._exit(7)
        reward = float("nan") if self.how == "nan" else 1.0
        return np.full(2, 0.1, dtype=np.float32), reward, Env.steps % 5 == 0, False, {}

    def __str__(self):
        return "Env"

def make_raise():
    env = Env()
    Env.how = "raise"
    return env

def make_hang():
    env = Env()
    Env.how = "hang"
    return env

def make_die():
    env = Env()
    Env.how = "die"
    return env

def make_nan():
    env = Env()
    Env.how = "nan"
    return env

class Dictionary(Env):
    observation_space = gymnasium.spaces.Dict(a=gymnasium.spaces.Box(-1, 1, (2,)))

class Several(Env):
    action_space = gymnasium.spaces.MultiDiscrete([2, 2])

def network():
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))

PPO = PpoSettings(environments=2, steps=4, iterations=5, epochs=1, minibatches=1, squared_std=False)

def task(environment, timeout=30.0):
    return ReinforcementTask("broken", GymnasiumWorld(environment, episode_steps=10, timeout=timeout), network, PPO, episodes=1)

RAISE, DIE, NAN = task(make_raise), task(make_die), task(make_nan)
HANG = task(make_hang, 4.0)
DICT, SEVERAL, UNKNOWN = task(Dictionary), task(Several), task("Cartpoole-v3")
"""


@pytest.fixture
def broken(tmp_path) -> Path:
    pytest.importorskip("gymnasium")
    path = tmp_path / "broken.py"
    path.write_text(f"MARK = {str(tmp_path / 'mended')!r}\n{BROKEN}")
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RAISE", r"environment .*make_raise: step fails \(RuntimeError: the motor is on fire and so on\)"),
        ("HANG", r"environment .*make_hang: no answer to a step within 4 s; it hangs, or raise the world's timeout"),
        ("DIE", r"environment .*make_die: its process ended during a step; was it killed\?"),
    ],
)
def test_environments_that_fail_in_mid_rollout_are_one_line_and_lose_nothing(name, message, broken, tmp_path):
    options = {"runs": 4, "cohort_runs": 2, "checkpoints": 3, "networks_at_once": 2}
    with pytest.raises(ValueError, match=message) as error:
        collected(f"{broken}:{name}", tmp_path / "zoo", **options)
    one_line(error)
    (tmp_path / "mended").touch()
    zoo = collected(f"{broken}:{name}", tmp_path / "zoo", **options)
    whole = collected(f"{broken}:{name}", tmp_path / "whole", **options)
    assert bytes_of(zoo.path) == bytes_of(whole.path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DICT", r"observations are Dict\(.*expected a Box; wrap it, such as in gymnasium.wrappers.FlattenObservation"),
        ("SEVERAL", r"actions are MultiDiscrete\(.*expected a Box or Discrete"),
        ("UNKNOWN", r"environment Cartpoole-v3: make fails \(.*Cartpoole"),
        ("NAN", r"environment .*make_nan: a reward of nan in a step; make it finite, or clip it"),
    ],
)
def test_environments_that_do_not_fit_are_one_line(name, message, broken, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        collected(f"{broken}:{name}", tmp_path / "zoo", runs=2, cohort_runs=2, checkpoints=3, networks_at_once=2)
    one_line(error)


def test_a_run_that_diverged_does_not_end_the_others():
    pytest.importorskip("gymnasium")
    world = GymnasiumWorld("Pendulum-v1")
    batch = world.training(0, range(2), 1, CPU, torch.float32)
    batch.reset()
    step = batch.step(torch.tensor([[[torch.nan]], [[99.0]]]))
    assert step.observation.isfinite().all()
    world.process.stop()


def test_a_killed_process_of_environments_is_noticed():
    pytest.importorskip("gymnasium")
    world = GymnasiumWorld("CartPole-v1")
    batch = world.training(0, range(1), 1, CPU, torch.float32)
    batch.reset()
    os.kill(world.process._started[0].pid, signal.SIGKILL)
    world.process._started[0].join()
    with pytest.raises(ValueError, match="its process ended"):
        batch.step(torch.zeros(1, 1, 1, dtype=torch.long))
    assert batch.reset().observation.shape == (1, 4, 1)  # another one is started
    world.process.stop()


def test_without_gymnasium_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install 'triptych-gpt\[rl\]'"):
        GymnasiumWorld("CartPole-v1").observations  # noqa: B018


# Imports


def test_released_policies_come_in(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    layout, steps = TASKS["cartpole"].layout, [0, 7, 500]
    sizes = np.array([span.stop - span.start for span in layout.spans.values()], dtype=np.float32)
    assert sizes.tolist() == [1, 128, 32, 1024, 32, 32, 1]
    theta = {run: torch.randn(3, 1250, generator=torch.Generator().manual_seed(run)) for run in (0, 1)}
    for run in theta:
        folder, name = tmp_path / "data" / f"{run:06d}", f"{run:06d}"
        folder.mkdir(parents=True)
        keys = [f"{name}/it{step:05d}.pt" for step in steps]
        with lmdb.open(str(folder), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
            for key, row in zip(keys, theta[run], strict=True):
                transaction.put(key.encode(), row.numpy().tobytes())
                transaction.put(f"{key}_arch".encode(), sizes.tobytes())
        listed = {key: {"train_ret": 10.0 * run + place} for place, key in enumerate(keys)}
        (folder / "runs.json").write_text(json.dumps({"checkpoints": listed, "metadata": {}}))
        (folder / "DONE.txt").touch()
    config = ImportConfig(lmdb=tmp_path / "data", out=tmp_path / "zoo", task="cartpole", num_test_runs=1, checkpoints=3)
    with quiet():
        import_zoo(config)
    zoo = Zoo(tmp_path / "zoo")
    assert zoo.better == {"train_return": "higher"}
    assert zoo.steps.tolist() == [steps] * 2
    assert zoo.metrics("train_return").tolist() == [[0, 1, 2], [10, 11, 12]]
    assert torch.equal(zoo.theta([1, 1], [0, 2]), theta[1][[0, 2]])


CONTROL = """
from torch import nn
from triptych_gpt.tasks.reinforcement import GymnasiumWorld, ReinforcementTask

def network():
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))

SWING = ReinforcementTask("swing", GymnasiumWorld("Pendulum-v1", {"max_episode_steps": 20}), network, episodes=1)
"""


@pytest.fixture(scope="module")
def sb3_runs(tmp_path_factory) -> Path:
    sb3 = pytest.importorskip("stable_baselines3")
    folder = tmp_path_factory.mktemp("sb3")
    for run in range(3):
        model = sb3.PPO(
            "MlpPolicy", "Pendulum-v1", n_steps=4, batch_size=4, seed=run, policy_kwargs={"net_arch": [6, 6]}
        )
        for steps in (0, 40, 200):
            with torch.no_grad():
                model.policy.log_std.fill_(steps / 1000 - run)
            (folder / "runs" / f"run{run}").mkdir(parents=True, exist_ok=True)
            model.save(folder / "runs" / f"run{run}" / f"rl_model_{steps}_steps.zip")
    (folder / "control.py").write_text(CONTROL)
    return folder


def sb3_config(folder: Path, out: Path, **options: object) -> ImportConfig:
    settings = {"task": f"{folder / 'control.py'}:SWING", "num_test_runs": 1, "checkpoints": 3, **options}
    return ImportConfig(sb3=folder / "runs", out=out, **settings)


def test_stable_baselines_policies_come_in_as_runs(sb3_runs, tmp_path):
    import stable_baselines3 as sb3

    with quiet():
        import_zoo(sb3_config(sb3_runs, tmp_path / "zoo"))
    zoo = Zoo(tmp_path / "zoo")
    assert zoo.steps.tolist() == [[0, 40, 200]] * 3
    assert zoo.splits == {"train": 2, "test": 1}
    task = open_task(f"{sb3_runs / 'control.py'}:SWING")
    theta = zoo.theta([1], [2])
    assert float(theta[0, 0]) == pytest.approx(0.2 - 1)
    policy = task.policies.policy
    policy.load_state_dict(task.layout.unflatten(theta[0]))
    model = sb3.PPO.load(sb3_runs / "runs/run1/rl_model_200_steps.zip")
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    with torch.no_grad():
        ours = policy(torch.from_numpy(observations)).numpy()
    assert np.allclose(ours, model.predict(observations, deterministic=True)[0].clip(-2, 2), atol=1e-6)
    assert float(zoo.metrics("return")[1, 2]) == pytest.approx(float(task.evaluate(theta)["return"]), rel=1e-4)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_of_an_archive_is_unpickled(sb3_runs, tmp_path):
    runs = tmp_path / "runs"
    source = next((sb3_runs / "runs" / "run0").glob("*_0_steps.zip"))
    (tmp_path / "control.py").write_text(CONTROL)

    def archive(policy: bytes, data: bytes = b"{}") -> None:
        (runs / "a").mkdir(parents=True, exist_ok=True)
        for place in range(2):
            with zipfile.ZipFile(runs / "a" / f"m_{place}_steps.zip", "w") as out:
                out.writestr("policy.pth", policy)
                out.writestr("data", data)

    config = sb3_config(tmp_path, tmp_path / "zoo", num_test_runs=0, checkpoints=2)
    evil = pickle.dumps(Evil(tmp_path / "ran"))
    for content in (evil, b"", b"PK nothing"):
        archive(content)
        with pytest.raises(ValueError, match=r"policy\.pth: truncated, or neither") as error:
            import_zoo(config)
        one_line(error)
    with zipfile.ZipFile(source) as whole:
        archive(whole.read("policy.pth"), evil)
    with quiet():
        import_zoo(config)  # what else the archive holds is not opened
    assert not (tmp_path / "ran").exists()


def policy(runs: Path, change: Callable[[dict], dict], packing: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive again with another policy."""
    path = runs / "run0" / "rl_model_0_steps.zip"
    with zipfile.ZipFile(path) as whole:
        state = torch.load(io.BytesIO(whole.read("policy.pth")), weights_only=True)
    torch.save(change(state), content := io.BytesIO())
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("policy.pth", content.getvalue())
    return path


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200:204] = bytes(byte ^ 255 for byte in content[200:204])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda runs: policy(runs, lambda state: {**state, "more": torch.zeros(30_000_000)}, zipfile.ZIP_DEFLATED),
            r"policy\.pth of 120,[\d,]+ bytes, expected at most",
        ),
        (lambda runs: damage(policy(runs, dict, zipfile.ZIP_LZMA)), "damaged, or not an archive"),
        (lambda runs: damage(policy(runs, dict, zipfile.ZIP_DEFLATED)), "damaged, or not an archive"),
        (lambda runs: policy(runs, lambda state: {**state, 0: torch.zeros(1)}), "no state dict"),
        (
            lambda runs: policy(runs, lambda state: {name: x.cfloat() for name, x in state.items()}),
            "is torch.complex64, expected floating-point numbers",
        ),
        (lambda runs: (runs / "run0").rename(os.fsdecode(bytes(runs) + b"/run\xff")), "is not UTF-8; rename it"),
        (
            lambda runs: (runs / "run0" / "rl_model_0_steps.zip").write_bytes(b"PK"),
            "not an archive of stable-baselines3",
        ),
        (lambda runs: (runs / "run0" / "x.zip").touch(), "no number of steps in its name"),
        (lambda runs: (runs / "run0" / "again_40_steps.zip").touch(), "40 steps, as another one"),
    ],
)
def test_damaged_archives_are_one_line(spoil, message, sb3_runs, tmp_path):
    shutil.copytree(sb3_runs, tmp_path / "copy")
    spoil(tmp_path / "copy" / "runs")
    with pytest.raises(ValueError, match=message) as error, quiet():
        import_zoo(sb3_config(tmp_path / "copy", tmp_path / "zoo"))
    one_line(error)


def test_archives_of_other_networks_are_refused_with_both_shapes(sb3_runs, tmp_path):
    with pytest.raises(ValueError, match=r"a policy of shapes .*\(6, 3\).*the task's has .*\(32, 4\)"), quiet():
        import_zoo(sb3_config(sb3_runs, tmp_path / "zoo", task="cartpole_small"))
    shutil.copytree(sb3_runs, tmp_path / "copy")
    for path in (tmp_path / "copy" / "runs").glob("*/*[1-9]*_steps.zip"):
        path.unlink()
    with pytest.raises(ValueError, match="checkpoints 1: expected 2 or more"):
        import_zoo(sb3_config(tmp_path / "copy", tmp_path / "zoo", checkpoints=None))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        import_zoo(ImportConfig(sb3=tmp_path / "absent", out=tmp_path / "zoo"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no runs; expected a folder for each"):
        import_zoo(ImportConfig(sb3=tmp_path / "empty", out=tmp_path / "zoo"))
