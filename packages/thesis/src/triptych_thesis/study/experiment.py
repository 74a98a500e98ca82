"""What a study and its experiments are: what an experiment needs, what it measures, and how its result is shown.

A chapter is a dataclass derived from `Study`. Each of its experiments is one module of the chapter's `experiments` package with one
`EXPERIMENT` in it; `discover` finds them. To add an experiment to a chapter, add such a module.
"""

import pkgutil
import shlex
import struct
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from triptych_common.cli import CommonOptions
from triptych_common.fields import Ge

from triptych_thesis.study.claims import load_claims
from triptych_thesis.study.verdicts import INTERVALS_DECIDE, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from triptych_common.workers import Unit

    from triptych_thesis.study.runner import Stopwatch

Result = Mapping[str, Any]  # what an experiment measured, or a part of it, as JSON holds it


# Settings of trainings that identities recorded while they could not change, see `RunDirectory`.
FREED = frozenset(
    {"log_every", "checkpoint_every", "snapshots", "validation_every", "validation_data", "validation_images"}
)


@dataclass(frozen=True)
class Picture:
    """A PNG image with its caption; `pixels` keeps enlarged pixels sharp."""

    png: bytes
    caption: str
    pixels: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header of the PNG file."""
        width, height = struct.unpack(">II", self.png[16:24])
        return width, height

    @property
    def width(self) -> int:
        """Width on the page: type in plots is then as large as the page's own; small pictures are enlarged."""
        return max(280, round(self.size[0] / 1.6))


@dataclass(frozen=True)
class Table:
    """Rows under a header. Numbers with intervals stand here, never in sentences. `folded`: opens on request."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Links:
    """A list that opens on request: a label each, and links by name to files below the report's folder."""

    summary: str
    rows: Sequence[tuple[str, Mapping[str, str]]]


@dataclass(frozen=True)
class Section:
    """An experiment's part of the report: pictures first, then tables, then a note that folds out."""

    title: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    note: str = ""
    links: Sequence[Links] = ()


@dataclass(frozen=True)
class Opening:
    """A report's first screen."""

    title: str
    headline: str  # the sentence to take away
    pictures: Sequence[Picture] = ()  # one, or two that belong together
    rule: str = INTERVALS_DECIDE  # how the verdicts follow from the evidence


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Sections and figures are made from the result and the files beside it alone, so that a report is drawn again without a model.
    """

    name: str  # its key in results.json, and what `--only` takes
    order: float  # its place in the report
    measure: Callable[[Any], Result]  # with the chapter's context
    section: Callable[[Any, Result], Section]  # its part of the study's report
    verdicts: Callable[[Result], list[Verdict]] = lambda result: []
    # By title, for PNG files beside the result; bytes are such a file, which may be animated.
    figures: Callable[[Result], Mapping[str, "Figure | bytes"]] = lambda result: {}
    # What must be trained or sampled first, by any experiment.
    needs: Callable[[Any], Sequence[Any]] = lambda context: ()
    kept: bool = False  # an existing result is not measured again: what it depends on is part of the study's identity
    extra: bool = False  # only with --all
    offered: Callable[[Any], bool] = lambda study: True  # whether it makes sense for a study's size


@cache
def discover(package: str) -> dict[str, Experiment]:
    """The experiments of a package's modules by name, in their order. Raises ValueError for two of one name."""
    modules = pkgutil.iter_modules(import_module(package).__path__, f"{package}.")
    experiments = [getattr(import_module(module.name), "EXPERIMENT", None) for module in modules]
    found = sorted(filter(None, experiments), key=lambda each: each.order)
    by_name = {each.name: each for each in found}
    if len(by_name) < len(found):
        raise ValueError(f"{package}: two experiments have one name, expected different ones")
    return by_name


@dataclass(frozen=True)
class Study(CommonOptions):
    """The options that the studies of all chapters share. Everything else is a chapter's own."""

    chapter: ClassVar[int]
    results_folder: ClassVar[str] = "experiments"
    decisive: ClassVar[Sequence[str]] = ()  # the chapter's own options that decide results

    out: Path = Path("runs/study")
    """everything goes to OUT/SIZE; OUT/report.html is the latest finished size"""
    size: str = "laptop"
    """how much is trained and measured"""
    only: tuple[str, ...] = ()
    """experiments to run; by default all that the size offers"""
    all: bool = False
    """also what takes longest"""
    workers: Annotated[int | None, Ge(1)] = None
    """processes, each with one thread on a CPU; by default one a core, and one on a GPU. Changes no result"""
    claims: Path = Path("claims.toml")
    """ledger of the thesis's figures and tables, for the report; left out where absent"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size not in self.sizes:
            raise ValueError(f"size {self.size!r}: expected one of {', '.join(self.sizes)}")
        for name in self.only:
            if name not in self.offered:
                raise ValueError(f"experiment {name!r}: expected one of {', '.join(self.offered)} at size {self.size}")

    @property
    @abstractmethod
    def sizes(self) -> Collection[str]:
        """Names of the sizes."""

    @property
    def home(self) -> Path:
        """The folder of all sizes, and of the latest report."""
        return self.out

    @property
    def folder(self) -> Path:
        """The folder of this size."""
        return self.home / self.size

    @property
    def experiments(self) -> Mapping[str, Experiment]:
        """The chapter's experiments by name. They are imported on the first use, and torch with them."""
        return discover(f"triptych_thesis.chapter{self.chapter}.experiments")

    @property
    def offered(self) -> tuple[str, ...]:
        """Names of the experiments that the size has."""
        return tuple(name for name, each in self.experiments.items() if each.offered(self))

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the experiments to run."""
        return self.only or tuple(name for name in self.offered if self.all or not self.experiments[name].extra)

    def result_path(self, name: str) -> Path:
        """The file of an experiment's result."""
        return self.folder / self.results_folder / f"{name}.json"

    def figure(self, title: str, caption: str, *, pixels: bool = False) -> Picture:
        """A figure that was written beside the results, for the report. Raises OSError where it is missing."""
        return Picture((self.folder / "figures" / f"{title}.png").read_bytes(), caption, pixels)

    @abstractmethod
    def context(self) -> Any:
        """What the experiments measure with: models by name, samples, scores, made on first use."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the results, wherever they lie; --all, --only and --workers change what is done, not what comes out."""

    @abstractmethod
    def opening(self, results: Mapping[str, Any]) -> Opening:
        """The first screen of the report, from results.json and the files beside it alone."""

    @abstractmethod
    def facts(self, context: Any) -> dict[str, Any]:
        """What results.json holds besides: models, data, settings."""

    def judged(self, verdict: Verdict) -> Verdict | None:
        """An experiment's verdict as one on a row of the ledger; None where the claim does not speak of what was studied."""
        return verdict

    def check(self) -> None:
        """Raise for whatever would fail later: missing files, a damaged ledger."""
        if self.claims.exists():
            load_claims(self.claims)

    def prepare(self, context: Any, clock: "Stopwatch") -> None:
        """Make the data and models that every experiment needs."""

    def units(self, context: Any, needs: Sequence[Any]) -> Mapping[str, Sequence["Unit"]]:
        """What the experiments need, each once, as units of work by stage, in the order of the stages."""
        return {}

    @property
    def target(self) -> str:
        """The target of make that makes the results, with its variables."""
        return f"reproduce-ch{self.chapter} SIZE={self.size}"

    @property
    def command(self) -> str:
        """What a reader types to make the results."""
        words = ["triptych", "reproduce", f"ch{self.chapter}", "--size", self.size, *["--all"] * self.all]
        for name in self.decisive:
            if getattr(self, name) != getattr(type(self), name):
                words += [f"--{name.replace('_', '-')}", str(getattr(self, name))]
        return shlex.join([*words, "--seed", str(self.seed)])
