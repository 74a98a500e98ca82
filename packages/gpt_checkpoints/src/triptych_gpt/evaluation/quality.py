"""Prompt alignment against denoising steps, and how much of a network the last diffusion step still shows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_common.diffusion import normal_kl

from triptych_gpt.evaluation.alignment import Alignment, prompt_alignment
from triptych_gpt.evaluation.records import plain
from triptych_gpt.evaluation.update import Update
from triptych_gpt.tasks.task import Metric, Task


@dataclass(frozen=True)
class Quality:
    """Prompt alignment of a model's updates with one sampler at one number of model evaluations."""

    sampler: str
    model_evaluations: int
    alignment: Alignment

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, the alignment's within "alignment": JSON-able."""
        return plain(self)


def quality_against_steps(
    updates: Mapping[tuple[str, int], Update],
    task: Task,
    metric: Metric,
    theta: Float[Tensor, "networks D"],
    **options: Any,
) -> list[Quality]:
    """Prompt alignment of each update, on the same networks with the same prompts and noise.

    updates: by (sampler, model evaluations for one update). options are `prompt_sweep`'s, and so is what it raises. Returned by
    sampler in the order given, fewest evaluations first.
    """
    samplers = list(dict.fromkeys(sampler for sampler, _ in updates))
    order = sorted(updates, key=lambda key: (samplers.index(key[0]), key[1]))
    return [Quality(*key, prompt_alignment(updates[key], task, metric, theta, **options)) for key in order]


def kl_last_step(alpha_bar_last: float | Float[Tensor, ""], theta_star: Float[Tensor, "n D"]) -> float:
    """KL(q(x_T | x_0) || N(0, I)) of normalised networks, mean over networks, bits per dimension: thesis 3.3 has about 8e-6.

    alpha_bar_last: the noise schedule's last alpha_bar. In closed form, float64.
    """
    alpha_bar = torch.as_tensor(alpha_bar_last, dtype=torch.float64)
    mean = alpha_bar.sqrt() * theta_star.detach().to("cpu", torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    return float(normal_kl(mean, torch.log1p(-alpha_bar), zero, zero).mean()) / math.log(2)
