"""How much of everything the experiments of chapter 3 do."""

from dataclasses import dataclass

from triptych_gpt.evaluation.trial import Trial


@dataclass(frozen=True)
class Amounts:
    """How much of everything an evaluation does."""

    networks: int = 32
    """unseen networks for prompt alignment"""
    prompts: int = 20
    """prompts for each"""
    baseline_networks: int = 5
    """unseen networks in the comparison with optimisers, and as many validation networks to tune on; the thesis has five"""
    optimizer_steps: int | None = None
    """steps of the optimisers' curves; default: those of a training run"""
    updates: int = 10
    """updates in a row, of networks from other initialisers"""
    recursion_networks: int = 8
    """networks of each initialiser"""
    samples: int = 16
    """samples of one start, for diversity and landscape"""
    audit_samples: int = 100
    """networks of the memorisation audit"""
    neighbour_prompts: int = 5
    """prompts of the nearest-neighbour score"""
    every: int = 1
    """search every so many checkpoints of the training runs for neighbours; 1: all"""
    sampler_steps: tuple[int, ...] = (2, 5, 10, 25, 50, 100)
    """denoising steps to compare samplers at"""

    def __post_init__(self) -> None:
        for name in ("networks", "baseline_networks", "updates", "recursion_networks", "audit_samples", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        for name, least in (("prompts", 2), ("samples", 3), ("neighbour_prompts", 2)):  # three samples span a plane
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least {least}")
        if any(not 1 <= steps <= 1000 for steps in self.sampler_steps):
            raise ValueError(f"sampler_steps {self.sampler_steps}: expected numbers of 1..1000")

    def check(self, trial: Trial) -> None:
        """Raises ValueError where the zoo has too few unseen runs, before a folder knows the amounts."""
        trial.rows("test", max(self.networks, self.baseline_networks))
        trial.rows("validation", self.baseline_networks)
