"""What the experiments of chapter 3 share: a trained G.pt beside its zoo, and how its metrics are averaged and named."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from triptych_common.storage.checkpoint import digest
from triptych_gpt.evaluation.records import plain
from triptych_gpt.evaluation.trial import Trial
from triptych_gpt.settings import SamplerSettings
from triptych_gpt.train_config import GptTrainConfig

from triptych_thesis.chapter3.sizes import Amounts, Variants
from triptych_thesis.study.estimates import quantile


@dataclass
class Context:
    """A trained G.pt and the zoo that it was trained on; both are opened on first use."""

    model: Path  # run folder or model file
    zoo: Path
    settings: SamplerSettings
    amounts: Amounts
    seed: int = 0
    device: str = "auto"
    folder: Path | None = None  # of the study; like the rest, None for a model from elsewhere
    training: GptTrainConfig | None = None
    variants: Variants | None = None
    task: str | None = None  # as for `triptych_gpt.load`

    @cached_property
    def trial(self) -> Trial:
        """The model with its zoo. Raises as `Trial.open`, and ValueError for a zoo with fewer unseen runs than the amounts need."""
        trial = Trial.open(self.model, self.zoo, self.settings, self.seed, self.device, self.task)
        trial.rows("test", max(self.amounts.networks, self.amounts.baseline_networks))
        trial.rows("validation", self.amounts.baseline_networks)
        return trial

    def identity(self) -> dict[str, Any]:
        """What decides the results; a folder that holds another model's results is refused by it."""
        trained = self.trial.trained
        return {
            "model": trained.facts.get("zoo"), "weights": digest(trained.model.state_dict())[:16],
            "pairs_seen": trained.facts.get("pairs_seen"), "validation": trained.facts.get("validation"),
            "zoo": self.trial.zoo_identity(), "sampler": asdict(self.settings),
            "amounts": asdict(self.amounts), "seed": self.seed,
        }  # fmt: skip


def mean_over_networks(values: Float[Tensor, " n"]) -> dict[str, Any]:
    """Mean and 95% interval by Student's t, JSON-able; networks whose value is not finite are left out and counted."""
    finite = values.double()[values.isfinite()]
    n, mean, margin = len(finite), finite.mean() if len(finite) else torch.nan, torch.nan
    # Student's t is honest about few networks.
    if n > 1:
        margin = quantile(n - 1) * float(finite.std()) / n**0.5
    bounds = {"mean": float(mean), "low": float(mean) - margin, "high": float(mean) + margin}
    return plain({**bounds, "networks": n, "non_finite": len(values) - n})


def named(metric: str) -> str:
    """A metric in running text, "test loss"; axes are labelled by `triptych_gpt.evaluation.plots`."""
    return metric.replace("_", " ")


def shown(metric: str, value: float | None) -> str:
    """A value of a metric to three digits, errors in per cent as axes have them; a dash where there is none."""
    return "–" if value is None else f"{(100 if metric.endswith('error') else 1) * value:.3g}"
