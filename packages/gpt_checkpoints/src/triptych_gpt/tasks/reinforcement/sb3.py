"""gymnasium's vector environments for stable-baselines3."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices


class Sb3VecEnv(VecEnv):
    """A vector environment with same-step autoreset, whose sub-environments share one process, as stable-baselines3 steps them.

        PPO("MlpPolicy", Sb3VecEnv(gymnasium.make_vec("triptych/Cartpole-v0", 512, autoreset_mode="SameStep")))

    Raises ValueError for another autoreset mode.
    """

    def __init__(self, environments: VectorEnv) -> None:
        mode = environments.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                f"autoreset_mode {mode}: stable-baselines3 needs {AutoresetMode.SAME_STEP}; pass it to make_vec"
            )
        self.environments = environments
        self.render_mode = environments.render_mode
        super().__init__(environments.num_envs, environments.single_observation_space, environments.single_action_space)

    def reset(self) -> np.ndarray:
        first = self._seeds[0]  # the others' follow it, as gymnasium's do
        observations, _ = self.environments.reset(seed=None if first is None else int(first))
        self._reset_seeds()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observations, rewards, terminated, truncated, infos = self.environments.step(self._actions)
        done = terminated | truncated
        each: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.nonzero(done)[0]:
            late = bool(truncated[i] and not terminated[i])
            each[i] = {"terminal_observation": infos["final_obs"][i], "TimeLimit.truncated": late}
        return observations, rewards.astype(np.float32), done, each

    def close(self) -> None:
        self.environments.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self.environments, attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        setattr(self.environments, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        return [getattr(self.environments, method_name)(*args, **kwargs)] * len(self._rows(indices))

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        return [False] * len(self._rows(indices))

    def get_images(self) -> Sequence[np.ndarray | None]:
        images: Any = self.environments.render()
        return list(images) if images else [None] * self.num_envs

    def _rows(self, indices: VecEnvIndices) -> list[int]:
        return list(self._get_indices(indices))
