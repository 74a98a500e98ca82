"""One self-contained HTML page per run: what was found, tables, figures, and the commands that made them."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from triptych_common.cli import echo
from triptych_common.storage.atomic import write_bytes, write_text

if TYPE_CHECKING:
    pass

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
:root { color-scheme: light; --ink: #1c1c1e; --soft: #62626a; --line: #dcdce2; --paper: #fcfcfa; --accent: #27548a; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 60rem;
  padding: 2rem 1.25rem 5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
.lead { font-size: 1.08rem; } .lead li { margin: .2rem 0; } .soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; } .pixels { image-rendering: pixelated; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; caption-side: bottom; padding-top: .5rem; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } pre { background: #f0f0ec; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
.row { display: flex; flex-wrap: wrap; gap: 1.2rem; } .row figure { flex: 1 1 20rem; margin: .4rem 0; }
</style>
</head>
<body>
<h1>{{ report.title }}</h1>
<p class="soft">{{ report.subtitle }}</p>
<ul class="lead">{% for line in report.findings %}<li>{{ line }}</li>{% endfor %}</ul>
{% for part in report.parts %}{% if part.kind == "heading" %}
<h2>{{ part.text }}</h2>{% elif part.kind == "text" %}
<p>{{ part.text }}</p>{% elif part.kind == "code" %}
<pre>{{ part.text }}</pre>{% elif part.kind == "figures" %}
<div class="row">{% for f in part.figures %}<figure><img {% if f.pixels %}class="pixels" {% endif %}alt="{{ f.caption }}"
src="data:image/png;base64,{{ f.data }}"><figcaption>{{ f.caption }}</figcaption></figure>{% endfor %}</div>
{% elif part.kind == "table" %}
<div class="scroll"><table><caption>{{ part.text }}</caption><thead><tr>{% for h in part.header %}<th>{{ h }}</th>{% endfor %}</tr>
</thead><tbody>{% for row in part.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table>
</div>{% elif part.kind == "links" %}
<details><summary>{{ part.text }}</summary><ul>{% for label, links in part.rows %}<li>{{ label }}:
{% for name, path in links.items() %}<a href="{{ path | urlencode }}">{{ name }}</a> {% endfor %}</li>{% endfor %}</ul></details>
{% endif %}{% endfor %}
</body>
</html>
"""


@dataclass
class Report:
    """A page built from top to bottom; `findings` are what its first screen says."""

    title: str
    subtitle: str
    findings: Sequence[str]
    parts: list[dict[str, Any]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.parts.append({"kind": "heading", "text": text})

    def text(self, text: str) -> None:
        self.parts.append({"kind": "text", "text": text})

    def code(self, text: str) -> None:
        self.parts.append({"kind": "code", "text": text})

    def figures(self, *figures: tuple[bytes, str], pixels: bool = False) -> None:
        """PNG files with captions, side by side where they fit; `pixels` keeps enlarged pixels sharp."""
        shown = [
            {"data": base64.b64encode(png).decode(), "caption": caption, "pixels": pixels} for png, caption in figures
        ]
        self.parts.append({"kind": "figures", "figures": shown})

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
        self.parts.append({"kind": "table", "header": header, "rows": rows, "text": caption})

    def links(self, summary: str, rows: Sequence[tuple[str, Mapping[str, str]]]) -> None:
        """A list that opens on request: a label each, and links by name to files beside the page.

        Raises ValueError for a path that is not relative to the page's folder.
        """
        for _, links in rows:
            for path in links.values():
                if path.startswith("/") or ".." in path or ":" in path:
                    raise ValueError(f"link {path}: expected a path below the page's folder")
        self.parts.append({"kind": "links", "rows": rows, "text": summary})

    def html(self) -> str:
        from jinja2 import Environment

        return Environment(autoescape=True).from_string(_TEMPLATE).render(report=self)

    def write(self, path: Path) -> None:
        write_text(path, self.html())


def publish(folder: Path, out: Path, size: str) -> None:
    """A finished reproduction's report and results, from its folder to where the latest of any size lies; links follow."""
    base = f"{folder.relative_to(out).as_posix()}/"
    page = (folder / "report.html").read_text().replace('<a href="', f'<a href="{escape(quote(base))}')
    write_text(out / "report.html", page)
    write_bytes(out / "results.json", (folder / "results.json").read_bytes())
    for name in ("report.html", "results.json"):
        echo(f"wrote {out / name} (size {size})")
