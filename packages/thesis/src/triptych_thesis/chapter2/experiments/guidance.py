"""Tables 2.2 and 2.3: what classifier-free guidance does to each metric of one trained model, and on how many channels."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from matplotlib.figure import Figure
from triptych_common.plots import legend, panels

from triptych_thesis.chapter2.comparisons import LOWER_IS_BETTER
from triptych_thesis.chapter2.context import Context, SampleSet
from triptych_thesis.chapter2.showing import FRECHET, decided, difference, factor, metric_name, with_scores
from triptych_thesis.chapter2.sizes import Model
from triptych_thesis.study.estimates import interval
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.plots import interval_lines
from triptych_thesis.study.verdicts import UNDECIDED, Evidence, Verdict, overall, sign

RIVALS = {  # by image side: the best published scores that the tables compare with, guided rivals included
    256: {"frechet": 2.30, "digit_score": 267.75},
    512: {"frechet": 3.85},
}
PUBLISHED_COLUMN = "thesis: FID, sFID, IS, precision, recall"
PUBLISHED = {
    256: {1.0: "9.62, 6.85, 121.50, 0.67, 0.67", 1.25: "3.22, 5.28, 201.77, 0.76, 0.62", 1.5: "2.27, 4.60, 278.24, 0.83, 0.57"},
    512: {1.0: "12.03, 7.12, 105.25, 0.75, 0.64", 1.25: "4.64, 5.77, 174.77, 0.81, 0.57", 1.5: "3.04, 5.02, 240.82, 0.84, 0.54"},
}  # fmt: skip


def _headline(context: Context) -> int | Literal["all"]:
    """The channels that the thesis guides for its headline numbers, where the size repeats them; otherwise all."""
    return context.size.guidance_channels or "all"


def _fewer_channels(context: Context) -> int:
    """All channels but one; 0 where there is only one."""
    return context.size.guidance_channels or context.grid[context.size.main].in_channels - 1


def _guided(context: Context, scale: float, channels: int | str = "all") -> SampleSet:
    return context.of_main(context.size.guidance_samples, guidance_scale=scale, guidance_channels=channels)


def needs(context: Context) -> list[SampleSet]:
    """A sweep of scales on all channels; then on all but one, where there are several; then the model during its training."""
    size = context.size
    samples = [_guided(context, scale) for scale in size.guidance_scales]
    if channels := _fewer_channels(context):
        samples += [_guided(context, scale, channels) for scale in size.guidance_scales if scale != 1]
    settings = replace(size.sampler, guidance_scale=size.guidance_scale, guidance_channels=_headline(context))
    return [*samples, *(SampleSet(Model(size.main), images, settings, size.guidance_samples) for images in size.kept)]


def measure(context: Context) -> Result:
    size, channels = context.size, _fewer_channels(context)
    guided, plain = _guided(context, size.guidance_scale, _headline(context)), _guided(context, 1.0)
    pairs = {
        "frechet": (guided, plain),
        "precision": (guided, plain),
        "recall": (plain, guided),
        "digit_score": (guided, plain),
    }
    comparisons = [
        context.compare(better, worse, metric, seeds=False, of=metric, better_scale=better.settings.guidance_scale)
        for metric, (better, worse) in pairs.items()
    ]
    fewer = [
        context.compare(_guided(context, scale, channels), _guided(context, scale), seeds=False, scale=scale)
        for scale in size.guidance_scales
        if channels and scale != 1
    ]
    rows = [{**context.row(samples), "channels": samples.settings.guidance_channels} for samples in needs(context)]
    total = context.grid[size.main].in_channels
    return {"rows": rows, "comparisons": comparisons, "fewer": fewer, "channels": total, "side": size.side}


def verdicts(result: Result) -> list[Verdict]:
    """The tables claim that the guided model is ahead of all that they list, which digits do not decide."""
    claim = "dit.table-2.3" if result["side"] == 512 else "dit.table-2.2"
    effects = [Evidence(_effect(c), difference(c)) for c in result["comparisons"]]
    if result["side"] not in RIVALS:
        return [Verdict(claim, UNDECIDED, effects, "the table compares models of ImageNet, which digits do not decide")]
    scores, rivals = _headline_row(result), RIVALS[result["side"]]
    evidence = [
        Evidence(metric_name(metric), interval(scores[metric]), beside=f"{best} of the best other model")
        for metric, best in rivals.items()
    ]
    return [Verdict(claim, against_rivals(rivals, scores), [*evidence, *effects])]


def _headline_row(result: Result) -> Result:
    """The finished model's row at the thesis's scale, guided on fewer channels than all."""
    scale = result["comparisons"][0]["about"]["better_scale"]
    last = max(row["images"] for row in result["rows"])
    finished = (row for row in result["rows"] if (row["guidance"], row["images"]) == (scale, last))
    return next(row for row in finished if row["channels"] != "all")


def against_rivals(rivals: Mapping[str, float], scores: Mapping[str, Mapping[str, float]]) -> str:
    """The verdict on "ahead of all rivals": every score's whole interval on the better side of the best published one."""
    verdicts = []
    for metric, best in rivals.items():
        direction = -1 if metric in LOWER_IS_BETTER else 1
        low, high = sorted(direction * (scores[metric][bound] - best) for bound in ("low", "high"))
        verdicts.append(sign({"low": low, "high": high}))
    return overall(verdicts)


def _effect(c: Result) -> str:
    """What the thesis's Table 2.2 shows guidance to do to a metric."""
    metric = c["about"]["of"]
    if metric in LOWER_IS_BETTER:
        return f"{metric_name(metric)} without guidance over with"
    return f"{metric_name(metric)} {'without less with' if metric == 'recall' else 'with less without'} guidance"


def figures(result: Result) -> dict[str, Figure]:
    """Fréchet distance over scales, and precision against recall."""
    total = result["channels"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        on = "all channels" if row["channels"] == "all" else f"{row['channels']} of {total} channels"
        groups.setdefault(on, []).append({**row, "on": on})
    figure, (left, right) = panels(2)
    interval_lines(left, [row for group in groups.values() for row in group], "guidance", "frechet", by="on")
    left.set(xlabel="guidance scale", ylabel=FRECHET)
    # every errorbar of the left panel is three lines: the curve, and the caps at either end
    for (on, group), line in zip(groups.items(), left.get_lines()[::3], strict=False):
        points = [(row["recall"]["value"], row["precision"]["value"]) for row in group]
        right.plot(*zip(*points, strict=True), "o-", markersize=4, linewidth=1, color=line.get_color(), label=on)
        for row, at in zip(group, points, strict=True):
            right.annotate(f"{row['guidance']:g}", at, fontsize=7, xytext=(3, 3), textcoords="offset points")
    legend(left)
    right.set(xlabel="recall", ylabel="precision")
    return {"guidance": figure}


def section(study: Study, result: Result) -> Section:
    scale = result["comparisons"][0]["about"]["better_scale"]
    picture = study.figure("guidance", "Left: over scales. Right: precision and recall, labelled by scale.")
    one_channel = " Guidance on three of four channels has no counterpart in pixels of one channel."
    effects = Table(
        (f"effect of guidance {scale:g}, as in Table 2.2", "ours", "verdict"),
        [(_effect(c), difference(c), decided(c)) for c in result["comparisons"]],
        "One trained model: the noise of training seeds is in no interval here."
        + one_channel * (result["channels"] == 1),
    )
    published = PUBLISHED[512 if result["side"] == 512 else 256]
    last = max(row["images"] for row in result["rows"])

    def thesis(row: Result) -> str:
        """The thesis's numbers, beside rows of the finished model in the thesis's setting."""
        alike = row["guidance"] == 1 or row["channels"] != "all" or result["channels"] == 1
        return published.get(row["guidance"], "") if row["images"] == last and alike else ""

    rows = [{**row, "scale": f"{row['guidance']:g}", "thesis": thesis(row)} for row in result["rows"]]
    columns = {"scale": "scale", "channels": "channels", "images": "images", "n": "samples", "thesis": PUBLISHED_COLUMN}
    table = "2.3, 3M steps at 512" if result["side"] == 512 else "2.2, 7M steps at 256"
    section = Section("Guidance (Tables 2.2 and 2.3)", [picture], [effects, *_fewer_table(result)])
    return with_scores(study, section, rows, columns, f"Thesis: Table {table}, guided on 3 of 4 channels. ")


def _fewer_table(result: Result) -> list[Table]:
    """Guidance on all channels but one against guidance on all."""
    if not result["fewer"]:
        return []
    fewer = next(row["channels"] for row in result["rows"] if row["channels"] != "all")
    header = ("guidance scale", f"{FRECHET} on all channels over that on {fewer}", f"{fewer} are better")
    rows = [(f"{c['about']['scale']:g}", factor(c), decided(c)) for c in result["fewer"]]
    caption = f"Guidance on {fewer} of {result['channels']} channels, as the released code does, against all."
    return [Table(header, rows, caption)]


EXPERIMENT = Experiment("guidance", 7, measure, section, verdicts, figures, needs)
