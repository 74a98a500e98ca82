"""The ledger of the thesis's figures and tables, `claims.toml`, and the page generated from it, `docs/claims.md`."""

import json
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from triptych_common.cli import CommonOptions, echo
from triptych_common.storage.files import check, read_bytes, read_json, write_text
from typing_extensions import TypedDict
from tyro.conf import Positional, Suppress

from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, UNDECIDED, VERDICTS


class _Found(TypedDict):
    """What a run writes about a claim."""

    verdict: str
    size: str
    interval: str
    command: str


FOUND = tuple(_Found.__annotations__)
GENERATED = "Generated from `claims.toml` by `make docs`; edit that file, not this one."
KINDS = ("ordering", "number", "gallery", "diagram", "setting")


@dataclass(frozen=True)
class Claim:
    """One figure or table: what it claims, and what we measured."""

    id: str
    chapter: int
    item: str
    title: str
    kind: str  # one of KINDS
    claim: str
    published: str
    verdict: str  # one of VERDICTS
    size: str
    interval: str
    command: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"claim {self.id}: verdict {self.verdict!r}, expected one of {', '.join(VERDICTS)}")
        if self.kind not in KINDS:
            raise ValueError(f"claim {self.id}: kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.verdict in (CONFIRMED, REFUTED, UNDECIDED) and not (self.size and self.command):
            raise ValueError(f"claim {self.id}: verdict {self.verdict!r} without size and command")


def load_claims(path: Path) -> dict[str, Claim]:
    """Rows of the ledger by id. Raises ValueError for a file of another kind, other keys, or an id that appears twice."""
    names = {field.name for field in fields(Claim)}
    claims: dict[str, Claim] = {}
    try:
        rows = [dict(row) for row in tomllib.loads(read_bytes(Path(path)).decode())["claim"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: no ledger, expected TOML with [[claim]] tables ({error})") from error
    for row in rows:
        if row.keys() != names:
            raise ValueError(f"{path}: claim {row.get('id')!r}: keys differ by {sorted(row.keys() ^ names)}")
        claim = check(row, Claim, source=str(path), remedy="mend this line")
        if claim.id in claims:
            raise ValueError(f"{path}: claim {claim.id!r} appears twice")
        claims[claim.id] = claim
    return claims


def record(ledger: Path, found: Mapping[str, Mapping[str, str]]) -> None:
    """Write results into the ledger's rows, and leave all else in the file. Raises ValueError for a claim that it lacks."""
    known = load_claims(ledger)
    if missing := sorted(found.keys() - known.keys()):
        raise ValueError(f"{ledger}: has no claim {missing[0]!r}; expected a ledger with {', '.join(found)}")
    head, *blocks = ledger.read_text().split("[[claim]]\n")
    for i, block in enumerate(blocks):
        claim = tomllib.loads(block)["id"]
        if values := found.get(claim):
            Claim(**{**vars(known[claim]), **values})  # refuses what is no verdict
            for name in FOUND:
                line = f"{name} = {json.dumps(values[name], ensure_ascii=False)}"
                line = line.replace("\x7f", r"\u007f")  # which TOML refuses as it is
                block = re.sub(rf'^{name} = ".*"$', line.replace("\\", r"\\"), block, flags=re.MULTILINE)
        blocks[i] = block
    write_text(ledger, "[[claim]]\n".join([head, *blocks]))


def record_results(results: Path, ledger: Path) -> list[str]:
    """Write the verdicts of a run's results.json into the ledger; returns the ids of their claims.

    Raises ValueError for a file of another kind, results of another chapter than their claims, and smoke runs.
    """
    verdicts, chapter = _verdicts(results)
    claims = load_claims(ledger)
    if any(claims[claim].chapter != chapter for claim in verdicts if claim in claims):
        raise ValueError(f"{results}: decides no claim of chapter {chapter}; expected its results.json")
    record(ledger, verdicts)
    return list(verdicts)


class _Results(TypedDict):
    claims: dict[str, _Found]
    chapter: int
    size: str


def _verdicts(results: Path) -> tuple[dict[str, dict[str, str]], int]:
    """A run's verdict on each claim, and its chapter."""
    if not results.exists():
        raise FileNotFoundError(f"{results}: no such file; expected the results.json of triptych reproduce")
    content = read_json(results, _Results, remedy="expected the results.json of triptych reproduce")
    verdicts = content["claims"]
    chapter, size = content["chapter"], content["size"]
    if not verdicts or size.startswith("smoke"):
        larger = "expected its results.json, of a size larger than smoke"
        raise ValueError(f"{results}: decides no claim of chapter {chapter}; {larger}")
    return verdicts, chapter


@dataclass(frozen=True)
class ClaimsConfig(CommonOptions):
    """Write the verdicts of studies into the ledger of the thesis's claims, and render the ledger as a page."""

    results: Positional[tuple[Path, ...]] = ()
    """results.json of studies of any chapter, larger than smoke; without any, the page alone is rendered"""
    ledger: Path = Path("claims.toml")
    """where the claims stand"""
    page: Path = Path("docs/claims.md")
    """the page to write"""
    out: Annotated[Path, Suppress] = Path()
    seed: Annotated[int, Suppress] = 0
    device: Annotated[str, Suppress] = "cpu"

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints: the verdicts that would be written."""
        return {claim: row for path in self.results for claim, row in _verdicts(path)[0].items()}


def claims(config: ClaimsConfig) -> dict[str, Any]:
    """The command `triptych claims`; returns the ids of the claims that were written. Raises as `record_results`."""
    if config.page.exists() and not config.overwrite and GENERATED.encode() not in read_bytes(config.page):
        raise ValueError(f"page {config.page}: of another command; choose another --page, or pass --overwrite")
    written = {str(path): record_results(path, config.ledger) for path in config.results}
    for path, ids in written.items():
        echo(f"{path}: wrote {len(ids)} verdicts into {config.ledger}")
    write_text(config.page, claims_page(load_claims(config.ledger)))
    echo(f"wrote {config.page}")
    return {"written": written, "page": str(config.page)}


def claims_page(claims: dict[str, Claim]) -> str:
    """The ledger as Markdown."""
    counts = Counter(claim.verdict for claim in claims.values())
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    lines = ["# Claims of the thesis and what became of them", "", GENERATED, "", f"{summary}."]
    header = ["| id | item | claim | published | verdict | measured |", "|---|---|---|---|---|---|"]
    chapter = None
    for claim in claims.values():
        if claim.chapter != chapter:
            chapter = claim.chapter
            lines += ["", f"## Chapter {chapter}", "", *header]
        verdict = f"{claim.verdict} ({claim.size})" if claim.size else claim.verdict
        measured = " ".join(part for part in (claim.interval, f"`{claim.command}`" if claim.command else "") if part)
        cells = (f"`{claim.id}`", f"{claim.item}: {claim.title}", claim.claim, claim.published, verdict, measured)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
