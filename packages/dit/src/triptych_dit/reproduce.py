"""Chapter 2 end to end: train an autoencoder, encode, train, sample with and without guidance, score, draw, report."""

import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from triptych_common import data
from triptych_common.cli import CommonOptions, say
from triptych_common.metrics.digits import NEAR_DUPLICATE_QUANTILE, DigitScorer
from triptych_common.progress import Stopwatch
from triptych_common.run import RunDirectory, provenance, write_json

from triptych_dit.autoencoder_config import AUTOENCODER_PRESETS, AutoencoderTrainConfig
from triptych_dit.encode import EncodeConfig, encode
from triptych_dit.figures import Pictures, draw_pictures
from triptych_dit.flops import gflops, parameter_count
from triptych_dit.report import write_report
from triptych_dit.sample import SampleConfig, sample
from triptych_dit.samples_file import read_npz
from triptych_dit.sampling import SamplerSettings, sample_images
from triptych_dit.train import snapshot_path, train
from triptych_dit.train_autoencoder import train_autoencoder
from triptych_dit.train_config import TRAIN_PRESETS, TrainConfig
from triptych_dit.training_data import open_training_data
from triptych_dit.validation import mean_mse
from triptych_dit.weights import FILE_NAME, load_model

GUIDANCE_SCALE = 1.5  # fixed beforehand: the thesis's cfg
EXPERIMENTS = ("dit.fig-2.1", "dit.table-2.2")  # samples by class; guided against unguided
DATA = "mnist5k"


@dataclass(frozen=True)
class Size:
    """How large a reproduction is: sizes only, the code is the same. Without an autoencoder it works on pixels."""

    train: TrainConfig
    num_samples: int
    num_inference_steps: int
    autoencoder: AutoencoderTrainConfig | None = None


SIZES: dict[str, Size] = {
    "smoke": Size(TRAIN_PRESETS["digits-latent-smoke"], 100, 20, AUTOENCODER_PRESETS["digits-smoke"]),
    "smoke-pixels": Size(TRAIN_PRESETS["digits-smoke"], 100, 20),
    "laptop": Size(TRAIN_PRESETS["digits-latent"], 1000, 50, AUTOENCODER_PRESETS["digits"]),
    "laptop-pixels": Size(TRAIN_PRESETS["digits"], 1000, 50),
}


@dataclass(frozen=True)
class ReproduceConfig(CommonOptions):
    """Reproduce chapter 2 on real digits: train, sample, score, report. Repeating the command resumes it."""

    out: Path = Path("runs/ch2")
    """everything goes to OUT/SIZE; OUT/report.html is the latest finished size"""
    size: str = "laptop"
    """smoke (a minute) or laptop (a quarter of an hour on two cores), in latents as the thesis is; smoke-pixels and
    laptop-pixels do without an autoencoder"""
    claims: Path = Path("claims.toml")
    """ledger of the thesis's figures and tables, for the report; left out where absent"""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r}: expected one of {', '.join(SIZES)}")

    @property
    def folder(self) -> Path:
        return self.out / self.size

    @property
    def vae(self) -> str | None:
        """Where the autoencoder lies; None for pixels."""
        return None if SIZES[self.size].autoencoder is None else str(self.folder / "autoencoder")

    def data_of(self, split: str) -> str:
        """What a DiT is trained or validated on: a cache of latents, or the digits themselves."""
        return DATA if self.vae is None else str(self.folder / "latents" / split)

    def autoencoder_config(self) -> AutoencoderTrainConfig | None:
        preset = SIZES[self.size].autoencoder
        return preset and replace(preset, out=self.folder / "autoencoder", seed=self.seed, device=self.device)

    def encode_config(self, split: str) -> EncodeConfig:
        return EncodeConfig(
            out=Path(self.data_of(split)), source=DATA, split=split, vae=str(self.vae), image_size=28, flips=False,
            workers=0, device=self.device,
        )  # fmt: skip

    def train_config(self) -> TrainConfig:
        preset, out = SIZES[self.size].train, self.folder / "train"
        return replace(preset, data=self.data_of("train"), out=out, seed=self.seed, device=self.device)

    def sample_config(self, scale: float) -> SampleConfig:
        size = SIZES[self.size]
        return SampleConfig(
            out=self.folder / f"samples-cfg-{scale}",
            checkpoint=str(self.folder / "train"),
            vae=self.vae,
            num_samples=size.num_samples,
            num_inference_steps=size.num_inference_steps,
            guidance_scale=scale,
            seed=self.seed,
            device=self.device,
        )

    def identity(self) -> dict[str, Any]:
        """What decides the result, wherever it lies."""
        autoencoder, train = self.autoencoder_config(), self.train_config().identity()
        return {
            "size": self.size,
            "autoencoder": autoencoder and autoencoder.identity(),
            "train": {key: value for key, value in train.items() if key != "data"},
        }

    def resolved(self) -> dict[str, Any]:
        autoencoder = self.autoencoder_config()
        return {
            "autoencoder": autoencoder and autoencoder.resolved(),
            "train": self.train_config().resolved(),
            "samples": [asdict(self.sample_config(scale)) for scale in (GUIDANCE_SCALE, 1.0)],
            "experiments": EXPERIMENTS,
        }


def reproduce(config: ReproduceConfig) -> dict[str, Any]:
    """Run what is missing of the reproduction; returns the content of results.json.

    Raises what training, sampling and scoring raise, and ValueError under torchrun.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("reproduce is for one process; use triptych-dit train and sample under torchrun")
    with RunDirectory(config.folder, config.identity()) as run:
        clock = Stopwatch(run.path / "seconds.json")
        say(f"chapter 2, size {config.size}: {run.path}")
        autoencoder = config.autoencoder_config()
        if autoencoder is not None:
            train_autoencoder(autoencoder)
            with clock("encoding", afresh=True):
                for split in ("train", "held_out"):
                    encode(config.encode_config(split))
        train(config.train_config())
        for scale in (GUIDANCE_SCALE, 1.0):
            with clock("sampling"):
                sample(config.sample_config(scale))
        say("scoring and drawing")
        with clock("scoring", afresh=True):
            scores = score(config)
        with clock("drawing", afresh=True):
            pictures = draw(config)
        seconds = {**clock.seconds, "training": _logged_seconds(config.train_config().out)}
        if autoencoder is not None:
            seconds["autoencoder"] = _logged_seconds(autoencoder.out)
        results = assemble(config, scores, seconds)
        write_json(run.path / "results.json", results)
        write_report(run.path / "report.html", config, results, pictures)
    for name in ("report.html", "results.json"):
        shutil.copyfile(config.folder / name, config.out / name)
        say(f"wrote {config.out / name} (size {config.size})")
    return results


def _logged_seconds(run: Path) -> float:
    return round(sum(row.get("time/seconds", 0.0) for row in RunDirectory(run, {}).metrics()), 2)


def score(config: ReproduceConfig) -> dict[str, Any]:
    """Every score of guided and unguided samples, of real digits, and of the trivial baseline."""
    scorer = DigitScorer(*_splits(config), seed=config.seed)
    rows: dict[str, Any] = {}
    for name, scale in (("guided", GUIDANCE_SCALE), ("unguided", 1.0)):
        rows[name] = scorer(*read_npz(config.sample_config(scale).out / "samples.npz"))
    n = rows["guided"].n
    rows["training digits"], rows["class means"] = scorer.real(n), scorer.class_means(n)
    floor = scorer.floor(n)
    return {
        "n": n,
        "rows": {name: row.as_dict() for name, row in rows.items()},
        "floor": {"frechet": float(floor.mean()), "sets": floor.tolist()},
        "held_out": {"accuracy": scorer.held_out_accuracy()._asdict(), "near_duplicates": NEAR_DUPLICATE_QUANTILE},
        "near_duplicate_distance": scorer.near_duplicate_distance,
        "instruments": scorer.instruments(),
    }


def draw(config: ReproduceConfig) -> Pictures:
    """Every picture of the report; also written as PNG files."""
    train_config = config.train_config()
    counts = [*train_config.snapshots, train_config.total_images]
    paths = [snapshot_path(train_config.out, count) for count in train_config.snapshots]
    models = [load_model(path) for path in [*paths, train_config.out / FILE_NAME]]
    labels = torch.arange(10)
    settings = SamplerSettings(
        num_inference_steps=SIZES[config.size].num_inference_steps, guidance_scale=GUIDANCE_SCALE
    )
    over_training = torch.cat([sample_images(m, labels, settings, seed=config.seed, vae=config.vae) for m in models])
    losses = snapshot_losses(config, models)
    metrics = RunDirectory(train_config.out, {}).metrics()
    return draw_pictures(
        folder=config.folder / "figures",
        guided=read_npz(config.sample_config(GUIDANCE_SCALE).out / "samples.npz")[0][:100],
        unguided=read_npz(config.sample_config(1.0).out / "samples.npz")[0][:100],
        over_training=over_training,
        counts=counts,
        metrics=metrics,
        snapshot_losses=losses,
        trained=models[-1],
        settings=settings,
        seed=config.seed,
        vae=config.vae,
    )


def snapshot_losses(config: ReproduceConfig, models: list[Any]) -> dict[str, list[float]]:
    """Noise-prediction error of each snapshot on training and on held-out digits: the same noise for all, timesteps
    distributed as in training.
    """
    n = min(1000, 10 * SIZES[config.size].num_samples)
    train_config = config.train_config()
    out: dict[str, list[float]] = {}
    for name, split in (("train", "train"), ("held-out", "held_out")):
        examples = open_training_data(config.data_of(split), train_config.model, split)
        out[name] = [mean_mse(train_config, trained.model, examples, n) for trained in models]
    return out


def assemble(config: ReproduceConfig, scores: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The content of results.json."""
    train_config, autoencoder, size = config.train_config(), config.autoencoder_config(), SIZES[config.size]
    guided, unguided = scores["rows"]["guided"], scores["rows"]["unguided"]
    return {
        "chapter": 2,
        "size": config.size,
        "experiments": {
            "dit.fig-2.1": {"samples": str(config.sample_config(GUIDANCE_SCALE).out / "samples.npz")},
            "dit.table-2.2": {
                "guided frechet": guided["frechet"], "unguided frechet": unguided["frechet"],
                "guided precision": guided["precision"], "unguided precision": unguided["precision"],
                "guided recall": guided["recall"], "unguided recall": unguided["recall"],
            },
        },
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": size.num_inference_steps,
        "model": {
            "config": asdict(train_config.model),
            "parameters": parameter_count(train_config.model),
            "gflops_per_forward": gflops(train_config.model),
        },
        "training": {k: v for k, v in train_config.identity().items() if k != "model"} | {"data": DATA},
        "autoencoder": autoencoder and autoencoder.identity(),
        "scores": scores,
        "seconds": seconds,
        **provenance(),
    }  # fmt: skip


def _splits(config: ReproduceConfig) -> tuple[data.ImageDataset, data.ImageDataset]:
    return data.load(DATA, "train"), data.load(DATA, "held_out")
