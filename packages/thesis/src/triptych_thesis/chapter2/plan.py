"""The commands behind a study, one for each unit of work: what a cluster runs under torchrun before the study collects it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from triptych_dit.sample import SampleConfig
from triptych_dit.train_config import TRAIN_PRESETS, TrainConfig

from triptych_thesis.chapter2.context import Context, Sampling, Training

LAUNCH = "torchrun --nproc-per-node=8 -m triptych_dit.cli"


def encode_command(context: Context) -> str:
    side = context.size.side
    return f"{LAUNCH} encode --source ILSVRC2012/train --image-size {side} --vae {context.vae} --out {context.data}"


def commands(context: Context, trainings: Sequence[Training], samplings: Sequence[Sampling]) -> list[str]:
    """Commands that encode the images, train each missing model, and draw each missing set of samples."""
    trains = [_train_command(unit.config) for unit in trainings if not unit.done]
    drawings = [_flags(asdict(SampleConfig()), asdict(unit.config)) for unit in samplings if not unit.drawn]
    return [encode_command(context), *trains, *(" ".join([f"{LAUNCH} sample", *flags]) for flags in drawings)]


def _train_command(config: TrainConfig) -> str:
    """A training run as the published run of its model and the options that differ from it."""
    preset = next((name for name, known in TRAIN_PRESETS.items() if known.model == config.model), "DiT-XL/2")
    flags = _flags(asdict(TRAIN_PRESETS[preset]), asdict(config))
    return " ".join([f"{LAUNCH} train --preset {preset}", *flags, "--parallel fsdp"])


def _flags(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    words: list[str] = []
    for name, value in now.items():
        if isinstance(value, dict):
            words += _flags(before[name], value, f"{prefix}{name}.")
        elif value != before[name] and value is not None:
            text = " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
            words.append(f"--{prefix}{name} ".replace("_", "-") + text)
    return words
