"""Networks built by a file's config, whose numbers are only claims: building ends before it takes far more than the file."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map_only

from triptych_common.storage.pickle_machine import Budget

_SMALL = 1 << 20
_LEAST = 1 << 14  # bytes that a tensor is charged for, so that a million layers of one number end too


class Bounded(TorchFunctionMode):
    """Within it, torch makes tensors of a few times `size` bytes in all. Raises TooLarge, before it allocates the first beyond."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.budget = Budget(size)

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name.endswith("_") or name in ("cat", "stack"):  # in place, an attribute, or no larger than its parts
            return function(*args, **kwargs)
        made = function in _device_constructors()
        if made:
            self.budget.spend(max(_LEAST, _bytes(function, args, kwargs | {"device": "meta"}, unless=_SMALL)))
        else:  # what an operation makes out of others is often gone soon
            whole = Budget(self.budget.size)
            whole.spend(_bytes(function, args, kwargs, unless=whole.left))
        return function(*args, **kwargs)


def _bytes(function: Any, args: Any, kwargs: dict[str, Any], unless: int) -> int:
    """The size of a function's result from its arguments' shapes alone, or any bound of it below `unless`."""
    if function is torch.arange:
        return _range_bytes(*args, **kwargs)
    # Not made on the device meta without need: there the first call of many a function takes seconds.
    most = 8 * math.prod(map(_factor, tree_leaves((args, kwargs))))
    if most < unless:
        return most
    args, kwargs = tree_map_only(Tensor, _shape, (args, kwargs))
    try:
        result = function(*args, **kwargs)
    except Exception:  # needs values, or is wrong: then the call itself says so
        return 0
    parts = result if isinstance(result, tuple | list) else [result]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def _factor(argument: Any) -> int:
    """By how much an argument can multiply the numbers of a result, as in an outer product or a repetition."""
    return max(1, argument.numel() if isinstance(argument, Tensor) else argument if type(argument) is int else 1)


def _range_bytes(start: float, end: float | None = None, step: float = 1, **_: Any) -> int:
    return 8 * math.ceil(abs((start if end is None else end - start) / step)) if step else 0


def _shape(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
