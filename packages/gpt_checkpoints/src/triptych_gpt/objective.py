"""What a G.pt is trained on: pairs of checkpoints, noised, and the error of the denoised later one.  [thesis eq. 3.1]"""

from collections.abc import Sequence
from dataclasses import asdict, replace
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
from triptych_gpt.model import Gpt
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.zoo.pairs import Pairs, Sampling, stratified
from triptych_gpt.zoo.source import recipe_of, task_of
from triptych_gpt.zoo.zoo import Zoo

PIXEL_STD = 0.538  # of ImageNet pixels in [-1, 1], which the noise schedule was made for
_SAMPLED = 25_000  # checkpoints that the parameters' deviation is measured on


def make_diffusion() -> GaussianDiffusion:
    """1000 linear steps, predicting the clean parameters, fixed large variance.  [thesis 3.2.2]"""
    return GaussianDiffusion(NoiseSchedule.linear(), predict="sample", variance="fixed_large", decoder="gaussian")


class Examples(NamedTuple):
    """Everything a loss needs besides the network, on the CPU; thetas are normalised."""

    theta: Float[Tensor, "n D"]
    theta_star: Float[Tensor, "n D"]
    metric: Float[Tensor, " n"]
    metric_star: Float[Tensor, " n"]
    t: Int[Tensor, " n"]
    noise: Float[Tensor, "n D"]


class TrainingZoo:
    """A zoo as one model sees it: its task, the metric it is prompted with, and the runs it learns from.

    Raises ValueError for a metric or a number of runs that the zoo does not have, or a task that is not the zoo's.
    """

    def __init__(self, config: GptTrainConfig) -> None:
        self.config, self.zoo = config, Zoo(config.zoo)
        self.task, self.spec = task_of(self.zoo, config.task)
        self.metric = config.metric or self.zoo.metric_names[0]
        values = self.zoo.metrics(self.metric)
        self.rows = torch.from_numpy(self.zoo.runs_in("train"))
        if config.runs is not None and config.runs > len(self.rows):
            raise ValueError(f"runs {config.runs:,}: {config.zoo} holds {len(self.rows):,} training runs; use fewer")
        self.rows = self.rows[: config.runs]
        self.values = values[self.rows]

    @cached_property
    def scale(self) -> float:
        """What parameters are multiplied by, so that they vary as much as pixels in [-1, 1] do.  [thesis 3.3]"""
        n = min(_SAMPLED, self.values.numel())
        rows = (randomness.uniform(0, "scale run", range(n)) * len(self.rows)).long()
        places = (randomness.uniform(0, "scale checkpoint", range(n)) * self.zoo.checkpoints).long()
        total, squares = 0.0, 0.0
        for some in torch.arange(n).split(1000):
            theta = self.zoo.theta(self.rows[rows[some]], places[some]).double()
            total, squares = total + float(theta.sum()), squares + float(theta.square().sum())
        count = n * self.zoo.layout.size
        return PIXEL_STD / (squares / count - (total / count) ** 2) ** 0.5

    @cached_property
    def orders(self) -> dict[str, Int[Tensor, "runs _"]] | None:
        """Permutations that bring each run into the order of the first one's last network; None where nothing is reordered."""
        if not self.config.canonicalise:
            return None
        from triptych_gpt.symmetry.matching import match

        last = self.zoo.theta(self.rows, torch.full_like(self.rows, self.zoo.checkpoints - 1))
        found = [match(self.task.symmetry, some, last[0]) for some in last.split(256)]
        return {group: torch.cat([part[group] for part in found]) for group in found[0]}

    @cached_property
    def model_config(self) -> GptConfig:
        """The shape of the model that this config and zoo ask for."""
        c = self.config
        return GptConfig(
            symmetry=self.task.symmetry, tokenizer=c.tokenizer, chunk_size=c.chunk_size, width=c.width, depth=c.depth,
            num_heads=c.num_heads, scalars=c.scalars, metric_factor=c.metric_factor,
            metric_scale=MetricScale.of(self.values) if c.scalars == "normalised" else None,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """The content that decides what is learned: which recipe's runs, and which of them."""
        return {
            "task": self.zoo.task,
            "recipe": recipe_of(self.zoo),
            "metric": self.metric,
            "checkpoints": self.zoo.checkpoints,
            "training_runs": len(self.rows),
            "last_run": int(self.zoo.runs.run[self.rows[-1]]),
        }


class Objective:
    """Denoising of the later checkpoint of each pair. All that is random about a pair follows from (seed, its counter)."""

    def __init__(self, data: TrainingZoo) -> None:
        self.data, self.config, self.diffusion = data, data.config, make_diffusion()
        sampling: str | Sampling = self.config.pairs
        if sampling == "stratified":
            sampling = stratified(data.values, data.zoo.better[data.metric])
        self.pairs = Pairs(data.zoo, "train", sampling, self.config.seed, runs=len(data.rows))

    def draw(self, counters: Sequence[int]) -> Examples:
        """The examples of some counters."""
        data, seed, dtype = self.data, self.config.seed, self.config.dtype
        batch = self.pairs.draw(counters)
        both, symmetry = torch.stack([batch.theta, batch.theta_star], dim=1), data.task.symmetry
        if data.orders is not None:
            both = symmetry.apply(both, {group: order[batch.places] for group, order in data.orders.items()})
        if self.config.augmented:
            both = symmetry.apply(both, symmetry.draw(seed, counters))
        theta, theta_star = (both.to(dtype) * data.scale).unbind(1)
        t = (randomness.evenly_spread(seed, "timestep", counters) * len(self.diffusion.schedule)).long()
        noise = randomness.normal(seed, "noise", counters, theta.shape[1:], dtype=dtype)
        metric, metric_star = (values[data.metric].to(dtype) for values in (batch.metrics, batch.metrics_star))
        return Examples(theta, theta_star, metric, metric_star, t, noise)

    def loss(self, network: nn.Module, examples: Examples, device: torch.device) -> Loss:
        """Loss of each example under `network`, which may be a parallel wrapper of the model."""
        theta, theta_star, metric, metric_star, t, noise = (onto(device, value) for value in examples)
        noised = self.diffusion.q_sample(theta_star, t, noise)
        output = network(noised, t, theta, metric, metric_star)
        return self.diffusion.loss(output, theta_star, noised, t, noise)


def training_flops(config: GptConfig) -> int:
    """Floating-point operations of a forward and a backward pass for one pair, 2 a multiply-add."""
    with torch.device("meta"):
        model, theta, scalar = Gpt(config), torch.empty(1, config.symmetry.layout.size), torch.empty(1)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(theta, scalar, theta, scalar, scalar)
    return 3 * counter.get_total_flops()


def parameter_count(config: GptConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Gpt(config).parameters())


def plan(config: GptTrainConfig) -> dict[str, Any]:
    """What training would be: sizes and arithmetic."""
    data = TrainingZoo(replace(config, canonicalise=False))
    shape = data.model_config
    flops = training_flops(shape)
    return {
        "config": asdict(config),
        "zoo": data.identity(),
        "parameters": parameter_count(shape),
        "gflops_per_pair": round(flops / 1e9, 6),
        "steps": -(-config.total_pairs // config.batch_size),
        "training_gflops": round(flops / 1e9 * config.total_pairs, 1),
    }
