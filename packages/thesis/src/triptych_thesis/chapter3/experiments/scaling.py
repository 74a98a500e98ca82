"""Further trained models: prompt alignment against scale (Fig. 3.7), and the ablations of thesis 3.4.6."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from triptych_common.plots import BLUE, ORANGE, intervals, legend, panels, thousands
from triptych_common.storage.files import read_json, write_json
from triptych_common.storage.run import differences, without
from triptych_gpt.evaluation.alignment import prompt_alignment
from triptych_gpt.evaluation.trial import Trial
from triptych_gpt.settings import SamplerSettings
from triptych_gpt.train import train
from triptych_gpt.train_config import GptTrainConfig
from triptych_gpt.trained import load
from triptych_gpt.zoo.zoo import Zoo
from typing_extensions import TypedDict

from triptych_thesis.chapter3.context import Context
from triptych_thesis.chapter3.sizes import Amounts
from triptych_thesis.study.estimates import interval
from triptych_thesis.study.experiment import FREED, Experiment, Result, Section, Study, Table
from triptych_thesis.study.verdicts import CONFIRMED, REFUTED, UNDECIDED, Evidence, Verdict, better, overall

CLAIM = "gpt.fig-3.7"
PANELS = (("parameters of G.pt", "width", "parameters"), ("training runs", "runs", "training_runs"))
LOOKS = (("points", "unseen networks", BLUE, "o-"), ("train", "training networks", ORANGE, "s--"))
FLAT_FROM = 25_000  # training runs of 200 checkpoints: the thesis's 5 million checkpoints


class _Estimate(TypedDict):
    value: float | None
    low: float | None
    high: float | None


class _Row(TypedDict):
    parameters: int
    training_runs: int
    pairs: int
    unseen: _Estimate
    unseen_at_best: _Estimate
    train: _Estimate
    train_at_best: _Estimate


class _Measured(TypedDict):
    row: _Row
    asked: dict[str, Any]


@dataclass(frozen=True)
class FurtherModel:
    """A variant to train and to measure, a unit of work."""

    config: GptTrainConfig
    settings: SamplerSettings
    amounts: Amounts

    @property
    def title(self) -> str:
        return self.config.out.name

    @property
    def cost(self) -> float:
        return float(self.config.total_pairs * (self.config.width or 1) ** 2)

    @property
    def path(self) -> Path:
        return self.config.out / "alignment.json"

    @property
    def done(self) -> bool:
        """Whether it was measured; raises as `row`."""
        return self.path.exists() and bool(self.row())

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the row."""
        evaluation = {"networks": self.amounts.networks, "prompts": self.amounts.prompts}
        return json.loads(json.dumps({"train": self.config.identity(), "sampler": asdict(self.settings), **evaluation}))

    def __call__(self) -> None:
        """Train the variant, and measure its alignment on unseen and on its own training runs."""
        train(self.config)
        trial = Trial(load(self.config.out), Zoo(self.config.zoo), self.settings, self.config.seed)
        alignments = {}
        prompts, best = self.amounts.prompts, trial.trained_best
        for split, name, held in (
            ("test", "unseen", trial.zoo.splits["test"]),
            ("train", "train", len(trial.training)),
        ):
            theta = trial.starts(split, min(self.amounts.networks, held))
            alignment = prompt_alignment(
                trial.update, trial.task, trial.metric, theta, prompts=prompts, trained_best=best
            )
            alignments[name] = alignment.r2._asdict()
            alignments[f"{name}_at_best"] = alignment.achieved_at_best._asdict()
        parameters = sum(p.numel() for p in trial.trained.model.parameters())
        sizes = {"parameters": parameters, "training_runs": len(trial.training), "pairs": self.config.total_pairs}
        row = {**sizes, **alignments}
        write_json(self.path, {"row": row, "asked": self.identity})  # its name in files of earlier versions

    def row(self) -> dict[str, Any]:
        """The alignment as it was measured. Raises ValueError for a damaged file, or where it was measured with other settings."""
        remedy = "delete this file and repeat the command, which measures it again"
        known = read_json(self.path, _Measured, remedy=remedy)
        if changed := differences(without(FREED, known["asked"]), without(FREED, self.identity)):
            raise ValueError(f"{self.path}: measured with {changed}; delete {self.config.out}, or use another --out")
        return known["row"]


def further_models(context: Context) -> dict[str, dict[str, FurtherModel]]:
    """The models to compare, by comparison and variant, each in a folder of its own below "study"."""
    # `triptych figures`, whose context has none of these, does not offer this experiment.
    assert context.training is not None and context.variants is not None and context.folder is not None  # noqa: PT018
    known: dict[GptTrainConfig, FurtherModel] = {}
    models: dict[str, dict[str, FurtherModel]] = {}
    for comparison, variants in context.variants.configs(context.training, Zoo(context.zoo).checkpoints).items():
        models[comparison] = {}
        for name, config in variants.items():
            folder = context.folder / "study" / f"{comparison}-{name}".replace(", ", "-").replace(" ", "-")
            model = FurtherModel(replace(config, out=folder), context.settings, context.amounts)
            models[comparison][name] = known.setdefault(config, model)
    return models


def needs(context: Context) -> list[FurtherModel]:
    return [model for variants in further_models(context).values() for model in variants.values()]


def measure(context: Context) -> Result:
    """For each comparison a row a variant, and the panels of Fig. 3.7 made of them: alignment on unseen and training runs."""
    variants = {
        comparison: [{"name": name, "folder": f"study/{one.title}", **one.row()} for name, one in models.items()]
        for comparison, models in further_models(context).items()
    }

    def points(comparison: str, x: str, split: str) -> list[dict[str, Any]]:
        shown = [(row[x], row[split]) for row in variants[comparison]]
        return [{"x": at, "r2": r2["value"], "low": r2["low"], "high": r2["high"]} for at, r2 in shown]

    drawn = [
        {"label": label, "points": points(comparison, x, "unseen"), "train": points(comparison, x, "train")}
        for label, comparison, x in PANELS
    ]
    return {"panels": drawn, "variants": variants}


def verdicts(result: Result) -> list[Verdict]:
    """Whether alignment on unseen runs rises with the size of G.pt and of its data, and flattens at last."""
    size, data = (panel["points"] for panel in result["panels"])
    large = [point for point in data if point["x"] >= FLAT_FROM]
    flat = UNDECIDED  # of the runs from there on, the largest must not be wholly above the first
    if len(large) > 1:
        flat = REFUTED if better(large[-1], large[0]) == CONFIRMED else CONFIRMED
    rising = [point for point in data if point["x"] <= FLAT_FROM] if large else data
    evidence = []
    for panel in result["panels"]:
        first, last = panel["points"][0], panel["points"][-1]
        what = f"R² on unseen runs with {last['x']:,} {panel['label']}"
        beside = f"{interval(first, '.3f', 'r2')} with {first['x']:,}"
        others = [f"{interval(panel['train'][-1], '.3f', 'r2')} on its training runs", "-2.7 of the identity"]
        thesis = "random G.pt about -2.7, at best 1"
        evidence.append(Evidence(what, interval(last, ".3f", "r2"), thesis, beside, others))
    why = "" if len(large) > 1 else f"flattening beyond {FLAT_FROM:,} training runs was not tested"
    return [Verdict(CLAIM, overall([_rises(size), _rises(rising), flat]), evidence, why)]


def _rises(points: Sequence[Result]) -> str:
    """Whether the largest is wholly above the smallest, and wholly below none."""
    if any(better(point, points[-1]) == CONFIRMED for point in points[:-1]):
        return REFUTED
    return CONFIRMED if better(points[-1], points[0]) == CONFIRMED else UNDECIDED


def figure(data: Sequence[Result]) -> Figure:
    """Prompt alignment against scale, a panel for each thing scaled.  [Fig. 3.7]

    data: [{"label": what is scaled, "points": [{"x", "r2", "low", "high"}], "train": the same on training runs, optional}], points
    in order of x.
    """
    figure, axes = panels(len(data), size=(4.2 * len(data), 3.3))
    for one, panel in zip(data, axes, strict=True):
        for key, name, color, style in LOOKS:
            if points := [point for point in one.get(key, []) if point["r2"] is not None]:
                x, y = ([point[axis] for point in points] for axis in ("x", "r2"))
                panel.errorbar(x, y, intervals(points, "r2"), fmt=style, color=color, label=name, capsize=2, markersize=4,
                               linewidth=1.2)  # fmt: skip
        panel.set(xscale="log", xlabel=one["label"])
        panel.xaxis.set_major_formatter(thousands)
        panel.xaxis.set_minor_formatter("")
        if all(len(one["points"]) <= 8 for one in data):
            panel.set_xticks([float(point["x"]) for point in one["points"]])
        bottom, _ = panel.get_ylim()
        panel.set(ylim=(max(min(bottom, 0), -3.2), 1.02))
    axes[0].set_ylabel("prompt alignment (R²)")
    if any(one.get("train") for one in data):
        legend(axes[0])
    return figure


def section(study: Study, result: Result) -> Section:
    rows = [
        (comparison, row["name"], f"{row['parameters']:,}", f"{row['training_runs']:,}", interval(row["unseen"], ".3f"),
         interval(row["train"], ".3f"), interval(row["unseen_at_best"], ".3f"))
        for comparison, variants in result["variants"].items()
        for row in variants
    ]  # fmt: skip
    pairs = next(iter(result["variants"].values()))[0]["pairs"]
    r2 = ("R², unseen runs", "R², training runs", "at the best prompt")
    header = ("comparison", "variant", "parameters", "training runs", *r2)
    return Section(
        "Scaling and ablations (Figure 3.7)",
        [study.figure("fig-3.7", "Prompt alignment on unseen and on training runs")],
        [Table(header, rows, f"Every variant is trained alike, on {pairs:,} pairs.")],
    )


def figures(result: Result) -> dict[str, Figure]:
    return {"fig-3.7": figure(result["panels"])}


EXPERIMENT = Experiment("fig-3.7", 11, measure, section, verdicts, figures, needs, extra=True)
