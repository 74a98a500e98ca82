"""Settings of the commands that use an aligner."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from triptych_common.cli import CommonOptions
from triptych_common.fields import Ge, Interval
from triptych_common.parallel import process_group

from triptych_gangealing.aligner import Aligner, load_aligner

Flips = Literal["trained", "yes", "no"]


def open_aligner(
    path: Path, device: str, iterations: int | None = None, flips: Flips = "trained"
) -> tuple[Aligner, dict[str, Any]]:
    """An aligner on a device, and the options with which it is to look at pictures: as in training where nothing else is said.

    Raises as `load_aligner`, and ValueError for flips or several looks of a transformer that can neither.
    """
    with process_group(device) as ranks:
        aligner = load_aligner(path).to(ranks.device)
    options = {
        "iterations": aligner.facts["iterations"] if iterations is None else iterations,
        "flips": aligner.facts["flips"] if flips == "trained" else flips == "yes",
    }
    if options["flips"] and aligner.transformer.flow is None:
        raise ValueError("flips yes: a transformer without flow has no measure of which is better; pass --flips no")
    if options["iterations"] > 1 and aligner.transformer.similarity is None:
        raise ValueError(
            f"iterations {options['iterations']}: a transformer of flow alone looks once; pass --iterations 1"
        )
    return aligner, options


@dataclass(frozen=True)
class UseOptions(CommonOptions):
    """What every use of an aligner takes."""

    aligner: Path = Path("runs/align-digits32")
    """run folder of triptych-gangealing train, or its aligner.safetensors"""
    iterations: Annotated[int | None, Ge(1)] = None
    """times the similarity network looks; default: as in training. 3 were published for most data sets"""
    flips: Flips = "trained"
    """mirror pictures whose flow is smoother then; trained: where the training did"""

    def open(self) -> tuple[Aligner, dict[str, Any]]:
        """The aligner, and the options with which it is to look at pictures."""
        return open_aligner(self.aligner, self.device, self.iterations, self.flips)


@dataclass(frozen=True)
class FolderOptions(UseOptions):
    """What every use of an aligner on a folder takes."""

    out: Path = Path("runs/aligned")
    """where to write"""
    images: Path = Path("images")
    """folder of pictures"""
    limit: Annotated[int | None, Ge(1)] = None
    """the first so many of them only"""
    size: Annotated[int | None, Ge(1)] = None
    """height and width of the aligned pictures and their average; default: the transformer's input size"""

    def open(self) -> tuple[Aligner, dict[str, Any]]:
        """As `UseOptions.open`; raises ValueError where what is written would lie among what is read."""
        out, images = self.out.resolve(), self.images.resolve()
        if out == images or images in out.parents:
            raise ValueError(
                f"out {self.out}: lies in {self.images}, among the pictures to be read; choose a folder elsewhere"
            )
        for written in (out / "aligned", out / "pictures"):
            if written == images or written in images.parents:
                raise ValueError(f"out {self.out}: would overwrite {self.images}; choose another")
        return super().open()


@dataclass(frozen=True)
class WarpedOptions(FolderOptions):
    """What every command that shows aligned pictures takes."""

    padding: Literal["trained", "border", "reflection", "zeros"] = "trained"
    """what a picture shows beyond its edges; trained: as in training"""

    def shown(self, aligner: Aligner) -> tuple[int, str]:
        """Height and width of aligned pictures, and the padding."""
        padding = aligner.facts["padding"] if self.padding == "trained" else self.padding
        return self.size or aligner.config.input_size, padding


@dataclass(frozen=True)
class AlignConfig(WarpedOptions):
    """Align a folder of pictures: OUT/aligned, OUT/grid.png, OUT/average.png, OUT/alignment.jsonl."""


@dataclass(frozen=True)
class AverageConfig(WarpedOptions):
    """The average of a folder's aligned pictures, to draw on: OUT/average.png, one for each cluster."""

    out: Path = Path("runs/average")
    """where to write"""
    keep: Annotated[float, Interval(gt=0, le=1, wanted="a share above 0, at most 1")] = 1.0
    """share of the pictures that count, those with the smoothest flows"""


@dataclass(frozen=True)
class PropagateConfig(FolderOptions):
    """What is drawn on the average aligned picture, in every picture of a folder: OUT/pictures, or OUT/points.json."""

    out: Path = Path("runs/propagated")
    """where to write"""
    edit: Path | None = None
    """RGBA picture of the size of average.png: what to lay over it"""
    points: Path | None = None
    """JSON list of [x, y] in pixels of average.png, the centre of the first pixel at 0"""
    cluster: int = 0
    """whose average was drawn on; pictures of others stay as they are"""


@dataclass(frozen=True)
class CorrespondConfig(UseOptions):
    """Points of one picture in another: OUT/matches.png, OUT/matches.json."""

    out: Path = Path("runs/matches")
    """where to write"""
    source: Path = Path("a.png")
    """picture to take points from"""
    target: Path = Path("b.png")
    """picture to find them in"""
    points: Path | None = None
    """JSON list of [x, y] in pixels of the source; default: a grid of them"""
    spacing: Annotated[int, Ge(1)] = 8
    """points of that grid a side"""
