"""NVIDIA's network pickles, read without running a line of them.

They may use the names in `_CALLS` and nothing else. The source text that comes with modules is dropped; tensors' numbers, which
are pickles within the pickle, are read by torch's own restricted reader; arrays may hold numbers only.
"""

import io
import math
import mmap
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triptych_common.storage import torch_file
from triptych_common.storage.files import regular
from triptych_common.storage.pickle_machine import Budget, Machine, Name, Refused, TooLarge, dictionary, plain_keys

_SCALARS = (str, int, float, bool, type(None))
_MOST_MODULES, _DEEPEST = 5000, 8  # of a network: ten times NVIDIA's largest
_DAMAGE = (ValueError, LookupError, EOFError, TypeError, OverflowError, RuntimeError, MemoryError, AttributeError)


@dataclass(frozen=True)
class PickledNetwork:
    """A network from a pickle, as plain data.

    kwargs: arguments of its constructor. tensors: parameters and buffers by full name. settings: plain attributes of its modules
    by full name, such as "synthesis.b4.conv1.conv_clamp"; none for TensorFlow.
    """

    class_name: str
    kwargs: dict[str, Any]
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    tensorflow: bool = False


def load_pickle(path: Path) -> dict[str, PickledNetwork]:
    """Networks "G", "D" and "G_ema", as far as present, of a file by stylegan2-ada-pytorch, stylegan3 or their TensorFlow era.

    Raises FileNotFoundError for an absent file; ValueError for one that names anything networks do not need (nothing has been
    run), is damaged, or holds no networks.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with regular(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            budget = Budget(len(content))
            return dict(_networks(Machine(_CALLS, _build, budget).run(content), budget))
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except _DAMAGE as error:
        raise ValueError(f"{path}: truncated, or no pickle of networks; make or fetch it again") from error


@dataclass
class _Module:
    """A module as NVIDIA's persistence pickles it: class name and attributes, without the source text."""

    class_name: str
    state: dict[str, Any]


@dataclass
class _TensorFlowNetwork:
    state: dict[str, Any] = field(default_factory=dict)


def _build(target: Any, state: Any) -> None:
    """Set an object's state, for the three kinds of object that have one."""
    if type(target) is _TensorFlowNetwork and type(state) is dict:
        target.state = state
    elif isinstance(target, np.dtype) and _is_byte_order(state):
        # Only the byte order is taken from the state: no fields, names or subtypes.
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
    return dict(items) if type(items) is dict else dictionary([part for item in items for part in _pair(item)])


def _pair(item: Any) -> Sequence[Any]:
    if type(item) not in (list, tuple) or len(item) != 2:
        raise ValueError("no pair")
    return item


def _parameter(data: Any, requires_grad: Any = True, hooks: Any = None) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("no tensor")
    return data


def _tensor(flat: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, inside it and no larger: strides of 0 could make a tensor of a thousand billion numbers."""
    if not (isinstance(flat, Tensor) and flat.ndim == 1 and _is_shape(size) and _is_shape(stride)):
        raise ValueError("no storage or no shape")
    if len(size) != len(stride) or type(offset) is not int or offset < 0 or math.prod(size) > len(flat):
        raise ValueError("beyond its storage")
    if math.prod(size) and offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= len(flat):
        raise ValueError("beyond its storage")
    return flat.as_strided(size, stride, offset)


def _storage(content: Any) -> Tensor:
    """A stored tensor's numbers, which are a pickle within the pickle."""
    file = io.BytesIO(content)
    try:
        torch_file.check(file, len(content))
    except TooLarge:
        raise
    except Refused as error:
        raise Refused(f"has a stored tensor that {error}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # typed storages are deprecated
        storage = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(storage, torch.storage.TypedStorage):
            raise ValueError("no storage")
        return torch.empty(0, dtype=storage.dtype).set_(storage.untyped())


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


# Everything that NVIDIA's files need. None: may be mentioned, never called.
_CALLS: dict[str, Callable[..., Any] | None] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "dnnlib.util.EasyDict": _mapping,
    "dnnlib.tflib.network.Network": lambda: _TensorFlowNetwork(),
    "collections.OrderedDict": _mapping,
    "builtins.set": lambda items=(): set(plain_keys(items)),  # sets, before protocol 4
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy.ndarray": None,
}


def _networks(content: Any, budget: Budget) -> Iterator[tuple[str, PickledNetwork]]:
    """Of NVIDIA's dictionaries, and of the older triples (G, D, G_ema)."""
    if type(content) is tuple and len(content) == 3:
        content = dict(zip(("G", "D", "G_ema"), content, strict=True))
    networks = content if type(content) is dict else {}
    readers: dict[type, Callable[[Any, Budget], PickledNetwork]] = {
        _Module: _taken_apart,
        _TensorFlowNetwork: _taken_apart_tensorflow,
    }
    keys = [key for key in ("G", "D", "G_ema") if type(networks.get(key)) in readers]
    if not keys:
        raise Refused("holds no networks: expected a dictionary with G, D and G_ema")
    for key in keys:
        yield key, readers[type(networks[key])](networks[key], budget)


def _walk(root: Any, children: Callable[[Any], Iterable[tuple[str, Any]]], separator: str) -> Iterator[tuple[str, Any]]:
    """Every part of a network, with the prefix of its tensors' names. Parts may hold themselves, so that counts are bounded."""
    todo, seen = [("", root)], 1
    while todo:
        prefix, part = todo.pop()
        yield prefix, part
        for name, child in children(part):
            seen += 1
            if seen > _MOST_MODULES or prefix.count(separator) > _DEEPEST:
                raise Refused("has modules without end")
            todo.append((f"{prefix}{name[:100]}{separator}", child))


def _taken_apart(root: _Module, budget: Budget) -> PickledNetwork:
    tensors, settings = dict[str, Tensor](), dict[str, Any]()
    for prefix, module in _walk(root, _modules, "."):
        named = [*_part(module, "_parameters"), *_part(module, "_buffers")]
        for name, value in named:
            if isinstance(value, Tensor):
                budget.spend(4 * value.numel())  # networks are of float32
                tensors[prefix + name] = value
        settings |= {f"{prefix}{k}": v for k, v in module.state.items() if type(v) in _SCALARS and type(k) is str}
    kwargs = root.state.get("_init_kwargs", {})
    return PickledNetwork(root.class_name, kwargs if type(kwargs) is dict else {}, tensors, settings)


def _modules(module: _Module) -> Iterator[tuple[str, _Module]]:
    return ((name, child) for name, child in _part(module, "_modules") if type(child) is _Module)


def _part(module: _Module, name: str) -> list[tuple[str, Any]]:
    part = module.state.get(name, {})
    if type(part) is not dict or not all(type(key) is str and len(key) <= 100 for key in part):
        raise Refused(f"has a module whose {name} is no dictionary of names")
    return list(part.items())


def _taken_apart_tensorflow(root: _TensorFlowNetwork, budget: Budget) -> PickledNetwork:
    tensors: dict[str, Tensor] = {}
    for prefix, network in _walk(root, _components, "/"):
        for name, value in map(_pair, network.state.get("variables", [])):
            if type(name) is str and isinstance(value, np.ndarray | float | int):
                budget.spend(4 * np.size(value))
                tensors[f"{prefix}{name[:100]}"] = torch.from_numpy(np.array(value, dtype=np.float32))
    kwargs, name = root.state.get("static_kwargs", {}), root.state.get("build_func_name", "")
    named = name if type(name) is str else ""
    return PickledNetwork(named, kwargs if type(kwargs) is dict else {}, tensors, tensorflow=True)


def _components(network: _TensorFlowNetwork) -> Iterator[tuple[str, _TensorFlowNetwork]]:
    for name, child in network.state.get("components", {}).items():
        if type(name) is not str or type(child) is not _TensorFlowNetwork:
            raise Refused("has components that are no networks")
        yield name, child
