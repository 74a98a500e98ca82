"""Chapter 4 end to end: an encoder, an alignment of one digit, clusters of all, scores beside baselines, ablations, report."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from triptych_common.cli import CommonOptions, say
from triptych_common.progress import Stopwatch
from triptych_common.run import RunDirectory, provenance, write_bytes, write_json

from triptych_gangealing import ablations
from triptych_gangealing.aligner import FILE, Aligner, load_aligner
from triptych_gangealing.cluster_scores import cluster_scores, kmeans_clusters
from triptych_gangealing.evaluate import PckConfig, evaluate, posed_digits
from triptych_gangealing.gallery import Gallery, make_gallery
from triptych_gangealing.report import write_report
from triptych_gangealing.simclr import EncoderTrainConfig
from triptych_gangealing.simclr import run as train_encoder
from triptych_gangealing.sizes import DIGIT, SIZES
from triptych_gangealing.stylegan2.interop import load_generator
from triptych_gangealing.train import digest_of, train
from triptych_gangealing.train_config import AlignTrainConfig


@dataclass(frozen=True)
class ReproduceConfig(CommonOptions):
    """Reproduce chapter 4: align one digit, cluster all, score, report. Repeating the command resumes it."""

    out: Path = Path("runs/ch4")
    """everything goes to OUT/SIZE; OUT/report.html is the latest finished size"""
    size: str = "laptop"
    """smoke (a minute), laptop (two cores, under twenty minutes), gpu (one GPU, resumable slices)"""
    all: bool = False
    """also what takes longer: the rest of Table 4.3's rows"""
    generator: str = "digits32"
    """generator of all digits: an embedded one, a run folder or a file"""
    digit_generator: str = "digits32-3"
    """generator of the one digit"""
    claims: Path = Path("claims.toml")
    """ledger of the thesis's figures and tables, for the report; left out where absent"""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r}: expected one of {', '.join(SIZES)}")

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
        """A row of Table 4.3, for fewer images in the same proportions."""
        complete, images = self.align_config("one"), SIZES[self.size].ablation_images
        share = images / complete.total_images
        shorter = replace(
            complete, out=self.folder / "ablations" / row.replace(" ", "-"), total_images=images,
            psi_images=round(share * complete.psi_images), constant_images=round(share * complete.constant_images),
            restart_images=max(1, round(share * complete.restart_images)),
        )  # fmt: skip
        shape = load_generator(complete.generator)
        return ablations.ablation(row, shorter, num_ws=shape.num_ws, w_dim=shape.config.w_dim)

    def rows(self) -> tuple[str, ...]:
        return tuple(ablations.THESIS) if self.all else ablations.FIRST

    def pck_config(self, *, grey: bool) -> PckConfig:
        size = SIZES[self.size]
        return PckConfig(
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
        return {
            "encoder": self.encoder_config().resolved(),
            "one": self.align_config("one").resolved(),
            "clustered": self.align_config("clustered").resolved(),
            "scores": asdict(self.pck_config(grey=False)),
            "ablations": self.rows(),
        }


def reproduce(config: ReproduceConfig) -> dict[str, Any]:
    """Run what is missing of the reproduction; returns the content of results.json.

    Raises what training and scoring raise, and ValueError under torchrun.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("reproduce is for one process; use triptych-gangealing train under torchrun, then repeat it")
    with RunDirectory(config.folder, config.identity()) as run:
        clock = Stopwatch(run.path / "seconds.json", finished=(run.path / "results.json").exists())
        say(f"chapter 4, size {config.size}: {run.path}")
        with clock("encoder"):
            train_encoder(config.encoder_config())
        with clock("alignment"):
            _trained(config.align_config("one"))
        with clock("clusters"):
            _trained(config.align_config("clustered"))
        with clock("scores"):
            scores = {name: _scored(config.pck_config(grey=name == "grey")) for name in ("coloured", "grey")}
            clusters = _clusters(config, load_aligner(config.folder / "clustered"))
        with clock("ablations"):
            table = {row: _ablated(config, row) for row in config.rows()}
        with clock("pictures", afresh=True):
            gallery = make_gallery(config.folder, SIZES[config.size], seed=config.seed)
        results = assemble(config, scores, clusters, table, gallery, clock.seconds)
        write_json(run.path / "results.json", results)
        write_report(run.path / "report.html", config, results, gallery)
    for name in ("report.html", "results.json"):
        write_bytes(config.out / name, (config.folder / name).read_bytes())
        say(f"wrote {config.out / name} (size {config.size})")
    return results


def _trained(config: AlignTrainConfig) -> None:
    """An alignment, trained where it is missing: what decides about it is part of the reproduction's identity."""
    if not (config.out / FILE).exists():
        train(config)


def _scored(config: PckConfig) -> dict[str, Any]:
    """Scores of every method, made where they are missing."""
    if not (config.out / "pck.json").exists():
        evaluate(config)
    return json.loads((config.out / "pck.json").read_text())["scores"]


def _clusters(config: ReproduceConfig, aligner: Aligner) -> dict[str, Any]:
    """Purity and mutual information of the clusters of held-out digits, and of k-means'."""
    n, heads = SIZES[config.size].cluster_images, aligner.config.heads
    training = posed_digits(max(n, 2 * heads), config.seed, None, split="train")
    held_out = posed_digits(n, config.seed + 1, None)
    ours = aligner.align(held_out.images.float() / 127.5 - 1).cluster
    theirs = kmeans_clusters(training, held_out, heads, config.seed)
    labels = held_out.jitters.label
    return {
        "clusters": heads,
        "GANgealing": cluster_scores(ours, labels, seed=config.seed).as_dict(),
        "k-means, moments-aligned pixels": cluster_scores(theirs, labels, seed=config.seed).as_dict(),
    }


def _ablated(config: ReproduceConfig, row: str) -> dict[str, Any]:
    settings = config.ablation_config(row)
    _trained(settings)
    pck = replace(config.pck_config(grey=False), aligner=settings.out, out=settings.out / "scores", baselines="none")
    return _scored(pck)["GANgealing"]


def assemble(
    config: ReproduceConfig,
    scores: dict[str, Any],
    clusters: dict[str, Any],
    table: dict[str, Any],
    gallery: Gallery,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of results.json: what was run, and what it found."""
    return {
        "chapter": 4,
        "size": config.size,
        "seed": config.seed,
        "digit": DIGIT,
        "scores": scores,
        "clusters": clusters,
        "ablations": table,
        "edited": gallery.edited,
        "training": {name: config.align_config(name).identity() for name in ("one", "clustered")},
        "seconds": seconds,
        **provenance(),
    }
