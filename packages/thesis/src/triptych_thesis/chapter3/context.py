"""How much of everything the experiments of chapter 3 do."""

from dataclasses import dataclass
from typing import Annotated

from triptych_common.fields import Checked, Ge, Interval
from triptych_gpt.evaluation.trial import Trial


@dataclass(frozen=True)
class Amounts(Checked):
    """How much of everything an evaluation does."""

    networks: Annotated[int, Ge(1)] = 32
    """unseen networks for prompt alignment"""
    prompts: Annotated[int, Ge(2)] = 20
    """prompts for each"""
    baseline_networks: Annotated[int, Ge(1)] = 5
    """unseen networks in the comparison with optimisers, and as many validation networks to tune on; the thesis has five"""
    optimizer_steps: int | None = None
    """steps of the optimisers' curves; default: those of a training run"""
    updates: Annotated[int, Ge(1)] = 10
    """updates in a row, of networks from other initialisers"""
    recursion_networks: Annotated[int, Ge(1)] = 8
    """networks of each initialiser"""
    samples: Annotated[int, Ge(3)] = 16  # three span a plane
    """samples of one start, for diversity and landscape"""
    audit_samples: Annotated[int, Ge(1)] = 100
    """networks of the memorisation audit"""
    neighbour_prompts: Annotated[int, Ge(2)] = 5
    """prompts of the nearest-neighbour score"""
    every: Annotated[int, Ge(1)] = 1
    """search every so many checkpoints of the training runs for neighbours; 1: all"""
    sampler_steps: Annotated[tuple[int, ...], Interval(ge=1, le=1000)] = (2, 5, 10, 25, 50, 100)
    """denoising steps to compare samplers at"""

    def check(self, trial: Trial) -> None:
        """Raises ValueError where the zoo has too few unseen runs, before a folder knows the amounts."""
        trial.rows("test", max(self.networks, self.baseline_networks))
        trial.rows("validation", self.baseline_networks)
