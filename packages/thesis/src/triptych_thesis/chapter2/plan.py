"""The commands behind a study, one for each unit of work: what a cluster runs under torchrun before the study collects it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from triptych_dit.sample import SampleConfig
from triptych_dit.train_config import TRAIN_PRESETS, TrainConfig

from triptych_thesis.chapter2.context import Sampling, Training

LAUNCH = "torchrun --nproc-per-node=8 -m triptych_dit.cli"


def commands(data: str, vae: str, side: int, trainings: Sequence[Training], samplings: Sequence[Sampling]) -> list[str]:
    """Commands that encode the images, train each model that is not there yet, and sample each set that is not."""
    return [
        f"{LAUNCH} encode --source ILSVRC2012/train --image-size {side} --vae {vae} --out {data}",
        *(train_command(unit) for unit in trainings if not unit.done),
        *(sample_command(unit) for unit in samplings if not unit.drawn),
    ]


def train_command(unit: Training) -> str:
    """A training run as a preset and the options that differ from it."""
    preset = _nearest_preset(unit.config)
    before, now = asdict(TRAIN_PRESETS[preset]), asdict(unit.config)
    return " ".join([f"{LAUNCH} train --preset {preset}", *_flags(before, now), "--parallel fsdp"])


def sample_command(unit: Sampling) -> str:
    return " ".join([f"{LAUNCH} sample", *_flags(asdict(SampleConfig()), asdict(unit.config))])


def _nearest_preset(config: TrainConfig) -> str:
    """The published run of this model."""
    return next((name for name, preset in TRAIN_PRESETS.items() if preset.model == config.model), "DiT-XL/2")


def _flags(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    words: list[str] = []
    for name, value in now.items():
        if isinstance(value, dict):
            words += _flags(before[name], value, f"{prefix}{name}.")
        elif value != before[name] and value is not None:
            text = " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
            words.append(f"--{prefix}{name} ".replace("_", "-") + text)
    return words
