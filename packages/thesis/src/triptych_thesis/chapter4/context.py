"""What the experiments of chapter 4 share: the settings of every training and scoring, and the trained alignments."""

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from triptych_gangealing.aligner import FILE, Aligner, load_aligner
from triptych_gangealing.encoders.perceptual import open_distance
from triptych_gangealing.encoders.simclr import EncoderTrainConfig
from triptych_gangealing.encoders.simclr import run as train_encoder
from triptych_gangealing.keypoints.evaluate import OURS
from triptych_gangealing.stylegan2.weights import load_generator
from triptych_gangealing.train import digest_of, train
from triptych_gangealing.train_config import AlignTrainConfig

from triptych_thesis.chapter4.alignment_scores import score_alignment
from triptych_thesis.chapter4.options import AlignmentScoreConfig
from triptych_thesis.chapter4.sizes import (
    DIGIT,
    FIRST_ROWS,
    LPIPS_ROWS,
    REMAINING_ROWS,
    TABLE_4_3,
    Size,
    ablation,
    folder_name,
)  # fmt: skip

ONE, CLUSTERED = "one", "clustered"  # the two alignments that are not ablations, and their folders


@dataclass(frozen=True)
class Training:
    """The training of one alignment, a unit of work."""

    title: str
    config: AlignTrainConfig

    @property
    def cost(self) -> int:
        """Generated images, counted once for each cluster."""
        return self.config.total_images * self.config.clusters

    @property
    def done(self) -> bool:
        # Settings need no comparison: they are part of the study's identity.
        return (self.config.out / FILE).exists()

    def __call__(self) -> None:
        train(self.config)


@dataclass(frozen=True)
class Context:
    """Settings and models of one study, derived from its options (see `Chapter4`)."""

    folder: Path
    size: Size
    seed: int
    device: str
    generator: str
    digit_generator: str
    lpips_weights: Path | None
    all_rows: bool

    def check(self) -> None:
        """Raise ValueError or OSError for a bad file of LPIPS's weights, before an hour of training."""
        if self.lpips_weights is not None:
            open_distance("lpips", weights=self.lpips_weights)

    def identity(self) -> dict[str, Any]:
        """What decides the results."""
        placed = "distance", "generator"  # where they lie decides nothing; generators are identified by their digests
        alignments = {
            name: {key: value for key, value in self.align_config(name).identity().items() if key not in placed}
            for name in (ONE, CLUSTERED)
        }
        amounts = {
            name: getattr(self.size, name)
            for name in ("ablation_images", "pairs", "images", "cluster_images", "shown", "iterations")
        }
        digests = {name: digest_of(load_generator(getattr(self, name))) for name in ("generator", "digit_generator")}
        return {"encoder": self.encoder_config().identity(), **alignments, **amounts, **digests}

    def facts(self) -> dict[str, Any]:
        """What results.json says of the trainings."""
        training = {name: self.align_config(name).identity() for name in (ONE, CLUSTERED)}
        return {"all": self.all_rows, "digit": DIGIT, "training": training}

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints."""
        return {
            "encoder": self.encoder_config().resolved(),
            "one": self.align_config(ONE).resolved(),
            "clustered": self.align_config(CLUSTERED).resolved(),
            "scores": asdict(self.score_config(grey=False)),
            "ablations": self.wanted_rows,
        }

    def train_encoder(self) -> None:
        """Train the encoder that images are compared by, or what is missing of it."""
        train_encoder(self.encoder_config())

    def encoder_config(self) -> EncoderTrainConfig:
        """Settings of the encoder that images are compared by."""
        return replace(
            self.size.encoder, out=self.folder / "encoder", generator=self.generator, seed=self.seed, device=self.device
        )

    def align_config(self, name: str) -> AlignTrainConfig:
        """Settings of the alignment of `ONE` digit, or of all, `CLUSTERED`."""
        return replace(
            getattr(self.size, name),
            out=self.folder / name,
            generator=self.digit_generator if name == ONE else self.generator,
            distance=f"simclr:{self.folder / 'encoder'}",
            seed=self.seed,
            device=self.device,
        )

    def ablation_config(self, row: str) -> AlignTrainConfig:
        """Settings of a row of Table 4.3: fewer images in the same proportions, the average's half-life too."""
        complete, images = self.align_config(ONE), self.size.ablation_images
        share = images / complete.total_images
        shorter = replace(
            complete,
            out=self.row_folder(row),
            total_images=images,
            psi_images=round(share * complete.psi_images),
            constant_images=round(share * complete.constant_images),
            restart_images=max(1, round(share * complete.restart_images)),
            ema_half_life_images=max(1, round(share * complete.ema_half_life_images)),
        )
        num_ws, w_dim = self._latents
        return ablation(row, shorter, num_ws=num_ws, w_dim=w_dim, vgg=self.lpips_weights)

    @cached_property
    def _latents(self) -> tuple[int, int]:
        generator = load_generator(self.digit_generator)
        return generator.num_ws, generator.config.w_dim

    def training(self, name: str) -> Training:
        """The training of `ONE`, `CLUSTERED`, or of a row of Table 4.3."""
        return Training(name, self.align_config(name) if name in (ONE, CLUSTERED) else self.ablation_config(name))

    def aligner(self, name: str) -> Aligner:
        """The trained `ONE` or `CLUSTERED`."""
        return load_aligner(self.folder / name)

    @property
    def wanted_rows(self) -> tuple[str, ...]:
        """Rows of Table 4.3 that the options ask for."""
        remaining = REMAINING_ROWS if self.all_rows else ()
        return (*FIRST_ROWS, *remaining, *(LPIPS_ROWS if self.lpips_weights is not None else ()))

    @property
    def rows(self) -> list[str]:
        """Rows of Table 4.3 to report: those asked for, and those that were scored before."""
        return [row for row in TABLE_4_3 if row in self.wanted_rows or self.was_scored(row)]

    def row_folder(self, row: str) -> Path:
        """Where a row of Table 4.3 is trained."""
        return self.folder / "ablations" / folder_name(row)

    def was_scored(self, row: str) -> bool:
        """Whether the scores of a row are there; its training is then not needed again."""
        return (self.row_folder(row) / "scores" / "pck.json").exists()

    def score_config(self, *, grey: bool) -> AlignmentScoreConfig:
        """How the alignment of one digit is scored, on coloured or on grey digits."""
        return AlignmentScoreConfig(
            out=self.folder / ("scores-grey" if grey else "scores"), aligner=self.folder / ONE, digit=DIGIT,
            pairs=self.size.pairs, images=self.size.images, grey=grey, iterations=self.size.iterations, seed=self.seed,
        )  # fmt: skip

    def scores(self, *, grey: bool) -> dict[str, Any]:
        """Scores of the alignment of one digit and of its baselines, by method."""
        return _scores(self.score_config(grey=grey))

    def row_scores(self, row: str) -> dict[str, Any]:
        """Scores of a row of Table 4.3.

        Raises ValueError for an LPIPS row that was trained with other VGG weights than those given.
        """
        folder = self.row_folder(row)
        if row in LPIPS_ROWS and self.lpips_weights is not None and (folder / FILE).exists():
            distance = open_distance("lpips", weights=self.lpips_weights)
            if load_aligner(folder).facts["distance"] != digest_of(distance):
                raise ValueError(f"{folder}: was trained with other weights than {self.lpips_weights}; repeat those")
        config = replace(self.score_config(grey=False), aligner=folder, out=folder / "scores", baselines="none")
        return _scores(config)[OURS]


def _scores(config: AlignmentScoreConfig) -> dict[str, Any]:
    """Scores by method, computed where their file is missing."""
    path = config.out / "pck.json"
    if not path.exists():
        score_alignment(config)
    return json.loads(path.read_text())["scores"]
