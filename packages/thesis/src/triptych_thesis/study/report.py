"""The report of a study: one self-contained HTML page.

Its first screen is one sentence, one picture and one table of verdicts. Sections follow, an experiment each.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from triptych_common.storage.files import write_bytes, write_text

from triptych_thesis.study.experiment import Opening, Section, Table
from triptych_thesis.study.verdicts import MARKS, Verdict

PUBLISHED = ("report.html", "results.json")
_TEMPLATE = Path(__file__).with_name("report.html.jinja")

WIDE = 2  # width over height from which on a picture takes the page's whole width


@dataclass(frozen=True, kw_only=True)
class Report(Opening):
    """A page."""

    setting: str  # size, seed, commit, time and hardware, on one line
    command: str  # what a reader types to make this page
    # Each with its claim, such as "Figure 2.5: adaLN-Zero is the best design".
    verdicts: Sequence[tuple[Verdict, str]] = ()
    sections: Sequence[Section] = ()  # the experiments
    facts: Table | None = None  # settings, versions, times: rows of name and value

    @property
    def beside(self) -> bool:
        """Whether the first screen has the table beside its pictures: below them where one is wide."""
        sizes = [picture.size for picture in self.pictures]
        return bool(sizes) and all(width <= WIDE * height for width, height in sizes)

    @property
    def evidence(self) -> Table:
        """Every measured quantity behind the verdicts."""
        rows = [
            ("" if i else name, MARKS[each.verdict or verdict.verdict], each.what, each.ours, each.against, each.thesis)
            for verdict, name in self.verdicts
            for i, each in enumerate(verdict.evidence)
        ]
        rows += [(name, MARKS[v.verdict], v.why, "", "", "") for v, name in self.verdicts if v.why]
        caption = f"A verdict holds for this size alone, never for the thesis's. {self.rule}"
        return Table(("claim", "", "quantity", "ours", "against", "thesis"), rows, caption)

    def html(self) -> str:
        """The page. Raises ValueError for a link that leads out of its folder."""
        from jinja2 import Environment

        rows = [row for section in self.sections for group in section.links for row in group.rows]
        for path in (path for _, links in rows for path in links.values()):
            if path.startswith("/") or ".." in path or ":" in path:
                raise ValueError(f"link {path}: expected a path below the page's folder")
        environment = Environment(autoescape=True, trim_blocks=True)
        environment.filters |= {"cell": _cell, "base64": lambda png: base64.b64encode(png).decode()}
        template = environment.from_string(_TEMPLATE.read_text())
        shown = [name for each, _ in self.verdicts for name in (each.verdict, *(one.verdict for one in each.shown))]
        legend = [(MARKS[name], name) for name in dict.fromkeys(shown) if name]
        return template.render(report=self, marks=MARKS, legend=legend)

    def write(self, path: Path) -> None:
        """Write the page atomically. Raises as `html`, and OSError when the disk refuses."""
        write_text(path, self.html())


def _cell(text: Any) -> Any:
    """HTML of a text in which numbers stay on one line with their intervals and verdicts' marks have their colours."""
    from markupsafe import Markup

    html = re.sub(r"\S+ \[[^][]+\]", r'<span class="number">\g<0></span>', escape(str(text)))
    verdict = html[2:] if html[:1] in MARKS.values() else ""
    if verdict in MARKS:
        html = f'<span class="number"><span class="mark {verdict}">{html[0]}</span> {verdict}</span>'
    return Markup(html)


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Settings by name as a table; dictionaries become lists of name and value."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {text(each)}" for key, each in value.items())
        return str(value)

    rows = [(name, text(value)) for name, value in facts.items() if value not in (None, {}, "")]
    return Table(("what", "value"), rows)


def publish(folder: Path, out: Path) -> list[Path]:
    """Copy a finished study's report and results to where the latest of any size lies; links follow. Returns the copies."""
    base = f"{folder.relative_to(out).as_posix()}/"
    report, results = (out / name for name in PUBLISHED)
    page = (folder / report.name).read_text()
    # Links inside the page stay; links to files gain the way to the study's folder.
    page = re.sub(r'<a href="(?!#)', f'<a href="{escape(quote(base))}', page)
    write_text(report, page)
    write_bytes(results, (folder / results.name).read_bytes())
    return [report, results]
