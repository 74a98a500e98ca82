"""Anyone's environments, in gymnasium's interface, stepped in a process of their own."""

import atexit
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from triptych_common.extras import import_extra
from triptych_common.fields import Checked, Ge, Gt
from triptych_common.randomness import counted_bits, stream_keys

from triptych_gpt.tasks.reinforcement.environments import Actions, Continuous, Discrete, Environments, Step, World
from triptych_gpt.tasks.reinforcement.serving import serve
from triptych_gpt.tasks.supervised import describe


@dataclass(frozen=True)
class GymnasiumWorld(Checked, World):
    """Environments with Box observations and Box or Discrete actions.

    environment: an id of gymnasium, "module:id" to import the module first, or a function that makes an environment.
    arguments: keywords for an id. episode_steps: of an evaluated episode at most, if the environment has no limit of its own.
    timeout: seconds that a step of all environments may take, or making them.

    Raises ValueError, when used, for an unknown environment or other spaces.
    """

    environment: str | Callable[[], Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    episode_steps: Annotated[int, Ge(1)] = 1000
    timeout: Annotated[float, Gt(0)] = 60.0

    @property
    def name(self) -> str:
        return self.environment if isinstance(self.environment, str) else describe(self.environment)

    @cached_property
    def process(self) -> "Process":
        return Process(self.name, self._maker(), self.timeout)

    def _maker(self) -> bytes:
        gymnasium = _gymnasium()
        import cloudpickle

        if isinstance(self.environment, str):
            return cloudpickle.dumps(partial(gymnasium.make, self.environment, **self.arguments))
        # A task's file is no module that another process could import.
        module = sys.modules.get(getattr(self.environment, "__module__", ""))
        own = module is not None and module.__name__.startswith("triptych_gpt_task_")
        if own:
            cloudpickle.register_pickle_by_value(module)
        try:
            return cloudpickle.dumps(self.environment)
        finally:
            if own:
                cloudpickle.unregister_pickle_by_value(module)

    @cached_property
    def _spaces(self) -> tuple[int, Actions, int]:
        spaces = _gymnasium().spaces
        observed, acted, limit, _ = self.process.ask("spaces")
        if not isinstance(observed, spaces.Box):
            remedy = "expected a Box; wrap it, such as in gymnasium.wrappers.FlattenObservation"
            raise ValueError(f"environment {self.name}: observations are {observed}, {remedy}")
        actions: Actions
        if isinstance(acted, spaces.Discrete):
            actions = Discrete(int(acted.n))
        elif isinstance(acted, spaces.Box):
            actions = Continuous(int(np.prod(acted.shape)))
        else:
            raise ValueError(f"environment {self.name}: actions are {acted}, expected a Box or Discrete; wrap it")
        return int(np.prod(observed.shape)), actions, limit or self.episode_steps

    @property
    def observations(self) -> int:
        return self._spaces[0]

    @property
    def actions(self) -> Actions:
        return self._spaces[1]

    @property
    def max_steps(self) -> int:
        return self._spaces[2]

    def training(
        self, seed: int, runs: Sequence[int], environments: int, device: torch.device, dtype: torch.dtype
    ) -> Environments:
        return self._batch(stream_keys(seed, [f"environment/{run}" for run in runs]), environments, device, dtype)

    def evaluation(self, networks: int, episodes: int, device: torch.device, dtype: torch.dtype) -> Environments:
        return self._batch(stream_keys(0, ["evaluation"]).expand(networks), episodes, device, dtype)

    def _batch(self, keys: Tensor, count: int, device: torch.device, dtype: torch.dtype) -> "GymnasiumBatch":
        seeds = (
            counted_bits(keys[:, None], torch.arange(count)) >> 33 & (1 << 31) - 1
        )  # 31 bits, as environments take them
        return GymnasiumBatch(self.process, seeds, device, dtype)

    def describe(self) -> dict[str, Any]:
        observed, acted, limit, words = self.process.ask("spaces")
        described = {"environment": self.name, "instance": words, "observations": str(observed), "actions": str(acted)}
        return {**described, "arguments": dict(self.arguments), "max_steps": limit or self.episode_steps}


def _gymnasium() -> Any:
    return import_extra("gymnasium", "environments of your own need a package: pip install 'triptych-gpt[rl]'")


@dataclass
class GymnasiumBatch:
    """Environments [policies, environments], begun again at once when over."""

    process: "Process"
    seeds: Int[Tensor, "policies environments"]
    device: torch.device
    dtype: torch.dtype

    def reset(self) -> Step:
        observed = self._tensor(self.process.ask("reset", self.seeds.flatten().tolist()))
        zeros = torch.zeros(self.seeds.shape, dtype=self.dtype, device=self.device)
        return Step(observed, zeros, zeros.bool(), zeros.bool(), observed)

    def step(self, actions: Tensor) -> Step:
        flat = actions.transpose(1, 2).flatten(0, 1).cpu().numpy()
        observed, rewards, terminated, truncated, final = self.process.ask("step", flat)
        # A policy that has diverged acts by finite actions all the same, so that these are the environment's own.
        for what, values in (("a reward", rewards), ("an observation", final)):
            if not np.isfinite(values).all():
                found = values[~np.isfinite(values)][0]
                raise ValueError(
                    f"environment {self.process.name}: {what} of {found} in a step; make it finite, or clip it"
                )
        numbers = torch.from_numpy(rewards).to(self.device, self.dtype).view(self.seeds.shape)
        failed, late = (torch.from_numpy(x).to(self.device).view(self.seeds.shape) for x in (terminated, truncated))
        return Step(self._tensor(observed), numbers, failed, late, self._tensor(final))

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        count = self.seeds.shape[1]
        self.process.ask("keep", (rows.cpu()[:, None] * count + torch.arange(count)).flatten().tolist())
        self.seeds = self.seeds[rows.cpu()]

    def close(self) -> None:
        """The process stays for the next batch."""

    def _tensor(self, rows: np.ndarray) -> Tensor:
        values = torch.from_numpy(rows).to(self.device, self.dtype)
        return values.view(*self.seeds.shape, -1).transpose(1, 2).contiguous()


class Process:
    """A process of environments. Raises ValueError where one raises, hangs or ends the process."""

    def __init__(self, name: str, maker: bytes, timeout: float) -> None:
        self.name, self.maker, self.timeout = name, maker, timeout
        self._started: tuple[Any, Any] | None = None

    def ask(self, command: str, *arguments: Any) -> Any:
        """The answer to a command."""
        if self._started is None:
            self._start()
        return self._ask(command, *arguments)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._started = process, ours
        atexit.register(self.stop)
        self._ask("make", self.maker)

    def _ask(self, command: str, *arguments: Any) -> Any:
        assert self._started is not None
        pipe = self._started[1]
        try:
            pipe.send((command, arguments))
            if not pipe.poll(self.timeout):
                self.stop()
                doing = {"make": "being made", "reset": "a reset"}.get(command, f"a {command}")
                problem = f"no answer to {doing} within {self.timeout:g} s"
                raise ValueError(f"environment {self.name}: {problem}; it hangs, or raise the world's timeout")
            right, answer = pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.stop()
            raise ValueError(
                f"environment {self.name}: its process ended during a {command}; was it killed?"
            ) from error
        if not right:
            self.stop()
            raise ValueError(f"environment {self.name}: {command} fails ({answer})")
        return answer

    def stop(self) -> None:
        """End the process; the next question starts another."""
        if self._started is not None:
            process, pipe = self._started
            self._started = None
            pipe.close()
            process.kill()
            process.join()
            atexit.unregister(self.stop)
