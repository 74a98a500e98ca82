"""The simulator-free cartpole: physics against other derivations, the order of steps, and its gymnasium interfaces."""

import math
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from triptych_common.randomness import stream_keys
from triptych_gpt.tasks.reinforcement import Cartpole, CartpoleBatch, CartpoleWorld

SWINGING = replace(Cartpole(), cart_damping=0.3, pole_damping=0.05)


def test_accelerations_are_those_of_sympys_lagrangian():
    import sympy as sp

    t, force, b, c = sp.symbols("t F b c")
    x, theta = sp.Function("x")(t), sp.Function("theta")(t)
    pole = SWINGING
    centre = sp.Matrix([x + pole.pole_centre * sp.sin(theta), pole.pole_centre * sp.cos(theta)])
    speed = centre.diff(t)
    kinetic = (
        pole.cart_mass * x.diff(t) ** 2 + pole.pole_mass * speed.dot(speed) + pole.pole_inertia * theta.diff(t) ** 2
    ) / 2
    lagrangian = kinetic - pole.pole_mass * pole.gravity * centre[1]
    pushes = (force - b * x.diff(t), -c * theta.diff(t))
    equations = [
        lagrangian.diff(q.diff(t)).diff(t) - lagrangian.diff(q) - push
        for q, push in zip((x, theta), pushes, strict=True)
    ]
    solved = sp.solve(equations, [x.diff(t, 2), theta.diff(t, 2)])
    rng = np.random.default_rng(0)
    for _ in range(5):
        angle, x_dot, theta_dot, push = rng.uniform(-2, 2, 4)
        at = {x.diff(t): x_dot, theta.diff(t): theta_dot, force: push, b: pole.cart_damping, c: pole.pole_damping}
        expected = [float(solved[q.diff(t, 2)].subs(at).subs(theta, angle)) for q in (x, theta)]
        assert pole.accelerations(angle, x_dot, theta_dot, push, math.sin, math.cos) == pytest.approx(
            expected, rel=1e-9
        )


def integrated(cartpole: Cartpole, state: list[float], action: float, seconds: float) -> np.ndarray:
    """The state later on by an integrator of order 8, from the same equations."""
    from scipy.integrate import solve_ivp

    def rate(_: float, y: np.ndarray) -> list[float]:
        force = action * cartpole.max_force
        x_acc, theta_acc = cartpole.accelerations(y[2], y[1], y[3], force, math.sin, math.cos)
        return [y[1], x_acc, y[3], theta_acc]

    return solve_ivp(rate, (0, seconds), state, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]


def test_steps_converge_to_the_solution_with_order_one():
    start, action, seconds = [0.05, -0.2, 0.08, 0.1], 0.01, 0.332
    expected = torch.from_numpy(integrated(SWINGING, start, action, seconds))
    errors = []
    for substeps in (2, 4, 8, 16, 32):
        cartpole, state = replace(SWINGING, substeps=substeps), torch.tensor(start, dtype=torch.float64)
        for _ in range(round(seconds / cartpole.dt)):
            state = cartpole.advanced(state, torch.tensor(action, dtype=torch.float64))
        errors.append(float((state - expected).norm()))
    ratios = [a / b for a, b in pairwise(errors)]
    assert ratios == pytest.approx([2] * 4, rel=0.1), errors
    assert errors[-1] < 0.01


def test_energy_is_kept_without_damping_and_control():
    worst = []
    for substeps in (4, 8, 16):
        cartpole = replace(Cartpole(), substeps=substeps)
        state = torch.tensor([0.0, 0.2, math.pi - 0.5, 0.3], dtype=torch.float64)  # swings about its hanging position
        before, change = cartpole.energy(state), 0.0
        for _ in range(240):  # 4 s
            state = cartpole.advanced(state, torch.zeros((), dtype=torch.float64))
            change = max(change, float((cartpole.energy(state) - before).abs()))
        worst.append(change)
    assert worst[0] / worst[1] == pytest.approx(2, rel=0.2)
    assert worst[1] / worst[2] == pytest.approx(2, rel=0.2)
    assert worst[2] < 0.05


def test_damping_takes_energy():
    state = torch.tensor([0.0, 0.2, math.pi - 0.5, 0.3], dtype=torch.float64)
    before = SWINGING.energy(state)
    for _ in range(100):
        state = SWINGING.advanced(state, torch.zeros((), dtype=torch.float64))
    assert SWINGING.energy(state) < before - 0.1


def test_rewards_and_failures_are_those_of_the_original():
    states = torch.tensor(
        [[0, 2.0, 0.1, -3.0], [3.1, 0, 0, 0], [0, 0, 1.6, 0], [-2.9, 0, -1.5, 0]], dtype=torch.float64
    )
    reward, failed = Cartpole().rewarded(states.T)
    assert reward.tolist() == pytest.approx([1 - 0.01 - 0.02 - 0.015, -2, -2, 1 - 2.25])
    assert failed.tolist() == [False, True, True, False]
    assert Cartpole().observed(torch.tensor([7.0, -9.0, 1.0, 5.0])).tolist() == [5, -5, -1, -5]


def test_observed_angles_turn_as_the_originals_joint_does():
    """Its rails point along y and its pole turns about x, so that a positive angle leans towards negative y."""
    from scipy.spatial.transform import Rotation

    rails, joint, upright = np.eye(3)[[1, 0, 2]]
    lean = 0.3  # towards positive positions on the rails
    angle = float(Cartpole().observed(torch.tensor([0.0, 0.0, lean, 0.0], dtype=torch.float64))[2])
    pole = Rotation.from_rotvec(angle * joint).apply(upright)
    assert pole @ rails == pytest.approx(math.sin(lean))
    # In our own description of the robot for Isaac Gym, positions are along x and the state's angle turns about y.
    assert Rotation.from_rotvec(lean * np.eye(3)[1]).apply(upright)[0] == pytest.approx(math.sin(lean))


def batch(runs: int = 3, environments: int = 4, **options: object) -> CartpoleBatch:
    keys = stream_keys(7, [f"cartpole/{run}" for run in range(runs)])
    return CartpoleBatch(Cartpole(), keys, environments, dtype=torch.float64, **options)


def noise(steps: int, *shape: int) -> torch.Tensor:
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
def test_a_batch_equals_its_policies_alone_bit_for_bit(autoreset):
    together, actions = batch(autoreset=autoreset), noise(150, 3, 1, 4)
    keys = together.keys
    alone = [CartpoleBatch(Cartpole(), keys[i : i + 1], 4, dtype=torch.float64, autoreset=autoreset) for i in range(3)]
    steps = [together.reset()], [[each.reset()] for each in alone]
    for action in actions:
        steps[0].append(together.step(action))
        for i, each in enumerate(alone):
            steps[1][i].append(each.step(action[i : i + 1]))
    ends = 0
    for t, step in enumerate(steps[0]):
        ends += int(step.terminated.sum())
        for i in range(3):
            assert all(torch.equal(a[i], b[0]) for a, b in zip(step, steps[1][i][t], strict=True))
    assert ends > 20  # so that resets are compared, too


def test_the_step_after_a_failure_starts_the_next_episode():
    cartpoles = batch(1, 1)
    cartpoles.reset()
    push = torch.ones(1, 1, 1, dtype=torch.float64)
    while not (step := cartpoles.step(push)).terminated:
        assert step.reward <= 1
    assert step.reward == -2
    after = cartpoles.step(push)
    assert after.observation.abs().max() <= 0.25  # whatever the action
    assert not after.terminated
    assert after.reward > 0.9


def test_an_episode_counts_five_hundred_states():
    # A pole that hangs never falls, if a right angle is no failure: nearly weightless, it stays where it is.
    still = replace(Cartpole(), gravity=1e-9, reset_velocity=0.0, reset_position=1e-3)
    cartpoles = CartpoleBatch(still, stream_keys(0, ["a"]), 2)
    rewards = [cartpoles.reset().reward]
    zero = torch.zeros(1, 1, 2)
    while not (step := cartpoles.step(zero)).truncated.any():
        rewards.append(step.reward)
    assert len(rewards) + 1 == 500
    assert step.truncated.all()
    assert not step.terminated.any()


def test_evaluation_starts_alike_for_every_network_and_networks_can_leave():
    world = CartpoleWorld()
    some = world.evaluation(5, 3, torch.device("cpu"), torch.float64)
    first = some.reset().observation
    assert (first == first[:1]).all()
    assert len(first[0].unique()) == 12
    some.keep(torch.tensor([4, 1]))
    assert some.step(torch.zeros(2, 1, 3, dtype=torch.float64)).reward.shape == (2, 3)


def test_float32_and_float64_start_alike():
    states = [
        CartpoleBatch(Cartpole(), stream_keys(1, ["a"]), 64, dtype=dtype).reset()
        for dtype in (torch.float32, torch.float64)
    ]
    assert torch.allclose(states[0].observation.double(), states[1].observation, atol=1e-7)


# gymnasium


def test_the_environment_passes_gymnasiums_checks():
    import gymnasium
    from gymnasium.utils.env_checker import check_env
    from triptych_gpt.tasks.reinforcement import gymnasium_cartpole  # noqa: F401 - registers it

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("triptych/Cartpole-v0", render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_the_vector_environment_equals_single_ones_bit_for_bit(mode):
    import gymnasium
    from triptych_gpt.tasks.reinforcement import gymnasium_cartpole  # noqa: F401 - registers it

    ours = gymnasium.make_vec("triptych/Cartpole-v0", 4, autoreset_mode=mode)
    assert type(ours.unwrapped).__name__ == "CartpoleVectorEnv"
    make = [lambda: gymnasium.make("triptych/Cartpole-v0")] * 4
    theirs = gymnasium.vector.SyncVectorEnv(make, autoreset_mode=mode)
    assert np.array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    rng, ends = np.random.default_rng(0), 0
    for _ in range(120):
        actions = rng.uniform(-1, 1, (4, 1)).astype(np.float32)
        found, expected = ours.step(actions), theirs.step(actions)
        for a, b in zip(found[:4], expected[:4], strict=True):
            assert np.array_equal(a, b)
        ends += int(found[2].sum())
        assert found[4].keys() == expected[4].keys()
        for i in np.nonzero(found[4].get("_final_obs", []))[0]:
            assert np.array_equal(found[4]["final_obs"][i], expected[4]["final_obs"][i])
    assert ends > 10


def test_gymnasium_finds_the_environment_by_its_module():
    """In a fresh process, without any import of ours; registering loads no torch."""
    module = "triptych_gpt.tasks.reinforcement.registration"
    code = f"""
import sys, gymnasium
many = gymnasium.make_vec("{module}:triptych/Cartpole-v0", 3)
print(type(many.unwrapped).__name__, gymnasium.make("triptych/Cartpole-v0").reset(seed=0)[0].shape)
"""
    alone = f"import {module}, sys; assert 'torch' not in sys.modules"
    for text, printed in ((code, "CartpoleVectorEnv (4,)"), (alone, "")):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, printed), done.stderr


def test_pictures_move_with_the_state():
    from triptych_gpt.tasks.reinforcement.gymnasium_cartpole import CartpoleVectorEnv, drawn

    upright, leaning = (drawn([0.0, 0, angle, 0], Cartpole()) for angle in (0.0, 0.5))
    assert upright.shape == (400, 600, 3)
    assert upright.dtype == np.uint8
    assert np.array_equal(upright, upright[:, ::-1]) or (upright != upright[:, ::-1]).mean() < 0.01
    red = (leaning[..., 0] > 150) & (leaning[..., 1] < 140)
    assert np.nonzero(red)[1].mean() > 310  # leans towards positive x
    environments = CartpoleVectorEnv(2, render_mode="rgb_array")
    environments.reset(seed=0)
    assert len(environments.render()) == 2


def test_wrong_modes_are_one_line():
    from triptych_gpt.tasks.reinforcement.gymnasium_cartpole import CartpoleEnv, CartpoleVectorEnv

    with pytest.raises(ValueError, match="render_mode 'human': expected rgb_array"):
        CartpoleEnv(render_mode="human")
    with pytest.raises(ValueError, match="expected NEXT_STEP or SAME_STEP"):
        CartpoleVectorEnv(2, autoreset_mode="Disabled")
    with pytest.raises(ValueError, match=r"pole_inertia -1\.0: expected a number of at least 0"):
        Cartpole(pole_inertia=-1.0)


def test_stable_baselines_steps_the_vector_environment():
    pytest.importorskip("stable_baselines3")
    import gymnasium
    from triptych_gpt.tasks.reinforcement.sb3 import Sb3VecEnv

    ours = Sb3VecEnv(gymnasium.make_vec("triptych/Cartpole-v0", 3, autoreset_mode="SameStep"))
    ours.seed(5)
    same = gymnasium.make_vec("triptych/Cartpole-v0", 3, autoreset_mode="SameStep")
    assert np.array_equal(ours.reset(), same.reset(seed=5)[0])
    ended = 0
    for _ in range(60):
        actions = np.ones((3, 1), dtype=np.float32)
        observed, rewards, done, infos = ours.step(actions)
        expected = same.step(actions)
        assert np.array_equal(observed, expected[0])
        assert rewards.dtype == np.float32
        for i in np.nonzero(done)[0]:
            assert np.array_equal(infos[i]["terminal_observation"], expected[4]["final_obs"][i])
            assert infos[i]["TimeLimit.truncated"] is False
            ended += 1
    assert ended
    with pytest.raises(ValueError, match="stable-baselines3 needs"):
        Sb3VecEnv(gymnasium.make_vec("triptych/Cartpole-v0", 3))


MYPY_INI = """
[mypy]
follow_imports = skip
ignore_missing_imports = True
[mypy-jaxtyping.*]
follow_imports = silent
[mypy-isaacgym.*]
follow_imports = normal
ignore_errors = True
"""


def test_the_isaac_adapter_fits_the_types_of_isaac_gym(tmp_path):
    """The stubs name two properties `lambda`, which no parser takes; the type checker sees a copy without."""
    api = pytest.importorskip("mypy.api")
    from importlib.metadata import PackageNotFoundError, distribution

    import triptych_gpt

    try:
        files = {Path(str(file)).name: Path(str(file.locate())) for file in distribution("isaacgym-stubs").files or ()}
    except PackageNotFoundError:
        pytest.skip("isaacgym-stubs is not installed")
    stub = files["gymapi.pyi"].read_text()
    package = tmp_path / "isaacgym"
    package.mkdir()
    (package / "__init__.pyi").touch()
    (package / "gymapi.pyi").write_text(re.sub(r"\blambda\b", "lambda_", stub))
    (tmp_path / "mypy.ini").write_text(MYPY_INI)
    source = Path(triptych_gpt.__file__).parent / "tasks" / "reinforcement" / "isaac.py"

    def checked(text: str) -> str:
        (tmp_path / "adapter.py").write_text(text)
        options = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
        return api.run([*options, str(tmp_path / "adapter.py")])[0]

    text = source.read_text()
    assert "Success" in checked(text)
    assert "has no attribute" in checked(text.replace("gym.simulate(", "gym.simulated("))  # so the stubs are seen


def test_the_isaac_description_is_the_cartpole():
    import types
    import xml.etree.ElementTree as ET
    from unittest.mock import patch

    fake = {name: types.ModuleType(name) for name in ("isaacgym", "isaacgym.gymapi", "isaacgym.gymtorch")}
    fake["isaacgym"].gymapi = fake["isaacgym.gymapi"]
    fake["isaacgym.gymapi"].Sim = object
    with patch.dict(sys.modules, fake):
        from triptych_gpt.tasks.reinforcement.isaac import urdf
    robot = ET.fromstring(urdf(Cartpole()))
    inertial = {link.get("name"): link.find("inertial") for link in robot.iter("link")}
    assert float(inertial["pole"].find("mass").get("value")) == 1
    assert float(inertial["pole"].find("inertia").get("iyy")) == pytest.approx(0.0836, abs=1e-4)
    assert inertial["pole"].find("origin").get("xyz") == "0 0 0.47"
    assert [joint.find("axis").get("xyz") for joint in robot.iter("joint")] == ["1 0 0", "0 1 0"]
