"""Proximal policy optimisation of many policies at once.  [Schulman et al. 2017; thesis 3.3]

Every quantity has a leading axis of policies, and each policy has its own environments, advantages, losses, gradients, norm of
gradients and Adam: it becomes what it would be alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from triptych_common.fields import Checked, Ge, Gt, Interval

from triptych_gpt.tasks.networks import due_steps, take_checkpoints
from triptych_gpt.tasks.reinforcement.environments import Environments
from triptych_gpt.tasks.reinforcement.policies import Policies
from triptych_gpt.tasks.stack import Parameters

EPISODES = 200  # the last ones, of which train_return is the mean


@dataclass(frozen=True)
class PpoSettings(Checked):
    """The recipe of a run; the defaults are the thesis's.  [thesis 3.3]"""

    environments: Annotated[int, Ge(1)] = 512
    steps: Annotated[int, Ge(1)] = 16  # of each environment in an iteration
    iterations: Annotated[int, Ge(1)] = 500
    epochs: Annotated[int, Ge(1)] = 8
    minibatches: Annotated[int, Ge(1)] = 2
    learning_rate: Annotated[float, Gt(0)] = 3e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    gamma: Annotated[float, Interval(ge=0, le=1)] = 0.99
    gae_lambda: Annotated[float, Interval(ge=0, le=1)] = 0.95
    clip_range: Annotated[float, Gt(0)] = 0.2
    value_coef: Annotated[float, Ge(0)] = 2.0
    entropy_coef: float = 0.0
    max_grad_norm: Annotated[float, Gt(0)] = 2.0
    adam_eps: Annotated[float, Gt(0)] = 1e-8
    # What follows are quirks of the original; other implementations have the other value.
    squared_std: bool = True
    """actions have the standard deviation exp(log_std)^2"""
    bootstrap_timeouts: bool = False
    """value what would have come after an episode's time limit"""
    shuffle: bool = False
    """off: the first minibatch holds the first steps of a rollout, in every epoch"""
    normalise: Literal["rollout", "minibatch"] = "rollout"
    """over what advantages get mean 0 and standard deviation 1"""
    clip_values: bool = False
    """also bound how far the critic moves from its value in the rollout, by clip_range"""

    def __post_init__(self) -> None:
        super().__post_init__()
        items = self.environments * self.steps
        if items % self.minibatches or items // self.minibatches < 2:
            expected = (
                f"a divisor of {items:,} ({self.environments} environments x {self.steps} steps), half of it at most"
            )
            raise ValueError(f"minibatches {self.minibatches}: expected {expected}")

    def rate(self, iteration: int, epoch: int) -> float:
        """Learning rate: half a cosine over the run, in steps of an epoch."""
        done = (iteration + epoch / self.epochs) / self.iterations
        return self.learning_rate * (0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1.0)


class Rollout(NamedTuple):
    """Transitions [policies, ..., items], item step x environments + environment."""

    observations: Float[Tensor, "policies observations items"]
    actions: Tensor
    log_prob: Float[Tensor, "policies items"]
    values: Float[Tensor, "policies items"]
    advantages: Float[Tensor, "policies items"]
    returns: Float[Tensor, "policies items"]

    def part(self, items: slice | Int[Tensor, " items"] | Int[Tensor, "policies items"]) -> "Rollout":
        """These items, all policies' the same or each one's own."""
        if isinstance(items, slice):
            return Rollout(*(x[..., items] for x in self))
        if items.ndim == 1:
            return Rollout(*(x.index_select(-1, items) for x in self))
        return Rollout(
            *(x.gather(-1, items.view(len(items), *[1] * (x.ndim - 2), -1).expand(*x.shape[:-1], -1)) for x in self)
        )


def advantages_of(
    rewards: Float[Tensor, "policies steps environments"],
    values: Float[Tensor, "policies steps environments"],
    last_values: Float[Tensor, "policies environments"],
    done: Bool[Tensor, "policies steps environments"],
    gamma: float,
    gae_lambda: float,
) -> Float[Tensor, "policies steps environments"]:
    """Generalised advantage estimation, A_t = sum_k (gamma lambda)^k delta_{t+k} up to the episode's end.  [Schulman et al. 2016]

    last_values: of what is observed after the last step. done: whether an episode ended with a step.
    """
    out, following, advantage = torch.empty_like(rewards), last_values, torch.zeros_like(last_values)
    for step in reversed(range(rewards.shape[1])):
        goes_on = (~done[:, step]).to(rewards.dtype) * gamma
        delta = rewards[:, step] + goes_on * following - values[:, step]
        advantage = delta + goes_on * gae_lambda * advantage
        out[:, step], following = advantage, values[:, step]
    return out


def normalised(advantages: Float[Tensor, "policies items"]) -> Float[Tensor, "policies items"]:
    """With mean 0 and standard deviation 1 for each policy."""
    std, mean = torch.std_mean(advantages, 1, keepdim=True)
    return (advantages - mean) / (std + 1e-8)


def losses(
    policies: Policies, parameters: Parameters, batch: Rollout, settings: PpoSettings
) -> Float[Tensor, " policies"]:
    """Clipped surrogate, squared error of values and entropy of each policy's minibatch."""
    outputs, clip = policies.outputs(parameters, batch.observations), settings.clip_range
    ratio = (policies.log_prob(parameters, outputs, batch.actions) - batch.log_prob).exp()
    advantages = normalised(batch.advantages) if settings.normalise == "minibatch" else batch.advantages
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    values = policies.values(parameters, batch.observations)
    errors = (values - batch.returns).square()
    if settings.clip_values:
        near = batch.values + (values - batch.values).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - batch.returns).square())
    loss = settings.value_coef * errors.mean(1) - surrogate.mean(1)
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * policies.entropy(parameters, outputs).mean(1)
    return loss


def clip_gradients(gradients: list[Tensor], max_norm: float) -> None:
    """Scale each policy's gradients [policies, ...] down to this norm, in place, as `clip_grad_norm_` does for one."""
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))


class LastEpisodes:
    """The returns of each policy's last EPISODES episodes."""

    def __init__(self, first_reward: Float[Tensor, "policies environments"]) -> None:
        self.running = first_reward.clone()
        self.finished = first_reward.new_zeros(len(first_reward), EPISODES)
        self.count = torch.zeros(len(first_reward), dtype=torch.long, device=first_reward.device)

    def add(self, reward: Float[Tensor, "policies environments"], done: Bool[Tensor, "policies environments"]) -> None:
        self.running += reward
        policy, environment = done.nonzero(as_tuple=True)
        if not len(policy):
            return
        rank = done.cumsum(1)  # 1, 2, ... of those that end now
        ended = rank[:, -1]
        recent = (ended[policy] - rank[policy, environment]) < EPISODES  # of one step, too, only as many are kept
        policy, environment = policy[recent], environment[recent]
        place = (self.count[policy] + rank[policy, environment] - 1) % EPISODES
        self.finished[policy, place] = self.running[policy, environment]
        self.count += ended
        self.running.masked_fill_(done, 0.0)

    def mean(self) -> Float[Tensor, " policies"]:
        """NaN for policies none of whose episodes have ended."""
        return self.finished.sum(1) / self.count.clamp(max=EPISODES)


@dataclass
class Learner:
    """Policies in training."""

    policies: Policies
    settings: PpoSettings
    theta: Float[Tensor, "policies both"]  # with their critics
    environments: Environments
    keys: Int[Tensor, " policies"]  # of action noise
    orders: Callable[[int], Tensor]  # the order of a rollout's items in an epoch, counted over the run
    make_optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] | None = None  # in place of Adam

    def __post_init__(self) -> None:
        views = self.policies.layout.unflatten(self.theta)
        self.parameters = {name: value.clone(memory_format=torch.contiguous_format) for name, value in views.items()}
        self.trained = [value.requires_grad_() for value in self.parameters.values()]
        adam = partial(torch.optim.Adam, lr=0.0, eps=self.settings.adam_eps, fused=True)
        self.optimizer = (self.make_optimizer or adam)(self.trained)
        self.iteration = 0
        first = self.environments.reset()
        self.observation, self.episodes = first.observation, LastEpisodes(first.reward)

    def iterate(self) -> None:
        """One rollout and the updates on it."""
        rollout = self.rollout()
        for epoch in range(self.settings.epochs):
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.rate(self.iteration, epoch)
            for batch in self._minibatches(rollout, epoch):
                self.update(batch)
        self.iteration += 1

    def update(self, batch: Rollout) -> Float[Tensor, " policies"]:
        """A step of the optimiser on a minibatch; returns the losses before it."""
        loss = losses(self.policies, self.parameters, batch, self.settings)
        # The sum over policies: each one's gradient is what it would be alone.
        gradients = [g.contiguous() for g in torch.autograd.grad(loss.sum(), self.trained)]
        clip_gradients(gradients, self.settings.max_grad_norm)
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """Act for some steps in every environment."""
        s, policies, observation = self.settings, self.policies, self.observation
        count, size, environments = observation.shape
        stacked = (count, s.steps, environments)
        observations = observation.new_empty(count, size, s.steps, environments)
        rewards, log_prob = observation.new_empty(stacked), observation.new_empty(stacked)
        done = torch.empty(stacked, dtype=torch.bool, device=observation.device)
        taken = []
        for t in range(s.steps):
            observations[:, :, t] = observation
            outputs = policies.outputs(self.parameters, observation)
            actions = policies.sampled(self.parameters, outputs, self.keys, self.iteration * s.steps + t)
            log_prob[:, t] = policies.log_prob(self.parameters, outputs, actions)
            step = self.environments.step(actions)
            taken.append(actions)
            done[:, t] = step.terminated | step.truncated
            self.episodes.add(step.reward, done[:, t])
            rewards[:, t] = step.reward
            if s.bootstrap_timeouts and step.truncated.any():
                rewards[:, t] += s.gamma * step.truncated * policies.values(self.parameters, step.final)
            observation = step.observation
        self.observation = observation
        flat = observations.flatten(2)
        values = policies.values(self.parameters, flat)
        last = policies.values(self.parameters, observation)
        advantages = advantages_of(rewards, values.view(stacked), last, done, s.gamma, s.gae_lambda).flatten(1)
        returns = advantages + values
        if s.normalise == "rollout":
            advantages = normalised(advantages)
        return Rollout(flat, torch.stack(taken, 2).flatten(2), log_prob.flatten(1), values, advantages, returns)

    def _minibatches(self, rollout: Rollout, epoch: int) -> Iterator[Rollout]:
        items = rollout.values.shape[1]
        size = items // self.settings.minibatches
        if self.settings.shuffle:
            order = self.orders(self.iteration * self.settings.epochs + epoch).to(rollout.values.device)
            rollout = rollout.part(order)
        for start in range(0, items, size):
            yield rollout.part(slice(start, start + size))


def train_policies(
    learner: Learner, record: Int[Tensor, "policies checkpoints"], out: Float[Tensor, "policies checkpoints D"]
) -> Float[Tensor, "policies checkpoints"]:
    """Train to the last of the iterations in `record`, ascending, and copy each policy into `out` after each of them.

    Returns its train_return at each: the mean of its last 200 episodes; before the first has ended, that of the first that do, and
    of what all have gained so far if none ever ends.
    """
    due, layout = due_steps(record), learner.policies.actor.layout
    returns = torch.full(record.shape, torch.nan, dtype=out.dtype, device=out.device)
    pending = torch.ones(len(record), dtype=torch.bool, device=out.device)
    take_checkpoints(due.get(0), learner.parameters, layout, out)
    for iteration in range(1, int(record.max()) + 1):
        learner.iterate()
        now = learner.episodes.mean()
        at = due.get(iteration)
        take_checkpoints(at, learner.parameters, layout, out)
        if at is not None:
            returns[at] = now[at[0]]
        if pending.any():
            new = pending & ~now.isnan()
            earlier = (record < iteration) & new[:, None]
            returns = torch.where(earlier, now[:, None], returns)
            pending &= ~new
    return torch.where(returns.isnan() & pending[:, None], learner.episodes.running.mean(1)[:, None], returns)
