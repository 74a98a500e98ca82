"""The process in which a user's environments run: it may hang, raise or die without harm to the one that trains.

Imports no torch.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np


def serve(pipe: Connection) -> None:
    """Answer each (name, arguments) with (True, result) or (False, error in one line), until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    state: dict[str, Batch] = {}
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send((True, _COMMANDS[name](state, *arguments)))
        except Exception as error:
            pipe.send((False, " ".join(f"{type(error).__name__}: {error}".split())))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "served by a child"
    parent.join()
    os._exit(1)  # even if an environment hangs


def _make(state: dict[str, "Batch"], maker: bytes) -> None:
    import cloudpickle  # by which gymnasium sends environments to processes, too

    state["batch"] = Batch(cloudpickle.loads(maker))


_COMMANDS: dict[str, Callable[..., Any]] = {
    "make": _make,
    "spaces": lambda state: state["batch"].spaces(),
    "reset": lambda state, *arguments: state["batch"].reset(*arguments),
    "step": lambda state, *arguments: state["batch"].step(*arguments),
    "keep": lambda state, rows: state["batch"].keep(rows),
}


class Batch:
    """Environments of one kind, stepped one after another; kept for the next batch, since some take long to make."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.all: list[Any] = [make()]
        self.used: list[Any] = []

    def spaces(self) -> tuple[Any, Any, int | None, str]:
        """Spaces of observations and actions, steps of an episode at most if known, and the environment in words."""
        first = self.all[0]
        limit = first.spec.max_episode_steps if first.spec is not None else None
        return first.observation_space, first.action_space, limit, str(first.unwrapped)

    def reset(self, seeds: list[int]) -> np.ndarray:
        while len(self.all) < len(seeds):
            self.all.append(self.make())
        self.used = self.all[: len(seeds)]
        return self._rows([environment.reset(seed=seed)[0] for environment, seed in zip(self.used, seeds, strict=True)])

    def keep(self, rows: list[int]) -> None:
        self.used = [self.used[row] for row in rows]

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Observations, rewards, terminated, truncated, and observations before those that were over began again."""
        space = self.all[0].action_space
        observed, final, rewards, terminated, truncated = [], [], [], [], []
        for environment, action in zip(self.used, actions, strict=True):
            observation, reward, failed, late, _ = environment.step(_fitting(space, action))
            final.append(observation)
            if failed or late:
                observation, _ = environment.reset()
            observed.append(observation)
            rewards.append(float(reward))
            terminated.append(bool(failed))
            truncated.append(bool(late and not failed))
        flags = np.array(terminated), np.array(truncated)
        return self._rows(observed), np.array(rewards), *flags, self._rows(final)

    def _rows(self, observations: list[Any]) -> np.ndarray:
        return np.stack([np.asarray(each, dtype=np.float64).reshape(-1) for each in observations])


def _fitting(space: Any, action: np.ndarray) -> Any:
    """An action that the environment accepts."""
    if hasattr(space, "n"):
        return int(action[0]) + int(space.start)
    # A policy that has diverged must not end the others' rollout.
    bounded = np.clip(np.nan_to_num(action), space.low.reshape(-1), space.high.reshape(-1))
    return bounded.astype(space.dtype).reshape(space.shape)
