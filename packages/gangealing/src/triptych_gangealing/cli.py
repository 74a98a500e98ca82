"""The command `triptych-gangealing`."""

import sys
from collections.abc import Sequence

from triptych_common.cli import Command, main


def _train_gan() -> Command:
    from triptych_gangealing.stylegan2.train import train_gan
    from triptych_gangealing.stylegan2.train_config import PRESETS, GanTrainConfig, start

    return Command(GanTrainConfig, train_gan, PRESETS, default="digits32", start=start)


def _generate() -> Command:
    from triptych_gangealing.generate import GenerateConfig, generate

    return Command(GenerateConfig, generate, {})


def _convert() -> Command:
    from triptych_gangealing.convert import ConvertConfig, convert

    return Command(ConvertConfig, convert, {})


COMMANDS = {
    "train-gan": ("train a StyleGAN2 on images, or resume", _train_gan),
    "generate": ("draw images from a generator", _generate),
    "convert": ("somebody else's StyleGAN2 checkpoint as network files, or ours as rosinality's", _convert),
}


def run(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return main("triptych-gangealing", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(run())
