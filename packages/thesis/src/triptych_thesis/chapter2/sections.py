"""The sections of a study's report, an experiment each."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from triptych_thesis.chapter2.drawing import drawn
from triptych_thesis.chapter2.findings import counted, factor, shown
from triptych_thesis.chapter2.published import THESIS, scores_table
from triptych_thesis.chapter2.scoring import METRICS
from triptych_thesis.study.old_report import Report

if TYPE_CHECKING:
    from triptych_thesis.chapter2.command import StudyConfig

Result = Mapping[str, Any]
INSTRUMENT = (
    "Intervals are 95%, by bootstrap over samples and real images; the noise of training seeds is in comparisons alone. Metrics, "
    "with the thesis's in brackets: "
    + "; ".join(f"{name.replace('_', ' ')} ({thesis}): {words}" for name, (thesis, words) in METRICS.items())
    + ". At paper sizes they are those of the ADM suite themselves."
)


def _gallery(report: Report, config: "StudyConfig", results: Result, result: Result) -> None:
    training = results["training"]
    counts = f"{results['model']['images']:,} images"
    report.heading("What it draws")
    report.figures(
        (_picture(config, "guided"), f"Sampled with guidance {result['guidance_scale']}; one class a column, nothing selected."),
        (_picture(config, "unguided"), "The same noise and classes without guidance."),
        pixels=True,
    )  # fmt: skip
    scores_table(report, result)
    _thesis_table(report, config, result)
    _spaces_table(report, config, results)
    report.figures(
        (_picture(config, "curve"), "Error of the predicted noise. The averaged weights are what is sampled.")
    )
    report.figures(
        (_picture(config, "over-training"), f"The same noise and classes through the averaged weights, up to {counts}."),
        (_picture(config, "strip"), f"One sample, from noise (left) to digit: above, the sample x_t; below, the clean digit the "
         f"model sees in it. {result['num_inference_steps']} steps, 10 shown."),
        pixels=True,
    )  # fmt: skip
    report.text(
        f"Samples: {', '.join(result['samples'].values())} in the run's folder, each beside a grid.png. Learning rate "
        f"{training['lr']:g} {training['lr_schedule']}, batch {training['batch_size']}."
    )


def _thesis_table(report: Report, config: "StudyConfig", result: Result) -> None:
    setting = f"{config.size}: n={result['n']:,}, {result['num_inference_steps']} steps"
    titles = {"frechet": "Fréchet distance", "precision": "precision", "recall": "recall"}
    report.table(
        ("metric", "guidance", "thesis", "ours", "our setting"),
        [
            (title, f"{kind} ({scale:g})", THESIS[metric][column], shown(result["rows"][kind][metric]), setting)
            for metric, title in titles.items()
            for column, (kind, scale) in enumerate((("unguided", 1.0), ("guided", result["guidance_scale"])))
        ],
        "Thesis: DiT-XL/2, 7M steps on ImageNet 256x256, FID-50K in Inception features (Table 2.2). Ours: digits in their own "
        "feature network, so only the direction from unguided to guided compares, never the numbers.",
    )


def _spaces_table(report: Report, config: "StudyConfig", results: Result) -> None:
    """Latents beside pixels, where the other has been run too."""
    other = config.size.removesuffix("-pixels") if config.size.endswith("-pixels") else f"{config.size}-pixels"
    path = config.out / other / "results.json"
    if not path.exists() or "gallery" not in (beside := json.loads(path.read_text()))["experiments"]:
        return
    metrics = ("frechet", "precision", "recall", "accuracy")
    report.table(
        ("space", "Fréchet distance", "precision", "recall", "class accuracy", "GFLOPs a forward pass"),
        [
            (
                r["space"],
                *(shown(r["experiments"]["gallery"]["rows"]["guided"][metric]) for metric in metrics),
                f"{r['model']['gflops_per_forward']:.4f}",
            )
            for r in (results, beside)
        ],
        f"Guided samples of the main models of sizes {config.size} and {other}, after as many images.",
    )


def _scaling(report: Report, config: "StudyConfig", results: Result, result: Result) -> None:
    report.heading("Scaling (Figures 2.2 left, 2.6, 2.8, 2.9, 2.10)")
    captions = {
        "scaling-gflops": "Every metric after equal steps against GFLOPs of a forward pass, with the correlation of its logarithm. "
        "The correlation's interval counts models as a sample and their samples' noise.",
        "scaling-over-training": "Fréchet distance over training: sizes at one patch, patches at one size.",
        "scaling-training-compute": "The same against total training compute.",
    }
    _figures(report, "scaling", result, captions)
    setting = f"{config.size}: {len({row['model'] for row in result['rows']})} models, n={result['rows'][0]['n']:,}"
    report.table(
        ("correlation of log GFLOPs with", "thesis", "ours", "our setting"),
        [
            (f"{metric.replace('_', ' ')} ({METRICS[metric][0]})", "-0.93" if metric == "frechet" else "drawn in Fig. 2.9",
             _plain(r), setting)
            for metric, r in result["correlations"].items()
        ],
        "Thesis: 12 models, 400K steps on ImageNet 256x256, FID-50K.",
    )  # fmt: skip
    _rows_table(report, result["rows"], ("model", "images", "gflops", "training_gflops"), INSTRUMENT)
    _comparisons_table(report, result["comparisons"], "Neighbours in size or patch, after equally many images.")
    if result["budgets"]:
        _comparisons_table(
            report, result["budgets"],
            "At no more training compute: the larger model's last measured stage within what the smaller took. The thesis "
            "claims an advantage from some budget on, so that losing here refutes nothing.",
        )  # fmt: skip
    if result["similar"]:
        report.table(
            ("models", "ratio of GFLOPs", "ratio of Fréchet distances", "similar"),
            [
                (" and ".join(s["models"]), f"{s['gflops_ratio']:.2f}", factor(s["log_ratio"]), s["verdict"])
                for s in result["similar"]
            ],
            "Models of other widths with similar GFLOPs. Similar: within a factor of 1.5 with the whole interval.",
        )


def _designs(report: Report, config: "StudyConfig", results: Result, result: Result) -> None:
    report.heading("Block designs (Figure 2.5)")
    _figures(report, "block-designs", result, {"block-designs": "Four designs of the same size, on the same examples."})
    last = max(row["images"] for row in result["rows"])
    thesis = {"in-context": "nearly 2 (119.4 GFLOPs)", "cross-attention": "above 1 (137.6)", "adaln": "above 1 (118.6)"}
    report.table(
        ("FID of the design over adaLN-Zero's", "thesis, XL/2 at 400K steps", "ours", "our setting"),
        [
            (c["worse"].split(" ", 1)[1], thesis[c["worse"].split(" ", 1)[1]], factor(c["difference"]),
             f"{config.size}: {c['better']}, {last:,} images")
            for c in result["comparisons"]
            if c["about"]["images"] == last
        ],
        f"At the last stage. {counted(result['comparisons']).capitalize()}.",
    )  # fmt: skip
    _rows_table(report, result["rows"], ("model", "images", "gflops"), INSTRUMENT)


def _unet(report: Report, config: "StudyConfig", results: Result, result: Result) -> None:
    report.heading("Against a U-Net (Figure 2.2 right)")
    caption = (
        f"The same examples, optimiser and rate; the U-Net has channels {result['channels']}, so that its GFLOPs match."
    )
    _figures(report, "unet", result, {"unet": caption})
    report.table(
        ("images", "FID of the U-Net over the DiT's, thesis", "ours", "our setting"),
        [
            (f"{c['about']['images']:,}", "1.59 (LDM-4 3.60, 103.6 GFLOPs; XL/2 2.27, 118.6)", factor(c["difference"]),
             f"{config.size}: {c['better']}")
            for c in result["comparisons"]
        ],
        "The thesis's are both guided, each trained in its own way. Here nothing is tuned for either.",
    )  # fmt: skip
    _rows_table(report, result["rows"], ("model", "images", "gflops"), INSTRUMENT)


def _compute(report: Report, config: "StudyConfig", results: Result, result: Result) -> None:
    report.heading("Sampling compute against model compute (Figure 2.11)")
    _figures(
        report, "compute", result, {"sampling-compute": "Denoising steps grow from left to right along each line."}
    )
    rows = [("L/2, 1000 steps (80.7 Tflops): 25.9; XL/2, 128 steps (15.2 Tflops): 23.7",
             f"{c['better']}, {c['about']['steps']} steps, against {c['worse']}, {c['about']['steps_of_smaller']} steps",
             factor(c["difference"]), c["verdict"]) for c in result["comparisons"]]  # fmt: skip
    if rows:
        report.table(
            ("thesis (FID-10K)", "our setting", "ours: the smaller's Fréchet distance over the larger's", "verdict"),
            rows,
        )
    _rows_table(report, result["rows"], ("model", "steps", "sampling_gflops"), INSTRUMENT)


def _guidance(report: Report, config: "StudyConfig", results: Result, result: Result) -> None:
    report.heading("Guidance (Tables 2.2 and 2.3)")
    _figures(
        report, "guidance", result, {"guidance": "Left: over scales. Right: precision and recall, labelled by scale."}
    )
    if result["channels"] == 1:
        report.text(
            "Guidance on three of four channels, as released, has no counterpart here: these pixels have one channel."
        )
    published = PUBLISHED[512 if result["side"] == 512 else 256]
    rows = [
        {
            **row,
            "scale": f"{row['guidance']:g}",
            "on": row["channels"],
            PUBLISHED_COLUMN: _published(published, result, row),
        }
        for row in result["rows"]
    ]
    table = "2.3, 3M steps at 512" if result["side"] == 512 else "2.2, 7M steps at 256"
    _rows_table(
        report, rows, ("scale", "on", "images", "n", PUBLISHED_COLUMN),
        f"Thesis: Table {table}, guided on 3 of 4 channels. One trained model: seeds are in no interval here.",
    )  # fmt: skip


PUBLISHED_COLUMN = "thesis: FID, sFID, IS, precision, recall"
PUBLISHED = {
    256: {1.0: "9.62, 6.85, 121.50, 0.67, 0.67", 1.25: "3.22, 5.28, 201.77, 0.76, 0.62", 1.5: "2.27, 4.60, 278.24, 0.83, 0.57"},
    512: {1.0: "12.03, 7.12, 105.25, 0.75, 0.64", 1.25: "4.64, 5.77, 174.77, 0.81, 0.57", 1.5: "3.04, 5.02, 240.82, 0.84, 0.54"},
}  # fmt: skip


def _published(published: Mapping[float, str], result: Result, row: Result) -> str:
    """The thesis's numbers beside the rows of its setting: unguided, or guided on all channels but one; the finished model's."""
    last = row["images"] == max(other["images"] for other in result["rows"])
    alike = row["guidance"] == 1 or row["channels"] != "all" or result["channels"] == 1
    return published.get(row["guidance"], "") if last and alike else ""


def _visual(report: Report, config: "StudyConfig", results: Result, result: Result) -> None:
    report.heading("The same noise through every model (Figure 2.7)")
    names = ", ".join(f"{m['model']} ({m['gflops']:.4f})" for m in result["models"])
    caption = f"A row a model, from top by GFLOPs: {names}. A column shares class, starting noise and sampling noise."
    report.figures((_picture(config, "visual-scaling"), caption), pixels=True)


def _samplers(report: Report, config: "StudyConfig", results: Result, result: Result) -> None:
    report.heading("Samplers")
    _figures(report, "samplers", result, {"samplers": "The main model without guidance."})
    report.table(
        ("asked whether", "is better than", "by", "thesis", "ours: difference", "verdict"),
        [
            (*c["about"]["pair"], c["about"]["of"].replace("_", " "), "DDPM, 250 steps, alone",
             factor(c["difference"]) if c["about"]["of"] == "frechet" else shown(c["difference"]), c["verdict"])
            for c in result["comparisons"]
        ],
        "Fréchet distances as the second's over the first's, recall as the first's less the second's. One trained model, the same "
        f"starting noises: {config.size}, n={result['rows'][0]['n']:,}.",
    )  # fmt: skip
    _rows_table(report, result["rows"], ("sampler", "steps", "n"), INSTRUMENT)


def _figures(report: Report, name: str, result: Result, captions: Mapping[str, str]) -> None:
    for title, png in drawn(name, result).items():
        report.figures((png, captions[title]))


def _picture(config: "StudyConfig", name: str) -> bytes:
    return (config.folder / "figures" / f"{name}.png").read_bytes()


def _rows_table(report: Report, rows: Sequence[Result], columns: Sequence[str], caption: str) -> None:
    metrics = [metric for metric in (*METRICS, "accuracy") if metric in rows[0]]
    report.table(
        (*(c.replace("_", " ").replace("gflops", "GFLOPs") for c in columns), *(m.replace("_", " ") for m in metrics)),
        [(*(_cell(row[column]) for column in columns), *(shown(row[metric]) for metric in metrics)) for row in rows],
        caption,
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _comparisons_table(report: Report, comparisons: Sequence[Result], caption: str) -> None:
    report.table(
        (
            "thesis: lower FID",
            "than",
            "our setting, images",
            "ours: the second's Fréchet distance over the first's",
            "verdict",
        ),
        [
            (c["better"], c["worse"], _cell(c["about"]["images"]), factor(c["difference"]), c["verdict"])
            for c in comparisons
        ],
        caption,
    )


def _plain(r: Mapping[str, Any]) -> str:
    return (
        f"{r['value']:.2f}"
        if r["low"] is None
        else f"{r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}], {r['verdict']}"
    )


SECTIONS: Mapping[str, Callable[[Report, "StudyConfig", Result, Result], None]] = {
    "gallery": _gallery,
    "scaling": _scaling,
    "visual-scaling": _visual,
    "block-designs": _designs,
    "unet": _unet,
    "compute": _compute,
    "guidance": _guidance,
    "samplers": _samplers,
}
