"""`triptych-gangealing pck` on a benchmark: every method and anyone's predictions, by every protocol, in one table."""

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from triptych_common.cli import echo
from triptych_common.parallel import process_group
from triptych_common.storage.files import read_bytes, write_bytes, write_json
from triptych_common.storage.tables import parquet

from triptych_gangealing.aligner import open_aligner
from triptych_gangealing.baselines.methods import OURS
from triptych_gangealing.keypoints.benchmarks import Benchmark, open_benchmark
from triptych_gangealing.keypoints.protocols import ALPHAS, Predictions, as_rows, by_attribute, plain, score
from triptych_gangealing.keypoints.transfers import (
    Transfer,
    by_aligner,
    by_features,
    congealed,
    identity,
    mean_keypoint,
)
from triptych_gangealing.settings import PckConfig

COLUMNS = ("pair", "keypoint", "x", "y")


def evaluate_benchmark(config: PckConfig) -> dict[str, Any]:
    """Score every method by every protocol; write pck.json and each method's predictions.

    Raises ValueError or OSError for what is no benchmark, aligner or table of predictions.
    """
    benchmark = open_benchmark(config.data, config.category, config.split, config.seed).first(config.pairs)
    methods = methods_of(config)
    given = None if config.predictions is None else read_predictions(config.predictions, benchmark)
    echo(f"{benchmark.name}: {len(benchmark):,} pairs of {len(benchmark.used()):,} pictures")
    tables, attributes = {}, {}
    for name, method in {**methods, **({} if given is None else {"predictions": None})}.items():
        predictions = given if method is None else method(benchmark)
        assert predictions is not None
        tables[name] = score(benchmark, predictions, seed=config.seed)
        attributes[name] = by_attribute(benchmark, predictions, seed=config.seed)
        if method is not None:
            write_predictions(config.out / "predictions" / f"{name.replace(' ', '-')}.csv", benchmark, predictions)
    for alpha in ALPHAS:
        header, rows = as_rows(tables, alpha)
        echo(f"\nPCK@{alpha:g}, %\n" + aligned([header, *rows]))
    split = {
        method: {name: plain({str(value): [one] for value, one in values.items()}) for name, values in found.items()}
        for method, found in attributes.items()
    }
    scores = {method: plain(table) for method, table in tables.items()}
    file = config.out / "pck.json"
    settings = {**asdict(config), "aligner": str(config.aligner), "out": str(config.out)}
    settings |= {
        name: None if getattr(config, name) is None else str(getattr(config, name))
        for name in ("predictions", "features_weights")
    }
    content = {
        "config": settings,
        "benchmark": benchmark.name,
        "pairs": len(benchmark),
        "scores": scores,
        "by attribute": split,
    }
    write_json(file, content)
    echo(f"\nscores: {file}")
    return {"scores": scores, "file": str(file)}


def methods_of(config: PckConfig) -> dict[str, Transfer]:
    """Methods by name: the aligner, the baselines, and features where they are asked for."""
    methods: dict[str, Transfer] = {}
    if config.baselines == "all":
        methods = {"identity": identity(), "mean keypoint": mean_keypoint(), "Congealing": congealed()}
    if config.features is not None:
        from triptych_gangealing.baselines.features import Encoder

        kind, _, name = config.features.partition(":")
        if kind != "timm" or not name:
            raise ValueError(f"features {config.features}: expected timm:NAME, such as timm:vit_small_patch14_dinov2")
        with process_group(config.device) as ranks:
            encoder = Encoder(
                name, config.features_weights, layer=config.features_layer, size=config.features_size, debias=config.debias,
                device=ranks.device,
            )  # fmt: skip
        methods[config.features] = by_features(encoder)
    if config.aligner is not None:
        aligner, options = open_aligner(config.aligner, config.device, config.iterations, config.flips)
        methods[OURS] = by_aligner(aligner, **options)
    return methods


def aligned(rows: list[list[str]]) -> str:
    """Rows of texts as lines with columns under each other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def write_predictions(path: Path, benchmark: Benchmark, predictions: Predictions) -> None:
    """Write predicted points as a table; points that a method gives no place are left out."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow((*COLUMNS, "mirrored"))
    for pair, keypoint in predictions.points.isfinite().all(-1).nonzero().tolist():
        x, y = predictions.points[pair, keypoint].tolist()
        writer.writerow((pair, keypoint, f"{x:.4f}", f"{y:.4f}", int(predictions.mirrored[pair])))
    write_bytes(path, file.getvalue().encode())


def read_predictions(path: Path, benchmark: Benchmark) -> Predictions:
    """Anyone's predictions: a table with the columns pair, keypoint, x, y and, where left may have become right, mirrored.

    pair: its number in the benchmark's order, from 0. keypoint: of the source. x, y: in pixels of the target.
    Raises ValueError for a table without these columns, for numbers that the benchmark does not have, for a point given twice,
    and for points at (-1, -1), which are padding.
    """
    columns = _columns(path)
    n, k = benchmark.listed.shape
    pair, keypoint = (_numbers(path, columns, name, whole) for name, whole in (("pair", n), ("keypoint", k)))
    points = torch.stack([_numbers(path, columns, name) for name in ("x", "y")], 1)
    if not bool(points.isfinite().all()):
        row = int((~points.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"{path}, row {row + 1}: a point that is not finite; leave out what is not predicted")
    if bool((padding := (points == -1).all(1)).any()):
        row = int(padding.nonzero()[0])
        raise ValueError(
            f"{path}, row {row + 1}: a point at (-1, -1), which is padding; leave out what is not predicted"
        )
    place = pair.long() * k + keypoint.long()
    if len(place.unique()) != len(place):
        raise ValueError(f"{path}: {len(place) - len(place.unique()):,} keypoints of a pair come twice; give each once")
    found = torch.full((n * k, 2), torch.nan)
    found[place] = points.float()
    mirrored = torch.zeros(n, dtype=torch.bool)
    if "mirrored" in columns:
        mirrored[pair.long()] = _numbers(path, columns, "mirrored", 2).bool()
    return Predictions(found.view(n, k, 2), mirrored)


def _columns(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table of predictions")
    if path.suffix == ".parquet":
        columns = parquet(path, remedy="make it again", extra="triptych-gangealing[tables]").to_pydict()
    elif path.suffix == ".csv":
        rows = list(csv.reader(read_bytes(path).decode("utf-8", "replace").splitlines()))
        if not rows or any(len(row) != len(rows[0]) for row in rows):
            raise ValueError(f"{path}: rows of different lengths; expected the columns {', '.join(COLUMNS)}")
        columns = {name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])}
    else:
        raise ValueError(f"predictions {path}: expected a .csv or .parquet")
    if lacking := [name for name in COLUMNS if name not in columns]:
        raise ValueError(
            f"{path}: lacks the columns {', '.join(lacking)}; it has {', '.join(map(str, list(columns)[:9]))}"
        )
    return columns


def _numbers(path: Path, columns: dict[str, list[Any]], name: str, below: int | None = None) -> torch.Tensor:
    try:
        values = torch.tensor([float(x) for x in columns[name]], dtype=torch.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {name} holds something else than numbers ({error})") from error
    if below is not None:
        wrong = ((values < 0) | (values >= below) | (values != values.floor())).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"{path}, row {row + 1}: {name} {values[row]:g}, expected a whole number from 0 to {below - 1:,}"
            )
    return values
