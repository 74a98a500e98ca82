"""The command `triptych-gangealing`."""

if __name__ == "__main__":  # before anything that takes time to import
    from triptych_common.interrupts import install

    install()

from collections.abc import Sequence

from triptych_common.cli import Command, leave, main

# Everything is imported on use, so that --help is quick.
COMMANDS = {
    "train-gan": Command(
        "train a StyleGAN2 on images, or resume",
        "triptych_gangealing.stylegan2.train_config:GanTrainConfig",
        "triptych_gangealing.stylegan2.train:train_gan",
        presets="triptych_gangealing.stylegan2.train_config:PRESETS",
        default="digits32",
        start="triptych_gangealing.stylegan2.train_config:start",
        preview="triptych_gangealing.stylegan2.train:preview",
    ),
    "generate": Command(
        "sample images from a generator",
        "triptych_gangealing.settings:GenerateConfig",
        "triptych_gangealing.stylegan2.generate:generate",
    ),
    "train-encoder": Command(
        "train a small encoder on generated images (SimCLR), for perceptual distances",
        "triptych_gangealing.encoders.train_config:EncoderTrainConfig",
        "triptych_gangealing.encoders.simclr:run",
    ),
    "train": Command(
        "train a spatial transformer from a generator (GANgealing), or resume",
        "triptych_gangealing.train_config:AlignTrainConfig",
        "triptych_gangealing.train:train",
        presets="triptych_gangealing.train_config:PRESETS",
        default="digits32",
        start="triptych_common.training.settings:to_length",
        preview="triptych_gangealing.train:preview",
    ),
    "align": Command(
        "align a folder of images",
        "triptych_gangealing.settings:AlignConfig",
        "triptych_gangealing.folders:write_aligned",
    ),
    "average": Command(
        "average the aligned images of a folder",
        "triptych_gangealing.settings:AverageConfig",
        "triptych_gangealing.folders:write_average",
    ),
    "propagate": Command(
        "propagate an edit or points from the average to every image of a folder",
        "triptych_gangealing.settings:PropagateConfig",
        "triptych_gangealing.folders:propagate_to_folder",
    ),
    "correspond": Command(
        "transfer points from one image to another",
        "triptych_gangealing.settings:CorrespondConfig",
        "triptych_gangealing.folders:write_matches",
    ),
    "pck": Command(
        "PCK of an aligner on digits whose correspondences are known, beside baselines",
        "triptych_gangealing.settings:PckConfig",
        "triptych_gangealing.keypoints.evaluate:evaluate",
    ),
    "convert": Command(
        "convert StyleGAN2 and GANgealing checkpoints of other implementations, or ours to theirs",
        "triptych_gangealing.settings:ConvertConfig",
        "triptych_gangealing.stylegan2.convert:convert",
        writes="file",
    ),
}


def run(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return main("triptych-gangealing", COMMANDS, argv)


if __name__ == "__main__":
    leave(run())
