"""The command `triptych-dit`."""

import sys

from triptych_common.cli import Command, main


def _train() -> Command:
    from triptych_dit.train import TRAIN_PRESETS, TrainConfig, train

    return Command(TrainConfig, train, TRAIN_PRESETS, default="digits")


def _sample() -> Command:
    from triptych_dit.sample import SampleConfig, sample

    return Command(SampleConfig, sample, {})


def _evaluate() -> Command:
    from triptych_dit.evaluate import EvaluateConfig, evaluate

    return Command(EvaluateConfig, evaluate, {})


def _reproduce() -> Command:
    from triptych_dit.reproduce import ReproduceConfig, reproduce

    return Command(ReproduceConfig, reproduce, {})


COMMANDS = {
    "train": ("train a class-conditional DiT, or resume", _train),
    "sample": ("sample images from a trained model", _sample),
    "evaluate": ("score samples against held-out real images", _evaluate),
    "reproduce": ("chapter 2 on real digits: train, sample, score, report", _reproduce),
}


def run() -> None:
    sys.exit(main("triptych-dit", COMMANDS))


if __name__ == "__main__":
    run()
