"""The command `triptych-dit study`: chapter 2, whole or in parts, from nothing to a report. Repeating it resumes it."""

import json
import math
import os
import re
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from triptych_common.cli import CommonOptions, echo
from triptych_common.progress import Stopwatch
from triptych_common.storage.atomic import write_bytes, write_json
from triptych_common.storage.provenance import git_commit, provenance
from triptych_common.storage.run import RunDirectory
from triptych_common.workers import default_workers, on_gpu, run_all
from triptych_dit.autoencoder.cache import LatentCache, is_latent_cache
from triptych_dit.autoencoder.encode import EncodeConfig, encode
from triptych_dit.autoencoder.encode import identity as encode_identity
from triptych_dit.autoencoder.train import train_autoencoder
from triptych_dit.flops import gflops, parameter_count

from triptych_thesis.chapter2.context import Bench, Draw
from triptych_thesis.chapter2.digits import padded_digits
from triptych_thesis.chapter2.drawing import drawn
from triptych_thesis.chapter2.experiments import EXPERIMENTS
from triptych_thesis.chapter2.findings import findings
from triptych_thesis.chapter2.ledger import claims, verdicts
from triptych_thesis.chapter2.plan import commands
from triptych_thesis.chapter2.sizes import SIZES, Model
from triptych_thesis.chapter2.units import Training
from triptych_thesis.study.claims import load_claims
from triptych_thesis.study.old_report import publish

PAPER_VAE = "stabilityai/sd-vae-ft-mse"
MADE_BY = ("shards", "command", "commit", "versions", "hardware")  # of a cache: how it came about, not what it holds


@dataclass(frozen=True)
class StudyConfig(CommonOptions):
    """Chapter 2 as a study: named experiments over shared models, and a report. Repeating the command resumes it."""

    out: Path = Path("runs/ch2")
    """everything goes to OUT/SIZE; OUT/report.html is the latest finished size"""
    size: str = "laptop"
    """smoke (a minute), laptop (a quarter of an hour on two cores, half as long again on slow ones), in latents as the thesis
    is; smoke-pixels and laptop-pixels do without an autoencoder; gpu (MNIST in pixels, hours on one GPU, resumable at any time);
    paper and paper-512 (the thesis's settings on ImageNet latents: --dry-run prints what to run under torchrun, then repeat it
    without)"""
    only: tuple[str, ...] = ()
    """experiments to run: gallery, block-designs, scaling, compute, guidance, visual-scaling, unet, samplers; all by default"""
    all: bool = False
    """also the models of the grid that take longest"""
    workers: int | None = None
    """processes, each with one thread on a CPU; by default one a core, and one on a GPU. Changes no result"""
    claims: Path = Path("claims.toml")
    """ledger of the thesis's figures and tables, for the report; left out where absent"""
    latents: str | None = None
    """paper sizes: cache of ImageNet's latents; latents/imagenet-256 or -512 by default"""
    vae: str | None = None
    """paper sizes: its autoencoder, stabilityai/sd-vae-ft-mse by default as in Figure 2.9"""
    decoder: str | None = None
    """paper sizes: another autoencoder of the same encoder to draw samples with, such as stabilityai/sd-vae-ft-ema"""
    reference: Path | None = None
    """paper sizes: the ADM suite's reference file, by default VIRTUAL_imagenet256_labeled.npz or VIRTUAL_imagenet512.npz"""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r}: expected one of {', '.join(SIZES)}")
        for name in self.only:
            if name not in EXPERIMENTS:
                raise ValueError(f"experiment {name!r}: expected one of {', '.join(EXPERIMENTS)}")
            if name in SIZES[self.size].left_out:
                raise ValueError(
                    f"experiment {name!r}: not for size {self.size}; expected one of {', '.join(self.offered)}"
                )
        if SIZES[self.size].reference is None:
            for name in ("latents", "vae", "decoder", "reference"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} {getattr(self, name)}: for the paper sizes alone; leave --{name} out")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers {self.workers}: expected at least 1")

    @property
    def folder(self) -> Path:
        return self.out / self.size

    @property
    def offered(self) -> tuple[str, ...]:
        return tuple(name for name in EXPERIMENTS if name not in SIZES[self.size].left_out)

    @property
    def chosen(self) -> tuple[str, ...]:
        return self.only or self.offered

    def bench(self) -> Bench:
        size = SIZES[self.size]
        if size.reference is not None:
            places = {"data": self.latents or size.data, "vae": self.vae or PAPER_VAE}
        elif size.autoencoder is not None:
            places = {"data": str(self.folder / "latents/train"), "vae": str(self.folder / "autoencoder")}
        else:
            places = {"data": str(self.folder / "digits32"), "vae": None}
        reference = size.reference and (self.reference or Path(size.reference))
        return Bench(
            size, self.folder, everything=self.all, **places, decoder=self.decoder, reference=reference, seed=self.seed,
            device=self.device,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What decides the result, wherever it lies; --all, --only and --workers change what is done, not what comes of it.

        Raises what reading the latents' index or the reference raises, of paper sizes.
        """
        bench = self.bench()
        made = {} if bench.size.reference is None else given(bench)
        return {"size": self.size, "seed": self.seed, **_settings(self.size), **made}

    def resolved(self) -> dict[str, Any]:
        """What --dry-run prints."""
        bench = self.bench()
        draws = [draw for name in self.chosen for draw in EXPERIMENTS[name].needs(bench)]
        trainings = [bench.training(model) for model in dict.fromkeys(draw.model for draw in draws)]
        return {
            "experiments": self.chosen,
            "models": {
                t.title: {
                    "gflops_per_forward": round(gflops(t.config.model), 6),
                    "parameters": parameter_count(t.config.model),
                    "images": t.config.total_images,
                    "done": t.done,
                }
                for t in trainings
            },
            "training_gflops": round(sum(3 * t.cost for t in trainings), 1),
            "sampling_gflops": round(sum(bench.sampling(draw).cost for draw in dict.fromkeys(draws)), 1),
            "sets_of_samples": len(set(draws)),
            "settings": _settings(self.size),
        } | ({} if bench.size.reference is None else {"run_first": self._plan(bench, trainings, draws)})

    def _plan(self, bench: Bench, trainings: list[Training], draws: list[Draw]) -> list[str]:
        sets = [bench.sampling(draw) for draw in dict.fromkeys(draws)]
        return commands(bench.data, str(bench.vae), bench.size.side, trainings, sets)


def _settings(size: str) -> dict[str, Any]:
    """A size, without what only says where and how to run."""
    settings = asdict(SIZES[size])
    base, autoencoder = SIZES[size].base, SIZES[size].autoencoder
    settings["base"] = {key: value for key, value in base.identity().items() if key not in ("model", "data", "seed")}
    settings["autoencoder"] = autoencoder and autoencoder.identity()
    return settings


def study(config: StudyConfig) -> dict[str, Any]:
    """Run what is missing of the chosen experiments; returns the content of results.json.

    Raises what training, sampling and scoring raise, and ValueError under torchrun.
    """
    from triptych_thesis.chapter2.report import write_report  # matplotlib

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("study is for one process; use triptych-dit train and sample under torchrun")
    bench = config.bench()
    if config.claims.exists():
        load_claims(config.claims)  # what is wrong with it is said before the work
    if bench.size.reference is not None:
        check_data(bench)
    with RunDirectory(config.folder, config.identity()) as run:
        clock = Stopwatch(run.path / "seconds.json")
        echo(f"chapter 2, size {config.size}: {run.path}")
        if bench.size.reference is None:
            make_data(config, bench, clock)
        draws = list(dict.fromkeys(draw for name in config.chosen for draw in EXPERIMENTS[name].needs(bench)))
        workers = config.workers or default_workers(config.device)
        one_thread = not on_gpu(config.device)
        with clock("training"):
            models = dict.fromkeys(draw.model for draw in draws)
            run_all("training", [bench.training(model) for model in models], workers, one_thread=one_thread)
        with clock("sampling and scoring"):
            run_all("sampling", [bench.sampling(draw) for draw in draws], workers, one_thread=one_thread)
        with clock("measuring and drawing", afresh=True):
            for name in config.chosen:
                measure(config, bench, name)
        results = assemble(config, bench, clock.seconds)
        write_json(run.path / "results.json", results)
        write_report(run.path / "report.html", config, results)
    publish(config.folder, config.out, config.size)
    return results


def check_data(bench: Bench) -> None:
    """Raises FileNotFoundError where what must be made or fetched beforehand is not there."""
    if not is_latent_cache(Path(bench.data)):
        remedy = commands(bench.data, str(bench.vae), bench.size.side, [], [])[0]
        raise FileNotFoundError(f"{bench.data}: no latent cache; pass --latents, or make it: {remedy}")
    if not bench.scorer.path.exists():
        raise FileNotFoundError(
            f"{bench.scorer.path}: no such reference; fetch it from the ADM suite, pass --reference"
        )


def given(bench: Bench) -> dict[str, Any]:
    """What was made or fetched beforehand: latents and reference by content, autoencoder and decoder by name."""
    manifest = encode_identity(LatentCache(Path(bench.data)).facts)
    latents = {name: value for name, value in manifest.items() if name not in MADE_BY}
    return {"latents": latents, "vae": bench.vae, "decoder": bench.decoder, "reference": bench.scorer.digest}


def make_data(config: StudyConfig, bench: Bench, clock: Stopwatch) -> None:
    """Digits with a margin; an autoencoder, and its latents of them, where the size has one."""
    size = bench.size
    digits = padded_digits(config.folder / "digits32", size.data)
    if size.autoencoder is None:
        return
    autoencoder = replace(size.autoencoder, out=config.folder / "autoencoder", seed=config.seed, device=config.device)
    if not (autoencoder.out / "autoencoder.json").exists():
        with clock("autoencoder"):
            train_autoencoder(autoencoder)
    with clock("encoding", afresh=True):
        for split in ("train", "held_out"):
            encode(
                EncodeConfig(
                    out=config.folder / "latents" / split, source=str(digits), split=split, vae=str(autoencoder.out),
                    image_size=size.side, flips=False, workers=0, device=config.device,
                )
            )  # fmt: skip


def measure(config: StudyConfig, bench: Bench, name: str) -> None:
    """Write experiments/NAME.json and its figures; what comes out as it did before keeps the command and commit it came with."""
    path = config.folder / "experiments" / f"{name}.json"
    result = EXPERIMENTS[name].measure(bench)
    before = read_result(path) if path.exists() else {}
    made = before.pop("made", None)
    if made is None or not alike(before, json.loads(json.dumps(result))):
        before, made = result, made_by(config)
    result = before | {"made": made}
    write_json(path, result)
    for title, png in drawn(name, result).items():
        write_bytes(config.folder / "figures" / f"{title}.png", png)


def made_by(config: StudyConfig) -> dict[str, str]:
    """The command that makes an experiment's result, and the commit that measured it."""
    words = ["triptych-dit", "study", "--size", config.size, *["--all"] * config.all]
    for name in ("latents", "vae", "decoder", "reference"):
        if (value := getattr(config, name)) is not None:
            words += [f"--{name}", str(value)]
    return {"command": shlex.join([*words, "--seed", str(config.seed)]), "commit": git_commit()}


def alike(before: Any, now: Any) -> bool:
    """Whether two JSON trees agree to rounding: linear algebra on many threads may differ in the last digit."""
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(alike(value, now[key]) for key, value in before.items())
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(alike, before, now))
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-5, abs_tol=1e-5)
    return before == now


def read_result(path: Path) -> dict[str, Any]:
    """What `measure` wrote. Raises ValueError for a damaged file."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged, expected JSON; delete it and repeat the command") from error


def assemble(config: StudyConfig, bench: Bench, seconds: dict[str, float]) -> dict[str, Any]:
    """The content of results.json: every experiment that this folder has, what it found, and what was run."""
    folder = config.folder / "experiments"
    experiments = {
        name: read_result(folder / f"{name}.json") for name in EXPERIMENTS if (folder / f"{name}.json").exists()
    }
    main = Model(bench.size.main)
    training = bench.train_config(main)
    logs = sorted((config.folder / "models").glob("*/metrics.jsonl"))
    runs = [*config.folder.glob("models/*/config.json"), *config.folder.glob("samples/*/*/config.json")]
    return {
        "chapter": 2,
        "size": config.size,
        "seed": config.seed,
        "findings": findings(experiments),
        "verdicts": verdicts(experiments),
        "claims": claims(experiments, config.size),
        "experiments": experiments,
        "model": {
            "name": main.name,
            "config": asdict(training.model),
            "parameters": parameter_count(training.model),
            "gflops_per_forward": gflops(training.model),
            "images": training.total_images,
        },
        "space": "pixels" if bench.vae is None else f"latents of {bench.vae}" if bench.size.reference else "latents",
        "decoder": bench.decoder if bench.size.reference else None,
        "training": _settings(config.size)["base"] | {"data": bench.size.data},
        "autoencoder": _settings(config.size)["autoencoder"],
        "models": {log.parent.name: round(_seconds(log), 1) for log in logs},
        "seconds": seconds,
        "commits": sorted({read_result(run)["commit"] for run in runs}),
        **provenance(),
    }


def _seconds(log: Path) -> float:
    return sum(float(found) for found in re.findall(r'"time/seconds": ([\d.]+)', log.read_text()))
