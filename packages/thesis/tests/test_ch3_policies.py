"""Hand-designed optimisers of policies and films of them, against plain loops; which options fit a study of policies."""

import subprocess
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from triptych_common.testing import fails_with, run_here
from triptych_gpt.config import GptConfig
from triptych_gpt.presets import PRESETS
from triptych_gpt.tasks import Cohort
from triptych_gpt.tasks.reinforcement import CARTPOLE_SMALL, PpoSettings
from triptych_gpt.tasks.reinforcement.cartpole import Cartpole, CartpoleWorld
from triptych_gpt.tasks.reinforcement.ppo import clip_gradients, losses
from triptych_thesis import cli
from triptych_thesis.chapter3.experiments import film
from triptych_thesis.chapter3.hand_designed import OPTIMIZERS, PPO, optimise, optimise_with_all
from triptych_thesis.chapter3.sizes import SIZES
from triptych_thesis.chapter3.study import CLAIMS, Chapter3

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
TINY = PpoSettings(environments=6, steps=8, iterations=5, epochs=2, minibatches=2, learning_rate=3e-3)
TASK = replace(CARTPOLE_SMALL, ppo=TINY, episodes=2, world=CartpoleWorld(Cartpole(max_steps=60)))
TEST, VALIDATION = TASK.initial(1, range(2)).double(), TASK.initial(2, range(2)).double()
BOTH = torch.cat([TEST, VALIDATION])


def learner_of(task, place: int, seed: int):
    """The learner of one of BOTH alone, with its critic."""
    theta = BOTH[place : place + 1]
    return task.learner(Cohort(seed, 0, range(1)), [place], CPU, torch.float64, theta=theta)


def theta_of(learner) -> torch.Tensor:
    return torch.cat([learner.parameters[name].detach().flatten(1) for name in TASK.layout.names], 1)[0]


def by_hand(name: str, point, place: int, steps: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    """A policy after each of `steps`, trained alone: a rollout, the gradient of PPO's loss on all of it, clipped, torch's step."""
    learner = learner_of(TASK, place, seed)
    kind, fixed = OPTIMIZERS[name]
    optimizer = getattr(torch.optim, kind)(
        learner.trained, lr=point.learning_rate, weight_decay=point.weight_decay, **fixed
    )
    out = []
    for step in range(max(steps)):
        loss = losses(learner.policies, learner.parameters, learner.rollout(), TINY)
        gradients = [g.contiguous() for g in torch.autograd.grad(loss.sum(), learner.trained)]
        clip_gradients(gradients, TINY.max_grad_norm)
        for parameter, gradient in zip(learner.trained, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        learner.iteration += 1
        if step + 1 in steps:
            out.append(theta_of(learner))
    return out


@pytest.mark.parametrize("name", ["Nesterov", "Adam"])
def test_a_policys_step_is_torch_optims_on_the_gradient_of_ppos_objective(name):
    steps = (1, 3)
    curve = optimise(TASK, name, TEST, VALIDATION, "return", steps, seed=4)
    for place, found in enumerate(curve.tuned.T):
        expected = TASK.evaluate(torch.stack(by_hand(name, curve.grid[curve.chosen[-1]], place, steps, 4)))["return"]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for i in (5,):
        own = [by_hand(name, curve.grid[i], place, steps, 4) for place in (2, 3)]
        means = [TASK.evaluate(torch.stack(after))["return"].mean() for after in zip(*own, strict=True)]
        torch.testing.assert_close(curve.validation[i], torch.stack(means), rtol=1e-9, atol=1e-9)
    best = curve.validation.argmax(0)  # higher returns are better
    assert torch.equal(curve.validation[list(curve.chosen), [0, 1]], curve.validation[best, [0, 1]])


def test_ppos_steps_are_iterations_of_the_tasks_recipe():
    curve = optimise(TASK, PPO, TEST, VALIDATION[:1], "return", (1, 4), seed=4)
    assert curve.grid == ((TINY.learning_rate, 0.0),)
    for place, found in enumerate([*curve.tuned.T, curve.validation[0]]):
        learner, after = learner_of(TASK, place, 4), []
        for _ in range(4):
            learner.iterate()
            after.append(theta_of(learner))
        scored = TASK.evaluate(torch.stack([after[0], after[3]]))["return"]
        torch.testing.assert_close(found, scored, rtol=1e-9, atol=1e-9)


def test_every_optimiser_and_ppo_has_a_curve_and_other_tasks_have_none():
    quick = replace(TASK, ppo=replace(TINY, environments=2, steps=2), episodes=1)
    curves = optimise_with_all(quick, TEST[:1].float(), VALIDATION[:1].float(), "return")
    assert [curve.optimizer for curve in curves] == [*OPTIMIZERS, PPO]
    assert all(curve.better == "higher" for curve in curves)
    assert all(curve.tuned.isfinite().all() for curve in curves)
    with pytest.raises(ValueError, match="metric 'test_loss': task cartpole_small has return, train_return"):
        optimise(TASK, PPO, TEST, VALIDATION, "test_loss")


def test_a_films_episodes_are_those_that_are_scored():
    theta = torch.cat([TEST, 3 * TEST]).float()
    episodes = film.episodes_of(TASK, TASK.world, theta)
    rewards = [[TASK.world.cartpole.rewarded(states.T)[0].sum() for states in own] for own in episodes]
    torch.testing.assert_close(torch.tensor(rewards).mean(1), TASK.evaluate(theta)["return"], rtol=1e-4, atol=1e-4)
    first = torch.stack([own[0][0] for own in episodes])
    assert torch.equal(first, first[:1].expand_as(first))  # the same resets for every policy


def test_a_film_shows_each_policy_in_real_time():
    falls = [[0.1 * i, 0.04 * i * i] for i in range(7)]
    stands = [[0.0, 0.1]] * 60
    data = {"metric": "return", "steps": 60, "cartpole": vars(TASK.world.cartpole), "policies": [
        {"asked": None, "achieved": 5.0, "episodes": [falls, falls[:4]]}, {"asked": 500.0, "achieved": 480.0, "episodes": [stands]},
    ]}  # fmt: skip
    written = film.film(data)
    picture = Image.open(BytesIO(written), formats=["PNG"])
    assert picture.is_animated
    seconds = 0.0
    frames = []
    for i in range(picture.n_frames):
        picture.seek(i)
        seconds += picture.info["duration"] / 1000
        frames.append(np.asarray(picture.convert("RGB")))
    assert seconds == pytest.approx(60 * TASK.world.cartpole.dt, rel=0.03)
    above, below = (np.stack([frame[half, :, :] for frame in frames]) for half in (slice(140), slice(140, 280)))
    assert (above[0] != above[2]).any()
    assert (below == below[0]).all()
    assert film.film(data) == written


def test_the_thesiss_size_has_the_released_shape():
    train = SIZES["cartpole"]["paper"].train
    shape = PRESETS["cartpole"]
    built = GptConfig(
        shape.symmetry,
        train.tokenizer,
        train.chunk_size,
        train.width,
        train.depth,
        train.num_heads,
        scalars=train.scalars,
    )
    assert built == shape
    assert SIZES["cartpole"]["paper"].collect.runs == 50_026
    assert SIZES["cartpole"]["laptop"].collect.task == "cartpole_small"


def test_policies_and_classifiers_have_folders_and_claims_of_their_own(tmp_path):
    images, policies = Chapter3(out=tmp_path), Chapter3(out=tmp_path, task="cartpole")
    assert images.folder == tmp_path / "laptop"
    assert policies.folder == tmp_path / "cartpole/laptop"
    assert "film" in set(policies.offered) - set(images.offered)
    assert "filters" in set(images.offered) - set(policies.offered)
    assert policies.command == "triptych reproduce ch3 --size laptop --task cartpole --seed 0"
    assert policies.target == "reproduce-ch3 SIZE=laptop TASK=cartpole"
    assert "gpt.fig-3.6" not in CLAIMS  # of MNIST alone
    shown = subprocess.run(
        ["make", "-n", "reproduce-ch3", "SIZE=smoke", "TASK=cartpole"], capture_output=True, text=True, cwd=ROOT
    )
    assert "triptych reproduce ch3 --size smoke  --task cartpole" in shown.stdout


@pytest.mark.parametrize(("options", "line"), [
    (("--task", "mnit"), "task 'mnit': expected one of mnist, cartpole"),
    (("--task", "cartpole", "--size", "gpu-cifar10"), "size 'gpu-cifar10': expected one of smoke, laptop, gpu, paper"),
    (("--task", "cartpole", "--only", "filters"), "experiment 'filters': expected one of "),
    (("--only", "film"), "experiment 'film': expected one of "),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(options, line):
    fails_with(run_here(cli.run, "reproduce", "ch3", *options), line, status=2)
