"""Figure 2.1 in small: what the main model draws, and its scores beside real digits and trivial baselines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from triptych_common.images import image_grid, png_bytes, to_uint8
from triptych_common.metrics.digits import NEAR_DUPLICATE_QUANTILE
from triptych_common.plots import BLUE, ORANGE, PALE_BLUE, figure_png, legend, panels, thousands
from triptych_common.storage.files import open_ended, read_json, write_bytes
from triptych_common.storage.provenance import command_line, git_commit
from triptych_common.storage.run import RunDirectory
from triptych_dit.model import DiT
from triptych_dit.objective import mean_mse, open_training_data
from triptych_dit.sample import read_npz
from triptych_dit.sampling import decoded, sample_images, trajectory
from triptych_dit.settings import SamplerSettings
from triptych_dit.weights import TrainedModel, load_model
from typing_extensions import TypedDict

from triptych_thesis.chapter2.context import Context, SampleSet
from triptych_thesis.chapter2.digits import with_margin, without_margin
from triptych_thesis.chapter2.showing import sample_links
from triptych_thesis.chapter2.sizes import SIZES, Model
from triptych_thesis.study.estimates import interval
from triptych_thesis.study.experiment import Experiment, Result, Section, Study, Table
from triptych_thesis.study.verdicts import UNDECIDED, Evidence, Verdict

STRIP_LENGTH = 10  # equal to the number of classes, so that grids and strips line up
THESIS = {  # Table 2.2, ImageNet 256x256, FID-50K: (unguided XL/2, guided XL/2-G at 1.50)
    "frechet": ("9.62", "2.27"),
    "precision": ("0.67", "0.83"),
    "recall": ("0.67", "0.57"),
}
TITLES = {
    "frechet": "Fréchet distance", "kernel": "KID", "precision": "precision", "recall": "recall", "accuracy": "class accuracy",
    "near_duplicates": "near-duplicates",
}  # fmt: skip


def _sets(context: Context) -> dict[str, SampleSet]:
    size = context.size
    steps = {"num_inference_steps": size.gallery_steps}
    guided = context.of_main(size.gallery_samples, guidance_scale=size.guidance_scale, **steps)
    return {"guided": guided, "unguided": context.of_main(size.gallery_samples, **steps)}


def needs(context: Context) -> list[SampleSet]:
    return list(_sets(context).values())


def measure(context: Context) -> Result:
    scorer, size, sets, rows = context.scorer.digits, context.size, _sets(context), {}
    for name, samples in sets.items():
        images, labels = read_npz(context.path(samples))
        rows[name] = scorer(without_margin(images), labels)
    rows["training digits"] = scorer.real(size.gallery_samples)
    rows["class means"] = scorer.class_means(size.gallery_samples)
    floor = scorer.floor(rows["guided"].n)
    draw_pictures(context)
    return {
        "n": rows["guided"].n, "rows": {name: row.as_dict() for name, row in rows.items()},
        "samples": {name: context.place(samples) for name, samples in sets.items()},
        "floor": {"frechet": float(floor.mean()), "sets": floor.tolist()},
        "held_out": {"accuracy": scorer.held_out_accuracy()._asdict(), "near_duplicates": NEAR_DUPLICATE_QUANTILE},
        "instruments": scorer.instruments(),
        "guidance_scale": size.guidance_scale, "num_inference_steps": size.gallery_steps,
    }  # fmt: skip


def verdicts(result: Result) -> list[Verdict]:
    guided, real, floor = result["rows"]["guided"], result["rows"]["training digits"], result["floor"]["frechet"]
    accuracy = interval(result["held_out"]["accuracy"])
    evidence = [
        Evidence("digits read as the class they were sampled for", interval(guided["accuracy"]), beside=f"{accuracy} of real ones"),
        Evidence("Fréchet distance", interval(guided["frechet"]), beside=f"{floor:.1f} between sets of real digits"),
        Evidence("recall", interval(guided["recall"]), beside=f"{interval(real['recall'])} of real ones"),
        Evidence("near-duplicates of training digits", interval(guided["near_duplicates"]), beside="0.050 of real ones"),
    ]  # fmt: skip
    why = "a picture, nothing selected; no number of the thesis decides it"
    return [Verdict("dit.fig-2.1", UNDECIDED, evidence, why)]


def section(study: Study, result: Result) -> Section:
    captions = {
        "guided": f"Sampled with guidance {result['guidance_scale']}; one class a column, nothing selected.",
        "unguided": "The same noise and classes without guidance.",
        "over-training": "The same noise and classes through the averaged weights, up to "
        f"{SIZES[study.size].main_images:,} images.",
        "strip": "One sample, from noise (left) to digit: above, the sample x_t; below, the clean digit the model sees in it. "
        f"{result['num_inference_steps']} steps, {STRIP_LENGTH} shown.",
    }
    pictures = [study.figure(name, caption, pixels=True) for name, caption in captions.items()]
    curve = study.figure("curve", "Error of the predicted noise. The averaged weights are what is sampled.")
    instruments = [(name, f"SHA-256 {digest}") for name, digest in result["instruments"].items()]
    tables = [
        _scores_table(result), _thesis_table(study, result), *_spaces_table(study),
        Table(("instrument", "file"), instruments, "The frozen instruments.", folded=True),
    ]  # fmt: skip
    links = sample_links(study, list(result["samples"].values()))
    return Section("What it draws", [*pictures, curve], tables, links=links)


def _scores_table(result: Result) -> Table:
    """Samples beside real digits and the trivial baseline."""
    names = {
        "guided": "samples, guided", "unguided": "samples, unguided", "training digits": "training digits (what copying scores)",
        "class means": "mean digit of each class (trivial baseline)",
    }  # fmt: skip
    return Table(
        ("", *TITLES.values()),
        [(title, *(interval(result["rows"][key][c]) for c in TITLES)) for key, title in names.items()],
        f"Against {result['n']:,} held-out digits with equally many samples; 95% bootstrap intervals. Distances, precision and "
        "recall (k=3) in 64 features of the frozen network mnist_features, accuracy by mnist_classifier. Fréchet distance between "
        f"disjoint sets of {result['n']:,} training digits: {', '.join(f'{value:.2f}' for value in result['floor']['sets'])}. "
        "Near-duplicates: nearer in pixels to a training digit than 95% of held-out digits are.",
    )


def _thesis_table(study: Study, result: Result) -> Table:
    kinds = (("unguided", 1.0), ("guided", result["guidance_scale"]))
    return Table(
        ("metric", "guidance", "thesis", "ours"),
        [
            (TITLES[metric], f"{kind} ({scale:g})", thesis, interval(result["rows"][kind][metric]))
            for metric, published in THESIS.items()
            for thesis, (kind, scale) in zip(published, kinds, strict=True)
        ],
        f"Beside Table 2.2. Thesis: DiT-XL/2, 7M steps on ImageNet 256x256, FID-50K in Inception features. Ours ({study.size}): "
        f"{result['n']:,} digits in {result['num_inference_steps']} steps, in their own feature network, so only the direction "
        "from unguided to guided compares, never the numbers.",
    )


@open_ended
class _Results(TypedDict):
    space: str
    model: dict[str, Any]
    experiments: dict[str, dict[str, Any]]


def _spaces_table(study: Study) -> list[Table]:
    """Latents beside pixels, where the other has been run too."""
    base = study.size.removesuffix("-pixels")
    paths = [study.out / size / "results.json" for size in (base, f"{base}-pixels")]
    remedy = "repeat the study of that size, which writes it again"
    results = [read_json(path, _Results, remedy=remedy) for path in paths if path.exists()]
    if len(results) < 2 or not all("gallery" in each["experiments"] for each in results):
        return []
    metrics, rows = ("frechet", "precision", "recall", "accuracy"), []
    for each in results:
        guided = each["experiments"]["gallery"]["rows"]["guided"]
        cost = f"{each['model']['gflops_per_forward']:.4f}"
        rows.append((each["space"], *(interval(guided[metric]) for metric in metrics), cost))
    header = ("space", *(TITLES[metric] for metric in metrics), "GFLOPs a forward pass")
    models = f"guided samples of the main models of sizes {base} and {base}-pixels, after as many images"
    return [Table(header, rows, f"Latents beside pixels: {models}.")]


def draw_pictures(context: Context) -> None:
    """Write every picture of the main model's samples and training as a PNG file; a grid's column is a class.

    All but the curve carry the command, seed and commit that made them.
    """
    main = Model(context.size.main)
    config = context.train_config(main)
    counts = [*config.snapshots, config.total_images]
    models = [load_model(context.weights(main, count)) for count in counts]
    settings, labels = _sets(context)["guided"].settings, torch.arange(10)
    over_training = [sample_images(m, labels, settings, seed=context.seed, vae=context.decoder) for m in models]
    guided, unguided = (read_npz(context.path(samples))[0][:100] for samples in needs(context))
    strip = denoising_strip(models[-1], settings, seed=context.seed, vae=context.decoder)
    grids = {
        "overview": torch.cat([guided, strip]),
        "guided": guided,
        "unguided": unguided,
        "over-training": to_uint8(torch.cat(over_training)),
        "strip": strip,
        "opening-drawn": guided[:50],  # the report's first screen: some samples, and as many real digits
        "opening-real": real_digits(context, 5),
    }
    made_by = {"command": command_line(), "seed": str(context.seed), "commit": git_commit()}
    pictures = {
        name: png_bytes(image_grid(images, columns=STRIP_LENGTH), scale=2, text=made_by)
        for name, images in grids.items()
    }
    losses = _snapshot_losses(context, [m.model for m in models])
    pictures["curve"] = training_curve(RunDirectory(config.out, {}).metrics(), counts, losses)
    for name, content in pictures.items():
        write_bytes(context.folder / "figures" / f"{name}.png", content)


def real_digits(context: Context, rows: int) -> UInt8[Tensor, "n 1 32 32"]:
    """The first held-out digits of every class, a class a column."""
    held_out = context.scorer.digits.held_out
    columns = [(held_out.labels == label).nonzero().flatten()[:rows] for label in range(STRIP_LENGTH)]
    return with_margin(held_out.images[torch.stack(columns, dim=1).flatten()])


def _snapshot_losses(context: Context, models: Sequence[DiT]) -> dict[str, list[float]]:
    """Noise-prediction errors of averaged weights on training and held-out digits.

    Latents of held-out images lie in a cache beside that of the training images; pixels in the same folder.
    """
    config = context.train_config(Model(context.size.main))
    held_out = context.data if context.vae is None else str(Path(context.data).with_name("held_out"))
    count, losses = min(1000, context.size.gallery_samples), {}
    for name, split, data in (("train", "train", context.data), ("held-out", "held_out", held_out)):
        examples = open_training_data(data, config.model, split)
        losses[name] = [mean_mse(config, model, examples, count) for model in models]
    return losses


@torch.inference_mode()
def denoising_strip(
    trained: TrainedModel, settings: SamplerSettings, *, label: int = 3, seed: int = 0, vae: str | None = None
) -> UInt8[Tensor, "n channels height width"]:
    """One sample's way from noise to digit: a row of x_t, then a row of the clean digit the model sees in each."""
    steps = list(trajectory(trained, torch.tensor([label]), [0], settings, seed=seed))
    shown = torch.linspace(0, len(steps) - 1, STRIP_LENGTH).round().int().tolist()
    rows = [steps[i].x for i in shown] + [steps[i].x_0 for i in shown]
    return to_uint8(decoded(trained, torch.cat(rows), vae=vae))


def training_curve(
    metrics: Sequence[dict[str, Any]], counts: Sequence[int], snapshot_losses: dict[str, list[float]]
) -> bytes:
    """Noise-prediction error over training, and that of the averaged weights on training and held-out digits."""
    figure, (axes,) = panels()
    rows = [row for row in metrics if "mse" in row]
    seen, errors = ([row[key] for row in rows] for key in ("images", "mse"))
    axes.plot(seen, errors, color=PALE_BLUE, linewidth=1, label="training batches")
    for (name, values), color, style in zip(snapshot_losses.items(), (BLUE, ORANGE), ("o-", "s--"), strict=True):
        label = f"averaged weights, {name} digits"
        axes.plot(counts, values, style, color=color, markersize=4, linewidth=1.2, label=label)
    axes.set(xlabel="training images seen", ylabel="error of the predicted noise (MSE)", yscale="log")
    axes.xaxis.set_major_formatter(thousands)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    legend(axes)
    return figure_png(figure)


EXPERIMENT = Experiment("gallery", 1, measure, section, verdicts, needs=needs)
