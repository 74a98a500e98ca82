"""The cartpole of Isaac Gym without Isaac Gym: its observation, reward, resets and order of steps, in torch.

A cart on rails is pushed so that the pole on it stays upright. Angles are 0 upright; a positive one leans towards positive x. Only
in observations is it the other way round, as there: the original's rails point along y, and its pole turns about x.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from triptych_common.fields import Checked, Ge, Gt
from triptych_common.randomness import counted_uniform, stream_keys

from triptych_gpt.tasks.reinforcement.environments import Continuous, Environments, Step, World

State = Float[Tensor, "4 *batch"]
"""Position of the cart (m), its velocity, angle of the pole (rad), its velocity."""

_WIDTH, _HEIGHT, _SCALE = 600, 400, 85  # pixels; pixels per metre


@dataclass(frozen=True)
class Cartpole(Checked):
    """The original's constants.

    Parity with PhysX cannot be shown without it; inertia, damping and substeps are therefore settings.
    """

    cart_mass: Annotated[float, Gt(0)] = 1.0  # kg
    pole_mass: Annotated[float, Gt(0)] = 1.0
    pole_centre: Annotated[float, Gt(0)] = 0.47  # m above the hinge
    pole_inertia: Annotated[float, Ge(0)] = (
        0.06**2 + 1.0**2
    ) / 12  # kg m^2 about its centre: a box, 0.06 m wide, 1 m long
    cart_damping: Annotated[float, Ge(0)] = 0.0  # N per m/s
    pole_damping: Annotated[float, Ge(0)] = 0.0  # N m per rad/s
    gravity: float = 9.81
    dt: Annotated[float, Gt(0)] = 0.0166  # s
    substeps: Annotated[int, Ge(1)] = 2
    max_force: Annotated[float, Gt(0)] = 400.0  # N at an action of 1
    max_position: Annotated[float, Gt(0)] = 3.0  # beyond it an episode has failed, as it has beyond a right angle
    max_steps: Annotated[int, Ge(2)] = 500  # of an episode, counting its first state
    clip_observations: Annotated[float, Gt(0)] = 5.0
    reset_position: Annotated[float, Ge(0)] = 0.1  # at most, of cart and pole
    reset_velocity: Annotated[float, Ge(0)] = 0.25

    def accelerations(
        self, theta: Any, x_dot: Any, theta_dot: Any, force: Any, sin: Callable[[Any], Any], cos: Callable[[Any], Any]
    ) -> tuple[Any, Any]:
        """Of cart and pole: Lagrange's equations of a cart with a rigid pole, solved for them.

        (m_c + m_p) x'' + m_p l cos(theta) theta'' = F - b x' + m_p l sin(theta) theta'^2
        m_p l cos(theta) x'' + (I + m_p l^2) theta'' = m_p g l sin(theta) - c theta'
        """
        coupling, total = self.pole_mass * self.pole_centre, self.cart_mass + self.pole_mass
        inertia = self.pole_inertia + self.pole_mass * self.pole_centre**2
        s, c = coupling * sin(theta), coupling * cos(theta)
        push = s * (theta_dot * theta_dot) + force
        pull = s * self.gravity
        if self.cart_damping:
            push = push - self.cart_damping * x_dot
        if self.pole_damping:
            pull = pull - self.pole_damping * theta_dot
        determinant = total * inertia - c * c
        return (inertia * push - c * pull) / determinant, (total * pull - c * push) / determinant

    def energy(self, state: State) -> Float[Tensor, "*batch"]:
        """Kinetic and potential, in joules; 0 for a pole at rest in the hinge's plane."""
        _, x_dot, theta, theta_dot = state
        inertia = self.pole_inertia + self.pole_mass * self.pole_centre**2
        kinetic = (self.cart_mass + self.pole_mass) * x_dot**2 + inertia * theta_dot**2
        coupled = self.pole_mass * self.pole_centre * theta.cos()
        return kinetic / 2 + coupled * (x_dot * theta_dot + self.gravity)

    def advanced(self, state: State, action: Float[Tensor, "*batch"]) -> State:
        """The state one step later: velocities first in each substep, then positions with the new ones, as PhysX does."""
        x, x_dot, theta, theta_dot = state.unbind()
        force, h = action.clamp(-1, 1) * self.max_force, self.dt / self.substeps
        for _ in range(self.substeps):
            x_acc, theta_acc = self.accelerations(theta, x_dot, theta_dot, force, torch.sin, torch.cos)
            x_dot, theta_dot = x_dot + x_acc * h, theta_dot + theta_acc * h
            x, theta = x + x_dot * h, theta + theta_dot * h
        return torch.stack([x, x_dot, theta, theta_dot])

    def failed(self, state: State) -> Bool[Tensor, "*batch"]:
        """Whether the cart has left its rails or the pole has fallen."""
        return (state[0].abs() > self.max_position) | (state[2].abs() > math.pi / 2)

    def rewarded(self, state: State) -> tuple[Float[Tensor, "*batch"], Bool[Tensor, "*batch"]]:
        """The reward of a state, at most 1, and whether it has failed, which costs 2."""
        _, x_dot, theta, theta_dot = state
        failed = self.failed(state)
        return (1 - theta * theta - 0.01 * x_dot.abs() - 0.005 * theta_dot.abs()).masked_fill(failed, -2.0), failed

    def observed(self, state: State) -> State:
        """The state clipped, with the original's sign of the pole's angle and its velocity: leaning to positive x is negative."""
        seen = state.clamp(-self.clip_observations, self.clip_observations)
        seen[2:].neg_()
        return seen

    def started(self, uniform: Float[Tensor, "4 *batch"]) -> State:
        """The first state of an episode, from numbers in [0, 1)."""
        ends = torch.tensor([self.reset_position, self.reset_velocity] * 2, dtype=uniform.dtype, device=uniform.device)
        return (2 * uniform - 1) * ends.view(-1, *[1] * (uniform.ndim - 1))


class CartpoleBatch:
    """Cartpoles [policies, environments]; each reset is a function of the row's key, the step and the environment.

    autoreset "next_step" is Isaac Gym's: the step after an episode's last one ignores its action and starts the next episode, with
    that state's reward. "same_step" starts it at once; the step's own state is then its `final`.
    """

    def __init__(
        self, cartpole: Cartpole, keys: Int[Tensor, " policies"], environments: int, *,
        dtype: torch.dtype = torch.float32, autoreset: Literal["next_step", "same_step"] = "next_step",
    ) -> None:  # fmt: skip
        self.cartpole, self.keys, self.dtype, self.autoreset = cartpole, keys, dtype, autoreset
        self.shape = (len(keys), environments)
        self.count = 0  # steps so far
        self.state = torch.zeros(4, *self.shape, dtype=dtype, device=keys.device)
        self.progress = torch.zeros(self.shape, dtype=torch.long, device=keys.device)
        self.over = torch.ones(self.shape, dtype=torch.bool, device=keys.device)

    def reset(self) -> Step:
        """Start every episode."""
        self.over.fill_(True)
        self._restart()
        return self._step(*self.cartpole.rewarded(self.state))

    def step(self, actions: Float[Tensor, "policies 1 environments"]) -> Step:
        self.count += 1
        self.state = self.advance(actions[:, 0])
        self.progress += 1
        if self.autoreset == "next_step":
            self._restart()
        reward, failed = self.cartpole.rewarded(self.state)
        step = self._step(reward, failed)
        self.over = step.terminated | step.truncated
        if self.autoreset == "same_step":
            self._restart()
            step = step._replace(observation=self._observed())
        return step

    def advance(self, action: Float[Tensor, "policies environments"]) -> State:
        """The states after an action."""
        return self.cartpole.advanced(self.state, action)

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these policies alone."""
        self.keys, self.progress, self.over = self.keys[rows], self.progress[rows], self.over[rows]
        self.state, self.shape = self.state[:, rows], (len(rows), self.shape[1])

    def close(self) -> None:
        """Nothing to close."""

    def _step(self, reward: Tensor, failed: Tensor) -> Step:
        truncated = (self.progress >= self.cartpole.max_steps - 1) & ~failed
        observation = self._observed()
        return Step(observation, reward, failed, truncated, observation)

    def _observed(self) -> Float[Tensor, "policies 4 environments"]:
        return self.cartpole.observed(self.state).transpose(0, 1).contiguous()

    def _restart(self) -> None:
        """Start the next episode where one is over."""
        # Only those: most steps end few episodes.
        policy, environment = self.over.nonzero(as_tuple=True)
        if not len(policy):
            return
        first = (self.count * self.shape[1] + environment) * 4
        counters = first + torch.arange(4, device=first.device)[:, None]
        started = self.cartpole.started(counted_uniform(self.keys[policy], counters).to(self.dtype))
        self.state[:, policy, environment] = started
        self.progress[policy, environment] = 0
        self.over = torch.zeros_like(self.over)


@dataclass(frozen=True)
class CartpoleWorld(World):
    """Cartpoles for training and evaluation, see `environments.World`."""

    cartpole: Cartpole = field(default_factory=Cartpole)
    observations = 4
    actions = Continuous(1)

    @property
    def max_steps(self) -> int:
        return self.cartpole.max_steps

    def training(
        self, seed: int, runs: Sequence[int], environments: int, device: torch.device, dtype: torch.dtype
    ) -> Environments:
        keys = stream_keys(seed, [f"cartpole/{run}" for run in runs], device)
        return CartpoleBatch(self.cartpole, keys, environments, dtype=dtype)

    def evaluation(self, networks: int, episodes: int, device: torch.device, dtype: torch.dtype) -> CartpoleBatch:
        keys = stream_keys(0, ["cartpole evaluation"], device).expand(networks)
        return CartpoleBatch(self.cartpole, keys, episodes, dtype=dtype)

    def describe(self) -> dict[str, Any]:
        return {"cartpole": vars(self.cartpole), "sign of the angle": "as in Isaac Gym"}


def drawn(state: list[float], cartpole: Cartpole) -> np.ndarray:
    """A picture [height, width, 3] of a state."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    x, ground = _WIDTH / 2 + _SCALE * state[0], _HEIGHT * 0.75
    ends = [_WIDTH / 2 + _SCALE * side * cartpole.max_position for side in (-1, 1)]
    draw.line([(ends[0], ground), (ends[1], ground)], fill="gray", width=3)
    draw.rectangle([x - 25, ground - 15, x + 25, ground + 15], fill="#4477aa")
    length = 2 * cartpole.pole_centre * _SCALE
    tip = (x + length * math.sin(state[2]), ground - length * math.cos(state[2]))
    draw.line([(x, ground), tip], fill="#cc6677", width=10)
    return np.array(image)
