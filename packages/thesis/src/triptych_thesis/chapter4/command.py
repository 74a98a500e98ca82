"""Chapter 4 end to end: an encoder, an alignment of one digit, clusters of all, scores beside baselines, ablations, report."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from triptych_common.cli import CommonOptions, echo
from triptych_common.progress import Stopwatch
from triptych_common.storage.atomic import write_json
from triptych_common.storage.provenance import provenance
from triptych_common.storage.run import RunDirectory
from triptych_common.workers import default_workers, on_gpu, run_all
from triptych_gangealing.aligner import FILE, load_aligner
from triptych_gangealing.encoders.perceptual import open_distance
from triptych_gangealing.encoders.simclr import EncoderTrainConfig
from triptych_gangealing.encoders.simclr import run as train_encoder
from triptych_gangealing.stylegan2.interop import load_generator
from triptych_gangealing.train import digest_of, train
from triptych_gangealing.train_config import AlignTrainConfig

from triptych_thesis.chapter4 import ablations
from triptych_thesis.chapter4.cluster_scores import compare_clusters
from triptych_thesis.chapter4.evaluate import AlignmentScoreConfig, evaluate
from triptych_thesis.chapter4.gallery import Gallery, make_gallery
from triptych_thesis.chapter4.ledger import claims
from triptych_thesis.chapter4.paper import DATASETS, paper_runs, reproduce_paper
from triptych_thesis.chapter4.report import write_report
from triptych_thesis.chapter4.sizes import DIGIT, SIZES
from triptych_thesis.chapter4.targets import targets
from triptych_thesis.study.old_report import publish

PAPER = "paper"


@dataclass(frozen=True)
class ReproduceConfig(CommonOptions):
    """Reproduce chapter 4: align one digit, cluster all, score, report. Repeating the command resumes it."""

    out: Path = Path("runs/ch4")
    """everything goes to OUT/SIZE; OUT/report.html is the latest finished size"""
    size: str = "laptop"
    """smoke (a minute), laptop (two cores, under twenty minutes), gpu (one GPU, resumable slices), paper (writes down the
    thesis's runs for eight GPUs, and reports on those that were run)"""
    all: bool = False
    """also what takes longer: the rest of Table 4.3's rows"""
    generator: str = "digits32"
    """generator of all digits: an embedded one, a run folder or a file"""
    digit_generator: str = "digits32-3"
    """generator of the one digit"""
    workers: int | None = None
    """alignments to train at a time; by default one a core, or one on a GPU. Results do not depend on it"""
    lpips_weights: Path | None = None
    """file of VGG-16's weights, as torchvision has them: adds LPIPS's rows of Table 4.3"""
    datasets: tuple[str, ...] = ()
    """size paper: which of the thesis's eight data sets; none named: all"""
    generators: Path = Path("generators")
    """size paper: folder of their generators, cat.pkl and so on"""
    claims: Path = Path("claims.toml")
    """ledger of the thesis's figures and tables, for the report; left out where absent"""

    def __post_init__(self) -> None:
        if self.size not in (*SIZES, PAPER):
            raise ValueError(f"size {self.size!r}: expected one of {', '.join((*SIZES, PAPER))}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers {self.workers}: expected at least 1")
        if self.datasets and self.size != PAPER:
            raise ValueError(f"datasets {' '.join(self.datasets)}: of size {PAPER}; pass --size {PAPER}")
        if unknown := set(self.datasets) - set(DATASETS):
            raise ValueError(f"dataset {min(unknown)!r}: expected some of {', '.join(DATASETS)}")

    @property
    def folder(self) -> Path:
        return self.out / self.size

    def encoder_config(self) -> EncoderTrainConfig:
        preset = SIZES[self.size].encoder
        return replace(
            preset, out=self.folder / "encoder", generator=self.generator, seed=self.seed, device=self.device
        )

    def align_config(self, name: str) -> AlignTrainConfig:
        """Of "one" digit, or of all of them, "clustered"."""
        preset = getattr(SIZES[self.size], name)
        generator = self.digit_generator if name == "one" else self.generator
        return replace(
            preset, out=self.folder / name, generator=generator, distance=f"simclr:{self.folder / 'encoder'}",
            seed=self.seed, device=self.device,
        )  # fmt: skip

    def ablation_config(self, row: str) -> AlignTrainConfig:
        """A row of Table 4.3, for fewer images in the same proportions, the average's half-life too."""
        complete, images = self.align_config("one"), SIZES[self.size].ablation_images
        share = images / complete.total_images
        shorter = replace(
            complete, out=self.folder / "ablations" / ablations.folder_name(row), total_images=images,
            psi_images=round(share * complete.psi_images), constant_images=round(share * complete.constant_images),
            restart_images=max(1, round(share * complete.restart_images)),
            ema_half_life_images=max(1, round(share * complete.ema_half_life_images)),
        )  # fmt: skip
        shape = load_generator(complete.generator)
        num_ws, w_dim = shape.num_ws, shape.config.w_dim
        return ablations.ablation(row, shorter, num_ws=num_ws, w_dim=w_dim, vgg=self.lpips_weights)

    def rows(self) -> tuple[str, ...]:
        """Rows of Table 4.3 asked for."""
        rest = ablations.REST if self.all else ()
        return (*ablations.FIRST, *rest, *(ablations.LPIPS if self.lpips_weights is not None else ()))

    def pck_config(self, *, grey: bool) -> AlignmentScoreConfig:
        size = SIZES[self.size]
        return AlignmentScoreConfig(
            out=self.folder / ("scores-grey" if grey else "scores"), aligner=self.folder / "one", digit=DIGIT,
            pairs=size.pairs, images=size.images, grey=grey, iterations=size.iterations, seed=self.seed,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What decides the result, wherever it lies."""
        placed = "distance", "generator"
        alignments = {
            name: {k: v for k, v in self.align_config(name).identity().items() if k not in placed}
            for name in ("one", "clustered")
        }
        size = SIZES[self.size]
        amounts = {
            name: getattr(size, name)
            for name in ("ablation_images", "pairs", "images", "cluster_images", "shown", "iterations")
        }
        digests = {name: digest_of(load_generator(getattr(self, name))) for name in ("generator", "digit_generator")}
        return {"size": self.size, "encoder": self.encoder_config().identity(), **alignments, **amounts, **digests}

    def resolved(self) -> dict[str, Any]:
        if self.size == PAPER:
            return {"runs": {run.name: {"command": run.command, **run.config.resolved()} for run in paper_runs(self)}}
        return {
            "encoder": self.encoder_config().resolved(),
            "one": self.align_config("one").resolved(),
            "clustered": self.align_config("clustered").resolved(),
            "scores": asdict(self.pck_config(grey=False)),
            "ablations": self.rows(),
        }


def reproduce(config: ReproduceConfig) -> dict[str, Any]:
    """Run what is missing of the reproduction; returns the content of results.json.

    Raises what training and scoring raise, and ValueError under torchrun. Of size paper nothing is trained: see `paper`.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("reproduce is for one process; use triptych-gangealing train under torchrun, then repeat it")
    if config.size == PAPER:
        return reproduce_paper(config)
    if config.lpips_weights is not None:
        open_distance("lpips", weights=config.lpips_weights)  # what is wrong with it is said before an hour of training
    with RunDirectory(config.folder, config.identity()) as run:
        clock = Stopwatch(run.path / "seconds.json", finished=(run.path / "results.json").exists())
        echo(f"chapter 4, size {config.size}: {run.path}")
        with clock("encoder"):
            train_encoder(config.encoder_config())
        asked = [row for row in ablations.THESIS if row in config.rows() or _was_scored(config, row)]
        with clock("alignments"):
            align_all(config, [row for row in asked if not _was_scored(config, row)])
        with clock("scores"):
            scores = {name: _scored(config.pck_config(grey=name == "grey")) for name in ("coloured", "grey")}
            clusters = compare_clusters(
                load_aligner(config.folder / "clustered"), SIZES[config.size].cluster_images, config.seed
            )
            table = {row: _ablated(config, row) for row in asked}
        with clock("pictures", afresh=True):
            gallery = make_gallery(config.folder, SIZES[config.size], seed=config.seed)
        results = assemble(config, scores, clusters, table, gallery, clock.seconds)
        write_json(run.path / "results.json", results)
        write_report(run.path / "report.html", config, results, gallery)
    publish(config.folder, config.out, config.size)
    return results


@dataclass(frozen=True)
class Alignment:
    """One to be trained where it is missing: what decides about it is part of the reproduction's identity."""

    title: str
    config: AlignTrainConfig

    @property
    def cost(self) -> int:
        """In images, those of many clusters for so many."""
        return self.config.total_images * self.config.clusters

    @property
    def done(self) -> bool:
        return (self.config.out / FILE).exists()

    def __call__(self) -> None:
        train(self.config)


def align_all(config: ReproduceConfig, rows: list[str]) -> None:
    """Train the alignment of one digit, that of all in clusters, and those of Table 4.3's rows."""
    units = [Alignment(name, config.align_config(name)) for name in ("one", "clustered")]
    units += [Alignment(row, config.ablation_config(row)) for row in rows]
    workers = config.workers or default_workers(config.device)
    run_all("alignments", units, workers, one_thread=not on_gpu(config.device))


def _scored(config: AlignmentScoreConfig) -> dict[str, Any]:
    """Scores of every method, made where they are missing."""
    if not (config.out / "pck.json").exists():
        evaluate(config)
    return json.loads((config.out / "pck.json").read_text())["scores"]


def _ablated(config: ReproduceConfig, row: str) -> dict[str, Any]:
    """Scores of a row of Table 4.3. Raises ValueError for LPIPS by other weights than it was trained with."""
    settings, scores = config.ablation_config(row), _ablation_scores(config, row)
    if row in ablations.LPIPS and config.lpips_weights is not None and (settings.out / FILE).exists():
        distance = open_distance(settings.distance, weights=settings.distance_weights)
        if load_aligner(settings.out).facts["distance"] != digest_of(distance):
            raise ValueError(
                f"{settings.out}: was trained with other weights than {config.lpips_weights}; repeat those"
            )
    return _scored(scores)["GANgealing"]


def _was_scored(config: ReproduceConfig, row: str) -> bool:
    return (_ablation_scores(config, row).out / "pck.json").exists()


def _ablation_scores(config: ReproduceConfig, row: str) -> AlignmentScoreConfig:
    folder = config.folder / "ablations" / ablations.folder_name(row)
    return replace(config.pck_config(grey=False), aligner=folder, out=folder / "scores", baselines="none")


def assemble(
    config: ReproduceConfig,
    scores: dict[str, Any],
    clusters: dict[str, Any],
    table: dict[str, Any],
    gallery: Gallery,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of results.json: what was run, what it found, whether that was aimed at, and what it says of the thesis."""
    results = {
        "chapter": 4,
        "size": config.size,
        "seed": config.seed,
        "all": config.all,
        "digit": DIGIT,
        "scores": scores,
        "clusters": clusters,
        "ablations": table,
        "ablation_images": SIZES[config.size].ablation_images,
        "complete_images": config.align_config("one").total_images,
        "edited": gallery.edited,
        "training": {name: config.align_config(name).identity() for name in ("one", "clustered")},
        "seconds": seconds,
        **provenance(),
    }
    aims = targets(results)
    met = {aim.name: {"met": aim.met, "found": aim.found} for aim in aims}
    return results | {"targets": met, "claims": claims(results, aims)}
