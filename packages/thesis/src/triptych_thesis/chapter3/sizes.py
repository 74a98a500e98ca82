"""How large a reproduction of chapter 3 is: sizes only, the code is the same."""

from dataclasses import dataclass, field, replace

from triptych_gpt.train_config import TRAIN_PRESETS, GptTrainConfig
from triptych_gpt.zoo.collect_config import PRESETS as COLLECT_PRESETS
from triptych_gpt.zoo.collect_config import CollectConfig

from triptych_thesis.chapter3.context import Amounts
from triptych_thesis.chapter3.further_models import Study

FIRST = ("fig-3.5", "fig-3.3", "fig-3.4", "fig-3.6", "audit", "filters")
REST = ("fig-3.8", "fig-3.9", "sampler-steps")


@dataclass(frozen=True)
class Size:
    """A zoo, a model trained on it, and how it is evaluated; `study` and REST are what --all adds."""

    collect: CollectConfig
    train: GptTrainConfig
    study: Study
    sampler: str = "ddpm"
    num_inference_steps: int = 50
    amounts: Amounts = field(default_factory=Amounts)


_LAPTOP_ZOO = COLLECT_PRESETS["laptop"]
_MNIST_PAPER = Amounts(networks=128, audit_samples=500, recursion_networks=32)

SIZES: dict[str, Size] = {
    "smoke": Size(
        replace(_LAPTOP_ZOO, runs=30, cohort_runs=10, epochs=4, checkpoints=20, split_every=3),
        replace(TRAIN_PRESETS["smoke"], total_pairs=6_400),
        Study(total_pairs=640, widths=(32, 64), runs=(5, 10), chunk_size=64),
        num_inference_steps=5,
        amounts=Amounts(
            networks=4, prompts=5, baseline_networks=2, optimizer_steps=20, updates=2, recursion_networks=2, samples=4,
            audit_samples=8, neighbour_prompts=2, sampler_steps=(2, 5),
        ),
    ),
    "laptop": Size(
        _LAPTOP_ZOO,
        TRAIN_PRESETS["laptop"],
        Study(total_pairs=40_000, widths=(64, 128, 256), runs=(100, 400, 1600), chunk_size=208),
        num_inference_steps=25,
        amounts=Amounts(audit_samples=64, every=4),
    ),
    "gpu": Size(
        CollectConfig(task="mnist_mlp", runs=4000),
        replace(
            TRAIN_PRESETS["laptop"], width=832, depth=8, num_heads=13, total_pairs=8_000_000, batch_size=1024, lr=5e-4,
            warmup_pairs=200_000, precision="bf16", validation_every=1000, checkpoint_every=500, validation_networks=32,
        ),
        Study(total_pairs=1_000_000, widths=(128, 256, 512, 1024), runs=(100, 400, 1600, 3200), chunk_size=768),
        num_inference_steps=250,
        amounts=Amounts(networks=128, audit_samples=200, recursion_networks=16),
    ),
    "gpu-cifar10": Size(
        CollectConfig(task="cifar_cnn", runs=2000),
        replace(
            TRAIN_PRESETS["laptop"], width=768, depth=8, num_heads=12, total_pairs=4_000_000, batch_size=512, lr=5e-4,
            warmup_pairs=100_000, precision="bf16", validation_every=1000, checkpoint_every=500, validation_networks=32,
        ),
        Study(total_pairs=500_000, widths=(128, 256, 512, 1024), runs=(100, 400, 1600), chunk_size=576),
        num_inference_steps=250,
        amounts=Amounts(networks=64, audit_samples=100, recursion_networks=16, every=4),
    ),
    "paper": Size(
        COLLECT_PRESETS["mnist"],
        TRAIN_PRESETS["mnist_loss"],
        Study(total_pairs=20_000_000, widths=(64, 128, 256, 512, 1024, 2048), runs=(500, 2000, 5000, 8500), chunk_size=1000),
        num_inference_steps=1000,
        amounts=_MNIST_PAPER,
    ),
    "paper-cifar10": Size(
        COLLECT_PRESETS["cifar10"],
        TRAIN_PRESETS["cifar10_loss"],
        Study(total_pairs=20_000_000, widths=(64, 128, 256, 512, 1024, 2048), runs=(500, 5000, 10_000, 25_000, 45_000),
              chunk_size=576),
        num_inference_steps=1000,
        amounts=_MNIST_PAPER,
    ),
}  # fmt: skip
