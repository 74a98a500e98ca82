"""The command `triptych-gangealing`."""

import sys
from collections.abc import Sequence

from triptych_common.cli import Command, deferred, main


def _train_gan() -> Command:
    from triptych_gangealing.stylegan2.train_config import PRESETS, GanTrainConfig, start

    train = deferred("triptych_gangealing.stylegan2.train:train_gan")
    return Command(GanTrainConfig, train, PRESETS, default="digits32", start=start)


def _generate() -> Command:
    from triptych_gangealing.settings import GenerateConfig

    return Command(GenerateConfig, deferred("triptych_gangealing.stylegan2.generate:generate"), {})


def _train_encoder() -> Command:
    from triptych_gangealing.encoders.train_config import EncoderTrainConfig

    return Command(EncoderTrainConfig, deferred("triptych_gangealing.encoders.simclr:run"), {})


def _train() -> Command:
    from triptych_gangealing.train_config import PRESETS, AlignTrainConfig

    return Command(AlignTrainConfig, deferred("triptych_gangealing.train:train"), PRESETS, default="digits32")


def _align() -> Command:
    from triptych_gangealing.settings import AlignConfig

    return Command(AlignConfig, deferred("triptych_gangealing.folders:write_aligned"), {})


def _average() -> Command:
    from triptych_gangealing.settings import AverageConfig

    return Command(AverageConfig, deferred("triptych_gangealing.folders:write_average"), {})


def _propagate() -> Command:
    from triptych_gangealing.settings import PropagateConfig

    return Command(PropagateConfig, deferred("triptych_gangealing.folders:propagate_to_folder"), {})


def _correspond() -> Command:
    from triptych_gangealing.settings import CorrespondConfig

    return Command(CorrespondConfig, deferred("triptych_gangealing.folders:write_matches"), {})


def _pck() -> Command:
    from triptych_gangealing.settings import PckConfig

    return Command(PckConfig, deferred("triptych_gangealing.keypoints.evaluate:evaluate"), {})


def _convert() -> Command:
    from triptych_gangealing.settings import ConvertConfig

    return Command(ConvertConfig, deferred("triptych_gangealing.stylegan2.convert:convert"), {})


COMMANDS = {
    "train-gan": ("train a StyleGAN2 on images, or resume", _train_gan),
    "generate": ("sample images from a generator", _generate),
    "train-encoder": ("train a small encoder on generated images (SimCLR), for perceptual distances", _train_encoder),
    "train": ("train a spatial transformer from a generator (GANgealing), or resume", _train),
    "align": ("align a folder of images", _align),
    "average": ("average the aligned images of a folder", _average),
    "propagate": ("propagate an edit or points from the average to every image of a folder", _propagate),
    "correspond": ("transfer points from one image to another", _correspond),
    "pck": ("PCK of an aligner on digits whose correspondences are known, beside baselines", _pck),
    "convert": ("convert StyleGAN2 checkpoints of other implementations, or ours to rosinality's", _convert),
}


def run(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return main("triptych-gangealing", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(run())
