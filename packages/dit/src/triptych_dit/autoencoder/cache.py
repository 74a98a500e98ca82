"""The latent cache: posterior moments of encoded images in shards that any rank reads from any offset.

A cache is a folder. `shard-000000.safetensors` holds images 0 .. shard_size-1 of the source, the next shard those after
them, each with `moments` (rows, flips, mean and log-variance channels, height, width; unscaled), `labels`, `items`, the
images' numbers in the source, and `crc32` of the pixels that were encoded. Images that could not be used have no row and are
listed in `skipped.json`. `manifest.json` records what was encoded, how and by which autoencoder; it is written last, so a
folder without one is incomplete. `config.json` holds the settings that a repeated command must have. From shards and
settings, a repeated command makes the other files again, byte for byte.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from triptych_common import randomness
from triptych_common.cli import echo
from triptych_common.data.contents import Contents
from triptych_common.fields import Ge
from triptych_common.parallel import Ranks
from triptych_common.storage import checkpoint
from triptych_common.storage.files import (
    FileName,
    check,
    open_ended,
    parse,
    read_json,
    recorded_command,
    regular,
    write_json,
)
from triptych_common.storage.model_file import refuse_non_finite
from triptych_common.storage.provenance import PROVENANCE, provenance
from triptych_common.storage.verified import verify_once
from typing_extensions import TypedDict

from triptych_dit.autoencoder.model import scaled_sample
from triptych_dit.weights import LatentSpace

Moments = Float[Tensor, "n twice_channels height width"]
MANIFEST, SKIPPED, CONFIG = "manifest.json", "skipped.json", "config.json"
_KIND = "latent cache"
_AGAIN = "repeat the encode or import command with its settings"
_BY_PLACE = {"autoencoder": ("spec", "encoder_sha256", "image_channels"), "source": ("spec", "class_names")}


class LatentCache:
    """A finished cache, its shards mapped into memory and read row by row.

    facts: the manifest. labels, items: for each row, the class and the number in the source. latent_shape: channels, height
        and width of a latent.
    Raises FileNotFoundError if there is no cache, ValueError for one that is incomplete or damaged; only `verify`, which
    training calls, compares contents with their checksums.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.facts = _read_manifest(self.folder)
        self.space = LatentSpace.of(self.facts["autoencoder"], str(self.folder / MANIFEST))
        self.latent_shape: tuple[int, int, int] = tuple(self.facts["latent_shape"])
        self.has_flips: bool = self.facts["flips"]
        self.class_names: tuple[str, ...] = tuple(self.facts["source"]["class_names"])
        if not self.facts["shards"]:
            raise ValueError(f"{self.folder}: lists no shards; {_AGAIN}")
        shards = [self._open(shard) for shard in self.facts["shards"]]
        self.labels: Int[Tensor, " items"] = torch.cat([tensors["labels"] for tensors in shards])
        self.items: Int[Tensor, " items"] = torch.cat([tensors["items"] for tensors in shards])
        self._rows = [tensors["moments"].flatten(0, 1) for tensors in shards]
        self._starts = torch.tensor([0, *(len(tensors["labels"]) for tensors in shards)]).cumsum(0)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def moments(self, indices: Int[Tensor, " n"], flipped: Bool[Tensor, " n"] | None = None) -> Moments:
        """Mean and log-variance of rows, or of their mirror images if `flipped`, in float32 on the CPU.

        Raises ValueError for mirror images that were not encoded, IndexError for rows outside the cache.
        """
        if flipped is not None and flipped.any():
            self.check_flips()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"{self.folder}: row outside 0..{len(self) - 1}")
        # In a shard an image's row is followed by that of its mirror image, if there are any.
        shards = torch.searchsorted(self._starts, indices, right=True) - 1
        rows = (indices - self._starts[shards]) * (2 if self.has_flips else 1)
        if flipped is not None:
            rows = rows + flipped
        found = [self._rows[shard][row] for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]
        return torch.stack(found).float()

    def check_flips(self) -> None:
        """Raise ValueError if mirror images were not encoded."""
        if not self.has_flips:
            raise ValueError(
                f"{self.folder}: holds no mirror images; pass --no-horizontal-flip, or encode without --no-flips"
            )

    def verify(self) -> None:
        """Read every shard that is not known to be whole.

        Raises ValueError at the first whose checksum differs, or which holds values that are not finite.
        """

        def read(name: str) -> None:
            try:
                refuse_non_finite(checkpoint.read(self.folder / name)[0], name)
            except ValueError as error:
                raise ValueError(f"{self.folder / name}: damaged; {_remedy(self.facts)}") from error

        verify_once(self.folder, {shard["file"]: shard["sha256"] for shard in self.facts["shards"]}, read)

    def _open(self, shard: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a shard: safetensors maps the file, and nothing is read before it is used."""
        path = self.folder / shard["file"]
        try:
            with safe_open(regular(path), framework="pt") as file:
                sha256 = (file.metadata() or {}).get("sha256")
                tensors = {name: file.get_tensor(name) for name in ("moments", "labels", "items")}
        except FileNotFoundError as error:
            raise ValueError(f"{path}: missing; {_remedy(self.facts)}") from error
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: truncated or of another kind; {_remedy(self.facts)}") from error
        # By the hash that the shard itself records: reading all of it would take as long as an epoch.
        channels, height, width = self.latent_shape
        shape = (shard["items"], 2 if self.has_flips else 1, 2 * channels, height, width)
        labels, items = tensors["labels"], tensors["items"]
        fits = tuple(tensors["moments"].shape) == shape and labels.shape == items.shape == shape[:1]
        if sha256 != shard["sha256"] or not fits or not labels.dtype == items.dtype == torch.int64:
            raise ValueError(f"{path}: not the shard that the manifest lists; {_remedy(self.facts)}")
        if len(wrong := labels[(labels < 0) | (labels >= self.num_classes)]):
            raise ValueError(f"{path}: label {int(wrong[0])} of {self.num_classes} classes; {_remedy(self.facts)}")
        return tensors


class LatentData:
    """A cache as `TrainingData`: a latent is sampled from its image's posterior each time it is used.  [thesis 2.4]"""

    def __init__(self, cache: LatentCache) -> None:
        self.cache, self.name = cache, str(cache.folder)
        self.contents: Contents | None = None  # the shards' hashes are in `identity`
        contents = ",".join(shard["sha256"] for shard in cache.facts["shards"])
        digest = hashlib.sha256(contents.encode()).hexdigest()[:16]
        self.identity = f"latents of {cache.facts['source']['spec']}, {len(cache):,} images, {digest}"
        self.shape, self.labels, self.num_classes = cache.latent_shape, cache.labels, cache.num_classes
        self.facts = {"autoencoder": cache.facts["autoencoder"], "lossy_data": cache.facts["lossy"]}
        self.facts["class_names"] = list(cache.class_names)

    def __len__(self) -> int:
        return len(self.cache)

    def examples(self, items: Tensor, flipped: Tensor, seed: int, counters: Sequence[int]) -> Tensor:
        # By the sample counter, not the image: every epoch samples the posterior afresh.
        noise = randomness.normal(seed, "posterior", counters, self.shape)
        return scaled_sample(self.cache.moments(items, flipped), noise, self.cache.space)

    def check_flips(self) -> None:
        self.cache.check_flips()

    def verify(self, ranks: Ranks) -> None:
        if ranks.is_main:
            self.cache.verify()
        ranks.barrier()


def is_latent_cache(folder: Path) -> bool:
    """Whether a folder is a latent cache, finished or not."""
    return (folder / MANIFEST).is_file() or shard_path(folder, 0).is_file()


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.safetensors"


def write_shard(
    folder: Path, shard: int, moments: Float[Tensor, "rows flips twice_channels height width"],
    labels: Int[Tensor, " rows"], items: Int[Tensor, " rows"], crc32: Int[Tensor, " rows"] | None = None, *,
    skipped: Sequence[Mapping[str, Any]] = (), request: str = "",
) -> None:  # fmt: skip
    """Write one shard atomically. skipped: item, path and reason of images without a row. request: a hash of the settings."""
    state = {"kind": _KIND, "shard": shard, "request": request, "skipped": list(skipped)}
    tensors = {"moments": moments, "labels": labels, "items": items}
    checkpoint.write(shard_path(folder, shard), tensors if crc32 is None else {**tensors, "crc32": crc32}, state)


def pixel_sums(path: Path) -> dict[int, int] | None:
    """The CRC-32 of the pixels of each of a shard's images; None for a shard of a version that did not record it."""
    with safe_open(path, framework="pt") as file:
        if "crc32" not in file.keys():  # noqa: SIM118 (not a mapping)
            return None
        items, sums = (file.get_tensor(name).tolist() for name in ("items", "crc32"))
    return dict(zip(items, sums, strict=True))


def finished_shards(folder: Path, num_shards: int, request: str) -> set[int]:
    """The shards of this request that are there and whole; others are reported, as they are encoded again."""
    paths = {shard_path(folder, shard).name: shard for shard in range(num_shards)}
    recorded, damaged = {}, dict[str, str]()
    for name, shard in paths.items():
        if (folder / name).exists():
            try:
                listed, state = _header(folder / name)
            except ValueError as error:
                damaged[name] = str(error)
                continue
            if (state["shard"], state["request"]) == (shard, request):
                recorded[name] = listed["sha256"]
            else:
                damaged[name] = f"{folder / name}: a shard of another cache or number"
    verify_once(folder, recorded, lambda name: checkpoint.read(folder / name), damaged=damaged)
    for message in damaged.values():
        echo(f"{message}; making it again")
    return {paths[name] for name in recorded.keys() - damaged.keys()}


def refuse_other_settings(folder: Path, num_shards: int, request: str) -> None:
    """Raise ValueError if a folder has lost its settings, and its shards were made with others than `request`."""
    if (folder / CONFIG).exists():
        return
    for path in (shard_path(folder, shard) for shard in range(num_shards)):
        with contextlib.suppress(OSError, ValueError):  # absent or damaged, and so encoded again
            if _header(path)[1]["request"] != request:
                break
    else:
        return
    lost = f"made with other settings, and {CONFIG}, which held them, is lost"
    raise ValueError(f"{path}: {lost}; {_AGAIN}, or use another --out")


def _header(path: Path) -> tuple[dict[str, Any], "_State"]:
    """A shard as the manifest lists it, and its state. Raises ValueError for a file of another kind."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, items = file.metadata() or {}, file.get_slice("labels").get_shape()[0]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or of another kind") from error
    state = parse(metadata.get("state", ""), _State, source=str(path), remedy=_AGAIN)
    return {"file": path.name, "items": items, "sha256": metadata.get("sha256", "")}, state


def identity(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts that a repeated command must share: without the paths of source and autoencoder, and what others imply."""
    return facts | {
        part: {key: value for key, value in facts[part].items() if key not in _BY_PLACE[part]}
        for part in _BY_PLACE.keys() & facts.keys()
    }


def write_manifest(folder: Path, num_shards: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a cache: write its manifest, unless it says the same already, and return it.

    facts: with "autoencoder", "source" (with "spec" and "class_names"), "latent_shape" and "flips".
    Raises ValueError if no image could be used.
    """
    shards, skipped = [], []
    for shard in range(num_shards):
        listed, state = _header(shard_path(folder, shard))
        shards.append(listed)
        skipped += state["skipped"]
    counts = {"items": sum(shard["items"] for shard in shards), "skipped": len(skipped)}
    # Before the manifest, whose existence declares the cache complete.
    write_json(folder / SKIPPED, skipped)
    if not counts["items"]:
        such = f"such as {skipped[0]['path']}: {skipped[0]['reason']}"
        raise ValueError(f"{facts['source']['spec']}: none of {len(skipped):,} images could be used, {such}")
    manifest = {"kind": _KIND, "format": 1, **facts, **counts, **(_begun(folder) or provenance()), "shards": shards}
    with contextlib.suppress(OSError, ValueError):  # one that was lost or damaged is written again
        before = read_json(folder / MANIFEST, _Manifest, remedy="")
        if _content(before) == _content(manifest):
            return before
    write_json(folder / MANIFEST, manifest)
    return manifest


def _content(manifest: dict[str, Any]) -> str:
    """What a manifest says of the cache, without who made it from where, as a text."""
    said = {key: value for key, value in identity(manifest).items() if key not in PROVENANCE}
    return json.dumps(said, sort_keys=True)


def _begun(folder: Path) -> dict[str, Any]:
    """The provenance of the command that began the cache; nothing where its settings are lost."""
    with contextlib.suppress(OSError, ValueError):
        settings = read_json(folder / CONFIG, remedy="")
        return {key: settings[key] for key in PROVENANCE if key in settings}
    return {}


@open_ended
class _State(TypedDict):
    shard: int
    request: str
    skipped: list[dict[str, Any]]


@open_ended
class _Source(TypedDict):
    spec: str
    class_names: list[str]


class _Shard(TypedDict):
    file: FileName
    items: Annotated[int, Ge(0)]
    sha256: str


@open_ended
class _Manifest(TypedDict):
    kind: Literal["latent cache"]
    format: Literal[1]
    autoencoder: dict[str, Any]
    source: _Source
    latent_shape: tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)], Annotated[int, Ge(1)]]
    flips: bool
    lossy: NotRequired[bool]
    shards: list[_Shard]


@open_ended
class _Counted(TypedDict):
    images: NotRequired[Annotated[int, Ge(0)]]


@open_ended
class _Request(TypedDict):
    autoencoder: dict[str, Any]
    source: _Counted
    shard_size: Annotated[int, Ge(1)]


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).exists():
        if not (folder / CONFIG).exists() and not shard_path(folder, 0).exists():
            raise FileNotFoundError(f"{folder}: no latent cache; make one with triptych-dit encode --out {folder}")
        raise _incomplete(folder)
    again = "which makes the manifest again from the shards; nothing else is lost"
    return read_json(folder / MANIFEST, _Manifest, remedy=f"{_remedy(_begun(folder))}, {again}")


def _incomplete(folder: Path) -> ValueError:
    if not (folder / CONFIG).exists():
        return ValueError(f"{folder}: {MANIFEST} and {CONFIG} are lost; {_AGAIN}, which makes them again")
    request = read_json(folder / CONFIG, remedy=f"delete this file and {_AGAIN}, which makes it again")
    source = f"{folder}: a run of another command, no latent cache"
    facts = check(request.get("config"), _Request, source=source, remedy=_AGAIN)
    images, done = facts["source"].get("images"), len(list(folder.glob("shard-*.safetensors")))
    of = "" if images is None else f"of {math.ceil(images / facts['shard_size']):,} "
    return ValueError(f"{folder}: incomplete, {done:,} {of}shards are there; {_remedy(request)}")


def _remedy(facts: Mapping[str, Any]) -> str:
    """The command that goes on with a cache. facts: its manifest, or its settings, with the provenance."""
    for name in ("encode", "import"):
        if command := recorded_command(facts.get("command"), f"triptych-dit {name}"):
            return f"repeat the {name} command: {command}"
    return _AGAIN
