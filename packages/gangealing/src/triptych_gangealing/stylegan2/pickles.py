"""NVIDIA's network pickles, read without running a line of them.

They may name what is in `_CALLS` and nothing else. Source text that comes with the modules is dropped, tensors' numbers, which
are pickles within the pickle, are read by torch's own restricted reader, and arrays may hold numbers only.
"""

import io
import math
import mmap
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych_gangealing.stylegan2.pickle_machine import Machine, Name, Refused, dictionary, plain_keys

_SCALARS = (str, int, float, bool, type(None))
_MOST_MODULES, _DEEPEST = 5000, 8  # of a network: ten times NVIDIA's largest
_DAMAGE = (ValueError, LookupError, EOFError, TypeError, OverflowError, RuntimeError, MemoryError, AttributeError)


@dataclass(frozen=True)
class PickledNetwork:
    """A network taken out of a pickle as plain data.

    kwargs: what it was built with. tensors: parameters and buffers by their full names. settings: plain attributes of its modules
    by full name, such as "synthesis.b4.conv1.conv_clamp"; none of a TensorFlow one.
    """

    class_name: str
    kwargs: dict[str, Any]
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    tensorflow: bool = False


def load_pickle(path: Path) -> dict[str, PickledNetwork]:
    """Networks "G", "D" and "G_ema", those that are present, of a file by stylegan2-ada-pytorch, stylegan3 or their TensorFlow era.

    Raises FileNotFoundError where there is none; ValueError, one line, for a file that names anything that networks do not need
    (nothing has been run), is damaged, or holds no networks.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return dict(_networks(Machine(_CALLS, _build).run(content)))
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except _DAMAGE as error:
        raise ValueError(f"{path}: truncated, or no pickle of networks; make or fetch it again") from error


def refused_name(error: BaseException) -> str | None:
    """What torch's restricted reader would not import, out of its error."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found[1][:100] if found else None


@dataclass
class _Module:
    """A module of NVIDIA's persistence: its attributes. The source text that comes with it is dropped."""

    class_name: str
    state: dict[str, Any]


@dataclass
class _TensorFlowNetwork:
    state: dict[str, Any] = field(default_factory=dict)


def _build(target: Any, state: Any) -> None:
    """The opcode that sets an object's state, for the three kinds of object that have one."""
    if type(target) is _TensorFlowNetwork and type(state) is dict:
        target.state = state
    elif isinstance(target, np.dtype) and _is_byte_order(state):
        target.__setstate__((3, state[1], None, None, None, -1, -1, 0))  # type: ignore[attr-defined]
    elif type(target) is np.ndarray and type(state) is tuple and len(state) == 5:
        _, shape, dtype, fortran, raw = state
        if not (_is_number_type(dtype) and _is_shape(shape) and type(raw) is bytes):
            raise Refused("has a numpy array of something else than numbers")
        if math.prod(shape) * dtype.itemsize != len(raw):
            raise ValueError("array of another size")
        target.__setstate__((1, shape, dtype, bool(fortran), raw))  # type: ignore[arg-type]
    else:
        raise Refused(f"sets the state of a {type(target).__name__}")


def _is_shape(shape: Any) -> bool:
    return type(shape) is tuple and len(shape) <= 8 and all(type(n) is int and n >= 0 for n in shape)


def _is_number_type(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind in "biuf"


def _is_byte_order(state: Any) -> bool:
    return type(state) is tuple and len(state) >= 5 and state[1] in ("<", ">", "|", "=") and state[2:5] == (None,) * 3


def _persistent(meta: Any) -> _Module:
    if type(meta) is not dict or meta.get("type") != "class" or type(meta.get("state")) is not dict:
        raise Refused("has a persistent object that is no module")
    if type(meta.get("class_name")) is not str:
        raise Refused("has a module without a class name")
    return _Module(meta["class_name"], meta["state"])


def _mapping(items: Any = ()) -> dict[Any, Any]:
    if type(items) is dict:
        return dict(items)
    return dictionary([part for item in items for part in _pair(item)])


def _pair(item: Any) -> Sequence[Any]:
    if type(item) not in (list, tuple) or len(item) != 2:
        raise ValueError("no pair")
    return item


def _set(items: Any = ()) -> set[Any]:
    return set(plain_keys(items))


def _parameter(data: Any, requires_grad: Any = True, hooks: Any = None) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("no tensor")
    return data


def _tensor(flat: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, which must lie within it and may not be larger: no tensor of a thousand billion equal numbers."""
    if not (isinstance(flat, Tensor) and flat.ndim == 1 and _is_shape(size) and _is_shape(stride)):
        raise ValueError("no storage or no shape")
    if len(size) != len(stride) or type(offset) is not int or offset < 0 or math.prod(size) > len(flat):
        raise ValueError("does not lie in its storage")
    if math.prod(size) and offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= len(flat):
        raise ValueError("does not lie in its storage")
    return flat.as_strided(size, stride, offset)


def _storage(content: Any) -> Tensor:
    """A stored tensor's numbers, which are a pickle within the pickle."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # typed storages are deprecated
            storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if not isinstance(storage, torch.storage.TypedStorage):
                raise ValueError("no storage")
            return torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise ValueError("damaged storage") from error
        raise Refused(
            f"names {found[1][:100]} within a stored tensor, which could run code; nothing was run"
        ) from error


def _dtype(code: Any, *_: Any) -> np.dtype:
    if type(code) is not str or not re.fullmatch(r"[biuf][1248]", code):
        raise Refused(f"has a numpy.dtype {ascii(code)[:20] if type(code) is str else '?'} that is no number's")
    return np.dtype(code, align=False, copy=True)  # a copy: its byte order is set later, in place


def _scalar(dtype: Any, raw: Any) -> bool | float:
    if not _is_number_type(dtype) or type(raw) is not bytes or len(raw) != dtype.itemsize:
        raise Refused("has a numpy scalar that is no number")
    return np.frombuffer(raw, dtype)[0].item()


def _array(kind: Any, *_: Any) -> np.ndarray:
    if kind != Name("numpy.ndarray"):
        raise Refused("has a numpy array of an unknown kind")
    return np.empty(0, np.uint8)


_CALLS: dict[str, Callable[..., Any] | None] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "dnnlib.util.EasyDict": _mapping,
    "dnnlib.tflib.network.Network": lambda: _TensorFlowNetwork(),
    "collections.OrderedDict": _mapping,
    "builtins.set": _set,  # sets, before protocol 4
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy.ndarray": None,
}


def _networks(content: Any) -> Iterator[tuple[str, PickledNetwork]]:
    """Of NVIDIA's dictionaries, and of the older triples (G, D, G_ema)."""
    if type(content) is tuple and len(content) == 3:
        content = dict(zip(("G", "D", "G_ema"), content, strict=True))
    found = False
    for key in ("G", "D", "G_ema"):
        network = content.get(key) if type(content) is dict else None
        if type(network) is _Module:
            yield key, _taken_apart(network)
        elif type(network) is _TensorFlowNetwork:
            yield key, _taken_apart_tensorflow(network)
        found = found or type(network) in (_Module, _TensorFlowNetwork)
    if not found:
        raise Refused("holds no networks: expected a dictionary with G, D and G_ema")


def _taken_apart(root: _Module) -> PickledNetwork:
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    todo, seen = [("", root)], 1
    while todo:
        prefix, module = todo.pop()
        for name, value in [*_part(module, "_parameters"), *_part(module, "_buffers")]:
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
        settings |= {f"{prefix}{k}": v for k, v in module.state.items() if type(v) in _SCALARS and type(k) is str}
        for name, child in _part(module, "_modules"):
            seen += 1
            if type(child) is _Module:
                todo.append((f"{prefix}{name}.", child))
            if seen > _MOST_MODULES or prefix.count(".") > _DEEPEST:
                raise Refused("has modules without end")
    kwargs = root.state.get("_init_kwargs", {})
    return PickledNetwork(root.class_name, kwargs if type(kwargs) is dict else {}, tensors, settings)


def _part(module: _Module, name: str) -> list[tuple[str, Any]]:
    part = module.state.get(name, {})
    if type(part) is not dict or not all(type(key) is str and len(key) <= 100 for key in part):
        raise Refused(f"has a module whose {name} is no dictionary of names")
    return list(part.items())


def _taken_apart_tensorflow(root: _TensorFlowNetwork) -> PickledNetwork:
    tensors: dict[str, Tensor] = {}
    todo, seen = [("", root)], 1
    while todo:
        prefix, network = todo.pop()
        for name, value in map(_pair, network.state.get("variables", [])):
            if type(name) is str and isinstance(value, np.ndarray | float | int):
                tensors[f"{prefix}{name[:100]}"] = torch.from_numpy(np.array(value, dtype=np.float32))
        for name, child in network.state.get("components", {}).items():
            seen += 1
            if type(name) is not str or type(child) is not _TensorFlowNetwork:
                raise Refused("has components that are no networks")
            if seen > _MOST_MODULES or prefix.count("/") > _DEEPEST:
                raise Refused("has modules without end")
            todo.append((f"{prefix}{name[:100]}/", child))
    kwargs, name = root.state.get("static_kwargs", {}), root.state.get("build_func_name", "")
    named = name if type(name) is str else ""
    return PickledNetwork(named, kwargs if type(kwargs) is dict else {}, tensors, tensorflow=True)
