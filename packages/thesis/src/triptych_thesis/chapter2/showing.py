"""What the sections of chapter 2 share: tables of scores and of comparisons, their counts as evidence, links to samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from triptych_common.plots import legend, panels

from triptych_thesis.chapter2.comparisons import LOWER_IS_BETTER
from triptych_thesis.chapter2.scoring import METRICS
from triptych_thesis.study.estimates import interval, ratio
from triptych_thesis.study.experiment import Links, Result, Section, Study, Table
from triptych_thesis.study.plots import interval_lines, plain_ticks
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, Evidence, marked, overall, sign

Rows = Sequence[Result]
FRECHET = "Fréchet distance"
NAMES = {"frechet": FRECHET, "spatial_frechet": "spatial Fréchet distance", "digit_score": "digit score"}
COLUMNS = {"gflops": "GFLOPs", "training_gflops": "training GFLOPs", "sampling_gflops": "sampling GFLOPs"}
INSTRUMENTS = (
    "Metrics, with the thesis's in brackets: "
    + "; ".join(f"{NAMES.get(name, name)} ({thesis}): {words}" for name, (thesis, words) in METRICS.items())
    + ". At paper sizes they are those of the ADM suite. Intervals are 95%, by bootstrap over samples and real images; the noise "
    "of training seeds is in comparisons alone."
)
FILES = ("grid.png", "samples.npz", "scores.json")


def metric_name(metric: str) -> str:
    return NAMES.get(metric, metric)


def factor(comparison: Result) -> str:
    """The worse distance over the better one, with its interval."""
    return ratio(comparison["difference"])


def difference(comparison: Result) -> str:
    """A difference by any metric, with its interval: of distances as a factor, of others as it is."""
    metric = comparison["about"]["of"]
    return factor(comparison) if metric in LOWER_IS_BETTER else interval(comparison["difference"])


def decided(comparison: Result) -> str:
    """The verdict on a comparison, in a table's cell."""
    return marked(sign(comparison["difference"]))


def all_better(comparisons: Rows) -> str:
    """The verdict on "each is better than what it is compared with"."""
    return overall(sign(c["difference"]) for c in comparisons)


def cell(value: Any) -> str:
    """A number in a table's cell, with thousands apart."""
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def with_scores(
    study: Study, section: Section, rows: Rows, columns: Mapping[str, str] | Sequence[str], note: str = ""
) -> Section:
    """A section, and behind its tables every score of `rows`, under the given columns, with links to their samples."""
    titles = columns if isinstance(columns, Mapping) else {name: COLUMNS.get(name, name) for name in columns}
    metrics = [metric for metric in (*METRICS, "accuracy") if metric in rows[0]]
    scores = Table(
        (*titles.values(), *map(metric_name, metrics)),
        [(*(cell(row[name]) for name in titles), *(interval(row[metric]) for metric in metrics)) for row in rows],
        f"Every score. {note}{INSTRUMENTS}",
        folded=True,
    )
    return replace(
        section, tables=[*section.tables, scores], links=sample_links(study, [row["samples"] for row in rows])
    )


def comparisons_table(comparisons: Rows, caption: str, summary: str) -> Table:
    """Comparisons of Fréchet distances with their verdicts; it opens on request, under its summary."""
    header = ("claimed better", "than", "images", f"the second's {FRECHET} over the first's", "verdict")
    rows = [(c["better"], c["worse"], cell(c["about"]["images"]), factor(c), decided(c)) for c in comparisons]
    return Table(header, rows, f"{summary}. {caption}", folded=True)


def counted(what: str, comparisons: Rows) -> list[Evidence]:
    """How many comparisons agree with the thesis, and which are reversed."""
    if not comparisons:
        return [Evidence(what, "nothing comparable was measured")]
    verdicts = [sign(c["difference"]) for c in comparisons]
    against = [f"{c['better']} behind {c['worse']}" for c in comparisons if sign(c["difference"]) == REFUTED]
    count = f"{verdicts.count(CONFIRMED)} of {len(verdicts)}, {len(against) or 'none'} reversed"
    return [Evidence(what, count), *[Evidence("reversed", ", ".join(dict.fromkeys(against)))] * bool(against)]


def last_of(comparisons: Rows) -> list[Result]:
    """The comparisons after the most training images."""
    last = max((c["about"]["images"] for c in comparisons), default=0)
    return [c for c in comparisons if c["about"]["images"] == last]


def sample_links(study: Study, places: Sequence[str]) -> list[Links]:
    """Links to sets of samples, by their paths in the study's folder, each with its grid and scores."""
    rows = []
    for place in map(Path, sorted(set(places))):
        files = [place.with_name(name) for name in FILES if (study.folder / place.with_name(name)).exists()]
        rows.append((" / ".join(place.parts[1:-1]), {path.name: path.as_posix() for path in files}))
    return [Links(f"Samples: {len(rows)} sets, by model / images-sampler-steps-count", rows)] if rows else []


def lines(rows: Rows, x: str, *, by: str = "model", **labels: Any) -> Figure:
    """Fréchet distance against one quantity, on a logarithmic axis, a line for each value of `by`."""
    figure, (axes,) = panels(size=(7.2, 3.8))
    interval_lines(axes, rows, x, "frechet", by=by, floor=0.05)
    axes.set(**{"ylabel": FRECHET, "yscale": "log", **labels})
    plain_ticks(axes)
    legend(axes, ncols=2)
    return figure


def over_training(title: str) -> Callable[[Result], dict[str, Figure]]:
    """An experiment's only figure: Fréchet distance over training, model by model."""
    return lambda result: {title: lines(result["rows"], "images", xlabel="training images seen")}
