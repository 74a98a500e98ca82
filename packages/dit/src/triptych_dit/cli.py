"""The command `triptych-dit`."""

import sys

from triptych_common.cli import Command, main


def _train() -> Command:
    from triptych_dit.fine_tune import settings_from
    from triptych_dit.train import train
    from triptych_dit.train_config import TRAIN_PRESETS, TrainConfig

    return Command(TrainConfig, train, TRAIN_PRESETS, default="digits", start=settings_from)


def _autoencoder() -> Command:
    from triptych_dit.autoencoder.config import AUTOENCODER_PRESETS, AutoencoderTrainConfig
    from triptych_dit.autoencoder.train import train_autoencoder

    return Command(AutoencoderTrainConfig, train_autoencoder, AUTOENCODER_PRESETS, default="digits")


def _encode() -> Command:
    from triptych_dit.autoencoder.encode import EncodeConfig, encode

    return Command(EncodeConfig, encode, {})


def _sample() -> Command:
    from triptych_dit.sample import SampleConfig, sample

    return Command(SampleConfig, sample, {})


def _walk() -> Command:
    from triptych_dit.walk import WalkConfig, walk

    return Command(WalkConfig, walk, {})


def _evaluate() -> Command:
    from triptych_dit.evaluate import EvaluateConfig, evaluate

    return Command(EvaluateConfig, evaluate, {})


def _export() -> Command:
    from triptych_dit.export import ExportConfig, export

    return Command(ExportConfig, export, {})


COMMANDS = {
    "train": ("train a class-conditional DiT, or resume", _train),
    "autoencoder": ("train an autoencoder for latents, or resume", _autoencoder),
    "encode": ("encode images into a cache of latents, or resume", _encode),
    "sample": ("sample images from a trained model", _sample),
    "walk": ("render a video of a walk between noises, or between classes", _walk),
    "evaluate": ("score samples: the ADM suite on two npz files, or the scores for digits", _evaluate),
    "export": ("convert a model to or from diffusers and the released DiT's format", _export),
}


def run() -> None:
    sys.exit(main("triptych-dit", COMMANDS))


if __name__ == "__main__":
    run()
