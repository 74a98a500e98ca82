"""What an experiment of a study is: a name, what it needs, what it measures, and how its result is shown.

Each experiment is one module of its chapter's `experiments` package with one `EXPERIMENT` in it; `discover` finds them. To add
an experiment to a chapter, add such a module.
"""

import pkgutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

from triptych_thesis.study.verdicts import Verdict

Result = Mapping[str, Any]  # what an experiment measured, as JSON holds it


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
class Experiment:
    """One experiment.

    Args:
        name: its key in results.json, and what `--only` takes.
        order: its place in the report.
        measure: from the chapter's context to a JSON-able result.
        section: from the study and the result to its part of the report, from nothing but them, so that a report is drawn again
            without a model.
        verdicts: from the result to verdicts on claims.
        figures: from the result to PNG files by title; they are written beside the result too.
        needs: what must be trained or sampled first; experiments share what they need.
        kept: a result that is there is not measured again (what it depends on is part of the study's identity).
        extra: only with --all.
    """

    name: str
    order: float
    measure: Callable[[Any], dict[str, Any]]
    section: Callable[[Any, Result], Section]
    verdicts: Callable[[Result], list[Verdict]] = lambda result: []
    figures: Callable[[Result], dict[str, bytes]] = lambda result: {}
    needs: Callable[[Any], Sequence[Any]] = lambda context: ()
    kept: bool = False
    extra: bool = False
    offered: Callable[[Any], bool] = field(default=lambda study: True)
    """whether the experiment makes sense for a study's size"""


@cache
def discover(package: str) -> dict[str, Experiment]:
    """The experiments of a package's modules by name, in their order; the modules are imported on the first call.

    Raises ValueError for two experiments of one name.
    """
    modules = pkgutil.iter_modules(import_module(package).__path__, f"{package}.")
    experiments = [getattr(import_module(module.name), "EXPERIMENT", None) for module in modules]
    found = sorted(filter(None, experiments), key=lambda each: each.order)
    by_name = {each.name: each for each in found}
    if len(by_name) < len(found):
        raise ValueError(f"{package}: two experiments have one name, expected different ones")
    return by_name
