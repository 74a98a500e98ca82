"""Score a file of samples: digits by the frozen instruments, images of any kind by the ADM evaluation suite."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from triptych_common import data
from triptych_common.cli import echo
from triptych_common.metrics.adm import NEIGHBOURS, AdmScores, ImageFeatures, adm_scores, image_features
from triptych_common.metrics.digits import NEAR_DUPLICATE_QUANTILE, DigitScorer
from triptych_common.metrics.inception import FILE_NAME, Inception, load_inception
from triptych_common.metrics.npz import Images, NpzImages
from triptych_common.parallel import process_group
from triptych_common.progress import Progress
from triptych_common.storage.files import write_json
from triptych_common.storage.provenance import provenance

from triptych_dit.fitting import look_over
from triptych_dit.sample import read_npz
from triptych_dit.settings import EvaluateConfig

ADM_SCORES = {  # title, and digits after the point
    "fid": ("FID", 3), "sfid": ("sFID", 3), "inception_score": ("IS", 2), "precision": ("precision", 4), "recall": ("recall", 4),
}  # fmt: skip


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Write scores.json and return its content without the provenance.

    Raises ValueError for files that cannot be scored, FileNotFoundError for absent ones.
    """
    path = config.out / "scores.json"
    pair = config.files or (config.reference, config.samples)
    result, lines = _score_digits(config) if pair[0] is None else _score_pair(config, pair[0], pair[1])
    write_json(path, {**result, **provenance()})
    for line in (*lines, f"wrote {path}"):
        echo(line)
    return result


def _score_digits(config: EvaluateConfig) -> tuple[dict[str, Any], list[str]]:
    images, labels = read_npz(config.samples)
    config.out.mkdir(parents=True, exist_ok=True)
    scorer = DigitScorer(data.load(config.data, "train"), data.load(config.data, "held_out"), seed=config.seed)
    scores = scorer(images, labels)
    floor = scorer.floor(scores.n)
    result = {
        "samples": str(config.samples),
        "reference": f"{config.data} held-out, n={scores.n}",
        "scores": scores.as_dict(),
        "floor": {"frechet": float(floor.mean()), "sets": floor.tolist(), "real": scorer.real(scores.n).as_dict()},
        "near_duplicates_among_held_out": NEAR_DUPLICATE_QUANTILE,
        "instruments": scorer.instruments(),
    }
    lines = [f"{name:<16}{value}" for name, value in vars(scores).items()]
    lines.append(f"{'frechet floor':<16}{floor.mean():.3g} ({len(floor)} sets of {scores.n} training digits)")
    if scores.n < 1000:
        lines.append(f"note: n={scores.n} is below 1,000; distances are inflated, compare them with the floor only")
    return result, lines


class Pictures(Images):
    """The pictures of a folder, or of another source, cropped to one size as training crops them.

    Those that cannot be used are left out and reported; `out` will list them.
    """

    pool = spatial = None

    def __init__(self, path: Path, size: tuple[int, int], out: Path) -> None:
        self.path, self.unusable = path, list[data.UnreadableImage]()
        source = data.open_source(str(path), unconditional=True)
        self.images = data.in_memory(source, size, unusable=self.unusable).images
        data.report_unusable(self.unusable, len(source), out, strict=False)
        self.count, self.crc32 = len(self.images), f"{zlib.crc32(self.images.contiguous().numpy().data):08x}"

    def batches(self, size: int) -> Iterator[Tensor]:
        return iter(self.images.split(size))


def open_pair(reference: Path, samples: Path, out: Path) -> tuple[Images, Images, list[str]]:
    """Reference and samples, and notes on how pictures were brought to one size: that of the other side's images.

    Two folders meet at the size of the smallest picture looked at. Raises ValueError or OSError for what holds no images.
    """
    files = {path: None if path.is_dir() else NpzImages(path) for path in (samples, reference)}
    size = next((file.size for file in files.values() if file and file.size), None)
    folders = [path for path, file in files.items() if file is None]
    if size is None and folders:
        looks = [look_over(data.open_source(str(path), unconditional=True)) for path in folders]
        size = (min(look.sides[0] for look in looks),) * 2
    opened: dict[Path, Images] = {path: file or Pictures(path, size or (0, 0), out) for path, file in files.items()}
    data.write_unusable([e for found in opened.values() for e in getattr(found, "unusable", ())], out)
    notes = [f"pictures of {path} are reduced and centre-cropped to {size[1]}x{size[0]}" for path in folders if size]
    return opened[reference], opened[samples], notes


def _score_pair(config: EvaluateConfig, first: Path, second: Path) -> tuple[dict[str, Any], list[str]]:
    reference, samples, resized = open_pair(first, second, config.out)
    for source in (reference, samples):
        if 0 < source.count <= NEIGHBOURS:
            need = f"precision and recall with k={NEIGHBOURS} need more than {NEIGHBOURS}"
            raise ValueError(f"{source.path}: {source.count} images; {need}")
    with process_group(config.device) as ranks:
        inception = load_inception(config.inception, device=ranks.device)
        real, fake = (_features(source, inception, config.batch_size) for source in (reference, samples))
        probabilities = None if fake.pool.vectors is None else inception.probabilities(fake.pool.vectors)
        scores = adm_scores(real, fake, probabilities, device=ranks.device, repeats=config.repeats, seed=config.seed)
    notes = [*resized, *scores.notes]
    if not inception.is_published:
        notes.append(f"the Inception weights are not the published {FILE_NAME}: compare with no published score")
    result = {
        "suite": "ADM: FID, sFID, IS, precision, recall",
        "reference": _described(reference),
        "samples": _described(samples),
        "scores": {name: None if value is None else value._asdict() for name, value in scores.estimates().items()},
        "unavailable": scores.unavailable,
        "notes": notes,
        "repeats": config.repeats,
        "instruments": {"inception": inception.sha256},
    }
    return result, _score_lines(result, scores)


def _features(source: Images, inception: Inception, batch_size: int) -> ImageFeatures:
    with Progress(f"features of {source.path.name}", source.count, "images") as progress:
        progress.at(0)
        return image_features(source, inception, batch_size=batch_size, progress=progress.advance)


def _described(source: Images) -> dict[str, Any]:
    facts = {"path": str(source.path), "images": source.count, "statistics": source.pool is not None}
    return facts | {"arr_0_crc32": source.crc32}


def _score_lines(result: dict[str, Any], scores: AdmScores) -> list[str]:
    lines = []
    for role in ("reference", "samples"):
        file = result[role]
        held = [f"{file['images']:,} images"] * bool(file["images"]) + ["statistics"] * file["statistics"]
        lines.append(f"{role:<12}{file['path']}: {' and '.join(held)}")
    for name, estimate in scores.estimates().items():
        title, digits = ADM_SCORES[name]
        if estimate is None:
            lines.append(f"{title:<12}not available: {scores.unavailable[name]}")
        else:
            interval = "" if estimate.low is None else f"  [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
            lines.append(f"{title:<12}{estimate.value:.{digits}f}{interval}")
    return lines + [f"note: {note}" for note in result["notes"]]
