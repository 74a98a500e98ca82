"""Reinforcement learning as a task: policies trained by PPO, scored by the return of whole episodes."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from triptych_common.fields import Checked, Ge
from triptych_common.randomness import permutation, stream_keys

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.symmetry.derivation import derive
from triptych_gpt.symmetry.spec import PermutationSpec
from triptych_gpt.tasks.initialisers import INITIALISERS, initial_networks
from triptych_gpt.tasks.reinforcement.cartpole import CartpoleWorld
from triptych_gpt.tasks.reinforcement.environments import Actions, Continuous, World
from triptych_gpt.tasks.reinforcement.policies import Policies, Selu
from triptych_gpt.tasks.reinforcement.ppo import EPISODES, Learner, PpoSettings, train_policies
from triptych_gpt.tasks.supervised import candidate_counts, describe, even_slices, recorded_steps, seconds_each
from triptych_gpt.tasks.task import Cohort, Metric, Prompts, Speed, Task, Trajectories

_LOOK = 25  # steps between looks at which networks' episodes are over
_AT_ONCE = 1 << 13  # episodes of evaluation at a time on a CPU, whose activations stay in the cache


@dataclass(frozen=True)
class ReinforcementTask(Checked, Task):
    """Policies trained by PPO in environments of one kind.  [thesis 3.3]

    network: builds a freshly initialised one, best an `nn.Sequential`: from an observation to the mean of each continuous action,
    or to a logit for each discrete one. critic: builds one with a single output; by default the network with another last layer.
    A checkpoint holds the policy alone: log_std first if actions are continuous, then the network as "actor".
    episodes: of an evaluation, the same for every network.

    Raises ValueError, when used, for a network that does not fit the environment, or whose symmetry cannot be derived.
    """

    name: str
    world: World
    network: Callable[[], nn.Module]
    ppo: PpoSettings = field(default_factory=PpoSettings)
    critic: Callable[[], nn.Module] | None = None
    episodes: Annotated[int, Ge(1)] = 16
    log_std: float = 0.0
    prompts: Prompts | None = None
    permutations: PermutationSpec | None = None

    @cached_property
    def policies(self) -> Policies:
        critic = self.critic or partial(with_one_output, self.network)
        found = Policies(self.network, critic, self.world.actions, self.log_std, self.ppo.squared_std)
        _check(self.name, found, self.world)
        return found

    @property
    def layout(self) -> ParameterLayout:
        return self.policies.actor.layout

    @cached_property
    def symmetry(self) -> PermutationSpec:
        return self.permutations or derive(self.policies.policy)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """train_return of a checkpoint is measured while it trains; `evaluate` scores it as the return of sampled actions."""
        greedy = f"mean return of {self.episodes} fixed episodes, most likely actions"
        sampled = f"mean return of the last {EPISODES} episodes of training, sampled actions"
        return (
            Metric("return", "higher", self.prompts, greedy),
            Metric("train_return", "higher", self.prompts, sampled),
        )

    @property
    def initialisers(self) -> tuple[str, ...]:
        return INITIALISERS

    @property
    def steps(self) -> int:
        """Iterations of PPO: checkpoints are taken between them."""
        return self.ppo.iterations

    def recipe(self) -> dict[str, Any]:
        return {
            "network": str(self.policies.policy),
            "builder": describe(self.network),
            "critic": describe(self.policies.critic),
            "layout": self.layout.to_json(),
            "world": self.world.describe(),
            "ppo": asdict(self.ppo),
            "episodes": self.episodes,
            "log_std": self.log_std,
            **self.settings(),
        }

    def settings(self) -> dict[str, Any]:
        return {"optimizer": "Adam", "schedule": self.ppo.schedule, "lr": self.ppo.learning_rate}

    def initial(self, seed: int, runs: Sequence[int], initialiser: str = "default") -> Float[Tensor, "runs D"]:
        return self._initial(seed, runs, initialiser)[:, : self.layout.size].contiguous()

    def _initial(self, seed: int, runs: Sequence[int], initialiser: str) -> Float[Tensor, "runs both"]:
        return initial_networks(self.policies.build, seed, runs, initialiser)

    def train_cohort(
        self, cohort: Cohort, device: torch.device, networks_at_once: int, dtype: torch.dtype = torch.float32
    ) -> Trajectories:
        record = recorded_steps(cohort, self.steps)
        theta = torch.empty(len(cohort.runs), cohort.checkpoints, self.layout.size, dtype=dtype, device=device)
        returns = torch.empty(theta.shape[:2], dtype=dtype)
        for here in even_slices(len(cohort.runs), networks_at_once):
            learner = self.learner(cohort, cohort.runs[here], device, dtype)
            try:
                returns[here] = train_policies(learner, record[here].to(device), theta[here]).cpu()
            finally:
                learner.environments.close()
        return Trajectories(theta.cpu(), record, {"train_return": returns})

    def learner(
        self,
        cohort: Cohort,
        runs: Sequence[int],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        theta: Float[Tensor, "runs D"] | None = None,
        make_optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] | None = None,
    ) -> Learner:
        """The policies of some runs of a cohort, before training.

        theta: other policies, which learn with the runs' critics and in their environments. make_optimizer: in place of Adam; the
        recipe's rate is set on its groups.
        """
        both = self._initial(cohort.seed, runs, cohort.initialiser).to(device, dtype)
        if theta is not None:
            both[:, : self.layout.size] = theta
        keys = stream_keys(cohort.seed, [f"actions/{run}" for run in runs], device)
        environments = self.world.training(cohort.seed, runs, self.ppo.environments, device, dtype)
        order = partial(self._order, cohort, runs)
        return Learner(self.policies, self.ppo, both, environments, keys, order, make_optimizer)

    def _order(self, cohort: Cohort, runs: Sequence[int], epoch: int) -> Tensor:
        """Of a rollout's items in an epoch: the cohort's, or each run's own."""
        items = self.ppo.environments * self.ppo.steps
        if cohort.shared_batches:
            return permutation(cohort.seed, f"items/cohort-{cohort.number}", epoch, items)
        return torch.stack([permutation(cohort.seed, f"items/run-{run}", epoch, items) for run in runs])

    def evaluate(self, theta: Float[Tensor, "n D"]) -> Mapping[str, Float[Tensor, " n"]]:
        return Returns(self, theta)

    @torch.no_grad()
    def returns(self, theta: Float[Tensor, "n D"], *, sampled: bool = False) -> Float[Tensor, " n"]:
        """Mean return of the evaluation's episodes, the same starts, and noise if actions are sampled, for all networks."""
        world, policies, parameters = self.world, self.policies, dict(self.policies.parameters(theta))
        environments = world.evaluation(len(theta), self.episodes, theta.device, theta.dtype)
        noise = stream_keys(0, ["evaluation actions"], theta.device)
        try:
            step = environments.reset()
            total, alive = step.reward.clone(), torch.ones_like(step.terminated)
            out, rows = theta.new_empty(len(theta)), torch.arange(len(theta), device=theta.device)
            for count in range(world.max_steps):
                outputs = policies.outputs(parameters, step.observation)
                actions = policies.sampled(parameters, outputs, noise, count) if sampled else policies.greedy(outputs)
                step = environments.step(actions)
                total += step.reward * alive
                alive &= ~(step.terminated | step.truncated)
                if count % _LOOK == _LOOK - 1 and not (going := alive.any(1)).all():
                    out[rows[~going]] = total[~going].mean(1)
                    if not going.any():
                        return out
                    on = going.nonzero()[:, 0]
                    environments.keep(on)
                    parameters = {name: value[on] for name, value in parameters.items()}
                    step = step._replace(observation=step.observation[on])
                    total, alive, rows = total[on], alive[on], rows[on]
            out[rows] = total.mean(1)
            return out
        finally:
            environments.close()

    def measure(self, device: torch.device, cohort_runs: int, shared_batches: bool = True) -> Speed:
        """Time an iteration of various numbers of policies, the cohort's at most, and the scoring of their first state."""

        def take(policies: int) -> float:
            cohort = Cohort(0, 0, range(policies), shared_batches=shared_batches)
            learner = self.learner(cohort, cohort.runs, device)
            try:
                return seconds_each(partial(_iterate, learner), self.steps) / policies
            finally:
                learner.environments.close()

        timed = {count: take(count) for count in candidate_counts(cohort_runs)}
        best = min(timed, key=timed.__getitem__)
        theta = self.initial(0, range(cohort_runs)).to(device)
        score = seconds_each(lambda count: self.evaluate(theta[:count])["return"].cpu(), len(theta))
        return Speed(best, timed[best] * self.steps, score)


class Returns(Mapping[str, Tensor]):
    """What `evaluate` scores, when it is looked up: collecting has train_return already, and scoring is half of its time."""

    def __init__(self, task: ReinforcementTask, theta: Float[Tensor, "n D"]) -> None:
        self.task, self.theta = task, theta
        self.names = [metric.name for metric in task.metrics]

    def __getitem__(self, name: str) -> Float[Tensor, " n"]:
        if name not in self.names:
            raise KeyError(name)
        at_once = max(1, _AT_ONCE // self.task.episodes) if self.theta.device.type == "cpu" else max(1, len(self.theta))
        parts = self.theta.split(at_once)
        return torch.cat([self.task.returns(part, sampled=name == "train_return") for part in parts])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _iterate(learner: Learner, count: int) -> None:
    for _ in range(count):
        learner.iterate()
    learner.parameters[learner.policies.actor.layout.names[0]].flatten()[0].item()  # waits for the device


def with_one_output(network: Callable[[], nn.Module]) -> nn.Module:
    """The network with a single output, for a critic. Raises ValueError unless its last layer is a Linear."""
    built = network()
    last = built[-1] if isinstance(built, nn.Sequential) and len(built) else built
    if not isinstance(last, nn.Linear):
        raise ValueError(
            f"network ending in {type(last).__name__}: expected an nn.Sequential ending in nn.Linear, or give a critic"
        )
    value = nn.Linear(last.in_features, 1)
    return (
        nn.Sequential(OrderedDict([*list(built.named_children())[:-1], ("value", value)]))
        if last is not built
        else value
    )


def _check(name: str, policies: Policies, world: World) -> None:
    """Raises ValueError for networks of other inputs or outputs than the environment's."""
    actions: Actions = world.actions
    wanted = actions.size if isinstance(actions, Continuous) else actions.choices
    inputs = torch.zeros(1, world.observations)
    for what, network, count in (("network", policies.policy, wanted), ("critic", policies.valuer.network, 1)):
        given = f"observations ({world.observations},), outputs ({count},)"
        try:
            with torch.no_grad():
                found = tuple(network.eval()(inputs).shape[1:])
        except RuntimeError as error:
            first = next((tuple(p.shape) for p in network.parameters() if p.ndim > 1), "unknown")
            raise ValueError(
                f"task {name}: the {what}'s first weight is {first}, the environment has {given}; fit one to the other"
            ) from error
        if found != (count,):
            raise ValueError(
                f"task {name}: the {what} gives {found}, the environment needs {given}; fit one to the other"
            )


_PROMPTS = Prompts(500.0, 500.0, 1.0)  # released

CARTPOLE = ReinforcementTask(
    "cartpole",
    CartpoleWorld(),
    Selu(),
    critic=Selu(last_gain=1.0),
    prompts=_PROMPTS,
)
CARTPOLE_SMALL = ReinforcementTask(
    "cartpole_small",
    CartpoleWorld(),
    Selu(),
    critic=Selu(last_gain=1.0),
    prompts=_PROMPTS,
    episodes=8,
    ppo=PpoSettings(environments=32, steps=16, iterations=200, epochs=4, minibatches=2, learning_rate=3e-3),
)
