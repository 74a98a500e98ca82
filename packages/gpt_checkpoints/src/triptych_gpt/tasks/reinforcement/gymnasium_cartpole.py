"""The cartpole as gymnasium environments, one or many; float64 inside, float32 observations."""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from triptych_gpt.tasks.reinforcement import registration  # noqa: F401 - so that importing this module registers them, too
from triptych_gpt.tasks.reinforcement.cartpole import Cartpole, drawn


def _spaces(cartpole: Cartpole) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]:
    bound = cartpole.clip_observations
    return gymnasium.spaces.Box(-bound, bound, (4,), np.float32), gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)


class CartpoleEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One cartpole: an action in [-1, 1] pushes it by up to 400 N. A failed episode terminates, one of 499 steps is truncated."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 60}  # noqa: RUF012 - as gymnasium declares it

    def __init__(self, render_mode: str | None = None, cartpole: Cartpole | None = None) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r}: expected rgb_array, or None")
        self.render_mode, self.cartpole = render_mode, cartpole or Cartpole()
        self.observation_space, self.action_space = _spaces(self.cartpole)
        self.state = torch.zeros(4, dtype=torch.float64)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state, self.steps = self.cartpole.started(torch.from_numpy(self.np_random.random(4))), 0
        return self._observed(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.state = self.cartpole.advanced(self.state, torch.as_tensor(action, dtype=torch.float64).reshape(()))
        self.steps += 1
        reward, failed = self.cartpole.rewarded(self.state)
        over = self.steps >= self.cartpole.max_steps - 1 and not failed
        return self._observed(), float(reward), bool(failed), over, {}

    def render(self) -> np.ndarray | None:
        return None if self.render_mode is None else drawn(self.state.tolist(), self.cartpole)

    def _observed(self) -> np.ndarray:
        return self.cartpole.observed(self.state).float().numpy()


class CartpoleVectorEnv(VectorEnv):
    """Many cartpoles at once; each equals a CartpoleEnv of its own seed, bit for bit."""

    def __init__(
        self, num_envs: int = 1, render_mode: str | None = None, cartpole: Cartpole | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ) -> None:  # fmt: skip
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        if self.autoreset_mode == AutoresetMode.DISABLED:
            raise ValueError(f"autoreset_mode {self.autoreset_mode}: expected NEXT_STEP or SAME_STEP")
        self.metadata = {**CartpoleEnv.metadata, "autoreset_mode": self.autoreset_mode}
        self.num_envs, self.render_mode, self.cartpole = num_envs, render_mode, cartpole or Cartpole()
        self.single_observation_space, self.single_action_space = _spaces(self.cartpole)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.state = torch.zeros(4, num_envs, dtype=torch.float64)
        self.steps, self.over = np.zeros(num_envs, dtype=np.int64), np.zeros(num_envs, dtype=bool)
        self._generators = [np_random(None)[0] for _ in range(num_envs)]

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        seeds = (
            [None if seed is None else seed + i for i in range(self.num_envs)] if not isinstance(seed, list) else seed
        )
        for i, own in enumerate(seeds):
            if own is not None:
                self._generators[i] = np_random(own)[0]
        self.over[:] = False
        self._start(np.ones(self.num_envs, dtype=bool))
        return self._observed(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.state = self.cartpole.advanced(self.state, torch.as_tensor(actions, dtype=torch.float64)[:, 0])
        self.steps += 1
        reward, failed = (x.numpy() for x in self.cartpole.rewarded(self.state))
        over = (self.steps >= self.cartpole.max_steps - 1) & ~failed
        infos: dict[str, Any] = {}
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:  # the action of what was over is ignored
            self._start(self.over)
            reward[self.over] = 0.0
            failed, over = failed & ~self.over, over & ~self.over
            self.over = failed | over
        elif (failed | over).any():
            final = self._observed()
            for i in np.nonzero(failed | over)[0]:
                infos = self._add_info(infos, {"final_obs": final[i], "final_info": {}}, int(i))
            self._start(failed | over)
        return self._observed(), reward, failed, over, infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        if self.render_mode is None:
            return None
        return tuple(drawn(state, self.cartpole) for state in self.state.T.tolist())

    def _start(self, which: np.ndarray) -> None:
        """Start the next episode of these."""
        chosen = np.nonzero(which)[0]
        if len(chosen):
            uniform = np.stack([self._generators[i].random(4) for i in chosen], 1)
            self.state[:, chosen] = self.cartpole.started(torch.from_numpy(uniform))
            self.steps[chosen] = 0

    def _observed(self) -> np.ndarray:
        return self.cartpole.observed(self.state).float().T.contiguous().numpy()
