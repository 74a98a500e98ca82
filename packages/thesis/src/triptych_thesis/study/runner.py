"""How a study runs, from nothing to its report, the same for every chapter. Repeating the command resumes it exactly."""

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NotRequired

from triptych_common.cli import echo
from triptych_common.plots import figure_png
from triptych_common.storage.files import open_ended, read_json, write_bytes, write_json
from triptych_common.storage.output import claimed, refuse_to_overwrite
from triptych_common.storage.provenance import git_commit, provenance
from triptych_common.storage.run import RunDirectory
from triptych_common.workers import default_workers, on_gpu, run_all
from typing_extensions import TypedDict

from triptych_thesis.study.claims import Claim, load_claims
from triptych_thesis.study.experiment import FREED, Experiment, Section, Study
from triptych_thesis.study.report import PUBLISHED, Report, facts_table, publish
from triptych_thesis.study.verdicts import Verdict, merged

_AGAIN = "delete it and repeat the command"


class _Made(TypedDict):
    command: str
    commit: str


@open_ended
class _File(TypedDict):
    command: NotRequired[str]
    commit: NotRequired[str]
    made: NotRequired[_Made]
    result: NotRequired[dict[str, Any]]


class Stopwatch:
    """Seconds spent in each stage, saved in a JSON file and summed over all the times the study was resumed.

    with clock("training"):
        train(config)
    """

    def __init__(self, path: Path, *, finished: bool = False) -> None:
        self.path, self.finished = path, finished
        remedy = "delete it, only the recorded times are lost"
        self.seconds: dict[str, float] = read_json(path, dict[str, float], remedy=remedy) if path.exists() else {}

    @contextmanager
    def __call__(self, stage: str, *, afresh: bool = False) -> Iterator[None]:
        """Time a stage; `afresh`: one that is done again rather than resumed, so that only the last time counts."""
        began = time.perf_counter()
        try:
            yield
        finally:
            # Stages of a finished study keep their seconds: finding work done is no work.
            if not (self.finished and stage in self.seconds):
                before = 0.0 if afresh else self.seconds.get(stage, 0.0)
                self.seconds[stage] = round(before + time.perf_counter() - began, 2)
                write_json(self.path, self.seconds)


def refuse_torchrun() -> None:
    """Raise ValueError on several ranks, which would write the same files."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("reproduce is for one process; use the libraries' own commands under torchrun, then repeat it")


def refuse_others(study: Study, folder: Path) -> None:
    """Raise ValueError if a report or results that a study is to write may replace those of others."""
    with suppress(OSError, ValueError):
        if read_json(folder / "results.json", remedy="").get("chapter") == study.chapter:
            return
    for name in PUBLISHED:
        refuse_to_overwrite(folder / name, overwrite=study.overwrite)


def run(study: Study) -> dict[str, Any]:
    """Run what is missing of a study's chosen experiments; returns the content of results.json.

    Raises what training, sampling and measuring raise, and ValueError under torchrun.
    """
    refuse_torchrun()
    study.check()
    context = study.context()
    refuse_others(study, study.home)
    owned = claimed(study.folder, f"triptych reproduce ch{study.chapter}", overwrite=study.overwrite)
    with owned, RunDirectory(study.folder, study.identity(), free=FREED) as directory:
        clock = Stopwatch(directory.path / "seconds.json", finished=(directory.path / "results.json").exists())
        echo(f"chapter {study.chapter}, size {study.size}: {directory.path}")
        study.prepare(context, clock)
        chosen = [study.experiments[name] for name in study.chosen]
        needs = dict.fromkeys(need for each in chosen for need in each.needs(context))
        for stage, units in study.units(context, list(needs)).items():
            with clock(stage):
                workers = study.workers or default_workers(study.device)
                run_all(stage, units, workers, one_thread=not on_gpu(study.device))
        # Kept results are resumed, so the times add up; what is measured again counts once.
        with clock("measuring and drawing", afresh=not any(each.kept for each in chosen)):
            figures = study.folder / "figures"
            for each in chosen:
                measure(each, context, study.result_path(each.name), figures, study.command)
            for name in study.offered:  # the report shows the results of other times too
                path = study.result_path(name)
                if name not in study.chosen and path.exists():
                    with _known(path):
                        draw(study.experiments[name], read_result(path)["result"], figures)
        results = assemble(study, context, clock.seconds)
        write_json(directory.path / "results.json", results)
        write_report(study, results)
    counts = Counter(each["verdict"] for each in results["claims"].values())
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) or "none decided"
    echo(f"claims of the thesis: {summary}")
    for path in publish(study.folder, study.home):
        echo(f"wrote {path} (size {study.size})")
    return results


def measure(experiment: Experiment, context: Any, path: Path, figures: Path, command: str) -> Any:
    """Write an experiment's result to `path`, as made by `command`, and its figures into a folder; returns the result."""
    before = read_result(path) if path.exists() else None
    if before is not None and experiment.kept:
        result = before["result"]
    else:
        result = json.loads(json.dumps(experiment.measure(context), allow_nan=False))
        made = {"command": command, "commit": git_commit()}
        # What comes out as before keeps the command and commit that it was first made with.
        if before is not None and alike(before["result"], result):
            result, made = before["result"], before["made"]
        write_json(path, {"experiment": experiment.name, "made": made, "result": result})
    with _known(path):
        draw(experiment, result, figures)
    return result


def draw(experiment: Experiment, result: Any, figures: Path) -> None:
    """Write an experiment's figures into a folder."""
    for title, figure in experiment.figures(result).items():
        write_bytes(figures / f"{title}.png", figure if isinstance(figure, bytes) else figure_png(figure))


def read_result(path: Path) -> dict[str, Any]:
    """What `measure` wrote: {"made": {"command", "commit"}, "result"}. Raises ValueError for a damaged file."""
    # Earlier versions had the result, or command and commit, at the top.
    content = read_json(path, _File, remedy=_AGAIN)
    made = content.pop("made", None) or {name: content.get(name, "unknown") for name in ("command", "commit")}
    return {"made": made, "result": content.get("result", content)}


@contextmanager
def _known(path: Path) -> Iterator[None]:
    """Turn what an experiment raises where a file holds something else than its result into one line that names the file."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: no result of this experiment ({problem}); {_AGAIN}") from error


def alike(before: Any, now: Any) -> bool:
    """Whether two JSON trees agree to rounding."""
    # Linear algebra on several threads may differ in the last digit.
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(alike(value, now[key]) for key, value in before.items())
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(alike, before, now))
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-5, abs_tol=1e-5)
    return before == now


def assemble(study: Study, context: Any, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The content of results.json: every experiment that the folder has, its verdicts, and what was run."""
    read = {name: read_result(study.result_path(name)) for name in study.offered if study.result_path(name).exists()}
    experiments = {name: each["result"] for name, each in read.items()}
    verdicts = _verdicts(study, experiments)
    commands: dict[str, dict[str, None]] = {}  # by claim, in order, each once
    for name, verdict in verdicts:
        commands.setdefault(verdict.claim, {})[read[name]["made"]["command"]] = None
    claims = {
        claim: {
            "verdict": each.verdict, "size": study.size, "interval": each.measured, "command": "; ".join(commands[claim]),
        }
        for claim, each in in_order(merged(verdict for _, verdict in verdicts), {}).items()
    }  # fmt: skip
    return {
        "chapter": study.chapter, "size": study.size, "seed": study.seed, "claims": claims, "experiments": experiments,
        "made": {name: each["made"] for name, each in read.items()},
        **study.facts(context), "seconds": dict(seconds), **provenance(),
    }  # fmt: skip


def _verdicts(study: Study, experiments: Mapping[str, Any]) -> list[tuple[str, Verdict]]:
    """The verdicts of every experiment, each with the experiment's name."""
    found = []
    for name, result in experiments.items():
        with _known(study.result_path(name)):
            judged = [study.judged(each) for each in study.experiments[name].verdicts(result)]
        found += [(name, each) for each in judged if each is not None]
    return found


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
        **vars(opening),
        setting=setting,
        verdicts=[
            (each, f"{ledger[claim].item}: {ledger[claim].title}" if claim in ledger else claim)
            for claim, each in in_order(verdicts, ledger).items()
        ],
        command=f"make {study.target} SIZE={study.size}\n{study.command}",
        facts=facts_table({**origins(results["made"]), **facts}),
        sections=[_section(study, name, result) for name, result in results["experiments"].items()],
    )
    report.write(study.folder / "report.html")


def _section(study: Study, name: str, result: Any) -> Section:
    with _known(study.result_path(name)):
        return study.experiments[name].section(study, result)


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

    return {claim: verdicts[claim] for claim in sorted(verdicts, key=key)}
