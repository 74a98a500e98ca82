"""Policies: steps of many environments with their policies in the loop, and updates of many policies by PPO, in one process.

"stepping": the thesis's environments of some policies, 64 x 512. Ours acts with each environment's own policy ("policies"), also
keeps what PPO needs, with values and advantages ("rollout"), or only steps ("environments alone"); beside gymnasium's own
SyncVectorEnv of CartPole-v1 without a policy, and the rollout of one stable-baselines3 policy in our environment.
"updates": one step of Adam on a minibatch of each policy, of the thesis's size or of `cartpole_small`'s; by stable-baselines3's
`train` for one policy, by ours for one and for many. "iteration": rollout, updates and all between, as `collect` does them.
"scoring": `return` of some policies, as untrained.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn
from triptych_common.throughput import keep_freed_memory
from triptych_gpt.tasks import Cohort
from triptych_gpt.tasks.reinforcement import CARTPOLE, CARTPOLE_SMALL, ReinforcementTask
from triptych_gpt.tasks.reinforcement.ppo import Learner

from benchmarks.runner import Job

NO_SB3 = None if find_spec("stable_baselines3") else "no stable-baselines3 here: pip install 'triptych-gpt[rl,sb3]'"


@dataclass(frozen=True)
class Size:
    """policies: together, with so many environments each. small: policies of `cartpole_small`'s size."""

    policies: int = 64
    environments: int = 512
    small: int = 64
    steps: int = 16
    device: str = "cpu"
    repeats: int = 5


def learner_of(task: ReinforcementTask, policies: int, device: str, seed: int) -> Learner:
    keep_freed_memory()  # as in the processes of `collect`
    cohort = Cohort(seed, 0, range(policies), 2)
    return task.learner(cohort, cohort.runs, torch.device(device))


def environments_alone(task: ReinforcementTask, size: Size) -> Callable[[int], Callable[[], None]]:
    def prepare(seed: int) -> Callable[[], None]:
        environments = learner_of(task, size.policies, size.device, seed).environments
        actions = torch.zeros(size.policies, 1, size.environments, device=size.device)

        def step() -> None:
            for _ in range(size.steps):
                environments.step(actions)

        return step

    return prepare


def acting(task: ReinforcementTask, size: Size) -> Callable[[int], Callable[[], None]]:
    def prepare(seed: int) -> Callable[[], None]:
        learner = learner_of(task, size.policies, size.device, seed)
        policies, observation, count = learner.policies, learner.observation, 0

        @torch.no_grad()
        def step() -> None:
            nonlocal observation, count
            for _ in range(size.steps):
                outputs = policies.outputs(learner.parameters, observation)
                actions = policies.sampled(learner.parameters, outputs, learner.keys, count)
                observation, count = learner.environments.step(actions).observation, count + 1

        return step

    return prepare


def rollout(task: ReinforcementTask, policies: int, device: str) -> Callable[[int], Callable[[], object]]:
    return lambda seed: learner_of(task, policies, device, seed).rollout


def updates(task: ReinforcementTask, policies: int, device: str) -> Callable[[int], Callable[[], object]]:
    def prepare(seed: int) -> Callable[[], object]:
        learner = learner_of(task, policies, device, seed)
        batch = next(learner._minibatches(learner.rollout(), 0))
        return lambda: learner.update(batch)

    return prepare


def iteration(task: ReinforcementTask, policies: int, device: str) -> Callable[[int], Callable[[], None]]:
    return lambda seed: learner_of(task, policies, device, seed).iterate


def scoring(task: ReinforcementTask, policies: int, device: str) -> Callable[[int], Callable[[], object]]:
    def prepare(seed: int) -> Callable[[], object]:
        theta = task.initial(seed, range(policies)).to(device)
        return lambda: task.evaluate(theta)["return"].cpu()

    return prepare


def sync_vector(size: Size) -> Callable[[int], Callable[[], None]]:
    def prepare(seed: int) -> Callable[[], None]:
        import gymnasium

        made = [lambda: gymnasium.make("CartPole-v1")] * size.environments
        environments = gymnasium.vector.SyncVectorEnv(made)
        environments.reset(seed=seed)
        actions = np.random.default_rng(seed).integers(2, size=(size.steps, size.environments))

        def step() -> None:
            for action in actions:
                environments.step(action)

        return step

    return prepare


def sb3_policy(task: ReinforcementTask, device: str, seed: int, epochs: int = 1) -> Any:
    """Their PPO with the task's settings, in our environment; so many epochs in a call of `train`."""
    import gymnasium
    from stable_baselines3 import PPO
    from triptych_gpt.tasks.reinforcement import registration
    from triptych_gpt.tasks.reinforcement.sb3 import Sb3VecEnv

    ppo = task.ppo
    environments = gymnasium.make_vec(registration.CARTPOLE_ID, ppo.environments, autoreset_mode="SameStep")
    model = PPO(
        "MlpPolicy", Sb3VecEnv(environments), n_steps=ppo.steps, n_epochs=epochs, device=device, seed=seed,
        learning_rate=lambda left: ppo.rate(round((1 - left) * ppo.iterations), 0), gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda, clip_range=ppo.clip_range, batch_size=ppo.environments * ppo.steps // ppo.minibatches,
        vf_coef=ppo.value_coef, max_grad_norm=ppo.max_grad_norm,
        policy_kwargs={"net_arch": [32, 32], "activation_fn": nn.SELU},
    )  # fmt: skip
    model._setup_learn(1)
    return model


def sb3_rollout(task: ReinforcementTask, device: str) -> Callable[[int], Callable[[], object]]:
    return lambda seed: _collecting(sb3_policy(task, device, seed), task.ppo.steps)


def sb3_updates(task: ReinforcementTask, device: str) -> Callable[[int], Callable[[], object]]:
    def prepare(seed: int) -> Callable[[], object]:
        model = sb3_policy(task, device, seed)
        _collecting(model, task.ppo.steps)()
        return model.train

    return prepare


def _collecting(model: Any, steps: int) -> Callable[[], object]:
    from stable_baselines3.common.callbacks import CallbackList

    callback = CallbackList([])
    callback.init_callback(model)
    return lambda: model.collect_rollouts(model.env, callback, model.rollout_buffer, steps)


def jobs_of(size: Size) -> Iterator[Job]:
    task = replace(CARTPOLE, ppo=replace(CARTPOLE.ppo, environments=size.environments, steps=size.steps))
    one, many = size.environments * size.steps, size.policies * size.environments * size.steps
    d, gpu = size.device, size.device != "cpu"

    def job(
        name: str, prepare: Any, items: int, unit: str, against: tuple[str, ...] = (), skip: str | None = None
    ) -> Job:
        return Job(name, prepare, items, unit, against, repeats=size.repeats, gpu=gpu, skip=skip)

    sync, sb3 = "stepping: SyncVectorEnv", "stepping: stable-baselines3"
    yield job(sync, sync_vector(size), one, "steps", skip=NO_SB3)
    yield job(sb3, sb3_rollout(task, d), one, "steps", skip=NO_SB3)
    yield job("stepping: environments alone", environments_alone(task, size), many, "steps", (sync,))
    yield job("stepping: policies", acting(task, size), many, "steps", (sync, sb3))
    yield job("stepping: rollout", rollout(task, size.policies, d), many, "steps", (sync, sb3))
    for of, count in ((task, size.policies), (CARTPOLE_SMALL, size.small)):
        theirs, alone = f"updates, {of.name}: stable-baselines3", f"updates, {of.name}: one policy"
        yield job(theirs, sb3_updates(of, d), of.ppo.minibatches, "updates", skip=NO_SB3)
        yield job(alone, updates(of, 1, d), 1, "updates", (theirs,))
        yield job(f"updates, {of.name}: {count} policies", updates(of, count, d), count, "updates", (theirs, alone))
    for count in (1, size.policies):
        yield job(f"iteration, cartpole: {count}", iteration(task, count, d), count, "iterations")
    for count in (size.small // 4, size.small):
        yield job(f"iteration, cartpole_small: {count}", iteration(CARTPOLE_SMALL, count, d), count, "iterations")
    yield job("scoring, cartpole_small", scoring(CARTPOLE_SMALL, 16 * size.small, d), 16 * size.small, "policies")


def jobs() -> Sequence[Job]:
    return list(jobs_of(Size()))


def gpu_jobs() -> Sequence[Job]:
    """The same for more policies on a GPU."""
    skip = None if torch.cuda.is_available() else "no GPU here: torch.cuda.is_available() is false"
    size = Size(policies=512, small=2048, device="cuda")
    return [replace(job, skip=skip) if skip else job for job in jobs_of(size)]
