"""Chapter 4 end to end: an encoder, an alignment of one digit, clusters of all, scores beside baselines, ablations, report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from triptych_thesis.study.experiment import Opening, Study
from triptych_thesis.study.runner import Stopwatch, run

# What needs torch is imported where it is used, so that --help does not wait for it.
if TYPE_CHECKING:
    from triptych_thesis.chapter4.context import Context, Training
    from triptych_thesis.chapter4.paper import Paper

PAPER = "paper"


@dataclass(frozen=True)
class Chapter4(Study):
    """Reproduce chapter 4: align one digit, cluster all, score, report. Repeating the command resumes it."""

    chapter: ClassVar[int] = 4
    sizes: ClassVar = ("smoke", "laptop", "gpu", PAPER)
    decisive: ClassVar = ("generator", "digit_generator", "lpips_weights")

    out: Path = Path("runs/ch4")
    """everything goes to OUT/SIZE; OUT/report.html is the latest finished size"""
    size: str = "laptop"
    """smoke (a minute), laptop (two cores, under twenty minutes), gpu (one GPU, resumable slices), paper (writes down the
    thesis's runs for eight GPUs, and reports on those that were run)"""
    all: bool = False
    """also what takes longer: the remaining rows of Table 4.3"""
    generator: str = "digits32"
    """generator of all digits: an embedded one, a run folder or a file"""
    digit_generator: str = "digits32-3"
    """generator of the one digit"""
    lpips_weights: Path | None = None
    """file of VGG-16's weights, as torchvision has them: adds LPIPS's rows of Table 4.3"""
    datasets: tuple[str, ...] = ()
    """size paper: which of the thesis's eight data sets; none named: all"""
    generators: Path = Path("generators")
    """size paper: folder of their generators, cat.pkl and so on"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.datasets and self.size != PAPER:
            raise ValueError(f"datasets {' '.join(self.datasets)}: of size {PAPER}; pass --size {PAPER}")
        if self.datasets:
            self.paper()

    def check(self) -> None:
        """Raise also for a bad file of LPIPS's weights, before an hour of training."""
        from triptych_gangealing.encoders.perceptual import open_distance

        super().check()
        if self.lpips_weights is not None:
            open_distance("lpips", weights=self.lpips_weights)

    def context(self) -> "Context":
        from triptych_thesis.chapter4.context import Context

        return Context(self)

    def identity(self) -> dict[str, Any]:
        from triptych_gangealing.stylegan2.weights import load_generator
        from triptych_gangealing.train import digest_of

        context = self.context()
        placed = "distance", "generator"  # where they lie decides nothing; generators are identified by their digests
        alignments = {
            name: {key: value for key, value in each.items() if key not in placed}
            for name, each in context.trainings().items()
        }
        counts = ("ablation_images", "pairs", "images", "cluster_images", "shown", "iterations")
        amounts = {name: getattr(context.size, name) for name in counts}
        digests = {name: digest_of(load_generator(getattr(self, name))) for name in ("generator", "digit_generator")}
        return {"size": self.size, "encoder": context.encoder_config().identity(), **alignments, **amounts, **digests}

    def prepare(self, context: "Context", clock: Stopwatch) -> None:
        from triptych_gangealing.encoders.simclr import run as train_encoder

        with clock("encoder"):
            train_encoder(context.encoder_config())

    def units(self, context: "Context", needs: "Sequence[Training]") -> "dict[str, Sequence[Training]]":
        return {"alignments": needs}

    def facts(self, context: "Context") -> dict[str, Any]:
        from triptych_thesis.chapter4.sizes import DIGIT

        return {"all": self.all, "digit": DIGIT, "training": context.trainings()}

    def opening(self, results: Mapping[str, Any]) -> Opening:
        digit = results["digit"]
        caption = f"Real digits {digit}, never trained on, and their average: above as they are, below aligned."
        drawn = (self.folder / "figures" / "before-after.png").exists()
        return Opening(
            "Digits learn to stand in line",
            "From nothing but a frozen generator of coloured, turned, scaled and shifted digits, and without a single label, a "
            "network learns to bring every digit into one and the same pose.",
            [self.figure("before-after", caption, pixels=True)] if drawn else [],
            "No number of the thesis measures its pictures. For digits, aims stand for them: errors and PCK better than those of "
            "every baseline with 95% intervals apart, a sharp average, purer clusters than those of k-means. A picture is "
            "confirmed where all of its aims are reached, refuted where none is, undecided otherwise. Table 4.3 is confirmed where "
            "every row collapses or stands as in the thesis, refuted where one does the contrary, and undecided while rows are "
            "missing or shorter than the complete method.",
        )

    def paper(self) -> "Paper":
        """The thesis's own runs, of size paper."""
        from triptych_thesis.chapter4.paper import Paper

        return Paper(self)

    def resolved(self) -> dict[str, Any]:
        if self.size == PAPER:
            return self.paper().resolved()
        from triptych_thesis.chapter4.context import CLUSTERED, ONE

        context = self.context()
        return {
            "encoder": context.encoder_config().resolved(),
            **{name: context.align_config(name).resolved() for name in (ONE, CLUSTERED)},
            "scores": asdict(context.score_config(grey=False)),
            "ablations": context.wanted_rows,
        }


def reproduce(study: Chapter4) -> dict[str, Any]:
    """Run what is missing of a study; returns the content of results.json. Of size paper nothing is trained: see `Paper`."""
    return study.paper().write() if study.size == PAPER else run(study)
