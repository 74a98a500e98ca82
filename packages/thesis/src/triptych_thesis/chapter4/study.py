"""Chapter 4 end to end: an encoder, an alignment of one digit, clusters of all, scores beside baselines, ablations, report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from triptych_thesis.study.runner import Opening, Stopwatch, Study, run

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
    package: ClassVar[str] = "triptych_thesis.chapter4.experiments"

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
        super().check()
        self.context().check()

    def context(self) -> "Context":
        from triptych_thesis.chapter4.context import Context
        from triptych_thesis.chapter4.sizes import SIZES

        return Context(
            self.folder, SIZES[self.size], self.seed, self.device, self.generator, self.digit_generator,
            self.lpips_weights, self.all,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        return {"size": self.size, **self.context().identity()}

    def prepare(self, context: "Context", clock: Stopwatch) -> None:
        with clock("encoder"):
            context.train_encoder()

    def units(self, context: "Context", needs: "Sequence[Training]") -> "dict[str, list[Training]]":
        return {"alignments": list({each.title: each for each in needs}.values())}

    def facts(self, context: "Context") -> dict[str, Any]:
        return context.facts()

    def opening(self, results: Mapping[str, Any]) -> Opening:
        caption = (
            f"Real digits {results['digit']}, never trained on, and their average: above as they are, below aligned."
        )
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

    def command_options(self) -> list[str]:
        given = {name: getattr(self, name) for name in ("generator", "digit_generator", "lpips_weights")}
        return [
            word
            for name, value in given.items()
            if value != getattr(type(self), name)
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]

    def paper(self) -> "Paper":
        """The thesis's own runs, of size paper."""
        from triptych_thesis.chapter4.paper import DATASETS, Paper

        datasets = self.datasets or DATASETS
        return Paper(self.folder, self.seed, self.device, datasets, self.generators, self.lpips_weights, self.all)

    def resolved(self) -> dict[str, Any]:
        return self.paper().resolved() if self.size == PAPER else self.context().resolved()


def reproduce(study: Chapter4) -> dict[str, Any]:
    """Run what is missing of a study; returns the content of results.json. Of size paper nothing is trained: see `Paper`."""
    return study.paper().write() if study.size == PAPER else run(study)
