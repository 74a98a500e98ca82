"""Files of other programs, read only as tensors, plain containers and harmless values: unpickling anything else runs code.

    network = state_dict(path, holds=["decoder.pos_emb"], prefer="ema")

finds a network in what anybody's training script saved: within entries (`state_dict`, `model`, `ema`), under a module's name
(`net.`, `ema_model.`), and with the names that DistributedDataParallel, FSDP, torch.compile and checkpointing insert.
"""

import argparse
import contextlib
import io
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from triptych_common.cli import echo, is_out_of_memory
from triptych_common.storage import torch_file
from triptych_common.storage.files import regular, replacing
from triptych_common.storage.pickle_machine import Refused, TooLarge

_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_COUNTERS = {"n_averaged", "initted", "step"}  # tensors that averaging wrappers keep beside a network's
_AVERAGE = re.compile(r"(^|[._])ema([._]|$)", re.IGNORECASE)
_USUAL = ("", "model", "net", "network", "state_dict", "model_state_dict")  # entries of the network itself
_DEPTH = 6  # of entries within entries


class StateDict(NamedTuple):
    """A network's tensors by its own names, the entry and module names that they were under, and the file's whole content."""

    tensors: dict[str, Tensor]
    place: str
    content: Any

    @property
    def is_average(self) -> bool:
        """Whether the entry or module is named as a moving average is."""
        return _AVERAGE.search(self.place) is not None and "online" not in self.place


def state_dict(path: Path, *, holds: Collection[str], prefer: Literal["ema", "model"] = "ema") -> StateDict:
    """The network in a file that has tensors of certain names. Raises as `read` and `network_in`, naming the file."""
    content = read(path)
    try:
        return network_in(content, holds=holds, prefer=prefer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def network_in(content: Any, *, holds: Collection[str], prefer: Literal["ema", "model"] = "ema") -> StateDict:
    """The network in a file's content; of several, the moving average or the one in training, as preferred.

    holds: names, without those that wrappers insert, that all of its tensors' names include. If no entry has them, the largest
        entry is returned, for the caller to tell what is missing; so it is without any names.
    Raises ValueError for content that is no mapping, and for several networks where neither name nor preference decides.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"holds a {type(content).__name__}, expected a state dict")
    found = networks_in(content, holds=holds)
    if not found:
        largest = max(_entries(content), key=lambda entry: len(entry[1]), default=("", {}))
        return StateDict(without_wrappers(largest[1], holds), largest[0], content)
    chosen = [one for one in found if one.is_average == (prefer == "ema")] or found
    if prefer == "ema" and not any(one.is_average for one in chosen) and (unnamed := _unnamed_average(content)):
        echo(f"the average {unnamed!r} has no names of tensors and is left aside: these are weights in training")
    usual = [one for one in chosen if one.place.rpartition(".")[2] in _USUAL]
    if len(chosen) > 1 and not usual:
        raise ValueError(
            f"holds several networks ({', '.join(one.place for one in chosen)}); save the one to use alone"
        )
    return (usual or chosen)[0]


def networks_in(content: Mapping[Any, Any], *, holds: Collection[str]) -> list[StateDict]:
    """All networks with tensors of certain names, each once, in the order of the file."""
    if not holds:
        return []
    landmark, found = next(iter(holds)), []
    for place, entry in _entries(content):
        tensors = without_wrappers(entry, holds)
        ends = [name.removesuffix(landmark) for name in tensors if f".{name}".endswith(f".{landmark}")]
        prefixes = [prefix for prefix in ends if all(prefix + name in tensors for name in holds)]
        for prefix in prefixes:
            inner = tuple(other for other in prefixes if len(other) > len(prefix))
            own = {name: x for name, x in tensors.items() if name.startswith(prefix) and not name.startswith(inner)}
            named = {name[len(prefix) :]: tensor for name, tensor in own.items()}
            named = {name: tensor for name, tensor in named.items() if name in holds or name not in _COUNTERS}
            found.append(StateDict(named, ".".join(filter(None, (place, prefix.rstrip(".")))), content))
    return found


def _unnamed_average(content: Mapping[Any, Any]) -> str | None:
    """The entry of a moving average that is a list of tensors, or whose names have lost their dots, as some scripts write it."""
    for name, value in content.items():
        inner = list(value.values()) if isinstance(value, Mapping) else [value]
        lists = any(isinstance(part, list) and part and isinstance(part[0], Tensor) for part in inner)
        if (
            isinstance(name, str)
            and _AVERAGE.search(name)
            and (lists or (isinstance(value, Tensor) and value.ndim > 0))
        ):
            return name
    nested = (
        _unnamed_average(value) for name, value in content.items() if isinstance(value, Mapping) and name in _USUAL
    )
    return next(filter(None, nested), None)


def _entries(content: Mapping[Any, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of a mapping and of all mappings in it, each with the names of the entries that lead to it."""
    waiting, seen = [("", content, 0)], {id(content)}  # a pickle can make a mapping that holds itself
    while waiting:
        place, mapping, depth = waiting.pop(0)
        if tensors := {name: x for name, x in mapping.items() if isinstance(name, str) and isinstance(x, Tensor)}:
            yield place, tensors
        for name, inner in mapping.items() if depth < _DEPTH else ():
            if isinstance(inner, Mapping) and id(inner) not in seen:
                seen.add(id(inner))
                waiting.append((f"{place}.{name}".lstrip("."), inner, depth + 1))


def without_wrappers(tensors: Mapping[str, Tensor], holds: Collection[str] = ()) -> dict[str, Tensor]:
    """The same without the names that wrappers insert anywhere; a network may have a module named so itself."""
    own = {part for name in holds for part in name.split(".")}
    inserted = [name for name in _WRAPPERS if name not in own]
    return {re.sub(rf"(?<![^.])({'|'.join(inserted)})\.", "", name): tensor for name, tensor in tensors.items()}


@cache
def _harmless() -> list[Any]:
    """What training scripts save beside weights, with the names that pickles of any system and version call it by: command lines,
    paths (as pure ones, which touch no disk), numbers and arrays of numpy.
    """
    numbers = [getattr(np.dtypes, name) for name in dir(np.dtypes) if re.fullmatch(r"(U?Int|Float|Bool)\d*DType", name)]
    paths = {"Posix": pathlib.PurePosixPath, "Windows": pathlib.PureWindowsPath}
    named: list[tuple[Any, str]] = [
        (pure, f"{module}.{kind}{system}Path")
        for system, pure in paths.items()
        for kind in ("", "Pure")
        for module in ("pathlib", "pathlib._local")
    ]
    functions: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]]
    for function in functions:
        named += [(function, f"numpy.{core}.multiarray.{function.__name__}") for core in ("core", "_core")]
    return [argparse.Namespace, np.ndarray, np.dtype, *numbers, *named]


def read(path: Path, content: bytes | None = None) -> Any:
    """The content of a safetensors or torch.save file, on the CPU and memory-mapped if its format permits.

    content: bytes of a torch.save file, which `path` then only names.
    Raises FileNotFoundError for an absent file, ValueError for one that is damaged or holds other objects than tensors, plain
    containers and harmless values.
    """
    if content is None and not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    # Opened first, so that missing permission is not reported as damage.
    with regular(path).open("rb") if content is None else io.BytesIO(content) as file:
        try:
            if content is None and path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as tensors:
                    return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
            torch_file.check(file, path.stat().st_size if content is None else len(content), _harmless())
            with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they concern formats that are rejected here anyway
                mapped = content is None and zipfile.is_zipfile(path)
                return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
        except TooLarge as error:
            raise ValueError(f"{path}: {error}; make or fetch it again") from error
        except Exception as error:  # damaged bytes can raise anything
            if is_out_of_memory(error):
                raise
            if isinstance(error, Refused | pickle.UnpicklingError | RuntimeError) and (objects := _refused(file)):
                raise ValueError(
                    f"{path}: holds Python objects besides tensors ({', '.join(objects)}), which may run code when read; "
                    "save its state dict alone where it was made, or get its weights as safetensors"
                ) from error
            raise ValueError(
                f"{path}: truncated, or neither a safetensors nor a torch.save file of weights; make or fetch it again"
            ) from error


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for any other file."""
    with contextlib.suppress(SafetensorError, OSError, ValueError), safe_open(regular(path), framework="pt") as file:
        return file.metadata() or {}
    return {}


def write(path: Path, content: Any) -> None:
    """torch.save, atomically."""
    # a full disk can raise RuntimeError
    with replacing(path, refusals=(RuntimeError,)) as partial, partial.open("wb") as file:
        torch.save(content, file)


def _refused(file: Any) -> list[str]:
    """Names of the classes and functions in a torch.save file that keep it from being read."""
    try:
        file.seek(0)
        with torch.serialization.safe_globals(_harmless()):
            return torch.serialization.get_unsafe_globals_in_checkpoint(file)[:3]
    except Exception:  # a damaged file can raise anything, and lists no objects
        return []
