"""PPO for many policies at once, against stable-baselines3, written-out formulas and policies trained alone."""

import math
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from triptych_gpt.tasks import Cohort
from triptych_gpt.tasks.reinforcement import CARTPOLE, CARTPOLE_SMALL, Discrete, Policies, PpoSettings, Selu
from triptych_gpt.tasks.reinforcement.policies import Continuous
from triptych_gpt.tasks.reinforcement.ppo import (
    LastEpisodes,
    Rollout,
    advantages_of,
    clip_gradients,
    losses,
    normalised,
)

CPU = torch.device("cpu")
TINY = PpoSettings(environments=6, steps=8, iterations=3, epochs=2, minibatches=2, learning_rate=3e-3)
TASK = replace(CARTPOLE_SMALL, ppo=TINY, episodes=2)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_advantages_are_their_definition():
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, term by term."""
    rewards, values, last, done = (
        draws(2, 7, 3),
        draws(2, 7, 3, seed=1),
        draws(2, 3, seed=2),
        draws(2, 7, 3, seed=3) > 1,
    )
    found = advantages_of(rewards, values, last, done, 0.9, 0.8)
    following = torch.cat([values[:, 1:], last[:, None]], 1)
    for p, t, e in np.ndindex(2, 7, 3):
        expected = 0.0
        for k in range(7 - t):
            goes_on = 0.0 if done[p, t + k, e] else 1.0
            delta = rewards[p, t + k, e] + 0.9 * goes_on * following[p, t + k, e] - values[p, t + k, e]
            expected += (0.9 * 0.8) ** k * float(delta)
            if not goes_on:
                break
        assert float(found[p, t, e]) == pytest.approx(expected, abs=1e-12)


def test_advantages_are_stable_baselines():
    pytest.importorskip("stable_baselines3")
    from gymnasium.spaces import Box
    from stable_baselines3.common.buffers import RolloutBuffer

    rewards, values, done = draws(1, 16, 4), draws(1, 16, 4, seed=1), draws(1, 17, 4, seed=3) > 1
    last = draws(1, 4, seed=2)
    buffer = RolloutBuffer(16, Box(-1, 1, (2,)), Box(-1, 1, (1,)), "cpu", 0.8, 0.9, 4)
    for t in range(16):
        start = done[0, t].float().numpy()  # whether an episode starts here
        buffer.add(
            np.zeros((4, 2)), np.zeros((4, 1)), rewards[0, t].numpy(), start, values[0, t].float(), torch.zeros(4)
        )
    buffer.compute_returns_and_advantage(last[0].float(), done[0, 16].numpy())
    found = advantages_of(rewards, values, last, done[:, 1:], 0.9, 0.8)
    assert np.allclose(found[0].numpy(), buffer.advantages, atol=1e-5)


def policies_of(actions: object = Continuous(1), squared_std: bool = True) -> Policies:
    outputs = actions.size if isinstance(actions, Continuous) else actions.choices
    return Policies(Selu(3, outputs, 5), Selu(3, 1, 5), actions, squared_std=squared_std)


def parameters_of(policies: Policies, count: int) -> dict[str, torch.Tensor]:
    theta = 0.5 * draws(count, policies.layout.size, seed=9)
    return {name: value.clone().requires_grad_() for name, value in policies.layout.unflatten(theta).items()}


def rollout_of(policies: Policies, parameters: dict[str, torch.Tensor], items: int = 12) -> Rollout:
    count = len(next(iter(parameters.values())))
    observations = draws(count, 3, items)
    with torch.no_grad():
        outputs = policies.outputs(parameters, observations)
        actions = policies.sampled(parameters, outputs, torch.arange(count) + 5, 0)
        # As of an older policy, so that some ratios are clipped.
        log_prob = policies.log_prob(parameters, outputs, actions) + 0.4 * draws(count, items, seed=4)
        values = policies.values(parameters, observations) + 0.3 * draws(count, items, seed=5)
    return Rollout(observations, actions, log_prob, values, draws(count, items, seed=6), draws(count, items, seed=7))


def module(policies: Policies, parameters: dict[str, torch.Tensor], row: int, part: str) -> nn.Module:
    """One policy's network, or its critic, in eager PyTorch."""
    network = (policies.network if part == "actor" else policies.critic)().double()
    state = {name.removeprefix(f"{part}."): p[row] for name, p in parameters.items() if name.startswith(part)}
    network.load_state_dict(state)
    return network


@pytest.mark.parametrize("actions", [Continuous(1), Continuous(2), Discrete(3)])
@pytest.mark.parametrize(
    "settings",
    [
        replace(TINY, entropy_coef=0.1),
        replace(TINY, clip_values=True, squared_std=False, normalise="minibatch", entropy_coef=0.01),
    ],
)
def test_losses_are_the_written_out_formulas(actions, settings):
    policies = policies_of(actions, settings.squared_std)
    parameters = parameters_of(policies, 2)
    batch = rollout_of(policies, parameters)
    found = losses(policies, parameters, batch, settings)
    for row in range(2):
        outputs = module(policies, parameters, row, "actor")(batch.observations[row].T)
        values = module(policies, parameters, row, "critic")(batch.observations[row].T)[:, 0]
        if isinstance(actions, Discrete):
            distribution = torch.distributions.Categorical(logits=outputs)
            log_prob, entropy = distribution.log_prob(batch.actions[row, 0]), distribution.entropy()
        else:
            log_std = parameters["log_std"][row]
            std = (log_std.exp() * log_std.exp()) if settings.squared_std else log_std.exp()
            distribution = torch.distributions.MultivariateNormal(outputs, scale_tril=torch.diag(std))
            log_prob, entropy = distribution.log_prob(batch.actions[row].T), distribution.entropy()
        a = batch.advantages[row]
        if settings.normalise == "minibatch":
            a = (a - a.mean()) / (a.std() + 1e-8)
        total = 0.0
        clipped = 0
        for i in range(len(a)):
            ratio = torch.exp(log_prob[i] - batch.log_prob[row, i])
            clipped += not 0.8 <= ratio <= 1.2
            surrogate = torch.minimum(ratio * a[i], ratio.clamp(0.8, 1.2) * a[i])
            error = (values[i] - batch.returns[row, i]) ** 2
            if settings.clip_values:
                near = batch.values[row, i] + (values[i] - batch.values[row, i]).clamp(-0.2, 0.2)
                error = torch.maximum(error, (near - batch.returns[row, i]) ** 2)
            total += (settings.value_coef * error - surrogate - settings.entropy_coef * entropy[i]).item()
        assert found[row].item() == pytest.approx(total / len(a), rel=1e-9)
        assert 0 < clipped < len(a)


def test_gradients_are_stable_baselines():
    sb3 = pytest.importorskip("stable_baselines3")
    import gymnasium

    steps = 32
    network = {"net_arch": [5, 5], "activation_fn": nn.SELU, "ortho_init": False}
    theirs = sb3.PPO(
        "MlpPolicy", gymnasium.make("Pendulum-v1"), n_steps=steps, batch_size=steps, n_epochs=1, gamma=0.9,
        gae_lambda=0.8, vf_coef=0.7, ent_coef=0.01, max_grad_norm=0.5, policy_kwargs=network, seed=0,
    )  # fmt: skip
    theirs._setup_learn(steps)
    theirs.collect_rollouts(theirs.env, _nothing(), theirs.rollout_buffer, n_rollout_steps=steps)
    with torch.no_grad():
        theirs.policy.action_net.weight.mul_(1.1)  # so that ratios differ from 1
    before = {name: value.clone() for name, value in theirs.policy.state_dict().items()}
    buffer = theirs.rollout_buffer
    data = {
        name: getattr(buffer, name).copy()
        for name in ("observations", "actions", "log_probs", "values", "advantages", "returns")
    }
    theirs.train()
    gradients = {name: p.grad for name, p in theirs.policy.named_parameters()}

    settings = replace(TINY, environments=1, steps=steps, minibatches=1, gamma=0.9, gae_lambda=0.8, value_coef=0.7,
                       entropy_coef=0.01, max_grad_norm=0.5, squared_std=False, normalise="minibatch")  # fmt: skip
    policies = policies_of(squared_std=False)
    names = dict(zip(policies.layout.names, THEIRS, strict=True))
    parameters = {ours: before[name][None].clone().requires_grad_() for ours, name in names.items()}
    flat = {name: torch.from_numpy(value[:, 0])[None] for name, value in data.items()}
    batch = Rollout(
        flat["observations"].mT.contiguous(), flat["actions"].mT.contiguous(),
        *(flat[name] for name in ("log_probs", "values", "advantages", "returns")),
    )  # fmt: skip
    ours = list(torch.autograd.grad(losses(policies, parameters, batch, settings).sum(), list(parameters.values())))
    clip_gradients(ours, settings.max_grad_norm)
    for gradient, name in zip(ours, names.values(), strict=True):
        assert torch.allclose(gradient[0], gradients[name], rtol=1e-3, atol=1e-6), name


THEIRS = [
    "log_std",
    *(f"mlp_extractor.policy_net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
    "action_net.weight",
    "action_net.bias",
    *(f"mlp_extractor.value_net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
    "value_net.weight",
    "value_net.bias",
]


def _nothing() -> object:
    from stable_baselines3.common.callbacks import CallbackList

    callback = CallbackList([])
    callback.on_step = lambda: True
    return callback


def test_gradients_are_clipped_as_torch_does():
    gradients = [draws(3, 4, 2), draws(3, 5)]
    gradients[0][1] *= 0.01
    gradients[1][1] *= 0.01
    expected = []
    for row in range(3):
        own = [nn.Parameter(torch.zeros_like(g[row])) for g in gradients]
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient[row].clone()
        nn.utils.clip_grad_norm_(own, 0.5)
        expected.append([parameter.grad for parameter in own])
    clip_gradients(gradients, 0.5)
    for row in range(3):
        assert all(torch.allclose(g[row], e) for g, e in zip(gradients, expected[row], strict=True))


def trained(task=TASK, runs=range(3), at_once=3, shared=True):
    cohort = Cohort(0, 0, runs, 4, shared_batches=shared)
    return task.train_cohort(cohort, CPU, at_once, torch.float64)


@pytest.mark.parametrize("settings", [TINY, replace(TINY, shuffle=True, bootstrap_timeouts=True)])
@pytest.mark.parametrize("shared", [True, False])
def test_a_cohort_equals_its_policies_trained_one_after_another(settings, shared):
    task = replace(TASK, ppo=settings)
    together, alone = trained(task, shared=shared), trained(task, at_once=1, shared=shared)
    assert torch.allclose(together.theta, alone.theta, rtol=0, atol=1e-9)
    assert torch.allclose(together.metrics["train_return"], alone.metrics["train_return"], atol=1e-9)
    assert torch.equal(together.theta[1:2, 0], task.initial(0, [1]).double())
    assert (together.theta[0, 0] - together.theta[0, -1]).abs().max() > 1e-3


def test_a_run_is_the_same_in_any_cohort():
    assert torch.allclose(trained().theta[2:], trained(runs=range(2, 3), at_once=1).theta, rtol=0, atol=1e-9)


def test_policies_learn_to_balance():
    task = replace(CARTPOLE_SMALL, ppo=replace(CARTPOLE_SMALL.ppo, iterations=24, learning_rate=1e-2), episodes=2)
    result = task.train_cohort(Cohort(0, 0, range(6), 2), CPU, 6)
    before, after = (task.evaluate(result.theta[:, place])["return"].mean() for place in (0, -1))
    assert before < 20
    assert after > 100


def test_the_thesis_recipe():
    ppo = CARTPOLE.ppo
    assert (ppo.environments, ppo.steps, ppo.iterations, ppo.epochs, ppo.minibatches) == (512, 16, 500, 8, 2)
    assert (ppo.gamma, ppo.gae_lambda, ppo.clip_range, ppo.value_coef, ppo.max_grad_norm) == (0.99, 0.95, 0.2, 2, 2)
    assert (ppo.entropy_coef, ppo.learning_rate, ppo.schedule, ppo.adam_eps) == (0, 3e-4, "cosine", 1e-8)
    assert (ppo.squared_std, ppo.bootstrap_timeouts, ppo.shuffle, ppo.normalise, ppo.clip_values) == (
        True, False, False, "rollout", False,
    )  # fmt: skip
    assert ppo.rate(0, 0) == 3e-4
    assert ppo.rate(250, 0) == pytest.approx(1.5e-4)
    assert ppo.rate(499, 7) == pytest.approx(1.5e-4 * (1 + math.cos(math.pi * 499.875 / 500)))
    assert CARTPOLE.initial(0, [0]).shape == (1, 1250)
    assert CARTPOLE.policies.layout.size == 1250 + 1249


def test_squared_std():
    for squared, std in ((True, math.exp(-1.4)), (False, math.exp(-0.7))):
        policies = policies_of(squared_std=squared)
        parameters = {name: torch.full_like(p, -0.7) for name, p in parameters_of(policies, 1).items()}
        outputs = torch.zeros(1, 1, 20_000, dtype=torch.float64)
        actions = policies.sampled(parameters, outputs, torch.tensor([3]), 1)
        assert float(actions.std()) == pytest.approx(std, rel=0.02)
        assert float(actions.mean().abs()) < 0.01


def test_discrete_actions_are_sampled_by_their_probabilities():
    policies = policies_of(Discrete(3))
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    actions = policies.sampled({}, p.log()[None, :, None].expand(1, 3, 20_000), torch.tensor([3]), 1)
    assert torch.allclose(actions.flatten().bincount() / 20_000, p.float(), atol=0.01)


class Timed:
    """Two environments whose first is out of time with every step; rewards are 0 and observations count steps."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self):
        return self._step()

    def step(self, actions):
        self.count += 1
        return self._step()

    def _step(self):
        from triptych_gpt.tasks.reinforcement import Step

        observation = torch.full((1, 4, 2), float(self.count), dtype=torch.float64)
        late = torch.tensor([[True, False]])
        return Step(observation, torch.zeros(1, 2, dtype=torch.float64), ~late & False, late, observation + 0.5)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_timeouts_are_bootstrapped_only_if_asked(bootstrap):
    settings = replace(TINY, environments=2, steps=3, bootstrap_timeouts=bootstrap)
    learner = replace(TASK, ppo=settings).learner(Cohort(0, 0, range(1), 2), range(1), CPU, torch.float64)
    learner.environments = Timed()
    learner.observation = learner.environments.reset().observation
    rollout = learner.rollout()
    value = learner.policies.values(learner.parameters, torch.full((1, 4, 1), 3.5, dtype=torch.float64))
    # The last step of the environment that is out of time: nothing follows, or the value of what it ended with.
    expected = settings.gamma * value.item() if bootstrap else 0.0
    assert float(rollout.returns.view(3, 2)[2, 0]) == pytest.approx(expected)
    assert value.abs().item() > 1e-3


def test_minibatches_are_the_rollouts_order_or_shuffled():
    for shuffle in (False, True):
        task = replace(TASK, ppo=replace(TINY, shuffle=shuffle))
        learner = task.learner(Cohort(0, 0, range(2), 2), range(2), CPU, torch.float64)
        rollout = learner.rollout()
        parts = [torch.cat([b.values for b in learner._minibatches(rollout, epoch)], 1) for epoch in (0, 1)]
        assert torch.equal(parts[0], rollout.values) is not shuffle
        assert torch.equal(*parts) is not shuffle
        assert torch.equal(parts[1].sort(1).values, rollout.values.sort(1).values)


def test_normalised_over_the_rollout():
    learner = TASK.learner(Cohort(0, 0, range(2), 2), range(2), CPU, torch.float64)
    advantages = learner.rollout().advantages
    assert torch.allclose(advantages.mean(1), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(advantages.std(1), torch.ones(2, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(normalised(5 + 3 * advantages), advantages, atol=1e-6)


def test_the_last_episodes_are_a_queues():
    rng, queues = np.random.default_rng(0), [deque(maxlen=200) for _ in range(2)]
    last, running = LastEpisodes(torch.ones(2, 300)), np.ones((2, 300))
    assert last.mean().isnan().all()
    for step in range(6):
        reward, done = rng.normal(size=(2, 300)), rng.random((2, 300)) < (0.9 if step == 3 else 0.1)
        last.add(torch.from_numpy(reward).float(), torch.from_numpy(done))
        running += reward
        for row in range(2):
            queues[row].extend(running[row, done[row]])
        running[done] = 0
        assert last.mean().numpy() == pytest.approx([np.mean(queue) for queue in queues], rel=1e-4)


def test_train_return_is_finite_even_before_an_episode_ends():
    quiet = replace(TASK, ppo=replace(TINY, steps=2, environments=2, minibatches=1))
    returns = trained(quiet).metrics["train_return"]
    assert returns.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minibatches": 7}, "minibatches 7: expected a divisor of 48"),
        ({"gamma": 1.5}, "gamma 1.5: expected"),
        ({"environments": 0}, "environments 0: expected at least 1"),
    ],
)
def test_wrong_settings_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **options)
