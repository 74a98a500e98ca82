"""Checkpoints: one safetensors file each, checksummed, complete or absent.

Tensors and a JSON state share a file, so that no interruption can mix two steps: it is written under a temporary name,
flushed to disk and renamed. A sharded run instead writes a folder, under the same name without suffix
(`triptych_common.storage.sharded`). The functions here that list, read or remove checkpoints accept both.
"""

import functools
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from triptych_common.cli import echo
from triptych_common.fields import Ge, OneOf
from triptych_common.storage.files import PARTIAL, FileName, check, parse, read_json, regular, replacing

INDEX = "index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_EXTRA, _SUFFIX = "-extra", ".safetensors"
_NAME = re.compile(rf"step-(\d+)({_EXTRA})?({re.escape(_SUFFIX)})?")


class _Chunk(TypedDict):
    file: FileName
    key: str
    offsets: list[Annotated[int, Ge(0)]]
    sizes: list[Annotated[int, Ge(0)]]


class _Stored(TypedDict):
    dtype: Annotated[str, OneOf(DTYPES)]
    shape: list[Annotated[int, Ge(0)]]
    chunks: list[_Chunk]


class _Index(TypedDict):
    state: dict[str, Any]
    files: dict[FileName, str]
    tensors: dict[str, _Stored]


def write(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and a state that JSON can hold to `path`, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # The state is text in the file's metadata: there it can neither get lost nor belong to another step's tensors.
    text = json.dumps(state, sort_keys=True)
    metadata = {"state": text, "sha256": digest(contiguous, text)}
    with replacing(path, refusals=(SafetensorError, RuntimeError)) as partial:  # a full disk can raise either
        save_file(contiguous, partial, metadata)
        _order_metadata(partial)


def _order_metadata(path: Path) -> None:
    """Sort the metadata in a file's header, which safetensors writes in random order: equal contents are equal bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state of a file that `write` made, or of a sharded run's folder.

    Raises ValueError when the file is truncated, altered or no checkpoint, OSError when it is absent or cannot be opened.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.is_dir():
        return _read_folder(path)
    regular(path).open("rb").close()  # so that missing permission is not reported as damage
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file; {remedy(path)}") from error
    if "state" not in metadata or "sha256" not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not one of triptych's checkpoints")
    if digest(tensors, metadata["state"]) != metadata["sha256"]:
        raise ValueError(f"{path}: checksum differs from the recorded one; {remedy(path)}")
    return tensors, parse(metadata["state"], dict[str, Any], source=str(path), remedy=remedy(path))


def is_whole(path: Path) -> bool:
    """Whether a file that `write` made is there and whole; a damaged one is reported, as the caller makes it again."""
    try:
        read(path)
    except FileNotFoundError:
        return False
    except ValueError:
        echo(f"{path}: damaged; making it again")
        return False
    return True


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Unsharded tensors (on the CPU) and state of a sharded run's folder; works on a single rank."""
    index = index_of(folder)
    verify_files(folder, sorted(index["files"]), index)
    # Shapes are only claims, and memory is allocated by them.
    claimed = sum(math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize for entry in index["tensors"].values())
    if claimed > sum((folder / name).stat().st_size for name in index["files"]):
        raise ValueError(f"{folder / INDEX}: tensors of {claimed:,} bytes, more than the files hold; {remedy(folder)}")
    part, tensors = part_reader(folder), {}
    for name, entry in index["tensors"].items():
        tensors[name] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        for chunk in entry["chunks"]:
            tensors[name][box(chunk["offsets"], chunk["sizes"])] = part(chunk)
    return tensors, index["state"]


def index_of(folder: Path) -> dict[str, Any]:
    """The content of a folder's index. Raises ValueError when it is missing, altered or no checkpoint's."""
    if not (folder / INDEX).exists():
        raise ValueError(f"{folder}: incomplete, or not one of triptych's checkpoints; {remedy(folder)}")
    index = read_json(folder / INDEX, remedy=remedy(folder))
    recorded = index.pop("sha256", None)
    if index_digest(index) != recorded:
        raise ValueError(f"{folder / INDEX}: checksum differs from the recorded one; {remedy(folder)}")
    return check(index, _Index, source=str(folder / INDEX), remedy=remedy(folder))


def verify_files(folder: Path, files: Sequence[str], index: Mapping[str, Any]) -> None:
    """Compare files of a folder with the index's checksums. Raises ValueError for a missing or altered file."""
    for name in files:
        try:
            digest = file_digest(folder / name)
        except FileNotFoundError as error:
            raise ValueError(f"{folder / name}: missing; {remedy(folder)}") from error
        if digest != index["files"][name]:
            raise ValueError(f"{folder / name}: checksum differs from the recorded one; {remedy(folder)}")


def part_reader(root: Path) -> Callable[..., Tensor]:
    """A function that reads a chunk of a tensor, or a box within it; it keeps files open."""
    opened = functools.cache(lambda name: safe_open(regular(root / name), framework="pt"))

    def part(chunk: Mapping[str, Any], box: tuple[slice, ...] = ()) -> Tensor:
        file = opened(chunk["file"])
        return file.get_slice(chunk["key"])[box] if box else file.get_tensor(chunk["key"])

    return part


def box(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    """The index of the part of a tensor that starts at `offsets` and has `sizes`."""
    return tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))


def index_digest(index: Mapping[str, Any]) -> str:
    """SHA-256 of a dictionary that JSON can hold, such as an index, which records that of its own content."""
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(path: Path) -> str:
    """The recorded SHA-256 of a file's tensors and state."""
    # Unlike the hash of the file it is reproducible: safetensors writes metadata in arbitrary order.
    with safe_open(regular(path), framework="pt") as file:
        return file.metadata()["sha256"]


def step_path(folder: Path, step: int, *, extra: bool = False, sharded: bool = False) -> Path:
    """The path of a step's checkpoint; an `extra` one is written on an interruption or at the end, not on schedule."""
    return folder / f"step-{step:08d}{_EXTRA if extra else ''}{'' if sharded else _SUFFIX}"


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_order)


def scheduled_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder except extra ones, oldest first."""
    return [path for path in steps_in(folder) if not path.stem.endswith(_EXTRA)]


def prune(folder: Path, keep: int) -> None:
    """Remove the leftovers of interrupted writes, and all checkpoints but the newest and the last `keep` scheduled ones."""
    # What is left does not depend on interruptions, whose extra checkpoints count for nothing once there is a newer one.
    kept = {*scheduled_in(folder)[-keep:], *steps_in(folder)[-1:]}
    for path in [*steps_in(folder), *folder.glob(f"*{PARTIAL}")]:
        if path not in kept:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint, complete or partial. A folder is renamed first, so that half of it never passes for one."""
    if path.is_dir():
        doomed = path if path.name.endswith(PARTIAL) else path.rename(path.with_name(f"{path.name}-old{PARTIAL}"))
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def remedy(path: Path) -> str:
    """Advice about a damaged checkpoint, for an error message."""
    if not _NAME.fullmatch(path.name):
        return "make or fetch it again"
    older = [p.name for p in steps_in(path.parent) if _order(p) < _order(path)]
    it = "it" if path.suffix else path.name  # of a folder, the message names a file inside
    return f"delete {it} to go on from {older[-1]}" if older else f"delete {it} to start afresh"


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of a text and of tensors' names, types, shapes and bytes, whatever their order, device and memory layout."""
    sha256 = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha256.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _order(path: Path) -> tuple[int, bool]:
    match = _NAME.fullmatch(path.name)
    assert match is not None  # only such paths are listed
    # Of two checkpoints of one step the scheduled one counts as newer.
    step, extra, _ = match.groups()
    return int(step), extra is None
