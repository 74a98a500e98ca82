"""Checkpoints in a folder: finding them, and reading each as theta."""

import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor
from triptych_common.storage import foreign
from triptych_common.storage.files import read_json

from triptych_gpt.layout import ParameterLayout

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_WHOLE = ("model.safetensors", "pytorch_model.bin")  # of a folder that holds one checkpoint
_SHOWN = 3


class Found(NamedTuple):
    """Checkpoints of every run by step, and files that are none, by reason."""

    runs: dict[str, dict[int, Path]]
    left_out: dict[str, list[Path]]


def find(folder: Path, pattern: str | None = None) -> Found:
    """The checkpoints in a folder, runs in natural order and steps ascending.

    By default a run is a subfolder, and its checkpoints are the files and folders in it whose names have a number, the last one of
    which is the step (or the one after "step=", as Lightning names them). pattern: of paths within the folder, {run}/{step}.pt.
    Raises FileNotFoundError for an absent folder, ValueError for one without checkpoints, or with two of one step.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the one that holds a folder for each run")
    runs: dict[str, dict[int, Path]] = {}
    left_out: dict[str, list[Path]] = {}
    for path in _candidates(folder):
        place = _place(path.relative_to(folder), pattern)
        if isinstance(place, str):
            left_out.setdefault(place, []).append(path)
            continue
        run, step = place
        if (other := runs.setdefault(run, {}).setdefault(step, path)) != path:
            raise ValueError(f"{path}: step {step} of run {run}, as {other.name} is; tell them apart by --pattern")
    if not runs:
        expected = f"{pattern!r}" if pattern else f"FOLDER/RUN/STEP with a number in its name, {', '.join(SUFFIXES)}"
        raise ValueError(f"{folder}: no checkpoints; expected {expected}")
    ordered = {run: dict(sorted(runs[run].items())) for run in sorted(runs, key=_natural)}
    return Found(ordered, left_out)


def _candidates(folder: Path) -> Iterator[Path]:
    """Regular files with weights, each once in its folder, and folders that are one checkpoint; links to folders are passed by."""
    for where, folders, files in os.walk(folder):
        folders.sort(key=_natural)
        here = Path(where)
        if here != folder and re.search(r"\d", here.name) and _weights_in(here) is not None and here.parent != folder:
            folders.clear()
            yield here
            continue
        seen: set[tuple[int, int]] = set()
        for name in sorted(
            files, key=lambda name: ((here / name).is_symlink(), _natural(name))
        ):  # a link repeats its file
            info = (here / name).stat() if name.endswith(SUFFIXES) and (here / name).exists() else None
            if info is not None and stat.S_ISREG(info.st_mode) and (info.st_dev, info.st_ino) not in seen:
                seen.add((info.st_dev, info.st_ino))
                yield here / name


def _weights_in(folder: Path) -> Path | None:
    """The weights of a folder that is one checkpoint: Hugging Face's names or their index, or a single file."""
    for name in (*_WHOLE, *(f"{name}.index.json" for name in _WHOLE)):
        if (folder / name).is_file():
            return folder / name
    if not folder.name.startswith("checkpoint"):
        return None
    files = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.is_file()]
    return files[0] if len(files) == 1 else None


def _place(path: Path, pattern: str | None) -> tuple[str, int] | str:
    """Run and step of a path within the folder, or why it is left out."""
    if pattern is not None:
        found = _compiled(pattern).fullmatch(path.as_posix())
        return (found["run"], int(found["step"])) if found else f"not {pattern}"
    if len(path.parts) != 2:
        return "not in a run's own folder"
    name = path.name.removesuffix(path.suffix) if path.suffix in SUFFIXES else path.name
    named = re.search(r"step[=_-]?(\d+)", name) or re.search(r"(\d+)(?!.*\d)", name)
    return (path.parts[0], int(named[1])) if named else "no number in the name"


def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{run\}|\{step\}|\*)", pattern)
    known = {"{run}": r"(?P<run>[^/]+)", "{step}": r"(?P<step>\d+)", "*": r"[^/]*"}
    written: list[str] = []
    for part in parts:  # a second {run} or {step} repeats the first
        again = part in ("{run}", "{step}") and known[part] in written
        written.append(f"(?P={part[1:-1]})" if again else known.get(part, re.escape(part)))
    return re.compile("".join(written))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts numbers within text as numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def read_state(path: Path, holds: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of a checkpoint file or folder by name, wherever training scripts put them and without wrappers' prefixes.

    holds: names that the network has; without any, the largest state dict is taken. Of weights and their average it is the weights,
    which metrics are usually of. Raises ValueError for a file without tensors.
    """
    content = _content(path)
    try:
        state = foreign.network_in(content, holds=holds, prefer="model").tensors
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not state:
        raise ValueError(f"{path}: holds no state dict; save one with torch.save")
    return state


def _content(path: Path) -> Any:
    if not path.is_dir():
        return foreign.read(path)
    whole = _weights_in(path)
    assert whole is not None  # or it would not have been found
    if not whole.name.endswith(".index.json"):
        return foreign.read(whole)
    names = read_json(whole, remedy="fetch it again").get("weight_map", {})
    files = sorted({str(name) for name in names.values()} if isinstance(names, Mapping) else ())
    if not files or any(Path(name).name != name for name in files):
        raise ValueError(f"{whole}: not an index of files in its folder; fetch it again")
    parts = [foreign.read(path / file) for file in files]
    return {name: tensor for part in parts if isinstance(part, Mapping) for name, tensor in part.items()}


def layout_of(state: Mapping[str, Tensor]) -> ParameterLayout:
    """The layout of a state dict that no task describes: its floating-point entries in their order."""
    return ParameterLayout(_shapes(state))


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of the floating-point entries. Raises ValueError for complex ones, which theta has no place for."""
    if wrong := [f"{name} is {x.dtype}" for name, x in state.items() if x.is_complex()]:
        raise ValueError(f"{wrong[0]}, expected real numbers; save its real and imaginary parts")
    return {name: tuple(x.shape) for name, x in state.items() if x.is_floating_point()}


def theta_of(state: Mapping[str, Tensor], layout: ParameterLayout, where: str, whose: str) -> Float[Tensor, " D"]:
    """The parameters as one float32 vector. Raises ValueError showing both sides if the state dict is of another network."""
    try:
        theirs = _shapes(state)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    expected = {
        **layout.shapes,
        **{name: layout.shapes[other] for name, other in layout.tied.items() if name in theirs},
    }
    if theirs != expected:
        wrong = [
            f"{n} is {theirs[n]} there, {expected[n]} here"
            for n in expected
            if n in theirs and theirs[n] != expected[n]
        ]
        wrong += [f"{name} {shape} is missing there" for name, shape in expected.items() if name not in theirs]
        wrong += [f"{name} {shape} is not here" for name, shape in theirs.items() if name not in expected]
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(f"{where}: a network other than {whose}: {'; '.join(wrong[:_SHOWN])}{more}")
    return layout.flatten({name: x.float() for name, x in state.items() if name in expected}).contiguous()
