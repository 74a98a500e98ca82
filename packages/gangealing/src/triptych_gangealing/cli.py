"""The command `triptych-gangealing`."""

import sys
from collections.abc import Sequence

from triptych_common.cli import Command, main


def _train_gan() -> Command:
    from triptych_gangealing.stylegan2.train import train_gan
    from triptych_gangealing.stylegan2.train_config import PRESETS, GanTrainConfig, start

    return Command(GanTrainConfig, train_gan, PRESETS, default="digits32", start=start)


def _generate() -> Command:
    from triptych_gangealing.stylegan2.generate import GenerateConfig, generate

    return Command(GenerateConfig, generate, {})


def _train_encoder() -> Command:
    from triptych_gangealing.encoders.simclr import EncoderTrainConfig, run

    return Command(EncoderTrainConfig, run, {})


def _train() -> Command:
    from triptych_gangealing.train import train
    from triptych_gangealing.train_config import PRESETS, AlignTrainConfig

    return Command(AlignTrainConfig, train, PRESETS, default="digits32")


def _align() -> Command:
    from triptych_gangealing.align_config import AlignConfig
    from triptych_gangealing.folders import align

    return Command(AlignConfig, align, {})


def _average() -> Command:
    from triptych_gangealing.align_config import AverageConfig
    from triptych_gangealing.folders import write_average

    return Command(AverageConfig, write_average, {})


def _propagate() -> Command:
    from triptych_gangealing.align_config import PropagateConfig
    from triptych_gangealing.folders import propagate_to_folder

    return Command(PropagateConfig, propagate_to_folder, {})


def _correspond() -> Command:
    from triptych_gangealing.align_config import CorrespondConfig
    from triptych_gangealing.folders import correspond

    return Command(CorrespondConfig, correspond, {})


def _pck() -> Command:
    from triptych_gangealing.keypoints.evaluate import PckConfig, evaluate

    return Command(PckConfig, evaluate, {})


def _convert() -> Command:
    from triptych_gangealing.stylegan2.convert import ConvertConfig, convert

    return Command(ConvertConfig, convert, {})


COMMANDS = {
    "train-gan": ("train a StyleGAN2 on images, or resume", _train_gan),
    "generate": ("draw images from a generator", _generate),
    "train-encoder": ("train a small encoder on a generator's images, to compare images by", _train_encoder),
    "train": ("learn to align images from a generator, or resume", _train),
    "align": ("align a folder of pictures", _align),
    "average": ("the average of a folder's aligned pictures", _average),
    "propagate": ("what is drawn on the average, in every picture of a folder", _propagate),
    "correspond": ("points of one picture in another", _correspond),
    "pck": ("PCK of an aligner on digits whose correspondences are known, beside baselines", _pck),
    "convert": ("somebody else's StyleGAN2 checkpoint as network files, or ours as rosinality's", _convert),
}


def run(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return main("triptych-gangealing", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(run())
