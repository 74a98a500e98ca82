"""The HTML report of a chapter 2 reproduction."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych_common.claims import load_claims
from triptych_common.metrics import Estimate
from triptych_common.report import Report

from triptych_dit.figures import Pictures

if TYPE_CHECKING:
    from triptych_dit.reproduce import ReproduceConfig

THESIS = {  # Table 2.2, ImageNet 256x256, FID-50K: (unguided XL/2, guided XL/2-G at 1.50)
    "frechet": ("9.62", "2.27"),
    "precision": ("0.67", "0.83"),
    "recall": ("0.67", "0.57"),
}


def write_report(path: Path, config: "ReproduceConfig", results: dict[str, Any], pictures: Pictures) -> None:
    """Write the page."""
    scores, rows = results["scores"], results["scores"]["rows"]
    guided, floor = rows["guided"], scores["floor"]["frechet"]
    seconds, model, training = results["seconds"], results["model"], results["training"]
    n = scores["n"]
    hardware, latents = results["hardware"], results["autoencoder"] is not None
    space = "latents of an autoencoder trained on the spot" if latents else "pixels"
    minutes = seconds["training"] / 60
    report = Report(
        title="A diffusion transformer learns to draw digits",
        subtitle=f"Chapter 2 (DiT), size {config.size}, seed {config.seed}: {model['parameters']:,} parameters trained on "
        f"{space} of {training['data']} ({training['total_images']:,} images seen, repeats counted) on {hardware['cores']} cores, "
        f"{hardware.get('gpu', hardware['cpu'])}.",
        findings=[
            f"{_percent(guided['accuracy'])} of {n:,} digits sampled with guidance {results['guidance_scale']} are read as "
            f"the digit that was asked for, by a classifier that reads {_percent(scores['held_out']['accuracy'])} of real "
            f"held-out digits right.",
            f"Their Fréchet distance to held-out digits is {guided['frechet']['value']:.1f}, "
            f"{guided['frechet']['value'] / floor:.1f} times the {floor:.1f} that real digits have at equal count.",
            f"They cover {guided['recall']['value']:.2f} of held-out digits (recall), where training digits cover "
            f"{rows['training digits']['recall']['value']:.2f}.",
            f"{_percent(guided['near_duplicates'])} lie as close to a training digit as the nearest 5% of held-out digits "
            "do; a copying model would show 100%.",
            (
                f"The autoencoder took {seconds['autoencoder'] / 60:.1f} minutes to train, the transformer {minutes:.1f}"
                if latents
                else f"Training took {minutes:.1f} minutes"
            )
            + f", sampling {2 * n:,} digits {seconds['sampling'] / 60:.1f} minutes.",
        ],
    )
    if n < 1000:
        report.text(
            f"Size {config.size} checks that everything works. With {n} samples of a barely trained model its "
            "scores say nothing about quality."
        )
    report.figures(
        (pictures.guided, f"Sampled with guidance {results['guidance_scale']}; one class a column, nothing selected."),
        (pictures.unguided, "The same noise and classes without guidance."),
        pixels=True,
    )  # fmt: skip
    report.heading("Scores")
    _scores_table(report, scores)
    _thesis_table(report, results, config)
    _spaces_table(report, results, config)
    report.heading("Training")
    report.figures((pictures.curve, "Error of the predicted noise. The averaged weights are what is sampled."))
    report.figures(
        (pictures.over_training, "The same noise and classes through the averaged weights during training, after "
         + ", ".join(f"{count:,}" for count in [*training["snapshots"], training["total_images"]]) + " images."),
        (pictures.strip, f"One sample, from noise (left) to digit: above, the sample x_t; below, the clean digit the model "
         f"sees in it. {results['num_inference_steps']} steps, 10 shown."),
        pixels=True,
    )  # fmt: skip
    _claims_table(report, config, results)
    report.heading("How this was made")
    report.code(f"make reproduce-ch2 SIZE={config.size}\n{results['command']}")
    report.table(
        ("what", "value"),
        [
            ("commit", results["commit"]),
            ("versions", ", ".join(f"{k} {v}" for k, v in results["versions"].items())),
            ("hardware", ", ".join(f"{k} {v}" for k, v in hardware.items())),
            ("model", f"{model['parameters']:,} parameters, {model['gflops_per_forward']:.4f} GFLOPs a forward pass; "
             + ", ".join(f"{k}={v}" for k, v in model["config"].items())),
            ("training", ", ".join(f"{k}={v}" for k, v in training.items())),
            ("autoencoder", ", ".join(f"{k}={v}" for k, v in (results["autoencoder"] or {"none": "pixels"}).items())),
            ("seconds", ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())),
            *((f"instrument {k}", f"SHA-256 {v}") for k, v in scores["instruments"].items()),
        ],
    )  # fmt: skip
    report.write(path)


def _scores_table(report: Report, scores: dict[str, Any]) -> None:
    names = {
        "guided": "samples, guided", "unguided": "samples, unguided", "training digits": "training digits (what copying scores)",
        "class means": "mean digit of each class (trivial baseline)",
    }  # fmt: skip
    columns = ("frechet", "kernel", "precision", "recall", "accuracy", "near_duplicates")
    report.table(
        ("", "Fréchet distance", "KID", "precision", "recall", "class accuracy", "near-duplicates"),
        [(title, *(str(Estimate(**scores["rows"][key][c])) for c in columns)) for key, title in names.items()],
        f"Against {scores['n']:,} held-out digits with as many samples; 95% bootstrap intervals. Distances, precision and "
        f"recall (k=3) in 64 features of the frozen network mnist_features "
        f"({scores['instruments']['mnist_features'][:12]}), accuracy by mnist_classifier "
        f"({scores['instruments']['mnist_classifier'][:12]}). Real-real floor of the Fréchet distance: "
        + ", ".join(f"{value:.2f}" for value in scores["floor"]["sets"])
        + f" for disjoint sets of {scores['n']:,} training digits. Near-duplicates: nearer in pixels to a training digit "
        "than 95% of held-out digits are.",
    )


def _thesis_table(report: Report, results: dict[str, Any], config: "ReproduceConfig") -> None:
    rows = results["scores"]["rows"]
    setting = f"{config.size}: n={results['scores']['n']:,}, {results['num_inference_steps']} steps"
    table = []
    for metric, title in (("frechet", "Fréchet distance"), ("precision", "precision"), ("recall", "recall")):
        for column, (kind, scale) in enumerate((("unguided", "1.0"), ("guided", str(results["guidance_scale"])))):
            table.append(
                (title, f"{kind} ({scale})", THESIS[metric][column], str(Estimate(**rows[kind][metric])), setting)
            )
    report.table(
        ("metric", "guidance", "thesis", "ours", "our setting"),
        table,
        "Thesis: DiT-XL/2, 7M steps on ImageNet 256x256, FID-50K in Inception features (Table 2.2). Ours: digits in their own "
        "feature network, so only the direction from unguided to guided compares, never the numbers.",
    )


def _spaces_table(report: Report, results: dict[str, Any], config: "ReproduceConfig") -> None:
    """Latents beside pixels, where the other has been run too."""
    other = config.size.removesuffix("-pixels") if config.size.endswith("-pixels") else f"{config.size}-pixels"
    path = config.out / other / "results.json"
    if not path.exists():
        return
    report.table(
        ("space", "Fréchet distance", "precision", "recall", "class accuracy", "minutes of training"),
        [
            (
                "pixels" if r["autoencoder"] is None else "latents",
                *(str(Estimate(**r["scores"]["rows"]["guided"][m])) for m in ("frechet", "precision", "recall", "accuracy")),
                f"{(r['seconds']['training'] + r['seconds'].get('autoencoder', 0)) / 60:.1f}",
            )
            for r in (results, json.loads(path.read_text()))
        ],
        f"Guided samples of sizes {config.size} and {other}. Minutes include the autoencoder's.",
    )  # fmt: skip


def _claims_table(report: Report, config: "ReproduceConfig", results: dict[str, Any]) -> None:
    if not config.claims.exists():
        return
    claims = load_claims(config.claims)
    report.heading("Claims of the thesis this run touches")
    report.table(
        ("id", "item", "claim", "verdict in the ledger"),
        [
            (c.id, f"{c.item}: {c.title}", c.claim, f"{c.verdict} {c.size}".strip())
            for c in (claims[id] for id in results["experiments"] if id in claims)
        ],
        f"From {config.claims.name}, which lists every figure and table. A run of this size decides none of them.",
    )


def _percent(estimate: dict[str, float]) -> str:
    return f"{100 * estimate['value']:.1f}%"
