"""What the studies of all chapters share: verdicts, estimates, the runner, the report, the ledger."""

import io
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from triptych_common import testing
from triptych_common.plots import figure_png, panels
from triptych_common.storage.output import claimed
from triptych_common.storage.run import RunDirectory
from triptych_thesis import cli
from triptych_thesis.study import runner
from triptych_thesis.study.claims import FOUND, load_claims, record, record_results
from triptych_thesis.study.estimates import Estimate, interval, mean_estimate, quantile, ratio
from triptych_thesis.study.experiment import Experiment, Links, Opening, Picture, Section, Study, Table
from triptych_thesis.study.report import Report, publish
from triptych_thesis.study.runner import Stopwatch
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, UNDECIDED, Evidence, Verdict, merged, overall, sign

ROOT = Path(__file__).parents[3]


# --- Verdicts and estimates


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([], UNDECIDED),
        ([CONFIRMED, CONFIRMED], CONFIRMED),
        ([CONFIRMED, UNDECIDED], UNDECIDED),
        ([CONFIRMED, UNDECIDED, REFUTED], REFUTED),
        ([UNDECIDED], UNDECIDED),
    ],
)
def test_a_claim_of_parts(parts, whole):
    assert overall(parts) == whole


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.2, CONFIRMED), (-0.2, -0.1, REFUTED), (0.0, 0.2, UNDECIDED), (None, None, UNDECIDED)],
)
def test_a_difference_is_decided_by_its_whole_interval(low, high, verdict):
    assert sign({"low": low, "high": high}) == sign(Estimate(0.1, low, high)) == verdict


def test_a_claim_has_the_evidence_of_every_experiment_that_speaks_of_it():
    one, two = Evidence("R²", "0.93"), Evidence("error", "5%", beside="7%")
    found = merged([Verdict("a", CONFIRMED, [one]), Verdict("b", REFUTED, why="no"), Verdict("a", UNDECIDED, [two])])
    assert {claim: each.verdict for claim, each in found.items()} == {"a": UNDECIDED, "b": REFUTED}
    assert found["a"].measured == "R²: 0.93; error: 5% against 7%"
    assert found["b"].measured == "no"
    half = Verdict("c", CONFIRMED, parts=2)
    assert merged([half]) == {}
    assert merged([half, half])["c"].verdict == CONFIRMED
    with pytest.raises(ValueError, match="claim a: verdict 'yes', expected one of confirmed, refuted"):
        Verdict("a", "yes")


def test_few_values_have_students_interval():
    values = [1.0, 2.5, 2.0, 4.0]
    mean, low, high = mean_estimate(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (mean, low, high) == pytest.approx((np.mean(values), *expected))
    assert mean_estimate([2.0]) == (2.0, None, None)
    assert quantile(1) == pytest.approx(12.706, abs=1e-3)
    assert quantile(0) == 1.96


def test_estimates_are_written_in_one_way():
    assert interval(Estimate(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert interval({"value": 0.5, "low": None, "high": None}, ".1f") == "0.5"
    assert interval(None) == interval({"value": None}) == "–"
    assert ratio({"value": 0.0, "low": -np.log(2), "high": np.log(2)}) == "1.00× [0.50, 2.00]"


# --- The runner


def png() -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Tiny(Study):
    """A study without a chapter: `given` are its experiments."""

    chapter: ClassVar[int] = 9
    sizes: ClassVar[Mapping[str, Any]] = {"smoke": None, "laptop": None}
    claims: Path = Path("none")
    given: dict = field(default_factory=dict)

    @property
    def experiments(self):
        return self.given

    def context(self) -> dict:
        return {}

    def identity(self) -> dict:
        return {"size": self.size}

    def opening(self, results) -> Opening:
        return Opening("Tiny & small", "One sentence.", [Picture(png(), "a picture")])

    def facts(self, context) -> dict:
        return {"model": {"width": 3, "shape": [1, 2]}}


def experiment(name: str = "one", value: list = [1.0], claims: tuple = ("a.fig-1",), **options: Any) -> Experiment:  # noqa: B006
    return Experiment(
        name,
        1,
        lambda context: {"rows": ({"x": value[0]},)},
        lambda study, result: Section(f"Section {name}", tables=[Table(("x",), [(result["rows"][0]["x"],)], "values", True)]),
        lambda result: [Verdict(claim, CONFIRMED, [Evidence(f"x of {name}", str(result["rows"][0]["x"]))]) for claim in claims],
        lambda result: {f"figure-{name}": panels()[0]},
        **options,
    )  # fmt: skip


def tiny(tmp_path, *experiments: Experiment, **options: Any) -> Tiny:
    options = {"out": tmp_path, "size": "laptop", "given": {each.name: each for each in experiments}, **options}
    return Tiny(**options)


def test_a_study_ends_with_results_a_report_and_few_lines(tmp_path, capsys):
    results = runner.run(tiny(tmp_path, experiment(), experiment("more", extra=True, claims=())))
    assert results["experiments"] == {"one": {"rows": [{"x": 1.0}]}}
    command = "triptych reproduce ch9 --size laptop --seed 0"
    row = {"verdict": CONFIRMED, "size": "laptop", "interval": "x of one: 1.0", "command": command}
    assert results["claims"] == {"a.fig-1": row}
    assert results["made"]["one"]["command"] == command
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "laptop/figures/figure-one.png").read_bytes() == figure_png(panels()[0])
    page = (tmp_path / "report.html").read_text()
    for words in (
        "Tiny &amp; small",
        "One sentence.",
        "Section one",
        "a.fig-1",
        "x of one",
        "make reproduce-ch9 SIZE=laptop",
    ):
        assert words in page
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "claims of the thesis: 1 confirmed",
        f"wrote {tmp_path / 'report.html'} (size laptop)",
        f"wrote {tmp_path / 'results.json'} (size laptop)",
    ]
    assert runner.run(tiny(tmp_path, experiment(), experiment("more", extra=True), all=True))["made"].keys() == {
        "one",
        "more",
    }


@pytest.mark.parametrize("place", ["report.html", "results.json", "laptop/results.json"])
def test_a_study_replaces_no_files_of_others(tmp_path, place):
    """Those that another study has published are another's, too; its own are replaced."""
    own, theirs = tmp_path / "own", tmp_path / place
    runner.run(tiny(own, experiment()))
    runner.run(tiny(own, experiment(), size="smoke"))
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text('{"chapter": 2}')
    with pytest.raises(ValueError, match=r"choose another --out, or pass --overwrite"):
        runner.run(tiny(tmp_path, experiment()))
    assert theirs.read_text() == '{"chapter": 2}'
    runner.run(tiny(tmp_path, experiment(), overwrite=True))
    assert theirs.read_text() != '{"chapter": 2}'
    runner.run(tiny(tmp_path, experiment()))


def test_what_comes_out_as_before_keeps_its_command_and_commit(tmp_path, monkeypatch):
    value, commit = [1.0], ["before"]
    monkeypatch.setattr(runner, "git_commit", lambda: commit[0])
    file = tmp_path / "laptop/experiments/one.json"

    def made(**options):
        study = tiny(tmp_path, experiment(value=value), **options)
        runner.measure(study.experiments["one"], {}, file, tmp_path / "figures", study.command)
        return runner.read_result(file)["made"]

    first = {"command": "triptych reproduce ch9 --size laptop --all --seed 0", "commit": "before"}
    assert made(all=True) == first
    commit[0] = "after"
    assert made() == first
    value[0] *= 1 + 1e-9
    assert made() == first  # linear algebra on several threads
    value[0] *= 1.001
    assert made() == {"command": "triptych reproduce ch9 --size laptop --seed 0", "commit": "after"}
    file.write_text("{")
    with pytest.raises(ValueError, match=r"one\.json: not JSON .*; delete it and repeat the command"):
        made()


def test_a_result_that_is_kept_is_not_measured_again(tmp_path):
    value = [1.0]
    runner.run(tiny(tmp_path, experiment(value=value, kept=True)))
    value[0] = 2.0
    assert runner.run(tiny(tmp_path, experiment(value=value, kept=True)))["experiments"]["one"]["rows"] == [{"x": 1.0}]
    assert runner.run(tiny(tmp_path, experiment(value=value)))["experiments"]["one"]["rows"] == [{"x": 2.0}]


def test_results_of_earlier_versions_are_read(tmp_path):
    made = {"command": "study", "commit": "a"}
    for content in (
        {"rows": [1], "made": made},
        {"result": {"rows": [1]}, "made": made},
        {"result": {"rows": [1]}, **made},
    ):
        (tmp_path / "old.json").write_text(json.dumps(content))
        assert runner.read_result(tmp_path / "old.json") == {"made": made, "result": {"rows": [1]}}


@pytest.mark.parametrize("name", ["one", "other"])
@pytest.mark.parametrize(
    "content", [{"a": 1}, {"result": [1]}, {"result": {"rows": [{}]}}, {"result": {"rows": [{"x": 1}]}, "made": [1]}]
)
def test_a_file_that_holds_no_result_is_named(tmp_path, name, content):
    """Whether its experiment is kept, or is another than those that run."""
    both = [experiment(kept=True), experiment("other")]
    runner.run(tiny(tmp_path, *both))
    (tmp_path / f"laptop/experiments/{name}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name}\.json: .*; delete it and repeat the command"):
        runner.run(tiny(tmp_path, *both, only=("one",)))


def test_a_claims_command_is_that_of_its_experiments(tmp_path):
    """A claim of two experiments has the commands of both, where they differ."""
    both = [experiment(claims=("a.fig-1", "a.fig-10")), experiment("two", claims=("a.fig-9", "a.fig-1"))]
    runner.run(tiny(tmp_path, *both, only=("one",), all=True))
    results = runner.run(tiny(tmp_path, *both, only=("two",)))
    assert list(results["claims"]) == ["a.fig-1", "a.fig-9", "a.fig-10"]
    words = "triptych reproduce ch9 --size laptop"
    assert results["claims"]["a.fig-9"]["command"] == f"{words} --seed 0"
    assert results["claims"]["a.fig-1"]["command"] == f"{words} --all --seed 0; {words} --seed 0"
    page = (tmp_path / "report.html").read_text()
    assert f"<td>results of one</td><td>{words} --all --seed 0 at commit" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "size 'huge': expected one of smoke, laptop"),
        ({"only": ("all",)}, "experiment 'all': expected one of one at size laptop"),
        ({"workers": 0}, "workers 0: expected at least 1"),
    ],
)
def test_what_a_study_is_asked_for_is_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, experiment(), **options)


@pytest.mark.parametrize(
    ("chapter", "known"),
    [(2, "smoke, smoke-pixels, laptop"), (3, "smoke, laptop, gpu, gpu-cifar10"), (4, "smoke, laptop, gpu, paper")],
)
def test_the_command_and_make_know_every_chapter(tmp_path, chapter, known):
    make = ["make", "-n", f"reproduce-ch{chapter}", "SIZE=smoke", "ARGS=--all"]
    shown = subprocess.run(make, capture_output=True, text=True, cwd=ROOT)
    assert f"triptych reproduce ch{chapter} --size smoke --all" in shown.stdout
    done = testing.run_here(cli.run, "reproduce", f"ch{chapter}", "--size", "huge", "--out", tmp_path)
    testing.fails_with(done, f"size 'huge': expected one of {known}", 2)


def test_another_study_in_the_folder_is_refused(tmp_path):
    with claimed(tmp_path / "laptop", "triptych reproduce ch9"), RunDirectory(tmp_path / "laptop", {"size": "other"}):
        pass
    with pytest.raises(ValueError, match="laptop: holds a run with size='other'"):
        runner.run(tiny(tmp_path, experiment()))


def test_a_study_is_for_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="reproduce is for one process"):
        runner.run(tiny(tmp_path, experiment()))


def test_a_stopwatch_adds_up_what_is_resumed_and_forgets_what_is_done_afresh(tmp_path, monkeypatch):
    path, now = tmp_path / "seconds.json", [0.0]
    monkeypatch.setattr("triptych_thesis.study.runner.time.perf_counter", lambda: now[0])

    def spend(clock: Stopwatch, seconds: float, stage: str, **options: bool) -> None:
        with clock(stage, **options):
            now[0] += seconds

    for _ in range(2):
        spend(Stopwatch(path), 3.0, "training")
        spend(Stopwatch(path), 2.0, "drawing", afresh=True)
    assert json.loads(path.read_text()) == {"training": 6.0, "drawing": 2.0}
    done = Stopwatch(path, finished=True)
    spend(done, 5.0, "training")
    spend(done, 4.0, "more")
    assert done.seconds == json.loads(path.read_text()) == {"training": 6.0, "drawing": 2.0, "more": 4.0}


@pytest.mark.parametrize("content", ['{"training": ', "[1.0]", '{"training": null}'])
def test_a_damaged_stopwatch_is_named(tmp_path, content):
    (tmp_path / "seconds.json").write_text(content)
    with pytest.raises(ValueError, match=r"seconds.json: .*; delete it, only the recorded times are lost"):
        Stopwatch(tmp_path / "seconds.json")


def test_a_stopwatch_counts_a_stage_that_is_interrupted(tmp_path):
    clock = Stopwatch(tmp_path / "seconds.json")
    with pytest.raises(KeyboardInterrupt), clock("training"):
        raise KeyboardInterrupt
    assert clock.seconds["training"] >= 0


# --- The report


def report(**options: Any) -> Report:
    parts: dict[str, Any] = {
        "title": "a < b", "headline": "1 & 2", "setting": "size <small>", "pictures": [Picture(png(), 'a "quoted" caption')],
        "verdicts": [], "command": "make it > log", "facts": Table(("a", "b"), [("<i>", 1)]),
    }  # fmt: skip
    return Report(**{**parts, **options})


def test_report_escapes_text_and_embeds_pictures():
    section = Section("<script>", [Picture(png(), "x > y")], [Table(("a", "b"), [("<i>", 1)], "caption")], "a <note>")
    page = report(sections=[section]).html()
    for words in ("<script>", "<i>", "<note>", "<small>"):
        assert words not in page
    for text in ("a &lt; b", "1 &amp; 2", "&lt;i&gt;", "x &gt; y", "make it &gt; log", "a &lt;note&gt;"):
        assert text in page
    testing.assert_self_contained(page, pictures=2)


def test_verdicts_have_marks_and_their_first_evidence():
    evidence = [Evidence("R²", "0.93 [0.92, 0.94]", thesis="0.95", beside="0.1"), Evidence("error", "5%")]
    page = report(verdicts=[(Verdict("a", CONFIRMED, evidence), "Figure 1: it works")]).html()
    table, rest = page.split('<table id="verdicts">')[1].split("</table>", 1)
    for words in ("✓", "Figure 1: it works", "R²", "0.93 [0.92, 0.94]", "against 0.1"):
        assert words in table
    assert "error" not in table
    for words in ("error", "5%", "0.95"):
        assert f"<td>{words}</td>" in rest


def test_links_of_a_published_report_lead_where_its_own_do(tmp_path):
    out, folder = tmp_path / "runs", tmp_path / "runs/small size"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples/a b.png").write_bytes(b"x")
    (folder / "results.json").write_text("{}")
    links = Links("all <samples>", [("first", {"picture": "samples/a b.png"})])
    report(sections=[Section("one", links=[links])]).write(folder / "report.html")
    assert publish(folder, out) == [out / "report.html", out / "results.json"]
    for page in (folder / "report.html", out / "report.html"):
        text = page.read_text()
        testing.assert_self_contained(text, pictures=1)
        files = [link for link in re.findall(r'href="([^"]*)"', text) if not link.startswith("#")]
        assert [(page.parent / unquote(link)).read_bytes() for link in files] == [b"x"]
        jumps = set(re.findall(r'href="#([^"]*)"', text))
        assert jumps <= set(re.findall(r'id="([^"]*)"', text))
    for path in ("/etc/passwd", "../up", "https://example.org"):
        with pytest.raises(ValueError, match="expected a path below the page's folder"):
            report(sections=[Section("one", links=[Links("", [("", {"": path})])])]).html()


@pytest.mark.parametrize("size", [(684, 344), (1200, 300), (100, 100)])
def test_a_report_fits_every_screen(tmp_path, check_page, size):
    file = io.BytesIO()
    Image.new("L", size).save(file, "PNG")
    picture = Picture(file.getvalue(), "what was made, beside what it is compared with " * 2)
    estimate = "0.123 [0.101, 0.145]"
    evidence = [Evidence("a quantity with quite a long name", estimate, beside=estimate), Evidence("another", estimate)]
    wide = Table([f"metric {i}" for i in range(12)], [[estimate] * 12] * 3, "Many columns. They scroll.", folded=True)
    links = Links("Samples: 1 set", [("a / rather-long-name-of-a-folder-n1000", {"grid.png": "samples/grid.png"})])
    sections = [
        Section(
            f"Section {i} with quite a long title (Figures 2.2 left, 2.6, 2.8, 2.9)",
            [picture] * 3,
            [wide],
            "note",
            [links],
        )
        for i in range(4)
    ]
    verdicts = [(Verdict(f"a.fig-{i}", CONFIRMED, evidence), f"Figure {i}: some claim of the thesis") for i in range(9)]
    long = "A sentence that says what was found here, in words that anyone who has not seen the thesis understands at once."
    page = report(pictures=[picture], verdicts=verdicts, sections=sections, headline=long)
    page.write(tmp_path / "report.html")
    check_page(tmp_path / "report.html")


# --- The ledger


@pytest.fixture
def ledger(tmp_path) -> Path:
    path = tmp_path / "claims.toml"
    path.write_text((ROOT / "claims.toml").read_text())
    return path


def written(folder: Path, size: str = "laptop", chapter: int = 4) -> Path:
    row = {"verdict": "undecided", "size": size, "interval": 'a "quoted" 0.5 [0.4, 0.6] \\ more', "command": "make x"}
    path = folder / "results.json"
    path.write_text(json.dumps({"chapter": chapter, "size": size, "claims": {"gangealing.table-4.3": row}}))
    return path


def test_a_verdict_enters_its_row_and_no_other(ledger, tmp_path):
    before, text = load_claims(ledger), ledger.read_text().splitlines()
    assert record_results(written(tmp_path), ledger) == ["gangealing.table-4.3"]
    after, new_text = load_claims(ledger), ledger.read_text().splitlines()
    assert [claim for claim in after if after[claim] != before[claim]] == ["gangealing.table-4.3"]
    assert after["gangealing.table-4.3"].interval == 'a "quoted" 0.5 [0.4, 0.6] \\ more'
    assert after["gangealing.table-4.3"].claim == before["gangealing.table-4.3"].claim
    changed = {old.split(" = ")[0] for old, new in zip(text, new_text, strict=True) if old != new}
    assert changed <= set(FOUND)
    record_results(written(tmp_path), ledger)
    assert ledger.read_text().splitlines() == new_text


def test_any_text_of_a_verdict_leaves_the_ledger_readable(ledger, tmp_path):
    text = "".join(map(chr, (*range(1, 0xD800), *range(0xE000, 0x10800)))) + '"\n[[claim]]\n'
    row = {"verdict": "undecided", "size": "laptop", "interval": text, "command": "make x"}
    (tmp_path / "results.json").write_text(
        json.dumps({"chapter": 4, "size": "laptop", "claims": {"gangealing.table-4.3": row}})
    )
    record_results(tmp_path / "results.json", ledger)
    assert load_claims(ledger)["gangealing.table-4.3"].interval == text


@pytest.mark.parametrize("wrong", ["title = 1", "title = 1979-05-27", 'chapter = "2"', "id = []"])
def test_values_of_other_types_are_no_claim(ledger, wrong):
    name = wrong.split(" = ")[0]
    ledger.write_text(re.sub(rf"^{name} = .*$", wrong, ledger.read_text(), count=1, flags=re.MULTILINE))
    with pytest.raises(ValueError, match=r"claims\.toml: .*; mend this line"):
        load_claims(ledger)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": "smoke"}, "decides no claim of chapter 4"), ({"chapter": 2}, "decides no claim of chapter 2")],
)
def test_results_that_decide_nothing_stay_out(ledger, tmp_path, options, message):
    before = ledger.read_text()
    with pytest.raises(ValueError, match=message):
        record_results(written(tmp_path, **options), ledger)
    assert ledger.read_text() == before


def test_the_ledger_takes_its_own_claims_and_verdicts_alone(ledger, tmp_path):
    row = {"verdict": "refuted", "size": "laptop", "interval": "", "command": "make x"}
    with pytest.raises(ValueError, match=r"has no claim 'dit\.fig-9'"):
        record(ledger, {"dit.fig-9": row})
    with pytest.raises(ValueError, match="verdict 'yes', expected one of confirmed"):
        record(ledger, {"dit.fig-2.5": {**row, "verdict": "yes"}})
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"results\.json: .*; expected the results.json of triptych reproduce"):
        record_results(tmp_path / "results.json", ledger)


DEEP = f"claim = {'[' * 5000}{']' * 5000}"


@pytest.mark.parametrize("content", ["a = 1", "[[claim", "claim = 1", "claim = [1]", DEEP, "folder", "pipe", "device"])
def test_what_is_no_ledger_is_said_before_the_work(tmp_path, content):
    file = tmp_path / "claims.toml"
    special = {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "device": lambda: file.symlink_to("/dev/zero")}
    special.get(content, lambda: file.write_text(content))()
    with pytest.raises(ValueError, match=r"claims\.toml: no ledger, expected TOML with \[\[claim\]\] tables"):
        runner.run(tiny(tmp_path / "out", experiment(), claims=file))
    assert not (tmp_path / "out").exists()


def test_the_command_claims_writes_verdicts_and_page(ledger, tmp_path):
    page = tmp_path / "docs/claims.md"
    words = ("claims", written(tmp_path), "--ledger", ledger, "--page", page)
    assert testing.run_here(cli.run, *words, "--dry-run").stdout.count("make x") == 1
    assert not page.exists()
    done = testing.run_here(cli.run, *words)
    assert done.returncode == 0, done.stderr
    assert "wrote 1 verdicts into" in done.stdout
    row = next(line for line in page.read_text().splitlines() if "`gangealing.table-4.3`" in line)
    assert 'undecided (laptop) | a "quoted" 0.5 [0.4, 0.6] \\ more `make x` |' in row
    assert testing.run_here(cli.run, "claims", "--ledger", ledger, "--page", page).returncode == 0
    testing.fails_with(testing.run_here(cli.run, "claims", written(tmp_path, "smoke"), *words[2:]), "decides no claim")
    page.write_text("of another")
    words = ("claims", "--ledger", ledger, "--page", page)
    testing.fails_with(testing.run_here(cli.run, *words), "claims.md: of another command; choose another --page")
    assert page.read_text() == "of another"
    assert testing.run_here(cli.run, *words, "--overwrite").returncode == 0


def test_every_command_in_the_ledger_can_be_run():
    commands = {claim.command for claim in load_claims(ROOT / "claims.toml").values() if claim.command}
    for command in {word.strip() for each in commands for word in each.split(";")}:
        words = command.split()
        assert words[:2] == ["triptych", "reproduce"], command
        done = testing.run_here(cli.run, *words[1:], "--dry-run")
        assert done.returncode == 0, done.stderr
