"""Figures 2.2 (left), 2.6, 2.8, 2.9 and 2.10: quality over the grid of model sizes and patch sizes, stage by stage."""

import math
from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

from matplotlib.figure import Figure
from triptych_common.plots import legend, panels, thousands
from triptych_dit.flops import gflops

from triptych_thesis.chapter2 import showing
from triptych_thesis.chapter2.comparisons import LOWER_IS_BETTER, correlation, strong
from triptych_thesis.chapter2.context import Context, SampleSet
from triptych_thesis.chapter2.scoring import METRICS
from triptych_thesis.chapter2.showing import FRECHET, all_better, counted, last_of, lines, metric_name
from triptych_thesis.chapter2.sizes import Model
from triptych_thesis.study.estimates import interval, ratio
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.plots import interval_lines, plain_ticks
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, UNDECIDED, Evidence, Verdict, marked, overall, sign

SIMILAR = 1.5  # GFLOPs, and Fréchet distances, within this factor are called similar
THESIS_R = -0.93  # FID with the logarithm of GFLOPs


def _samples(context: Context) -> list[SampleSet]:
    return context.over_training([Model(name) for name in context.grid])


def needs(context: Context) -> list[SampleSet]:
    return [*_samples(context), *context.repeated()]


def measure(context: Context) -> Result:
    comparisons = [
        c
        for grows, large, small in neighbours(context)
        for c in context.compare_stages(Model(large), Model(small), grows=grows)
    ]
    logs = [math.log(gflops(shape)) for shape in context.grid.values()]
    last = [context.after(Model(name)) for name in context.grid]
    scores = {metric: [context.score(samples, metric) for samples in last] for metric in METRICS}
    return {
        "rows": [context.row(samples) for samples in _samples(context)],
        "comparisons": comparisons,
        "correlations": {metric: correlation(logs, scores[metric])._asdict() for metric in METRICS},
        "similar": _similar(context),
        "budgets": _at_equal_training_compute(context),
        "noise": context.noises(),
    }


def neighbours(context: Context) -> Iterator[tuple[str, str, str]]:
    """(what grows, larger, smaller): models of the grid that are next to each other in size or patch."""
    widths, patches = (list(dict.fromkeys(name.split("/")[i] for name in context.grid)) for i in (0, 1))
    widths.sort(key=lambda width: max(gflops(c) for n, c in context.grid.items() if n.startswith(f"{width}/")))
    patches.sort(key=int, reverse=True)
    rows = [("model size", [f"{width}/{patch}" for width in widths]) for patch in patches]
    rows += [("tokens", [f"{width}/{patch}" for patch in patches]) for width in widths]
    for grows, names in rows:
        for smaller, larger in pairwise(name for name in names if name in context.grid):
            yield grows, larger, smaller


def _similar(context: Context) -> list[dict[str, Any]]:
    """Models of different widths and nearly equal GFLOPs, with the ratio of their distances.  [thesis 2.5: S/2, B/4]"""
    pairs = []
    for (a, x), (b, y) in combinations(context.grid.items(), 2):
        gflops_ratio = gflops(x) / gflops(y)
        if x.hidden_size == y.hidden_size or not 1 / SIMILAR <= gflops_ratio <= SIMILAR:
            continue
        difference = context.compare(context.after(Model(a)), context.after(Model(b)))["difference"]
        pairs.append({"models": [a, b], "gflops_ratio": gflops_ratio, "log_ratio": difference})
    return pairs


def _at_equal_training_compute(context: Context) -> list[dict[str, Any]]:
    """Each smaller model at its end against its larger neighbour after no more training compute, where that was measured."""
    size, comparisons = context.size, []
    for grows, large, small in neighbours(context):
        budget = gflops(context.grid[small]) * size.count(1.0)
        within = [s for s in size.stages if gflops(context.grid[large]) * size.count(s) <= budget]
        if within:
            ours = context.after(Model(large), max(within))
            theirs, images = context.after(Model(small)), size.count(1.0)
            comparison = context.compare(ours, theirs, grows=grows, images=ours.images, images_of_smaller=images)
            comparisons.append(comparison)
    return comparisons


def verdicts(result: Result) -> list[Verdict]:
    comparisons, last, budgets = result["comparisons"], last_of(result["comparisons"]), result["budgets"]
    strength = {metric: _strong(metric, r) for metric, r in result["correlations"].items()}
    correlations = [
        Evidence(f"correlation of log GFLOPs with {metric_name(metric)}", interval(r, ".2f"),
                 str(THESIS_R) if metric == "frechet" else "drawn in Figure 2.9")
        for metric, r in result["correlations"].items()
    ]  # fmt: skip
    similar = [
        Evidence(f"{FRECHET} of {pair['models'][1]} over that of {pair['models'][0]}", ratio(pair["log_ratio"]))
        for pair in result["similar"]
    ]
    alike = overall([strength["frechet"], *(_similarity(pair["log_ratio"]) for pair in result["similar"])])
    by_kind = [
        evidence
        for grows, kind in (("model size", "larger models better"), ("tokens", "more tokens better"))
        for evidence in counted(f"left: {kind}", [c for c in last if c["about"]["grows"] == grows])
    ]
    reached = {sign(c["difference"]) for c in budgets} == {CONFIRMED}  # too small a budget cannot refute the claim
    within = counted("larger better, at no more training compute", budgets)
    return [
        Verdict("dit.fig-2.2", all_better(last), by_kind, parts=2),
        Verdict("dit.fig-2.6", all_better(comparisons), counted("larger better, every pair and stage", comparisons)),
        Verdict("dit.fig-2.8", alike, [correlations[0], *similar]),
        Verdict("dit.fig-2.9", overall(strength.values()), correlations),
        Verdict("dit.fig-2.10", CONFIRMED if reached else UNDECIDED, within),
    ]


def _strong(metric: str, r: Result) -> str:
    """Whether a correlation is strong in the right direction: distances fall with GFLOPs, all else rises."""
    return strong(r, -1 if metric in LOWER_IS_BETTER else 1)


def _similarity(log_ratio: Result) -> str:
    """The verdict on "similar": the whole interval within a factor of 1.5 confirms, wholly outside refutes."""
    bound = math.log(SIMILAR)
    inside = max(-log_ratio["low"], log_ratio["high"]) < bound
    outside = log_ratio["low"] > bound or log_ratio["high"] < -bound
    return CONFIRMED if inside else REFUTED if outside else UNDECIDED


def figures(result: Result) -> dict[str, Figure]:
    training = {"xlabel": "training compute: GFLOPs x images x 3", "xscale": "log"}
    return {
        "scaling-gflops": _against_gflops(result),
        "scaling-over-training": _over_training(result),
        "scaling-training-compute": lines(result["rows"], "training_gflops", **training),
    }


def _over_training(result: Result) -> Figure:
    """Figure 2.6: the sizes at each patch in the upper row, the patches at each size in the lower one."""
    rows = [
        {**row, "size": row["model"].split("/")[0], "patch": f"patch {row['model'].split('/')[1]}"}
        for row in result["rows"]
    ]
    chosen = []
    for key, by in (("patch", "size"), ("size", "patch")):
        values = dict.fromkeys(row[key] for row in rows)
        chosen.append([(key, v, by) for v in values if len({row[by] for row in rows if row[key] == v}) > 1])
    columns = max(map(len, chosen))
    figure, axes = panels(columns, 2, size=(3.2 * columns, 5.8))
    for i, shown in enumerate(chosen):
        for each, (key, value, by) in zip(axes[i * columns :], shown, strict=False):
            interval_lines(each, [row for row in rows if row[key] == value], "images", "frechet", by=by, floor=0.05)
            each.set(title=value, xlabel="training images seen", ylabel=FRECHET, yscale="log")
            each.xaxis.set_major_formatter(thousands)
            plain_ticks(each)
            legend(each, fontsize=7)
        for unused in axes[i * columns + len(shown) : (i + 1) * columns]:
            unused.set_visible(False)
    return figure


def _against_gflops(result: Result) -> Figure:
    """Figures 2.2 (left), 2.8 and 2.9 (right): every metric at the last stage."""
    last = max(row["images"] for row in result["rows"])
    rows = [{**row, "size": row["model"].split("/")[0]} for row in result["rows"] if row["images"] == last]
    figure, axes = panels(3, 2, size=(9.6, 5.8))
    for each, metric in zip(axes, METRICS, strict=False):
        distance = metric in LOWER_IS_BETTER
        interval_lines(each, rows, "gflops", metric, by="size", floor=0.05 if distance else 0.0, line=False)
        each.set(xlabel="GFLOPs", xscale="log", ylabel=metric_name(metric), yscale="log" if distance else "linear")
        each.set_title(f"r = {interval(result['correlations'][metric], '.2f')}", fontsize=9)
        plain_ticks(each)
    legend(axes[0])
    for unused in axes[len(METRICS) :]:
        unused.set_visible(False)
    return figure


CAPTIONS = {
    "scaling-gflops": "Every metric after equally many images against GFLOPs of a forward pass, with the correlation of its "
    "logarithm. Intervals of correlations count the models as a sample, and hold the noise of their samples.",
    "scaling-over-training": "Fréchet distance over training: sizes at one patch above, patches at one size below.",
    "scaling-training-compute": "The same against total training compute.",
}


def section(study: Study, result: Result) -> Section:
    models = len({row["model"] for row in result["rows"]})
    correlations = [
        (f"{metric_name(metric)} ({METRICS[metric][0]})", THESIS_R if metric == "frechet" else "drawn in Fig. 2.9",
         interval(r, ".2f"), marked(_strong(metric, r)))
        for metric, r in result["correlations"].items()
    ]  # fmt: skip
    noise = [
        (f"{stage['images']:,}", f"{100 * math.expm1(stage['deviation']):.0f}%" if stage["pairs"] else "not measured",
         stage["pairs"])
        for stage in result["noise"]
    ]  # fmt: skip
    tables = [
        Table(
            ("correlation of log GFLOPs with", "thesis", "ours", "strong"), correlations,
            f"Ours: {models} models, {result['rows'][0]['n']:,} samples each. Thesis: 12 models, 400K steps on ImageNet "
            "256x256, FID-50K. Strong: the whole interval beyond 0.5.",
        ),
        Table(
            ("images", "another training seed moves a Fréchet distance by", "pairs of runs"), noise,
            "The noise of training seeds. One standard deviation; comparisons of models include it where it was measured.",
            folded=True,
        ),
        showing.comparisons_table(
            result["comparisons"], "Neighbours in size or patch, after equally many images.", "Every comparison of neighbours"
        ),
    ]  # fmt: skip
    if result["budgets"]:
        caption = (
            "The larger model's last measured stage within what the smaller took. The thesis claims an advantage from some budget "
            "on, so that losing here refutes nothing."
        )
        tables.append(showing.comparisons_table(result["budgets"], caption, "At no more training compute"))
    if result["similar"]:
        similar = [
            (" and ".join(s["models"]), f"{s['gflops_ratio']:.2f}", ratio(s["log_ratio"]), marked(_similarity(s["log_ratio"])))
            for s in result["similar"]
        ]  # fmt: skip
        header = ("models", "ratio of GFLOPs", "ratio of Fréchet distances", "similar")
        within = "Similar: within a factor of 1.5 with the whole interval."
        tables.append(Table(header, similar, f"Models of other widths with similar GFLOPs. {within}"))
    pictures = [study.figure(title, caption) for title, caption in CAPTIONS.items()]
    section = Section("Scaling (Figures 2.2 left, 2.6, 2.8, 2.9, 2.10)", pictures, tables)
    return showing.with_scores(study, section, result["rows"], ("model", "images", "gflops", "training_gflops"))


EXPERIMENT = Experiment("scaling", 2, measure, section, verdicts, figures, needs)
