"""The command `triptych-dit`."""

import sys
from collections.abc import Sequence
from typing import Any

from triptych_common.cli import Command, deferred, main


def _train() -> Command:
    from triptych_dit.train_config import TRAIN_PRESETS, TrainConfig

    return Command(TrainConfig, deferred("triptych_dit.train:train"), TRAIN_PRESETS, default="digits", start=_fitted)


def _fitted(config: Any, argv: Sequence[str]) -> Any:
    """Training settings, the model's taken from the one to start from where there is one: only then is torch loaded."""
    if not any(word.partition("=")[0].replace("_", "-") == "--init-from" for word in argv):
        return config
    from triptych_dit.fine_tune import settings_from

    return settings_from(config, argv)


def _autoencoder() -> Command:
    from triptych_dit.autoencoder.config import AUTOENCODER_PRESETS, AutoencoderTrainConfig

    train = deferred("triptych_dit.autoencoder.train:train_autoencoder")
    return Command(AutoencoderTrainConfig, train, AUTOENCODER_PRESETS, default="digits")


def _encode() -> Command:
    from triptych_dit.autoencoder.config import EncodeConfig

    preview = deferred("triptych_dit.autoencoder.encode:preview")
    return Command(EncodeConfig, deferred("triptych_dit.autoencoder.encode:encode"), {}, preview=preview)


def _sample() -> Command:
    from triptych_dit.settings import SampleConfig

    return Command(SampleConfig, deferred("triptych_dit.sample:sample"), {})


def _walk() -> Command:
    from triptych_dit.settings import WalkConfig

    return Command(WalkConfig, deferred("triptych_dit.walk:walk"), {})


def _evaluate() -> Command:
    from triptych_dit.settings import EvaluateConfig

    return Command(EvaluateConfig, deferred("triptych_dit.evaluate:evaluate"), {})


def _export() -> Command:
    from triptych_dit.settings import ExportConfig

    return Command(ExportConfig, deferred("triptych_dit.export:export"), {})


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
