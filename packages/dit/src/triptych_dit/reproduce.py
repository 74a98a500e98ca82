"""Chapter 2 end to end: train, sample with and without guidance, score, draw, report."""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from triptych_common import data
from triptych_common.cli import CommonOptions, say
from triptych_common.metrics.digits import NEAR_DUPLICATE_QUANTILE, DigitScorer
from triptych_common.parallel import Ranks
from triptych_common.run import RunDirectory, provenance, write_json

from triptych_dit.figures import Pictures, draw_pictures
from triptych_dit.flops import gflops, parameter_count
from triptych_dit.report import write_report
from triptych_dit.sample import SampleConfig, SamplerSettings, read_npz, sample, sample_images
from triptych_dit.train import TRAIN_PRESETS, TrainConfig, make_loss, make_state, snapshot_path, train
from triptych_dit.weights import FILE_NAME, load_model

GUIDANCE_SCALE = 1.5  # fixed beforehand: the thesis's cfg
EXPERIMENTS = ("dit.fig-2.1", "dit.table-2.2")  # samples by class; guided against unguided


@dataclass(frozen=True)
class Size:
    """How large a reproduction is: sizes only, the code is the same."""

    train: TrainConfig
    num_samples: int
    num_inference_steps: int


SIZES: dict[str, Size] = {
    "smoke": Size(TRAIN_PRESETS["digits-smoke"], num_samples=100, num_inference_steps=20),
    "laptop": Size(TRAIN_PRESETS["digits"], num_samples=1000, num_inference_steps=50),
}


@dataclass(frozen=True)
class ReproduceConfig(CommonOptions):
    """Reproduce chapter 2 on real digits: train, sample, score, report. Repeating the command resumes it."""

    out: Path = Path("runs/ch2")
    """everything goes to OUT/SIZE; OUT/report.html is the latest finished size"""
    size: str = "laptop"
    """smoke (a minute) or laptop (a quarter of an hour on two cores)"""
    claims: Path = Path("claims.toml")
    """ledger of the thesis's figures and tables, for the report; left out where absent"""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r}: expected one of {', '.join(SIZES)}")

    @property
    def folder(self) -> Path:
        return self.out / self.size

    def train_config(self) -> TrainConfig:
        return replace(SIZES[self.size].train, out=self.folder / "train", seed=self.seed, device=self.device)

    def sample_config(self, scale: float) -> SampleConfig:
        size = SIZES[self.size]
        return SampleConfig(
            out=self.folder / f"samples-cfg-{scale}",
            checkpoint=self.folder / "train" / FILE_NAME,
            num_samples=size.num_samples,
            num_inference_steps=size.num_inference_steps,
            guidance_scale=scale,
            seed=self.seed,
            device=self.device,
        )

    def resolved(self) -> dict[str, Any]:
        return {
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
    identity = {"size": config.size, "train": config.train_config().identity()}
    with RunDirectory(config.folder, identity) as run:
        clock = Stopwatch(run.path / "seconds.json")
        say(f"chapter 2, size {config.size}: {run.path}")
        train(config.train_config())
        for scale in (GUIDANCE_SCALE, 1.0):
            with clock("sampling"):
                sample(config.sample_config(scale))
        say("scoring and drawing")
        with clock("scoring"):
            scores = score(config)
        with clock("drawing"):
            pictures = draw(config)
        rows = RunDirectory(config.train_config().out, {}).metrics()
        seconds = {**clock.seconds, "training": round(sum(row["time/seconds"] for row in rows), 2)}
        results = assemble(config, scores, seconds)
        write_json(run.path / "results.json", results)
        write_report(run.path / "report.html", config, results, pictures)
    for name in ("report.html", "results.json"):
        shutil.copyfile(config.folder / name, config.out / name)
        say(f"wrote {config.out / name} (size {config.size})")
    return results


class Stopwatch:
    """Seconds spent in each stage; training's are those of the steps that count, over all the times it was resumed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, stage: str) -> "Stopwatch":
        self.stage = stage
        return self

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        before = self.seconds.get(self.stage, 0.0) if self.stage == "sampling" else 0.0  # the others are done afresh
        self.seconds[self.stage] = round(before + time.perf_counter() - self.start, 2)
        write_json(self.path, self.seconds)


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
    over_training = torch.cat([sample_images(m, labels, settings, seed=config.seed) for m in models])
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
    )


def snapshot_losses(config: ReproduceConfig, models: list[Any]) -> dict[str, list[float]]:
    """Noise-prediction error of each snapshot on training and on held-out digits: the same noise for all, timesteps
    distributed as in training.
    """
    n = min(1000, 10 * SIZES[config.size].num_samples)
    train_config = replace(config.train_config(), seed=config.seed + 1)  # noise that training did not see
    out: dict[str, list[float]] = {}
    for name, split in zip(("train", "held-out"), _splits(config), strict=True):
        out[name] = [_mse(train_config, trained.model, split, n) for trained in models]
    return out


@torch.inference_mode()
def _mse(config: TrainConfig, model: torch.nn.Module, split: data.ImageDataset, n: int) -> float:
    alone = Ranks(0, 1, torch.device("cpu"))
    state = make_state(config, alone)
    state.model.load_state_dict(model.state_dict())
    loss_of = make_loss(config, state, split, alone)
    return float(torch.cat([loss_of(range(i, min(i + 250, n))).mse for i in range(0, n, 250)]).mean())


def assemble(config: ReproduceConfig, scores: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The content of results.json."""
    train_config, size = config.train_config(), SIZES[config.size]
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
        "training": {key: value for key, value in train_config.identity().items() if key != "model"},
        "scores": scores,
        "seconds": seconds,
        **provenance(),
    }  # fmt: skip


def _splits(config: ReproduceConfig) -> tuple[data.ImageDataset, data.ImageDataset]:
    name = config.train_config().data
    return data.load(name, "train"), data.load(name, "held_out")
