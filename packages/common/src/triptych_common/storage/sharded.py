"""Checkpoints of sharded runs: a folder to which every rank writes its own shards, readable by any number of ranks.

`torch.distributed.checkpoint` plans which rank writes and reads which part of which tensor. Its file formats are not
used: its metadata is a pickle, which can run code when opened, and its safetensors variant keeps neither a state nor
checksums. Here a folder holds one safetensors file per rank, and `index.json` with the state, the location of each part
of each tensor and the SHA-256 of every file. It is written under a temporary name and renamed once all ranks are done.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from triptych_common.parallel import Ranks
from triptych_common.storage import checkpoint, files
from triptych_common.storage.files import parse

_DTYPE_NAMES = {dtype: name for name, dtype in checkpoint.DTYPES.items()}


def write(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], ranks: Ranks) -> None:
    """Write tensors, each sharded or the same on every rank, and a state that JSON can hold to `folder`, atomically.

    All ranks must call this. Raises OSError on every rank, the old folder intact, when one of them cannot write.
    """
    writer = _Writer(folder, state, ranks)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.save(dict(tensors), storage_writer=writer, planner=planner)
    except dcp.CheckpointException as failed:
        if ranks.is_main:
            shutil.rmtree(writer.partial, ignore_errors=True)
        remedy = "; make room or choose another --out, then repeat"
        raise _disk_error(failed, f"{folder}: cannot be written", remedy) from failed


def read_like(
    path: Path, like: Callable[[str], Tensor | None], ranks: Ranks
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint, a folder or a single file, each tensor sharded as `like(name)` is.

    A tensor for which `like` returns None or another shape is returned unsharded on the CPU. Each rank reads the parts it
    needs, whichever ranks wrote them. All ranks must call this.
    Raises ValueError on every rank when a file is missing, altered or no checkpoint's.
    """
    index = _on_all(ranks, lambda: checkpoint.index_of(path) if path.is_dir() else _index_of_file(path, ranks))
    _on_all(ranks, lambda: checkpoint.verify_files(path, sorted(index["files"])[ranks.rank :: ranks.world_size], index))
    tensors = {}
    for name, entry in index["tensors"].items():
        shape, dtype, template = torch.Size(entry["shape"]), checkpoint.DTYPES[entry["dtype"]], like(name)
        if template is None or template.shape != shape:
            tensors[name] = torch.empty(shape, dtype=dtype)
        else:
            tensors[name] = torch.empty_like(template, dtype=dtype)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(tensors, storage_reader=_Reader(path, index), planner=planner)
    except dcp.CheckpointException as failed:
        raise _disk_error(failed, f"{path}: cannot be read") from failed
    return tensors, index["state"]


class _NoStorage:
    """The steps of a reader's and a writer's protocol that have nothing to do here."""

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # constructed for one folder, never looked up by name


class _Writer(_NoStorage, dcp.StorageWriter):
    """The writer that torch.distributed.checkpoint calls: on every rank to write, on the main rank to finish."""

    def __init__(self, folder: Path, state: Mapping[str, Any], ranks: Ranks) -> None:
        self.folder, self.state, self.ranks = folder, state, ranks
        self.partial = folder.with_name(folder.name + files.PARTIAL)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        if self.partial.exists():  # left by a killed run
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        return plans

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        if not self.partial.is_dir():
            raise OSError("the folder is not visible there: all machines must share the file system of --out")
        path = self.partial / f"rank-{self.ranks.rank:05d}.safetensors"
        found = {_key(item.index): planner.resolve_data(item) for item in plan.items}
        parts = {key: part.detach().cpu().contiguous() for key, part in found.items() if isinstance(part, torch.Tensor)}
        save_file(parts, path)
        files.sync(path)
        digest = checkpoint.file_digest(path)
        return _done([WriteResult(item.index, 0, (item.tensor_data, path.name, digest)) for item in plan.items])

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        index: dict[str, Any] = {"state": self.state, "files": {}, "tensors": {}}
        for result in (one for of_rank in results for one in of_rank):
            data, file, digest = result.storage_data
            index["files"][file] = digest
            entry = {"dtype": _DTYPE_NAMES[data.properties.dtype], "shape": list(data.size), "chunks": []}
            chunk = {"file": file, "key": _key(result.index), "offsets": data.chunk.offsets, "sizes": data.chunk.sizes}
            index["tensors"].setdefault(result.index.fqn, entry)["chunks"].append(chunk)
        path = self.partial / checkpoint.INDEX
        path.write_text(json.dumps({**index, "sha256": checkpoint.index_digest(index)}, allow_nan=False))
        files.sync(path)
        # The index, written last, says that all files are there; the rename makes the folder appear at once.
        checkpoint.remove(self.folder)
        self.partial.rename(self.folder)


class _Reader(_NoStorage, dcp.StorageReader):
    """The reader that torch.distributed.checkpoint calls: for metadata from the index, then for the parts in its plan."""

    def __init__(self, path: Path, index: Mapping[str, Any]) -> None:
        self.part, self.index = checkpoint.part_reader(path if path.is_dir() else path.parent), index
        self.chunks: dict[MetadataIndex, Any] = {}

    def set_up_storage_reader(
        self, metadata: dcp.Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        tensors: dict[str, Any] = {}
        for name, entry in self.index["tensors"].items():
            chunks = []
            for chunk in entry["chunks"]:
                chunks.append(dcp.ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])))
                self.chunks[MetadataIndex(name, chunks[-1].offsets)] = chunk
            properties = TensorProperties(dtype=checkpoint.DTYPES[entry["dtype"]])
            tensors[name] = dcp.TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return dcp.Metadata(tensors)

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            target.copy_(self.part(self.chunks[item.storage_index], checkpoint.box(item.storage_offsets, item.lengths)))
            planner.commit_tensor(item, target)
        return _done(None)


def _disk_error(failed: dcp.CheckpointException, what: str, remedy: str = "") -> BaseException:
    """The failure of the lowest failing rank: as one line if the disk caused it, else unchanged."""
    rank, (error, _) = min(failed.failures.items(), key=lambda failure: failure[0])
    if not isinstance(error, SafetensorError | RuntimeError | OSError):  # a full disk arrives as any of the three
        return error
    return OSError(f"{what} by rank {rank} ({files.reason(error)}){remedy}")


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


def _key(index: MetadataIndex) -> str:
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def _index_of_file(path: Path, ranks: Ranks) -> dict[str, Any]:
    """The index that describes a single file, as that of a folder would; the main rank verifies the file for all."""
    if ranks.is_main:
        checkpoint.read(path)
    with safe_open(path, framework="pt") as file:
        tensors = {}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(name)
            shape = part.get_shape()
            chunk = {"file": path.name, "key": name, "offsets": [0] * len(shape), "sizes": shape}
            tensors[name] = {"dtype": part.get_dtype(), "shape": shape, "chunks": [chunk]}
        state = parse(file.metadata()["state"], dict[str, Any], source=str(path), remedy=checkpoint.remedy(path))
        return {"state": state, "files": {}, "tensors": tensors}


def _on_all(ranks: Ranks, act: Callable[[], Any]) -> Any:
    """The result of `act`. If it fails on one rank this raises on all of them, so that none waits for another."""
    result, failure = None, None
    try:
        result = act()
    except (ValueError, OSError, SafetensorError) as error:
        failure = error
    for failed in ranks.gather(failure):
        if failed is not None:
            raise failed
    return result
