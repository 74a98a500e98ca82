"""The manifest of a zoo: what it is, and which shards count.

Only one process writes it, whole and atomically, one shard at a time: a process killed anywhere leaves the zoo as it was
after the last commit. Files that the manifest does not list are what such a process left; they are ignored.
"""

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from triptych_common.storage.atomic import flush_file, write_text

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.zoo.store import DTYPES, ShardRecord, file_digest

MANIFEST, FORMAT = "manifest.json", 1
_KIND = "checkpoint zoo"
_FACTS = ("task", "layout", "checkpoints", "dtype", "metrics")
_OWN = {"kind", "format", "shards", "xxh3_128"}


class Manifest:
    """Facts and shards of the zoo at `folder`, as one process reads or writes them.

    facts: "task" (name), "layout" (ParameterLayout.to_json()), "checkpoints" (of each run), "dtype", "metrics" (name ->
    "lower" or "higher", which is better), and whatever else explains the zoo; "repair" is the command that makes damaged shards
    again, less its --out.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], shards: list[ShardRecord]) -> None:
        self.folder, self.facts, self.shards = Path(folder), dict(facts), list(shards)
        self._lines = [json.dumps(record.to_json()) for record in shards]  # written again with every commit

    @classmethod
    def create(cls, folder: Path, facts: Mapping[str, Any]) -> "Manifest":
        """Found a zoo without shards.

        Raises ValueError where there is one already, or for facts that are wrong; OSError when the disk refuses.
        """
        path = Path(folder) / MANIFEST
        if path.exists():
            raise ValueError(f"{path}: a zoo is there already; use another --out")
        content = json.loads(json.dumps(facts))  # as it will be read again
        _check(content)
        made = cls(folder, content, [])
        made._write()
        return made

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The zoo at `folder`, finished or growing.

        Raises FileNotFoundError where there is none, ValueError for one that is damaged or that this version cannot read.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder}: no zoo (it holds no {MANIFEST}); make one with triptych-gpt collect --out {folder}"
            )
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: truncated or not JSON; {_LOST}") from error
        if not isinstance(content, dict) or content.get("kind") != _KIND:
            raise ValueError(f"{path}: not the manifest of a {_KIND}; expected a folder that triptych-gpt collect made")
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{path}: format {content.get('format')!r}, this version reads {FORMAT}; "
                "use the version of triptych-gpt that wrote it, or collect again"
            )
        records, checksum = content.pop("shards", None), content.pop("xxh3_128", None)
        if not isinstance(records, list) or checksum != _digest(content, map(json.dumps, records)):
            raise ValueError(f"{path}: altered since it was written (its checksum differs); {_LOST}")
        shards = [ShardRecord.from_json(record) for record in records]
        facts = {name: value for name, value in content.items() if name not in _OWN}
        _check(facts)
        return cls(folder, facts, shards)

    @property
    def layout(self) -> ParameterLayout:
        return ParameterLayout.from_json(self.facts["layout"])

    @property
    def names(self) -> set[str]:
        """Names of the shards that are there."""
        return {record.name for record in self.shards}

    @property
    def bytes(self) -> int:
        """Of all files that count."""
        return sum(file.bytes for record in self.shards for file in record.files().values())

    def commit(self, record: ShardRecord, *, replace: bool = False) -> None:
        """Make a shard count, atomically, once its files are on the disk. `replace`: in place of the record of the same runs,
        whose files were damaged.

        Raises ValueError for runs that are there already; OSError, the zoo as it was, when the disk refuses.
        """
        clash = [old for old in self.shards if record.first < old.stop and old.first < record.stop]
        same = [old for old in clash if (old.name, old.split) == (record.name, record.split)]
        if clash and not (replace and clash == same):
            raise ValueError(
                f"{self.folder / MANIFEST}: runs {record.first}..{record.stop - 1} are there already, in "
                f"{clash[0].name} ({clash[0].split}); a zoo only grows, use another --out for other runs"
            )
        for name in record.files():
            flush_file(self.folder / name)
        before = self.shards, self._lines
        place = self.shards.index(same[0]) if same else len(self.shards)
        self.shards = [*self.shards[:place], record, *self.shards[place + 1 :]]
        self._lines = [*self._lines[:place], json.dumps(record.to_json()), *self._lines[place + 1 :]]
        try:
            self._write()
        except BaseException:
            self.shards, self._lines = before
            raise

    def remedy(self) -> str:
        """The command that makes damaged shards again."""
        command = self.facts.get("repair", f"triptych-gpt collect {self.facts['task']} --repair")
        return f"{command} --out {shlex.quote(str(self.folder))}"

    def _write(self) -> None:
        content = {"kind": _KIND, "format": FORMAT, **self.facts}
        digest = _digest(content, self._lines)
        head = json.dumps({**content, "xxh3_128": digest}, indent=2, allow_nan=False).removesuffix("\n}")
        lines = ",\n".join(self._lines)  # one line a shard: thousands stay readable
        write_text(self.folder / MANIFEST, f'{head},\n  "shards": [\n{lines}\n]}}\n')


_LOST = "copy the zoo again from where it is whole, or collect into another --out"


@dataclass(frozen=True)
class Damage:
    """A file that is not what the manifest says."""

    shard: str
    path: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def damages(
    manifest: Manifest, *, contents: bool = True, progress: Callable[[int], None] = lambda n: None
) -> Iterator[Damage]:
    """Every damaged file of a zoo: missing, of another size or, where `contents` are read, of another checksum.

    `progress` is called with the bytes of each file looked at.
    """
    for record in manifest.shards:
        for name, file in record.files().items():
            path = manifest.folder / name
            if problem := _problem(path, file.bytes, file.xxh3_128 if contents else None):
                yield Damage(record.name, path, problem)
            progress(file.bytes)


def to_repair(manifest: Manifest, *, repair: bool) -> list[Damage]:
    """All damage by checksum, to be made good. Raises ValueError for a wrong size where nothing shall be repaired."""
    found = []
    for damage in damages(manifest, contents=repair):
        if not repair:
            raise ValueError(f"{damage}; run {manifest.remedy()}")
        found.append(damage)
    return found


def _problem(path: Path, size: int, checksum: str | None) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{found:,} bytes, the manifest says {size:,}"
        if checksum is not None and file_digest(path) != checksum:
            return "contents differ from the manifest's checksum"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _digest(content: Mapping[str, Any], records: Iterable[str]) -> str:
    return xxhash.xxh3_128("\n".join([json.dumps(content, sort_keys=True), *records]).encode()).hexdigest()


def _check(facts: Mapping[str, Any]) -> None:
    missing = [name for name in _FACTS if name not in facts]
    if missing:
        raise ValueError(f"facts of a zoo without {missing[0]!r}: expected {', '.join(_FACTS)}")
    if taken := sorted(_OWN & facts.keys()):
        raise ValueError(f"fact {taken[0]!r}: the manifest's own name; give it another")
    if facts["dtype"] not in DTYPES:
        raise ValueError(f"dtype {facts['dtype']!r}: expected one of {', '.join(DTYPES)}")
    if facts["checkpoints"] < 2:
        raise ValueError(
            f"checkpoints {facts['checkpoints']}: expected at least 2 of each run, pairs are drawn from them"
        )
    for name, better in facts["metrics"].items():
        if better not in ("lower", "higher"):
            raise ValueError(f"metric {name}: better {better!r}, expected lower or higher")
    ParameterLayout.from_json(facts["layout"])
