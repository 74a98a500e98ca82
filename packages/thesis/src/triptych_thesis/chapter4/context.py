"""What the experiments of chapter 4 share: the settings of every training and scoring, and the trained alignments."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych_common.storage.files import open_ended, read_json
from triptych_gangealing.aligner import FILE, Aligner, load_aligner
from triptych_gangealing.encoders.perceptual import open_distance
from triptych_gangealing.encoders.simclr import EncoderTrainConfig
from triptych_gangealing.keypoints.evaluate import OURS
from triptych_gangealing.stylegan2.weights import load_generator
from triptych_gangealing.train import digest_of, train
from triptych_gangealing.train_config import AlignTrainConfig
from typing_extensions import TypedDict

from triptych_thesis.chapter4 import sizes
from triptych_thesis.chapter4.alignment_scores import score_alignment
from triptych_thesis.chapter4.options import AlignmentScoreConfig

if TYPE_CHECKING:
    from triptych_thesis.chapter4.study import Chapter4

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
    """Settings and models of one study, derived from its options."""

    study: "Chapter4"

    @property
    def size(self) -> sizes.Size:
        return sizes.SIZES[self.study.size]

    def encoder_config(self) -> EncoderTrainConfig:
        """Settings of the encoder that images are compared by."""
        study = self.study
        return replace(
            self.size.encoder, out=study.folder / "encoder", generator=study.generator, seed=study.seed, device=study.device
        )  # fmt: skip

    def align_config(self, name: str) -> AlignTrainConfig:
        """Settings of the alignment of `ONE` digit, or of all, `CLUSTERED`."""
        study = self.study
        generator = study.digit_generator if name == ONE else study.generator
        return replace(
            getattr(self.size, name), out=study.folder / name, generator=generator,
            distance=f"simclr:{study.folder / 'encoder'}", seed=study.seed, device=study.device,
        )  # fmt: skip

    def trainings(self) -> dict[str, dict[str, Any]]:
        """The settings that decide both alignments, by name."""
        return {name: self.align_config(name).identity() for name in (ONE, CLUSTERED)}

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
        digits = load_generator(self.study.digit_generator)
        return sizes.ablation(row, shorter, digits.num_ws, digits.config.w_dim, self.study.lpips_weights)

    def training(self, name: str) -> Training:
        """The training of `ONE`, `CLUSTERED`, or of a row of Table 4.3."""
        return Training(name, self.align_config(name) if name in (ONE, CLUSTERED) else self.ablation_config(name))

    def aligner(self, name: str) -> Aligner:
        """The trained `ONE` or `CLUSTERED`."""
        return load_aligner(self.study.folder / name)

    @property
    def wanted_rows(self) -> tuple[str, ...]:
        """Rows of Table 4.3 that the options select."""
        remaining = sizes.REMAINING_ROWS if self.study.all else ()
        return (*sizes.FIRST_ROWS, *remaining, *(sizes.LPIPS_ROWS if self.study.lpips_weights is not None else ()))

    @property
    def rows(self) -> list[str]:
        """Rows of Table 4.3 to report: those selected, and those that were scored before."""
        return [row for row in sizes.TABLE_4_3 if row in self.wanted_rows or self.was_scored(row)]

    def row_folder(self, row: str) -> Path:
        """The folder in which a row of Table 4.3 is trained."""
        return self.study.folder / "ablations" / sizes.folder_name(row)

    def was_scored(self, row: str) -> bool:
        """Whether the scores of a row exist; its training is then not needed again."""
        return (self.row_folder(row) / "scores" / "pck.json").exists()

    def score_config(self, *, grey: bool) -> AlignmentScoreConfig:
        """How the alignment of one digit is scored, on coloured or on grey digits."""
        folder, size = self.study.folder, self.size
        return AlignmentScoreConfig(
            out=folder / ("scores-grey" if grey else "scores"), aligner=folder / ONE, digit=sizes.DIGIT,
            pairs=size.pairs, images=size.images, grey=grey, iterations=size.iterations, seed=self.study.seed,
        )  # fmt: skip

    def scores(self, *, grey: bool) -> dict[str, Any]:
        """Scores of the alignment of one digit and of its baselines, by method."""
        return _scores(self.score_config(grey=grey))

    def row_scores(self, row: str) -> dict[str, Any]:
        """Scores of a row of Table 4.3. Raises ValueError for an LPIPS row of other VGG weights than those given."""
        folder, weights = self.row_folder(row), self.study.lpips_weights
        if row in sizes.LPIPS_ROWS and weights is not None and (folder / FILE).exists():
            given = digest_of(open_distance("lpips", weights=weights))
            if load_aligner(folder).facts["distance"] != given:
                raise ValueError(f"{folder}: was trained with other weights than {weights}; repeat those")
        config = replace(self.score_config(grey=False), aligner=folder, out=folder / "scores", baselines="none")
        return _scores(config)[OURS]


@open_ended
class _Scored(TypedDict):
    scores: dict[str, dict[str, Any]]


def _scores(config: AlignmentScoreConfig) -> dict[str, Any]:
    """Scores by method, computed where their file is missing."""
    path = config.out / "pck.json"
    if not path.exists():
        score_alignment(config)
    return read_json(path, _Scored, remedy="delete it and repeat the command, which scores again")["scores"]
