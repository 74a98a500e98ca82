"""The experiment that shows what the main model draws: pictures by class, and scores beside real digits and trivial baselines."""

from typing import Any

import torch
from triptych_common.metrics.digits import NEAR_DUPLICATE_QUANTILE
from triptych_common.storage.run import RunDirectory
from triptych_dit.objective import mean_mse, open_training_data
from triptych_dit.sample import read_npz
from triptych_dit.sampling import sample_images
from triptych_dit.weights import load_model

from triptych_thesis.chapter2.context import Bench, Draw
from triptych_thesis.chapter2.digits import without_margin
from triptych_thesis.chapter2.pictures import Pictures, draw_pictures
from triptych_thesis.chapter2.sizes import Model
from triptych_thesis.chapter2.statistics import SHOWN


def needs_gallery(bench: Bench) -> list[Draw]:
    return [guided(bench), unguided(bench)]


def guided(bench: Bench) -> Draw:
    size = bench.size
    return bench.of_main(
        size.gallery_samples, num_inference_steps=size.gallery_steps, guidance_scale=size.guidance_scale
    )


def unguided(bench: Bench) -> Draw:
    return bench.of_main(bench.size.gallery_samples, num_inference_steps=bench.size.gallery_steps)


def gallery(bench: Bench) -> dict[str, Any]:
    """Figure 2.1 in small: scores of guided and unguided samples, of training digits, and of the mean digit of each class."""
    scorer, size = bench.scorer.digits, bench.size
    rows = {
        "guided": _of_samples(bench, guided(bench)),
        "unguided": _of_samples(bench, unguided(bench)),
        "training digits": scorer.real(size.gallery_samples),
        "class means": scorer.class_means(size.gallery_samples),
    }
    floor = scorer.floor(rows["guided"].n)
    draw_gallery(bench)
    return {
        "n": rows["guided"].n,
        "rows": {name: row.as_dict() for name, row in rows.items()},
        "samples": {name: _place(bench, draw(bench)) for name, draw in (("guided", guided), ("unguided", unguided))},
        "floor": {"frechet": float(floor.mean()), "sets": floor.tolist()},
        "held_out": {"accuracy": scorer.held_out_accuracy()._asdict(), "near_duplicates": NEAR_DUPLICATE_QUANTILE},
        "instruments": scorer.instruments(),
        "guidance_scale": size.guidance_scale,
        "num_inference_steps": size.gallery_steps,
        "verdicts": {"dit.fig-2.1": SHOWN},
    }


def _of_samples(bench: Bench, draw: Draw) -> Any:
    images, labels = read_npz(bench.samples(draw))
    return bench.scorer.digits(without_margin(images), labels)


def _place(bench: Bench, draw: Draw) -> str:
    return str(bench.samples(draw).relative_to(bench.folder))


def draw_gallery(bench: Bench) -> Pictures:
    """Every picture of the main model's samples and training; also written as PNG files."""
    main = Model(bench.size.main)
    config = bench.train_config(main)
    counts = [*config.snapshots, config.total_images]
    models = [load_model(bench.weights(main, count)) for count in counts]
    settings, labels = guided(bench).settings, torch.arange(10)
    over_training = [sample_images(m, labels, settings, seed=bench.seed, vae=bench.decoder) for m in models]
    losses: dict[str, list[float]] = {}
    for name, split in (("train", "train"), ("held-out", "held_out")):
        examples = open_training_data(bench.data if split == "train" else _held_out(bench), config.model, split)
        losses[name] = [
            mean_mse(config, trained.model, examples, min(1000, bench.size.gallery_samples)) for trained in models
        ]
    return draw_pictures(
        folder=bench.folder / "figures",
        guided=read_npz(bench.samples(guided(bench)))[0][:100],
        unguided=read_npz(bench.samples(unguided(bench)))[0][:100],
        over_training=torch.cat(over_training),
        counts=counts,
        metrics=RunDirectory(config.out, {}).metrics(),
        snapshot_losses=losses,
        trained=models[-1],
        settings=settings,
        seed=bench.seed,
        vae=bench.decoder,
    )


def _held_out(bench: Bench) -> str:
    """Latents of held-out images lie in a cache beside that of the training images; pixels in the same folder."""
    return bench.data if bench.vae is None else bench.data.removesuffix("train") + "held_out"
