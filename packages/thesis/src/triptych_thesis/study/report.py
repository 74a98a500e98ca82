"""The report of a study: one self-contained HTML page.

Its first screen is one sentence, one picture and one table of verdicts. Sections follow, an experiment each; what explains
how numbers were made folds out.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from triptych_common.storage.atomic import write_bytes, write_text

from triptych_thesis.study.experiment import Picture, Section, Table
from triptych_thesis.study.verdicts import MARKS, Verdict

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
:root { color-scheme: light; --ink: #1c1c1e; --soft: #5c5c64; --line: #dcdce2; --paper: #fcfcfa; --accent: #27548a; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 64rem;
  padding: 1.5rem 1.25rem 5rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
a { color: var(--accent); } .headline { font-size: 1.1rem; margin: .4rem 0 .8rem; }
.soft, figcaption, caption, .note { color: var(--soft); font-size: .88rem; }
figure { margin: .6rem 0; } img { max-width: 100%; height: auto; display: block; } .pixels { image-rendering: pixelated; }
figcaption { margin-top: .3rem; } .scroll { overflow-x: auto; margin: .6rem 0 1.2rem; } .number { white-space: nowrap; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; caption-side: bottom; padding-top: .5rem; max-width: min(48rem, 100vw - 2.5rem); }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
table:not(#verdicts) td:first-child { min-width: 7rem; }
th { font-weight: 600; } pre { background: #f0f0ec; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
.row { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; align-items: start; } .row figure { max-width: 100%; }
nav { font-size: .9rem; margin: 1rem 0; line-height: 1.7; } nav a { margin-right: 1rem; }
summary { cursor: pointer; color: var(--accent); margin: .5rem 0; }
.mark { font-weight: 700; } .confirmed { color: #0b7a5e; } .refuted { color: #b03a2e; } .undecided { color: #8a6d1f; }
#verdicts { width: 100%; } #verdicts td { padding-bottom: .4rem; line-height: 1.35; } #verdicts td:last-child { padding-right: 0; }
.first img { max-height: 21rem; width: auto; }
@media (max-width: 40rem) {
  #verdicts thead { display: none; } #verdicts td { border: 0; } #verdicts tbody { border-bottom: 1px solid var(--line); }
}
@media (min-width: 52rem) {
  .beside { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); gap: 1.6rem; align-items: start; }
}
</style>
</head>
<body>
{% macro picture(p) %}<figure style="flex: 0 1 {{ p.width }}px">
<img {% if p.pixels %}class="pixels" {% endif %}alt="{{ p.caption }}"
width="{{ p.width }}" src="data:image/png;base64,{{ encoded(p.png) }}"><figcaption>{{ p.caption }}</figcaption></figure>
{% endmacro %}
{% macro table(t) %}{% if t.folded %}<details><summary>{{ t.caption.split(".")[0] }}</summary>{% endif %}
<div class="scroll"><table>{% if t.caption %}<caption>{{ t.caption }}</caption>{% endif %}<thead><tr>{% for h in t.header %}
<th>{{ h }}</th>{% endfor %}</tr></thead><tbody>{% for row in t.rows %}<tr>{% for text in row %}
<td>{{ text | cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>{% if t.folded %}</details>{% endif %}{% endmacro %}
{% macro measured(e) %}{{ e.ours | cell }}{% if e.beside %}<div class="soft">against {{ e.beside | cell }}</div>{% endif %}
{% endmacro %}
<h1>{{ report.title }}</h1>
<p class="headline">{{ report.headline }}</p>
<div class="first {{ "beside" if report.beside }}"><div>{% for p in report.pictures %}{{ picture(p) }}{% endfor %}</div>
{% if report.verdicts %}
<div class="scroll"><table id="verdicts"><thead><tr><th></th><th>claim of the thesis</th><th>measured here</th></tr></thead>
{% for v, name in report.verdicts %}{% set single = v.shown[0] if v.shown | length == 1 and not v.shown[0].verdict %}
<tbody id="{{ v.claim }}"><tr><td class="mark {{ v.verdict }}" title="{{ v.verdict }}">{{ marks[v.verdict] }}</td>
{% if single %}<td>{{ name }}<div class="soft">{{ single.what }}</div></td><td>{{ measured(single) }}</td></tr>
{% else %}<td colspan="2">{{ name }}{% if not v.shown %}<div class="soft">{{ v.why }}</div>{% endif %}</td></tr>
{% for e in v.shown %}<tr><td></td><td><span class="mark {{ e.verdict }}" title="{{ e.verdict }}">{{ marks[e.verdict] }}</span>
{{ e.what }}</td><td>{{ measured(e) }}</td></tr>{% endfor %}
{% endif %}</tbody>{% endfor %}
</table></div>{% endif %}</div>
<p class="soft">{{ report.setting }}
{% for mark, verdict in legend %} <span class="mark {{ verdict }}">{{ mark }}</span> {{ verdict }}
{{- "." if loop.last else "," }}{% endfor %}</p>
<nav>{% for s in report.sections %}<a href="#{{ loop.index }}">{{ s.title }}</a> {% endfor %}
{% if report.verdicts %}<a href="#evidence">Evidence</a> {% endif %}
<a href="#made">How this was made</a></nav>
{% for s in report.sections %}<h2 id="{{ loop.index }}">{{ s.title }}</h2>
{% if s.pictures %}<div class="row">{% for p in s.pictures %}{{ picture(p) }}{% endfor %}</div>{% endif %}
{% for t in s.tables %}{{ table(t) }}{% endfor %}
{% if s.note %}<details><summary>How to read this</summary><p class="note">{{ s.note }}</p></details>{% endif %}
{% for group in s.links %}<details><summary>{{ group.summary }}</summary><ul>{% for label, links in group.rows %}<li>{{ label }}:
{% for name, path in links.items() %}<a href="{{ path | urlencode }}">{{ name }}</a> {% endfor %}</li>{% endfor %}</ul></details>
{% endfor %}
{% endfor %}
{% if report.verdicts %}<h2 id="evidence">Evidence</h2>
{{ table(report.evidence) }}{% endif %}
<h2 id="made">How this was made</h2>
<pre>{{ report.command }}</pre>
{% if report.facts %}<details><summary>Settings, versions and times</summary>{{ table(report.facts) }}</details>{% endif %}
</body>
</html>
"""

INTERVALS_DECIDE = (
    "Confirmed: every comparison that the claim consists of has its whole 95% interval on the claimed side; refuted: one lies "
    "wholly on the other side; undecided otherwise. Comparisons are not corrected for their number."
)

WIDE = 2  # width over height from which on a picture takes the page's whole width


@dataclass
class Report:
    """A page.

    Args:
        title: what was done, in a few words.
        headline: the one sentence to take away.
        setting: size, seed, commit, time and hardware, on one line.
        command: what a reader types to make this page.
        pictures: what was made beside what it is compared with; one, two where they belong together.
        verdicts: each with the item of the thesis that makes the claim, such as "Figure 2.5: adaLN-Zero is the best design".
        sections: the experiments.
        facts: settings, versions, times: rows of name and value.
        rule: how verdicts follow from the evidence.
    """

    title: str
    headline: str
    setting: str
    command: str
    pictures: Sequence[Picture] = ()
    verdicts: Sequence[tuple[Verdict, str]] = ()
    sections: Sequence[Section] = ()
    facts: Table | None = None
    rule: str = INTERVALS_DECIDE

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
        caption = f"A verdict speaks of this size alone, never of the thesis's. {self.rule}"
        return Table(("claim", "", "quantity", "ours", "against", "thesis"), rows, caption)

    def html(self) -> str:
        """The page. Raises ValueError for a link that leads out of its folder."""
        from jinja2 import Environment

        rows = [row for section in self.sections for group in section.links for row in group.rows]
        for path in (path for _, links in rows for path in links.values()):
            if path.startswith("/") or ".." in path or ":" in path:
                raise ValueError(f"link {path}: expected a path below the page's folder")
        environment = Environment(autoescape=True, trim_blocks=True)
        environment.filters["cell"] = _cell
        template = environment.from_string(_TEMPLATE)
        shown = [name for each, _ in self.verdicts for name in (each.verdict, *(one.verdict for one in each.shown))]
        legend = [(MARKS[name], name) for name in dict.fromkeys(shown) if name]
        return template.render(
            report=self, marks=MARKS, legend=legend, encoded=lambda png: base64.b64encode(png).decode()
        )

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

    return Table(
        ("what", "value"), [(name, text(value)) for name, value in facts.items() if value not in (None, {}, "")]
    )


def publish(folder: Path, out: Path) -> list[Path]:
    """Copy a finished study's report and results to where the latest of any size lies; links follow. Returns the copies."""
    base = f"{folder.relative_to(out).as_posix()}/"
    page = (folder / "report.html").read_text()
    # Links inside the page stay; links to files gain the way to the study's folder.
    page = page.replace('<a href="', f'<a href="{escape(quote(base))}').replace(
        f'<a href="{escape(quote(base))}#', '<a href="#'
    )
    write_text(out / "report.html", page)
    write_bytes(out / "results.json", (folder / "results.json").read_bytes())
    return [out / "report.html", out / "results.json"]
