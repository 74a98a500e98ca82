"""A policy and its critic as functions of parameter vectors, for many of them at once."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from triptych_common.randomness import counted_normal, counted_uniform

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.tasks.reinforcement.environments import Actions, Continuous
from triptych_gpt.tasks.stack import Parameters, Stack

LOG_STD = "log_std"
_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


def with_log_std(network: nn.Module, actions: Actions, log_std: float = 0.0) -> nn.Sequential:
    """The policy as a checkpoint holds it: log_std first, if actions are continuous, then the network as "actor"."""
    policy = nn.Sequential(OrderedDict(actor=network))
    if isinstance(actions, Continuous):
        policy.register_parameter(LOG_STD, nn.Parameter(torch.full((actions.size,), float(log_std))))
    return policy


@dataclass(frozen=True)
class Selu:
    """Builds observations-hidden-hidden-outputs with SELU and orthogonal weights; biases start as in PyTorch.  [thesis 3.3]"""

    observations: int = 4
    outputs: int = 1
    hidden: int = 32
    last_gain: float = 0.01

    def __call__(self) -> nn.Sequential:
        sizes = (self.observations, self.hidden, self.hidden, self.outputs)
        linears = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for linear, gain in zip(linears, (2**0.5, 2**0.5, self.last_gain), strict=True):
            nn.init.orthogonal_(linear.weight, gain)
        first, second, third = linears
        return nn.Sequential(first, nn.SELU(), second, nn.SELU(), third)


class ActorCritic(nn.Module):
    """A policy and a critic as they are initialised: theta first, then the critic's parameters."""

    def __init__(self, policy: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic


@dataclass(frozen=True)
class Policies:
    """Acts with, and scores actions by, many policies.

    network, critic: build one, its inputs observations. squared_std: the standard deviation of actions is exp(log_std)^2, as in the
    released code, not exp(log_std).
    """

    network: Callable[[], nn.Module]
    critic: Callable[[], nn.Module]
    actions: Actions
    log_std: float = 0.0
    squared_std: bool = True

    def build(self) -> ActorCritic:
        return ActorCritic(with_log_std(self.network(), self.actions, self.log_std), self.critic())

    @cached_property
    def policy(self) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            return with_log_std(self.network(), self.actions, self.log_std)

    @cached_property
    def actor(self) -> Stack:
        return Stack(self.policy)

    @cached_property
    def valuer(self) -> Stack:
        with torch.random.fork_rng(devices=[]):
            return Stack(nn.Sequential(OrderedDict(critic=self.critic())))

    @cached_property
    def layout(self) -> ParameterLayout:
        """Of policy and critic together."""
        return ParameterLayout({**self.actor.layout.shapes, **self.valuer.layout.shapes})

    def outputs(
        self, parameters: Parameters, observations: Float[Tensor, "policies observations items"]
    ) -> Float[Tensor, "policies outputs items"]:
        """Means of continuous actions, logits of discrete ones."""
        own = {name: parameters[name] for name in self.actor.layout.names}
        return self.actor(own, observations.mT, shared=False).mT

    def values(
        self, parameters: Parameters, observations: Float[Tensor, "policies observations items"]
    ) -> Float[Tensor, "policies items"]:
        own = {name: parameters[name] for name in self.valuer.layout.names}
        return self.valuer(own, observations.mT, shared=False)[..., 0]

    def scale(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Standard deviation of continuous actions and its logarithm, [policies, size, 1]."""
        log_std = parameters[LOG_STD][..., None] * (2 if self.squared_std else 1)
        return log_std.exp(), log_std

    def sampled(self, parameters: Parameters, outputs: Tensor, keys: Tensor, step: int) -> Tensor:
        """Actions, a function of the policy's key, the step and the environment."""
        size, items = outputs.shape[1:]
        counters = step * size * items + torch.arange(size * items, device=outputs.device)
        if isinstance(self.actions, Continuous):
            noise = counted_normal(keys[:, None], counters).view(-1, size, items).to(outputs.dtype)
            return outputs + self.scale(parameters)[0] * noise
        # The largest of logits with Gumbel noise is a draw from their softmax.
        u = counted_uniform(keys[:, None], counters).view(-1, size, items)
        return (outputs - (-u.log()).log().to(outputs.dtype)).argmax(1, keepdim=True)

    def greedy(self, outputs: Tensor) -> Tensor:
        """The most likely actions."""
        return outputs if isinstance(self.actions, Continuous) else outputs.argmax(1, keepdim=True)

    def log_prob(self, parameters: Parameters, outputs: Tensor, actions: Tensor) -> Float[Tensor, "policies items"]:
        if isinstance(self.actions, Continuous):
            std, log_std = self.scale(parameters)
            return (((actions - outputs) / std).square() * -0.5 - log_std - _HALF_LOG_TAU).sum(1)
        return outputs.log_softmax(1).gather(1, actions)[:, 0]

    def entropy(self, parameters: Parameters, outputs: Tensor) -> Float[Tensor, "policies items"]:
        if isinstance(self.actions, Continuous):
            return (self.scale(parameters)[1] + 0.5 + _HALF_LOG_TAU).sum(1).expand(-1, outputs.shape[2])
        log_p = outputs.log_softmax(1)
        return -(log_p.exp() * log_p).sum(1)

    def parameters(self, theta: Float[Tensor, "policies D"]) -> Mapping[str, Tensor]:
        """Contiguous parameters of policies alone."""
        return {name: value.contiguous() for name, value in self.actor.layout.unflatten(theta).items()}
