"""A study of a chapter, run from nothing to its report. Repeating the command resumes it exactly.

A chapter is a dataclass derived from `Study`: its options, its sizes, its experiments, what they share, and what its report opens
with. `run` does the rest, the same for every chapter.
"""

import json
import math
import os
import re
import shlex
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from triptych_common.cli import CommonOptions, echo
from triptych_common.fields import Ge
from triptych_common.storage.atomic import write_bytes, write_json
from triptych_common.storage.provenance import git_commit, provenance
from triptych_common.storage.run import RunDirectory
from triptych_common.workers import Unit, default_workers, on_gpu, run_all

from triptych_thesis.study.claims import Claim, load_claims
from triptych_thesis.study.experiment import Experiment, Picture, discover
from triptych_thesis.study.report import INTERVALS_DECIDE, Report, facts_table, publish
from triptych_thesis.study.verdicts import Verdict, merged


@dataclass(frozen=True)
class Opening:
    """What a report's first screen says: title, the sentence to take away, one picture (two that belong together).

    rule: how the verdicts follow from the evidence.
    """

    title: str
    headline: str
    pictures: Sequence[Picture]
    rule: str = INTERVALS_DECIDE


@dataclass(frozen=True)
class Study(CommonOptions):
    """The options that the studies of all chapters share. Everything else is a chapter's own."""

    chapter: ClassVar[int]
    sizes: ClassVar[Collection[str]]  # their names
    package: ClassVar[str]  # of the experiments' modules, such as "triptych_thesis.chapter2.experiments"
    results_folder: ClassVar[str] = "experiments"

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
    def folder(self) -> Path:
        """Where everything of this size lies."""
        return self.out / self.size

    @property
    def experiments(self) -> Mapping[str, Experiment]:
        """The chapter's experiments by name. They are imported on the first use, and torch with them."""
        return discover(self.package)

    @property
    def offered(self) -> tuple[str, ...]:
        """Names of the experiments that the size has."""
        return tuple(name for name, each in self.experiments.items() if each.offered(self))

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the experiments to run."""
        if self.only:
            return self.only
        return tuple(name for name in self.offered if self.all or not self.experiments[name].extra)

    def result_path(self, name: str) -> Path:
        """Where the result of an experiment lies."""
        return self.folder / self.results_folder / f"{name}.json"

    def figure(self, title: str, caption: str, *, pixels: bool = False) -> Picture:
        """A figure that was written beside the results, for the report. Raises OSError where it is missing."""
        return Picture((self.folder / "figures" / f"{title}.png").read_bytes(), caption, pixels)

    @abstractmethod
    def context(self) -> Any:
        """What the experiments measure with: models by name, samples, scores, made when first asked for."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the results, wherever they lie; --all, --only and --workers change what is done, not what comes out."""

    @abstractmethod
    def opening(self, results: Mapping[str, Any]) -> Opening:
        """The first screen of the report, from results.json and the files beside it alone."""

    @abstractmethod
    def facts(self, context: Any) -> dict[str, Any]:
        """What results.json holds besides: models, data, settings."""

    def check(self) -> None:
        """Raise for whatever would fail later: missing files, a damaged ledger."""
        if self.claims.exists():
            load_claims(self.claims)

    def prepare(self, context: Any, clock: "Stopwatch") -> None:
        """Make the data and models that every experiment needs."""

    def units(self, context: Any, needs: Sequence[Any]) -> Mapping[str, Sequence[Unit]]:
        """What the experiments need, as units of work by stage, in the order of the stages."""
        return {}

    @property
    def command(self) -> str:
        """What a reader types to make the results."""
        words = ["triptych", "reproduce", f"ch{self.chapter}", "--size", self.size, *["--all"] * self.all]
        return shlex.join([*words, *self.command_options(), "--seed", str(self.seed)])

    def command_options(self) -> list[str]:
        """Further options that decide the results, where they are not the defaults."""
        return []


class Stopwatch:
    """Seconds spent in each stage, kept in a JSON file and summed over all the times the study was resumed.

        with clock("training"):
            train(config)

    finished: the study was done before, and stages that have their seconds keep them: finding work done is no work.
    """

    def __init__(self, path: Path, *, finished: bool = False) -> None:
        self.path, self.finished = path, finished
        try:
            kept = json.loads(path.read_text()) if path.exists() else {}
            self.seconds: dict[str, float] = {stage: float(seconds) for stage, seconds in kept.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged, expected JSON; delete it, only the recorded times are lost") from error

    @contextmanager
    def __call__(self, stage: str, *, afresh: bool = False) -> Iterator[None]:
        """Time a stage; `afresh`: one that is done again rather than resumed, so that only the last time counts."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if not (self.finished and stage in self.seconds):
                before = 0.0 if afresh else self.seconds.get(stage, 0.0)
                self.seconds[stage] = round(before + time.perf_counter() - began, 2)
                write_json(self.path, self.seconds)


def refuse_torchrun() -> None:
    """Raise ValueError on several ranks, which would write the same files."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("reproduce is for one process; use the libraries' own commands under torchrun, then repeat it")


def run(study: Study) -> dict[str, Any]:
    """Run what is missing of a study's chosen experiments; returns the content of results.json.

    Raises what training, sampling and measuring raise, and ValueError under torchrun.
    """
    refuse_torchrun()
    study.check()
    context = study.context()
    with RunDirectory(study.folder, study.identity()) as directory:
        clock = Stopwatch(directory.path / "seconds.json", finished=(directory.path / "results.json").exists())
        echo(f"chapter {study.chapter}, size {study.size}: {directory.path}")
        study.prepare(context, clock)
        needs = [need for name in study.chosen for need in study.experiments[name].needs(context)]
        workers = study.workers or default_workers(study.device)
        for stage, units in study.units(context, needs).items():
            with clock(stage):
                run_all(stage, units, workers, one_thread=not on_gpu(study.device))
        # What is kept is resumed, so the times add up; what is measured again counts once.
        afresh = not any(study.experiments[name].kept for name in study.chosen)
        with clock("measuring and drawing", afresh=afresh):
            for name in study.chosen:
                measure(study, context, study.experiments[name])
            draw_others(study)
        results = assemble(study, context, clock.seconds)
        write_json(directory.path / "results.json", results)
        write_report(study, results)
    written = publish(study.folder, study.out)
    for line in closing(results, written):
        echo(line)
    return results


def measure(study: Study, context: Any, experiment: Experiment) -> None:
    """Write an experiment's result and figures into the study's folder."""
    path, figures = study.result_path(experiment.name), study.folder / "figures"
    measure_once(experiment, context, path, figures, study.command)


def draw_others(study: Study) -> None:
    """Draw figures of results that are in the folder and were not asked for this time: the report shows them too."""
    for name in study.offered:
        path = study.result_path(name)
        if name in study.chosen or not path.exists():
            continue
        for title, png in study.experiments[name].figures(read_result(path)["result"]).items():
            write_bytes(study.folder / "figures" / f"{title}.png", png)


def measure_once(experiment: Experiment, context: Any, path: Path, figures: Path, command: str) -> Any:
    """Write an experiment's result to `path` and its figures into a folder; returns the result.

    A result that is kept is not measured again. One that comes out as it did before keeps the command and commit that it was first
    made with; otherwise `command` is what made it.
    """
    before = read_result(path) if path.exists() else None
    if before is not None and experiment.kept:
        result = before["result"]
    else:
        result = json.loads(json.dumps(experiment.measure(context), allow_nan=False))
        made = {"command": command, "commit": git_commit()}
        if before is not None and alike(before["result"], result):
            result, made = before["result"], before["made"]
        write_json(path, {"experiment": experiment.name, "made": made, "result": result})
    for title, png in experiment.figures(result).items():
        write_bytes(figures / f"{title}.png", png)
    return result


def read_result(path: Path) -> dict[str, Any]:
    """What `measure` wrote: {"made": {"command", "commit"}, "result"}; earlier versions had the result at the top.

    Raises ValueError for a damaged file.
    """
    try:
        content = json.loads(path.read_text())
        made = content.pop("made", None) or {name: content.get(name, "unknown") for name in ("command", "commit")}
        return {"made": made, "result": content.get("result", content)}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, expected JSON with a result; delete it and repeat the command") from error


def alike(before: Any, now: Any) -> bool:
    """Whether two JSON trees agree to rounding: linear algebra on several threads may differ in the last digit."""
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(alike(value, now[key]) for key, value in before.items())
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(alike, before, now))
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-5, abs_tol=1e-5)
    return before == now


def assemble(study: Study, context: Any, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The content of results.json: every experiment that the folder has, its verdicts, and what was run."""
    kept = {name: read_result(study.result_path(name)) for name in study.offered if study.result_path(name).exists()}
    experiments = {name: each["result"] for name, each in kept.items()}
    commands: dict[str, list[str]] = {}
    for name, verdict in _verdicts(study, experiments):
        commands.setdefault(verdict.claim, []).append(kept[name]["made"]["command"])
    return {
        "chapter": study.chapter,
        "size": study.size,
        "seed": study.seed,
        "claims": {
            claim: {
                "verdict": each.verdict,
                "size": study.size,
                "interval": each.measured,
                "command": "; ".join(dict.fromkeys(commands[claim])),
            }
            for claim, each in in_order(merged(v for _, v in _verdicts(study, experiments)), {}).items()
        },
        "experiments": experiments,
        "made": {name: each["made"] for name, each in kept.items()},
        **study.facts(context),
        "seconds": dict(seconds),
        **provenance(),
    }


def _verdicts(study: Study, experiments: Mapping[str, Any]) -> list[tuple[str, Verdict]]:
    """The verdicts of every experiment, each with the experiment's name."""
    return [(name, each) for name, result in experiments.items() for each in study.experiments[name].verdicts(result)]


def write_report(study: Study, results: Mapping[str, Any]) -> None:
    """Write report.html from results.json and the files beside it."""
    ledger = load_claims(study.claims) if study.claims.exists() else {}
    opening, hardware = study.opening(results), results["hardware"]
    minutes = sum(results["seconds"].values()) / 60
    setting = (
        f"Chapter {study.chapter}, size {study.size}, seed {study.seed}, commit {results['commit']}; {minutes:.1f} minutes on "
        f"{hardware['cores']} cores, {hardware.get('gpu', hardware['cpu'])}."
    )
    if study.size.startswith("smoke"):
        setting += (
            " A smoke run checks that everything works; scores of barely trained models say nothing about quality."
        )
    verdicts = merged(verdict for _, verdict in _verdicts(study, results["experiments"]))
    left_out = ("experiments", "claims", "chapter", "size", "seed", "made")
    facts = {name: value for name, value in results.items() if name not in left_out}
    report = Report(
        title=opening.title,
        headline=opening.headline,
        setting=setting,
        pictures=opening.pictures,
        verdicts=[(each, title_of(claim, ledger)) for claim, each in in_order(verdicts, ledger).items()],
        command=f"make reproduce-ch{study.chapter} SIZE={study.size}\n{study.command}",
        facts=facts_table({**origins(results["made"]), **facts}),
        rule=opening.rule,
        sections=[study.experiments[name].section(study, result) for name, result in results["experiments"].items()],
    )
    report.write(study.folder / "report.html")


def origins(made: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What made the experiments' results, one entry for each command and commit, naming the experiments."""
    names: dict[str, list[str]] = {}
    for name, each in made.items():
        names.setdefault(f"{each['command']} at commit {each['commit']}", []).append(name)
    return {f"results of {', '.join(several)}": origin for origin, several in names.items()}


def in_order(verdicts: Mapping[str, Verdict], ledger: Mapping[str, Claim]) -> dict[str, Verdict]:
    """Verdicts as the ledger orders its claims, others last, Figure 2.2 before 2.10."""
    place = {claim: i for i, claim in enumerate(ledger)}

    def key(claim: str) -> tuple[int, list[str | int]]:
        parts = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", claim)]
        return place.get(claim, len(place)), parts

    return dict(sorted(verdicts.items(), key=lambda item: key(item[0])))


def title_of(claim: str, ledger: Mapping[str, Claim]) -> str:
    """What a claim is called: item and title as the ledger has them, or its id."""
    return f"{ledger[claim].item}: {ledger[claim].title}" if claim in ledger else claim


def closing(results: Mapping[str, Any], written: Sequence[Path]) -> list[str]:
    """The last lines on the console: verdicts counted, files written."""
    counts = Counter(each["verdict"] for each in results["claims"].values())
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) or "none decided"
    return [f"claims of the thesis: {summary}", *(f"wrote {path} (size {results['size']})" for path in written)]
