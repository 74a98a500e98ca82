"""What a G.pt is trained on: pairs of checkpoints, the later one noised, and the error of its denoising.  [thesis eq. 3.1]

A pair is (theta, theta*), an earlier and a later checkpoint of one run, with their metrics. The network sees theta, noised
theta* and both metrics, and predicts theta*: it learns which changes of parameters lead from one metric to another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from triptych_common import randomness
from triptych_common.diffusion import GaussianDiffusion, Loss, NoiseSchedule
from triptych_common.parallel import onto

from triptych_gpt.config import GptConfig, MetricScale
from triptych_gpt.model import FORMAT, Gpt
from triptych_gpt.tokenizers import coarsened
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.zoo.pairs import Pairs, stratified
from triptych_gpt.zoo.source import contents_of, recipe_of, task_of
from triptych_gpt.zoo.zoo import Zoo

PIXEL_STD = 0.538  # of ImageNet pixels in [-1, 1], for which the noise schedule was designed
_SAMPLED = 25_000  # checkpoints from which the standard deviation of the parameters is estimated


def make_diffusion() -> GaussianDiffusion:
    """1000 linear steps, predicting the clean parameters, fixed large variance.  [thesis 3.2.2]"""
    # Predicting theta* rather than the noise lets the network output an update of theta, which is close to it already.
    return GaussianDiffusion(NoiseSchedule.linear(), predict="sample", variance="fixed_large", decoder="gaussian")


class Examples(NamedTuple):
    """Everything a loss needs besides the network, on the CPU; thetas are normalised."""

    theta: Float[Tensor, "n D"]
    theta_star: Float[Tensor, "n D"]
    metric: Float[Tensor, " n"]
    metric_star: Float[Tensor, " n"]
    t: Int[Tensor, " n"]
    noise: Float[Tensor, "n D"]


class Source(NamedTuple):
    """A model to start from, and the facts in its file."""

    model: Gpt
    facts: Mapping[str, Any]


def _source(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Source:
    model = Gpt(GptConfig.from_json(facts["config"]))
    model.load_state_dict(tensors)
    return Source(model, facts)


class TrainingZoo:
    """A zoo as one model sees it: its task, the metric that prompts the model, and the training runs.

    Raises ValueError for a metric or a number of runs that the zoo does not have, or a task that is not the zoo's.
    """

    def __init__(self, config: GptTrainConfig) -> None:
        self.config, self.zoo = config, Zoo(config.zoo)
        self.task, self.spec = task_of(self.zoo, config.task)
        self.metric = config.metric or self.zoo.metric_names[0]
        self.rows = torch.from_numpy(self.zoo.runs_in("train"))
        if config.runs is not None and config.runs > len(self.rows):
            raise ValueError(f"runs {config.runs:,}: {config.zoo} holds {len(self.rows):,} training runs; use fewer")
        self.rows = self.rows[: config.runs]
        self.values = self.zoo.metrics(self.metric)[self.rows]

    @cached_property
    def source(self) -> "Source | None":
        """The model to start from. Raises ValueError for one that is prompted with another metric, or of another kind."""
        if self.config.init_from is None:
            return None
        source = FORMAT.read(self.config.init_from, _source)
        if (theirs := source.facts["metric"]) != self.metric:
            raise ValueError(f"init_from {self.config.init_from}: prompted with {theirs}; pass --metric {theirs}")
        return source

    @cached_property
    def scale(self) -> float:
        """The factor that gives parameters the standard deviation of pixels in [-1, 1], or that of the model to start from.

        [thesis 3.3]
        """
        if self.source is not None:
            return float(self.source.facts["scale"])
        # One factor for all parameters, without shifting them: layers keep their sizes relative to each other, and zero stays zero.
        n = min(_SAMPLED, self.values.numel())
        rows = (randomness.uniform(0, "scale run", range(n)) * len(self.rows)).long()
        places = (randomness.uniform(0, "scale checkpoint", range(n)) * self.zoo.checkpoints).long()
        total, squares = 0.0, 0.0  # in float64, a thousand checkpoints at a time: all at once take gigabytes
        for some in torch.arange(n).split(1000):
            theta = self.zoo.theta(self.rows[rows[some]], places[some]).double()
            total, squares = total + float(theta.sum()), squares + float(theta.square().sum())
        count = n * self.zoo.layout.size
        return PIXEL_STD / (squares / count - (total / count) ** 2) ** 0.5

    @cached_property
    def augmented(self) -> bool:
        """Whether units are permuted at random: by default wherever the tokens do not follow every permutation by themselves."""
        symmetry, config = self.task.symmetry, self.config
        follow = config.tokenizer == "neuron" and coarsened(symmetry) is symmetry
        return config.augment == "on" or (config.augment == "auto" and not follow)

    @cached_property
    def orders(self) -> dict[str, Int[Tensor, "runs _"]] | None:
        """Permutations that bring each run's units into the order of the first run's; None unless canonicalise is set."""
        if not self.config.canonicalise:
            return None
        from triptych_gpt.symmetry.matching import match

        # Matched by last checkpoints, one permutation a run: units of one run correspond from its first checkpoint to its last.
        last = self.zoo.theta(self.rows, torch.full_like(self.rows, self.zoo.checkpoints - 1))
        parts = [match(self.task.symmetry, some, last[0]) for some in last.split(256)]
        return {group: torch.cat([part[group] for part in parts]) for group in parts[0]}

    @cached_property
    def model_config(self) -> GptConfig:
        """The model's shape, from the config and the zoo, with the metric's scale of the model to start from.

        Raises ValueError where that is of another shape.
        """
        names = ("tokenizer", "chunk_size", "width", "depth", "num_heads", "scalars", "metric_factor")
        scale = MetricScale.of(self.values) if self.config.scalars == "normalised" else None
        shape = {name: getattr(self.config, name) for name in names}
        own = GptConfig(self.task.symmetry, metric_scale=scale, **shape)
        if self.source is None:
            return own
        theirs = self.source.model.config
        for name, value in replace(own, metric_scale=theirs.metric_scale).to_json().items():
            if theirs.to_json()[name] != value:
                found = (
                    "other networks" if name == "symmetry" else f"{name} {theirs.to_json()[name]}, here it is {value}"
                )
                raise ValueError(f"init_from {self.config.init_from}: a model of {found}; pass its own settings")
        return theirs

    def identity(self) -> dict[str, Any]:
        """What decides the content of training: the recipe of the runs, which of them, and their bytes."""
        return {
            "task": self.zoo.task,
            "recipe": recipe_of(self.zoo),
            "metric": self.metric,
            "checkpoints": self.zoo.checkpoints,
            "training_runs": len(self.rows),
            "last_run": int(self.zoo.runs.run[self.rows[-1]]),
            "contents": contents_of(self.zoo.shards_of(self._used)),
        }

    @property
    def _used(self) -> list[int]:
        """Rows of the runs to train on and of those to validate on, also while there is no validation, which may begin later."""
        validated = self.config.validation_networks
        held = self.zoo.runs_in("validation")[:validated].tolist() if "validation" in self.zoo.splits else []
        return [*self.rows.tolist(), *held]


class Objective:
    """Denoising of each pair's later checkpoint. Everything random about a pair is a function of the seed and its counter."""

    def __init__(self, data: TrainingZoo) -> None:
        self.data, self.config, self.diffusion = data, data.config, make_diffusion()
        sampling: Any = self.config.pairs
        sampling = stratified(data.values, data.zoo.better[data.metric]) if sampling == "stratified" else sampling
        self.pairs = Pairs(data.zoo, "train", sampling, self.config.seed, runs=len(data.rows))

    def draw(self, counters: Sequence[int]) -> Examples:
        """The examples at these counters, on the CPU."""
        data, seed, dtype = self.data, self.config.seed, self.config.dtype
        batch = self.pairs.draw(counters)
        # n 2 D: theta and theta* are permuted alike, or their units would no longer correspond.
        both, symmetry = torch.stack([batch.theta, batch.theta_star], dim=1), data.task.symmetry
        if data.orders is not None:
            both = symmetry.apply(both, {group: order[batch.places] for group, order in data.orders.items()})
        # Augmentation: afresh for every pair, a network with its units in another order, which computes the same function.
        if data.augmented:
            both = symmetry.apply(both, symmetry.draw(seed, counters))
        theta, theta_star = (both.to(dtype) * data.scale).unbind(1)
        # Timesteps of consecutive counters are evenly spread over 0..999, which lowers the variance of a batch's loss.
        t = (randomness.evenly_spread(seed, "timestep", counters) * len(self.diffusion.schedule)).long()
        noise = randomness.normal(seed, "noise", counters, theta.shape[1:], dtype=dtype)
        metric, metric_star = (values[data.metric].to(dtype) for values in (batch.metrics, batch.metrics_star))
        return Examples(theta, theta_star, metric, metric_star, t, noise)

    def loss(self, network: nn.Module, examples: Examples, device: torch.device) -> Loss:
        """Loss of each example; network: the model, or a parallel wrapper of it."""
        theta, theta_star, metric, metric_star, t, noise = (onto(device, value) for value in examples)
        noised = self.diffusion.q_sample(theta_star, t, noise)
        # The prompt in training is the metric that theta* has achieved.
        output = network(noised, t, theta, metric, metric_star)
        return self.diffusion.loss(output, theta_star, noised, t, noise)


def training_flops(config: GptConfig) -> int:
    """Floating-point operations of a forward and a backward pass for one pair, two for each multiply-add."""
    with torch.device("meta"):
        model, theta, scalar = Gpt(config), torch.empty(1, config.symmetry.layout.size), torch.empty(1)
        # MATH: attention is counted as the matrix products that it consists of.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(theta, scalar, theta, scalar, scalar)
    return 3 * counter.get_total_flops()
