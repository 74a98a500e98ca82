"""What a file by torch.save claims, checked before torch reads it, since a few bytes can claim tensors of any size.

torch's own restricted reader runs nothing, but allocates what it is told to: `bytearray(n)`, a storage of n numbers, a view that
repeats one number, a deflated record. Here the pickle is run on plain data first, with tensors that are only their sizes.
"""

import io
import math
import mmap
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from triptych_common.storage.pickle_machine import Budget, Machine, Name, Refused, TooLarge, dictionary, plain_keys


def check(file: io.BytesIO | io.BufferedReader, size: int, allow: Sequence[Any] = ()) -> None:
    """Raise TooLarge for a file that would take more than a small multiple of its `size` in bytes.

    allow: classes and functions besides tensors and plain containers that it may name, as torch.serialization.safe_globals
        takes them. Raises Refused for any other, and whatever errors
    damaged bytes lead to.
    """
    content = _Content(size, allow)
    if zipfile.is_zipfile(file):
        content.zipped(file)
    elif isinstance(file, io.BytesIO):
        file.seek(0)
        content.legacy(file)
    else:  # mapped, since a file allocates what it is asked for before it reads less
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            content.legacy(mapped)
    file.seek(0)


@dataclass(frozen=True)
class _Storage:
    numel: int
    itemsize: int


@dataclass(frozen=True)
class _Tensor:
    numel: int


class _State(dict[str, Any]):
    """An object of an allowed class."""


def _object(*_: Any) -> _State:
    return _State()


def _empty_array(kind: Any, shape: Any, code: Any) -> _State:
    """As numpy pickles every array, whose shape and bytes follow and are compared there."""
    if shape != (0,) or code not in ("b", b"b"):
        raise ValueError("no empty array")
    return _State()


class _Content:
    def __init__(self, size: int, allow: Sequence[Any]) -> None:
        self.size, self.budget, self.storages = size, Budget(size), dict[str, int]()
        names = [one[1] if isinstance(one, tuple) else f"{one.__module__}.{one.__qualname__}" for one in allow]
        self.calls = _CALLS | {name: _empty_array if name.endswith("._reconstruct") else _object for name in names}
        self.calls |= dict.fromkeys([*storage_types(), *_DTYPES])
        rebuild = dict.fromkeys(("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"), self._tensor)
        self.calls |= {f"torch._utils.{name}": function for name, function in rebuild.items()}

    def zipped(self, file: io.BytesIO | io.BufferedReader) -> None:
        with zipfile.ZipFile(file) as archive:
            records = {info.filename.casefold(): info for info in archive.infolist()}
            if len(records) != len(archive.infolist()):
                raise Refused("has two records of one name")
            if sum(info.file_size for info in archive.infolist()) > self.size:
                raise TooLarge("has records that are larger than the file: torch.save neither packs nor overlaps them")
            root = archive.infolist()[0].filename.split("/")[0]
            self._run(io.BytesIO(archive.read(f"{root}/data.pkl")))
        for key, claimed in self.storages.items():
            if claimed > records[f"{root}/data/{key}".casefold()].file_size:
                raise TooLarge(f"has a storage of {claimed:,} bytes in a smaller record")

    def legacy(self, file: io.BytesIO | mmap.mmap) -> None:
        for _ in range(4):  # magic number, version, system, content
            self._run(file)
        keys = self._run(file)
        if type(keys) is not list or len(keys) > len(self.storages) or len(set(plain_keys(keys))) != len(keys):
            raise Refused("has storages more than once")
        if sum(self.storages.values()) > self.size:
            raise TooLarge(f"has storages of {sum(self.storages.values()):,} bytes, in {self.size:,}")

    def _run(self, file: io.BytesIO | mmap.mmap) -> Any:
        return Machine(self.calls, _build, self.budget, self._storage).run(file)

    def _storage(self, persistent_id: Any) -> _Storage:
        kind, type_name, key, _, numel, *view = persistent_id
        item = storage_types().get(type_name.text) if type(type_name) is Name else None
        if kind != "storage" or item is None or type(numel) is not int or numel < 0 or type(key) not in (str, int):
            raise Refused("has a persistent object that is no storage")
        self.storages[str(key)] = max(self.storages.get(str(key), 0), numel * item)
        if view and view[0] is not None:
            _, offset, numel = view[0]
            if type(offset) is not int or type(numel) is not int or offset < 0 or numel < 0:
                raise Refused("has a view of a storage without numbers")
        return _Storage(numel, item)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> _Tensor:
        """Inside its storage and no larger, so that a copy of it takes no more either."""
        shape_and_stride = (size, stride)
        if not all(type(x) is tuple and all(type(n) is int and n >= 0 for n in x) for x in shape_and_stride):
            raise ValueError("no shape")
        bytes_of_item = next((_DTYPES[x.text] for x in more if type(x) is Name and x.text in _DTYPES), storage.itemsize)
        numel = math.prod(size)
        if numel * bytes_of_item > storage.numel * storage.itemsize:
            raise TooLarge(f"has a tensor {size} in a storage of {storage.numel:,} numbers")
        self.budget.spend(numel * bytes_of_item)
        return _Tensor(numel)


def _build(target: Any, state: Any) -> None:
    if type(target) not in (dict, _State):
        raise Refused(f"sets the state of a {type(target).__name__}")
    if type(target) is _State and type(state) is dict:
        target.update(state)


@cache
def storage_types() -> dict[str, int]:
    """Bytes of a number, by the name of the storages' type."""
    types = {name: dtype.itemsize for dtype, name in torch.storage._dtype_to_storage_type_map().items()}
    places = ("torch", "torch.cuda", "torch.storage")
    return {f"{place}.{name}": size for place in places for name, size in (types | {"UntypedStorage": 1}).items()}


def _parameter(data: Any, *_: Any) -> _Tensor:
    if type(data) is not _Tensor:
        raise ValueError("no tensor")
    return data


def _mapping(items: Any = ()) -> dict[Any, Any]:
    return dict(items) if type(items) is dict else dictionary([part for item in items for part in tuple(item)])


def _encoded(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise ValueError("no bytes")
    return text.encode(encoding)


def _set(items: Any = ()) -> set[Any]:
    return set(plain_keys(items))


_DTYPES = {str(dtype): dtype.itemsize for name in dir(torch) if isinstance(dtype := getattr(torch, name), torch.dtype)}
_CALLS: dict[str, Any] = {
    "collections.OrderedDict": _mapping,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": lambda items=(): tuple(items),
    "torch.device": lambda *words: words,
    "torch.serialization._get_layout": lambda name: name,
    "_codecs.encode": _encoded,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "builtins.complex": complex,
    "__builtin__.complex": complex,
}
