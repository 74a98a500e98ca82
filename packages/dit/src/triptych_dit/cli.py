"""The command `triptych-dit`."""

if __name__ == "__main__":  # before anything that takes time to import
    from triptych_common.interrupts import install

    install()

from collections.abc import Sequence
from typing import Any

from triptych_common.cli import Command, leave, main, option


def fitted(config: Any, argv: Sequence[str]) -> Any:
    """Training settings; with --init-from, those of the model are the other model's, fitted to the data of --data."""
    init_from, data = option(argv, "init-from")[0], option(argv, "data")[0]
    if not init_from:
        return config
    from triptych_dit.config import CheckpointOptions
    from triptych_dit.fine_tune import settings_from  # imports torch, which takes seconds

    typed = {name: option(argv, name.replace("_", "-"))[0] for name in CheckpointOptions.__dataclass_fields__}
    options = {name: int(value) if value.isdecimal() else value for name, value in typed.items() if value}
    return settings_from(init_from, config, data or config.data, **options)


COMMANDS = {
    "train": Command(
        "train a class-conditional DiT, or resume", "triptych_dit.train_config:TrainConfig", "triptych_dit.train:train",
        presets="triptych_dit.train_config:TRAIN_PRESETS", default="digits", start=fitted,
    ),
    "autoencoder": Command(
        "train an autoencoder for latents, or resume", "triptych_dit.autoencoder.config:AutoencoderTrainConfig",
        "triptych_dit.autoencoder.train:train_autoencoder",
        presets="triptych_dit.autoencoder.config:AUTOENCODER_PRESETS", default="digits",
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
