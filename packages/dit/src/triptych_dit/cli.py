"""The command `triptych-dit`."""

if __name__ == "__main__":  # before anything that takes time to import
    from triptych_common.interrupts import install

    install()

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triptych_common.cli import Command, leave, main, option
from triptych_common.training.settings import to_length


def fitted(config: Any, argv: Sequence[str]) -> Any:
    """Training settings at the length asked for, with the model that --init-from has, fitted to the data."""
    config = to_length(config, argv)
    init_from, data = option(argv, "init-from")[0], option(argv, "data")[0] or config.data
    if {"-h", "--help"} & set(argv) or not (init_from or data != config.data or Path(data).exists()):
        return config
    from triptych_dit.fitting import fit  # imports torch, which takes seconds

    return fit(config, argv, data, init_from)


COMMANDS = {
    "train": Command(
        "train a class-conditional DiT, or resume", "triptych_dit.train_config:TrainConfig", "triptych_dit.train:train",
        presets="triptych_dit.train_config:TRAIN_PRESETS", default="digits", start=fitted, preview="triptych_dit.train:preview",
    ),
    "autoencoder": Command(
        "train an autoencoder for latents, or resume", "triptych_dit.autoencoder.config:AutoencoderTrainConfig",
        "triptych_dit.autoencoder.train:train_autoencoder",
        presets="triptych_dit.autoencoder.config:AUTOENCODER_PRESETS", default="digits", start=to_length,
        preview="triptych_dit.autoencoder.train:preview",
    ),
    "encode": Command(
        "encode images into a cache of latents, or resume", "triptych_dit.autoencoder.config:EncodeConfig",
        "triptych_dit.autoencoder.encode:encode", preview="triptych_dit.autoencoder.encode:preview",
    ),
    "import": Command(
        "make a cache of latents that others computed, or resume", "triptych_dit.autoencoder.config:ImportConfig",
        "triptych_dit.autoencoder.features:import_features",
    ),
    "sample": Command(
        "sample images from a trained model", "triptych_dit.settings:SampleConfig", "triptych_dit.sample:sample",
    ),
    "walk": Command(
        "render a video of a walk between noises, or between classes", "triptych_dit.settings:WalkConfig",
        "triptych_dit.walk:walk",
    ),
    "evaluate": Command(
        "score samples: the ADM suite on two npz files, or the scores for digits", "triptych_dit.settings:EvaluateConfig",
        "triptych_dit.evaluate:evaluate",
    ),
    "export": Command(
        "convert a model to or from diffusers and the released DiT's format", "triptych_dit.settings:ExportConfig",
        "triptych_dit.export:export",
    ),
}  # fmt: skip


def run(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return main("triptych-dit", COMMANDS, argv)


if __name__ == "__main__":
    leave(run())
