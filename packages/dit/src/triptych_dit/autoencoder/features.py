"""Latents that others computed, as a cache: fast-DiT's folders, LightningDiT's shards, and arrays with labels.

A cache holds posteriors; of one sampled latent it holds the sample, with the least variance that a cache can have.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from triptych_common.cli import echo
from triptych_common.progress import Progress
from triptych_common.storage import checkpoint, foreign
from triptych_common.storage.arrays import Npz, npy
from triptych_common.storage.files import changed_ns, read_json, regular
from triptych_common.storage.run import RunDirectory

from triptych_dit.autoencoder.cache import MANIFEST, finished_shards, shard_path, write_manifest, write_shard
from triptych_dit.autoencoder.config import ImportConfig
from triptych_dit.autoencoder.model import LOG_VARIANCE_RANGE, load_autoencoder
from triptych_dit.weights import STABLE_DIFFUSION, LatentSpace

_LATENTS, _FLIPPED, _LABELS = ("latents", "features", "x", "arr_0"), ("latents_flip",), ("labels", "y", "arr_1")
_FAST_DIT = ("_features", "_labels")  # ends of the names of its two folders
_SUFFIXES = (".npy", ".npz", ".safetensors")
MOST_CLASSES = 1 << 20  # each has a name in the manifest


class Part(NamedTuple):
    """Consecutive latents, without and with mirrored ones, and their labels."""

    latents: Float[np.ndarray, "n flips channels height width"]
    labels: Int[np.ndarray, " n"]


class Features:
    """Latents in files, read one by one.

    source: a folder of fast-DiT's, which holds NAME_features/*.npy and NAME_labels/*.npy; a file .npy, .npz or .safetensors; or a
        folder of .safetensors files. labels: a .npy file of labels, for a file without any.
    Raises ValueError or FileNotFoundError for anything else.
    """

    def __init__(self, source: Path, labels: Path | None = None) -> None:
        self.source, self.labels = source, labels
        self.files, self.label_files = _files(source)
        if not self.files:
            raise ValueError(f"features {source}: no latents there; expected NAME_features/*.npy, .npz or .safetensors")
        first = next(iter(self), None)
        if first is None:
            raise ValueError(f"features {source}: no latents in {self.files[0]}; make the file again")
        self.flips, self.latent_shape = first.latents.shape[1], first.latents.shape[2:]

    @property
    def is_fast_dit(self) -> bool:
        return bool(self.label_files)

    def labels_of(self, number: int) -> Int[np.ndarray, " n"] | None:
        """Labels of the latents of a file."""
        path = self.label_files[number] if self.label_files else self.labels
        found = _array(self.files[number], _LABELS) if path is None else _array(path, ("", *_LABELS))
        if found is None:
            return None
        integers = found.dtype.kind in "iu"
        if not integers or (found.size and not 0 <= found.min() <= found.max() < MOST_CLASSES):
            extent = f" in {found.min()}..{found.max()}" if integers else ""
            wanted = f"expected an integer for each, 0..{MOST_CLASSES - 1}"
            raise ValueError(f"{path or self.files[number]}: labels are {found.dtype}{extent}, {wanted}")
        return found.reshape(-1).astype(np.int64)

    def __iter__(self) -> Iterator[Part]:
        for number, path in enumerate(self.files):
            latents, flipped, labels = _array(path, ("", *_LATENTS)), _array(path, _FLIPPED), self.labels_of(number)
            if latents is None or latents.ndim not in (3, 4) or latents.dtype.kind != "f" or latents.itemsize > 8:
                raise ValueError(
                    f"{path}: expected floats (n, channels, height, width) as one of {', '.join(_LATENTS)}"
                )
            latents = latents[None] if latents.ndim == 3 else latents
            labels = np.zeros(len(latents), np.int64) if labels is None else labels
            if len(labels) != len(latents):
                raise ValueError(f"{path}: {len(labels)} labels for {len(latents)} latents")
            views = [latents] if flipped is None else [latents, flipped]
            if views[-1].shape != latents.shape:
                raise ValueError(f"{path}: {_FLIPPED[0]} are {views[-1].shape}, latents {latents.shape}")
            for start in range(0, len(latents), 1024):  # so that one array of everything stays on the disk
                some = slice(start, start + 1024)
                yield Part(np.stack([view[some] for view in views], axis=1), labels[some])

    def classes(self) -> int:
        """Number of classes, if the largest label is the last."""
        found = (self.labels_of(number) for number in range(1 if self.labels else len(self.files)))
        return 1 + max((int(labels.max()) for labels in found if labels is not None and len(labels)), default=0)

    def fingerprint(self) -> str:
        """A hash of names and sizes."""
        digest = hashlib.sha256()
        for path in self.all_files():
            digest.update(b"\n%b\0%d" % (path.name.encode(), path.stat().st_size))
        return f"names-and-sizes:{digest.hexdigest()}"

    def all_files(self) -> list[Path]:
        """Those of latents, then those of labels."""
        return [*self.files, *self.label_files, *filter(None, [self.labels])]


def import_features(config: ImportConfig) -> dict[str, Any]:
    """Write the cache; repeating the command goes on where it was interrupted. Returns its path and contents.

    Raises ValueError for latents that do not fit each other or the autoencoder, or are not finite.
    """
    features = Features(config.features, config.labels)
    space = _space(config, features)
    names = _names(config, features.classes())
    facts: dict[str, Any] = {
        "autoencoder": space.facts(),
        "source": {
            "spec": str(config.features), "split": "train", "fingerprint": features.fingerprint(),
            "class_names": names,
        },
        "lossy": False, "latent_shape": list(features.latent_shape), "flips": features.flips == 2, "dtype": config.dtype,
        "shard_size": config.shard_size, "sampled": True,
    }  # fmt: skip
    with RunDirectory(config.out, facts) as run, Progress("importing", len(features.files), "files") as progress:
        request = checkpoint.index_digest(facts)
        done = finished_shards(run.path, len(list(run.path.glob("shard-*.safetensors"))), request)
        changed, number = changed_ns(features.all_files()), 0
        newer = [shard for shard in done if changed > shard_path(run.path, shard).stat().st_mtime_ns]
        for shard, latents, labels in (
            _shards(features, config) if newer else ()
        ):  # before anything is written beside them
            if shard in newer:
                path = shard_path(run.path, shard)
                held, _ = checkpoint.read(path)
                same = torch.equal(held["moments"], _moments(latents, space, config))
                if not same or not torch.equal(held["labels"], labels):
                    others = f"other latents or labels than those that were imported into {path}"
                    raise ValueError(f"features {config.features}: {others}; put those back, or use another --out")
        for shard, latents, labels in _shards(features, config, progress.advance):
            number = shard + 1
            if shard not in done:
                items = torch.arange(len(labels)) + shard * config.shard_size
                write_shard(run.path, shard, _moments(latents, space, config), labels, items, request=request)
        items = write_manifest(run.path, number, facts)["items"]
    echo(f"latent cache of {items:,} latents in {len(names):,} classes: {config.out}")
    return {
        "cache": config.out,
        "manifest": config.out / MANIFEST,
        "items": items,
        "latent_shape": features.latent_shape,
    }


def _space(config: ImportConfig, features: Features) -> LatentSpace:
    names = ("scale_factor", "latents_mean", "latents_std")
    stated: dict[str, Any] = {name: value for name in names if (value := getattr(config, name))}
    channels = features.latent_shape[0]
    if config.vae is not None:
        if stated:
            raise ValueError(f"{', '.join(stated)}: the autoencoder {config.vae} says them itself; leave them out")
        space = load_autoencoder(config.vae).space
    elif stated:
        space = LatentSpace("unknown", **({"scale_factor": 1.0} | stated), latent_channels=channels)
    elif features.is_fast_dit:
        space = STABLE_DIFFUSION
    else:
        raise ValueError(f"features {config.features}: pass their autoencoder as --vae, or --scale-factor")
    if space.latent_channels != channels:
        raise ValueError(
            f"features {config.features}: {channels} channels, those of {space.spec} have {space.latent_channels}"
        )
    return space


def _moments(latents: Tensor, space: LatentSpace, config: ImportConfig) -> Tensor:
    if latents.std() == 0 or not latents.isfinite().all():
        raise ValueError(f"features {config.features}: latents that are not finite, or all the same")
    z = latents if config.raw else space.unscaled(latents)
    return torch.cat([z, torch.full_like(z, LOG_VARIANCE_RANGE[0])], dim=2).to(getattr(torch, config.dtype))


def _shards(
    features: Features, config: ImportConfig, advance: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, latents and labels of each shard."""
    rows = _rows(features, advance)
    for shard in count():
        if not (some := list(islice(rows, config.shard_size))):
            return
        yield shard, torch.stack([row for row, _ in some]), torch.tensor([label for _, label in some])


def _rows(features: Features, advance: Callable[[], None]) -> Iterator[tuple[Tensor, int]]:
    for part in features:
        advance()
        if part.latents.shape[1:] != (features.flips, *features.latent_shape):
            shapes = f"both {part.latents.shape[2:]} and {features.latent_shape}"
            raise ValueError(f"features {features.source}: latents of {shapes}")
        yield from zip(torch.from_numpy(part.latents).float(), part.labels.tolist(), strict=True)


def _names(config: ImportConfig, classes: int) -> list[str]:
    if config.class_names is None:
        return [str(label) for label in range(classes)]
    names = read_json(config.class_names, list[str], remedy='expected a JSON list of names, ["tench", ...]')
    if len(names) < classes:
        raise ValueError(f"class_names {config.class_names}: {len(names)} names for labels 0..{classes - 1}")
    return names


def refuse_features(data: str) -> None:
    """Raise ValueError, with the command that makes a cache of them, for data that are latents of others."""
    source = Path(data)
    if source.suffix in _SUFFIXES if source.is_file() else source.is_dir() and _files(source)[1]:
        facts = "" if source.is_dir() else "--vae AUTOENCODER "
        cache = f"latents/{source.resolve().stem}"
        command = f"triptych-dit import --features {data} {facts}--out {cache}"
        raise ValueError(
            f"data {data}: latents of other programs; make a cache of them once: {command}; then pass --data {cache}"
        )


def _files(source: Path) -> tuple[list[Path], list[Path]]:
    """Files of latents and, in fast-DiT's folders, the files of labels that go with them."""
    if source.exists() and not source.is_dir():
        return [regular(source)], []
    if not source.is_dir():
        raise FileNotFoundError(f"features {source}: no such file or folder")
    if source.name.endswith(_FAST_DIT):
        source = source.absolute().parent
    folders = [[f for f in sorted(source.iterdir()) if f.is_dir() and f.name.endswith(end)] for end in _FAST_DIT]
    if [len(found) for found in folders] != [1, 1]:
        return sorted(source.glob("*.safetensors")), []
    files, labels = ({path.stem: path for path in folder.glob("*.npy")} for (folder,) in folders)
    if files.keys() != labels.keys():
        lost = min(files.keys() ^ labels.keys())
        raise ValueError(
            f"features {source}: {lost}.npy is in only one of {folders[0][0].name} and {folders[1][0].name}"
        )
    order = sorted(files, key=lambda stem: (len(stem), stem))  # 2 before 10
    return [files[stem] for stem in order], [labels[stem] for stem in order]


def _array(path: Path, names: Sequence[str]) -> np.ndarray | None:
    """The first of several arrays that a file has; that of a .npy file has the name ""."""
    if path.suffix == ".npz":
        held = Npz(path)
        return next((held.array(name) for name in names if name in held.headers), None)
    if path.suffix == ".safetensors":
        tensors = foreign.read(path)
        found = next((tensors[name] for name in names if name in tensors), None)
        return None if found is None else (found.float() if found.is_floating_point() else found).numpy()
    return npy(path) if "" in names else None
