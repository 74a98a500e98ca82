"""How large a reproduction of chapter 3 is: sizes only, the code is the same."""

from dataclasses import dataclass, field, replace
from typing import Annotated

from triptych_common.fields import Checked, Ge, Interval
from triptych_gpt.train_config import TRAIN_PRESETS, GptTrainConfig
from triptych_gpt.zoo.collect_config import PRESETS as COLLECT_PRESETS
from triptych_gpt.zoo.collect_config import CollectConfig


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


@dataclass(frozen=True)
class Variants:
    """Which variants of a training run to compare, each trained on `total_pairs` pairs of checkpoints."""

    total_pairs: int
    widths: tuple[int, ...]
    runs: tuple[int, ...]
    chunk_size: int

    def configs(self, base: GptTrainConfig, checkpoints: int) -> dict[str, dict[str, GptTrainConfig]]:
        """Configurations by comparison and variant; one that several comparisons have is trained once.

        All but the tokenizers are compared with neuron tokens and stratified pairs, whatever `base`, the chapter's model, has, and
        layer tokens with its learning rate: none is tuned for itself. checkpoints: of each training run of the zoo.
        """
        warmup = min(base.warmup_pairs, self.total_pairs // 10)
        base = replace(
            base, total_pairs=self.total_pairs, warmup_pairs=warmup, tokenizer="neuron", chunk_size=None, pairs="stratified"
        )  # fmt: skip
        layer, chunk = replace(base, tokenizer="layer"), replace(base, tokenizer="chunk", chunk_size=self.chunk_size)
        canonical = replace(layer, augment="off", canonicalise=True)
        return {
            "width": {str(w): replace(base, width=w, num_heads=max(1, w // 64)) for w in self.widths},
            "runs": {str(n): replace(base, runs=n) for n in self.runs},
            "tokenizers": {"neuron": base, "layer": layer, "chunk": chunk},
            "augmentation": {"layer, augmented": layer, "layer, not augmented": replace(layer, augment="off")},
            "canonicalised zoo": {"layer, augmented": layer, "layer, canonicalised": canonical},
            "checkpoints": {f"{checkpoints} a run": base, "first and last only": replace(base, pairs="ends")},
            "pairs": {pairs: replace(base, pairs=pairs) for pairs in ("stratified", "thesis", "released")},
        }


@dataclass(frozen=True)
class Size:
    """A zoo, a model trained on it, and how it is evaluated; `variants` are further models, compared with --all."""

    collect: CollectConfig
    train: GptTrainConfig
    variants: Variants
    sampler: str = "ddpm"
    num_inference_steps: int = 50
    amounts: Amounts = field(default_factory=Amounts)


_LAPTOP_ZOO = COLLECT_PRESETS["laptop"]
_PAPER = Variants(20_000_000, widths=(64, 128, 256, 512, 1024, 2048), runs=(500, 2000, 5000, 8500), chunk_size=1000)
_PAPER_AMOUNTS = Amounts(networks=128, audit_samples=500, recursion_networks=32)
_GPU = replace(
    TRAIN_PRESETS["laptop"], width=768, depth=8, num_heads=12, total_pairs=4_000_000, batch_size=512, lr=5e-4,
    warmup_pairs=100_000, precision="bf16", validation_every=1000, checkpoint_every=500, validation_networks=32,
)  # fmt: skip

_MNIST: dict[str, Size] = {  # and the thesis's other images, CIFAR-10
    "smoke": Size(
        replace(_LAPTOP_ZOO, runs=30, cohort_runs=10, epochs=4, checkpoints=20, split_every=3),
        replace(TRAIN_PRESETS["smoke"], total_pairs=6_400),
        Variants(total_pairs=640, widths=(32, 64), runs=(5, 10), chunk_size=64),
        num_inference_steps=5,
        amounts=Amounts(
            networks=4, prompts=5, baseline_networks=2, optimizer_steps=20, updates=2, recursion_networks=2, samples=4,
            audit_samples=8, neighbour_prompts=2, sampler_steps=(2, 5),
        ),
    ),
    "laptop": Size(
        _LAPTOP_ZOO,
        TRAIN_PRESETS["laptop"],
        Variants(total_pairs=40_000, widths=(64, 128, 256), runs=(100, 400, 1600), chunk_size=208),
        num_inference_steps=25,
        amounts=Amounts(audit_samples=64, every=4),
    ),
    "gpu": Size(
        CollectConfig(task="mnist_mlp", runs=4000),
        replace(_GPU, width=832, num_heads=13, total_pairs=8_000_000, batch_size=1024, warmup_pairs=200_000),
        Variants(total_pairs=1_000_000, widths=(128, 256, 512, 1024), runs=(100, 400, 1600, 3200), chunk_size=768),
        num_inference_steps=250,
        amounts=Amounts(networks=128, audit_samples=200, recursion_networks=16),
    ),
    "gpu-cifar10": Size(
        CollectConfig(task="cifar_cnn", runs=2000),
        _GPU,
        Variants(total_pairs=500_000, widths=(128, 256, 512, 1024), runs=(100, 400, 1600), chunk_size=576),
        num_inference_steps=250,
        amounts=Amounts(networks=64, audit_samples=100, recursion_networks=16, every=4),
    ),
    "paper": Size(
        COLLECT_PRESETS["mnist"],
        TRAIN_PRESETS["mnist_loss"],
        _PAPER,
        num_inference_steps=1000,
        amounts=_PAPER_AMOUNTS,
    ),
    "paper-cifar10": Size(
        COLLECT_PRESETS["cifar10"],
        TRAIN_PRESETS["cifar10_loss"],
        replace(_PAPER, runs=(500, 5000, 10_000, 25_000, 45_000), chunk_size=576),
        num_inference_steps=1000,
        amounts=_PAPER_AMOUNTS,
    ),
}  # fmt: skip

_SMALL_ZOO = COLLECT_PRESETS["cartpole_small"]
_CARTPOLE: dict[str, Size] = {
    "smoke": Size(
        replace(_SMALL_ZOO, runs=18, cohort_runs=6, iterations=25, checkpoints=16, split_every=3),
        replace(
            TRAIN_PRESETS["smoke"], metric="return", width=64, total_pairs=1_920, batch_size=64, warmup_pairs=192, log_every=5,
            validation_every=15,
        ),
        Variants(total_pairs=640, widths=(32, 64), runs=(5, 10), chunk_size=64),
        num_inference_steps=5,
        amounts=Amounts(
            networks=4, prompts=5, baseline_networks=2, optimizer_steps=3, updates=2, recursion_networks=2, samples=4,
            audit_samples=4, neighbour_prompts=2, every=4, sampler_steps=(2, 5),
        ),
    ),
    "laptop": Size(
        _SMALL_ZOO,
        # Half the preset's width: four times as many pairs in the minutes that a laptop has.
        replace(TRAIN_PRESETS["cartpole_small"], width=64, num_heads=2, total_pairs=100_000),
        Variants(total_pairs=40_000, widths=(64, 128, 256), runs=(100, 400, 800), chunk_size=160),
        num_inference_steps=25,
        amounts=Amounts(audit_samples=64, every=4),
    ),
    "gpu": Size(
        CollectConfig(task="cartpole", runs=4000),
        replace(_GPU, metric="return", width=512, num_heads=8),
        Variants(total_pairs=500_000, widths=(128, 256, 512), runs=(100, 400, 1600, 3200), chunk_size=160),
        num_inference_steps=250,
        amounts=Amounts(networks=128, audit_samples=200, recursion_networks=16),
    ),
    "paper": Size(
        COLLECT_PRESETS["cartpole"],
        TRAIN_PRESETS["cartpole"],
        replace(_PAPER, runs=(500, 5000, 10_000, 25_000, 45_000), chunk_size=160),
        num_inference_steps=1000,
        amounts=_PAPER_AMOUNTS,
    ),
}  # fmt: skip

MNIST, CARTPOLE = "mnist", "cartpole"
SIZES = {MNIST: _MNIST, CARTPOLE: _CARTPOLE}
