"""Settings of every command except training. Imports no torch, so that --help is quick."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from triptych_common.cli import CommonOptions
from triptych_common.fields import Ge, Interval

from triptych_gangealing.config import Flips

Data = Literal["mnist5k", "mnist"]


@dataclass(frozen=True)
class UseOptions(CommonOptions):
    """Options of every command with an aligner."""

    aligner: Path = Path("runs/align-digits32")
    """run folder of triptych-gangealing train, or its aligner.safetensors"""
    iterations: Annotated[int | None, Ge(1)] = None
    """iterations of the similarity network; default: as in training. Most published results use 3"""
    flips: Flips = "trained"
    """mirror a picture if that makes its flow smoother; trained: as in training"""


@dataclass(frozen=True)
class FolderOptions(UseOptions):
    """Options of every command with an aligner and a folder."""

    out: Path = Path("runs/aligned")
    """where to write"""
    images: Path = Path("images")
    """folder of pictures"""
    limit: Annotated[int | None, Ge(1)] = None
    """use only this many pictures, the first by name"""
    size: Annotated[int | None, Ge(1)] = None
    """height and width of the aligned pictures and their average; default: the transformer's input size"""


@dataclass(frozen=True)
class WarpedOptions(FolderOptions):
    """Options of every command that writes aligned pictures."""

    padding: Literal["trained", "border", "reflection", "zeros"] = "trained"
    """values beyond a picture's edges; trained: as in training"""


@dataclass(frozen=True)
class AlignConfig(WarpedOptions):
    """Align a folder of pictures: OUT/aligned, OUT/grid.png, OUT/average.png, OUT/alignment.jsonl."""


@dataclass(frozen=True)
class AverageConfig(WarpedOptions):
    """Average a folder's aligned pictures, to draw on: OUT/average.png, or one for each cluster."""

    out: Path = Path("runs/average")
    """where to write"""
    keep: Annotated[float, Interval(gt=0, le=1, wanted="a share above 0, at most 1")] = 1.0
    """share of each cluster's pictures to average, those with the smoothest flows"""


@dataclass(frozen=True)
class PropagateConfig(FolderOptions):
    """Propagate an edit or points from the average to every picture of a folder: OUT/pictures, or OUT/points.json."""

    out: Path = Path("runs/propagated")
    """where to write"""
    edit: Path | None = None
    """RGBA picture of the size of average.png, to be laid over it"""
    points: Path | None = None
    """JSON list of [x, y] in pixels of average.png, the centre of the first pixel at 0"""
    cluster: int = 0
    """cluster whose average the edit is for; other pictures stay unchanged"""


@dataclass(frozen=True)
class CorrespondConfig(UseOptions):
    """Transfer points from one picture to another: OUT/matches.png, OUT/matches.json."""

    out: Path = Path("runs/matches")
    """where to write"""
    source: Path = Path("a.png")
    """picture to take points from"""
    target: Path = Path("b.png")
    """picture to find them in"""
    points: Path | None = None
    """JSON list of [x, y] in pixels of the source; default: a grid"""
    spacing: Annotated[int, Ge(1)] = 8
    """points of that grid along each side"""


@dataclass(frozen=True)
class DigitPairsConfig(CommonOptions):
    """Score an aligner by PCK on pairs of held-out coloured digits whose correspondences are known, beside baselines."""

    out: Path = Path("runs/pck")
    """where to write pck.json and, of a benchmark, the predictions of every method"""
    aligner: Path | None = Path("runs/align-digits32")
    """run folder of triptych-gangealing train, or its aligner.safetensors; None: the baselines alone"""
    digit: Annotated[int | None, Interval(ge=0, le=9, wanted="0 to 9, or None for all")] = 3
    """digit to align; None: all"""
    data: str = "mnist5k"
    """held-out digits of mnist5k, which need no download, or mnist's test split"""
    pairs: Annotated[int | None, Ge(1)] = None
    """pairs to score, the first; default: 300 of digits, all of a benchmark"""
    elastic_px: float = 2.5
    """largest elastic displacement of each image of a pair, in pixels of a 28-pixel digit"""
    grey: bool = False
    """white digits on black instead of coloured ones; the baselines are strong on them"""
    iterations: Annotated[int | None, Ge(1)] = None
    """iterations of the aligner's similarity network; default: as in training"""
    flips: Flips = "trained"
    """mirror images whose flow is smoother then; trained: as in training"""
    baselines: Literal["all", "none"] = "all"
    """score baselines too: of digits moments and classical Congealing; of a benchmark the identity, mean keypoints, Congealing"""


@dataclass(frozen=True)
class PckConfig(DigitPairsConfig):
    """Score an aligner, or anyone's predictions, by PCK: on a benchmark's pairs by every protocol, or on coloured digits."""

    data: str = "mnist5k"
    """held-out digits of mnist5k, which need no download, or of mnist; or a benchmark's layout and folder: spair:PATH, cub:PATH,
    willow:PATH, ap10k:PATH"""
    category: str | None = None
    """of a benchmark, such as cat; spair needs one"""
    split: str = "test"
    """of a benchmark"""
    predictions: Path | None = None
    """score these too: a .csv or .parquet table of pair, keypoint, x and y, in pixels of the target"""
    features: str | None = None
    """match features of a network of timm too, such as timm:vit_small_patch14_dinov2"""
    features_weights: Path | None = None
    """file of its weights"""
    features_size: Annotated[int, Ge(1)] = 224
    """pixels of the squares that it sees"""
    features_layer: int = -1
    """which of its stages; -1: the last"""
    debias: bool = False
    """remove what features of a place have in common over all pictures"""


@dataclass(frozen=True)
class GenerateConfig(CommonOptions):
    """Sample images from a generator."""

    out: Path = Path("runs/generated")
    """where to write grid.png and the other files"""
    generator: str = "digits32"
    """a run folder, a network file, a foreign checkpoint, or the name of an embedded generator"""
    num_samples: Annotated[int, Ge(1)] = 100
    """images to sample; image i depends only on the seed and i"""
    truncation_psi: float = 1.0
    """below 1, styles move towards their mean: fewer odd images, less variety"""
    truncation_cutoff: int | None = None
    """truncate only this many layers, the first; by default all"""
    label: int | None = None
    """class of a conditional generator; by default all in turn"""
    images: bool = False
    """write each image to OUT/images too"""
    video: Literal["none", "mp4", "gif"] = "none"
    """film of walks between latents, in a grid of 4x4: mp4 (extra: video) or gif"""
    keyframes: Annotated[int, Ge(1)] = 4
    """latents of each walk, which is a loop"""
    frames: Annotated[int, Ge(1)] = 48
    """frames between two latents"""
    fps: Annotated[int, Ge(1)] = 24
    """frames a second"""
    batch_size: Annotated[int, Ge(1)] = 64
    """images at once; changes speed, not results"""

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}


@dataclass(frozen=True)
class ConvertConfig(CommonOptions):
    """Convert StyleGAN2 networks and aligners of NVIDIA's, rosinality's and the released GANgealing code, and ours."""

    checkpoint: Path | None = None
    """file to read; none of its code is run"""
    format: Literal["safetensors", "rosinality", "gangealing"] = "safetensors"
    """safetensors: our files; rosinality: a checkpoint that rosinality/stylegan2-pytorch loads; gangealing: one that the
    released GANgealing code loads, of an aligner trained with --design released"""
    generator: str | None = None
    """with --format gangealing: the generator that the aligner was trained on, which goes into the file too"""
    generator_only: bool = False
    """leave the discriminator out"""
    out: Path = Path("runs/converted")
    """folder to write to, or a file: .safetensors for a generator alone, .pt for checkpoints of others"""

    def __post_init__(self) -> None:
        suffix = self.out.suffix
        if suffix == (".pt" if self.format == "safetensors" else ".safetensors"):
            raise ValueError(f"--out {self.out}: not a file of format {self.format}; choose another name or --format")
        if (self.generator is None) == (self.format == "gangealing"):
            raise ValueError(
                f"--format {self.format}, --generator {self.generator}: expected a generator with --format gangealing, "
                "and only there"
            )

    def resolved(self) -> dict[str, Any]:
        return {"config": asdict(self)}
